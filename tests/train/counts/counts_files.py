"""Small files of counts for tests."""

from pathlib import Path
from typing import Any

import numpy as np
import scipy.sparse

CELLS, GENES = 90, 30


def example_arrays(cells: int = CELLS, genes: int = GENES) -> dict[str, np.ndarray]:
    """Three types of cells, each of which expresses ten genes much more than the others."""
    rng = np.random.default_rng(0)
    label = np.arange(cells) % 3
    rate = np.where(np.arange(genes) % 3 == label[:, None], 8.0, 0.3) * rng.gamma(5, 0.2, (cells, 1))
    return {"x": rng.poisson(rate).astype(np.int32), "label": np.array(["B", "NK", "T"])[label]}


def write_matrix(group: Any, name: str, x: np.ndarray, layout: str, options: dict[str, Any]) -> None:
    """Write a matrix into a group of h5py or zarr, as anndata does."""
    if layout == "dense":
        group.create_dataset(name, data=x, **options)
        return
    matrix = getattr(scipy.sparse, f"{layout}_array")(x)
    node = group.create_group(name)
    node.attrs["encoding-type"], node.attrs["shape"] = f"{layout}_matrix", list(x.shape)
    for part in ("data", "indices", "indptr"):
        values = getattr(matrix, part)
        if hasattr(node, "create_array"):
            node.create_array(part, data=values, **options)
        else:
            node.create_dataset(part, data=values, **options)


def fill(
    root: Any,
    x: np.ndarray,
    layout: str = "csr",
    layer: str = "X",
    label: Any = None,
    genes: Any = None,
    names: Any = None,
    **options: Any,
) -> None:
    """Write an AnnData object into a group of h5py. `label` is a categorical column of obs; `names` are the cells'."""
    if layer != "X":
        write_matrix(root, "X", np.log1p(x), layout, options)
        write_matrix(root.require_group("layers"), layer, x, layout, options)
    else:
        write_matrix(root, "X", x, layout, options)
    names = {
        "obs": names or [f"cell {i}" for i in range(len(x))],
        "var": genes or [f"gene {i}" for i in range(x.shape[1])],
    }
    for table, index in names.items():
        node = root.create_group(table)
        node.attrs["_index"], node.attrs["column-order"] = "_index", ["kind"] if label is not None else []
        node.create_dataset("_index", data=np.array(index, dtype="S"))
    if label is not None:
        values, codes = np.unique(label, return_inverse=True)
        column = root["obs"].create_group("kind")
        column.attrs["encoding-type"] = "categorical"
        column.create_dataset("codes", data=codes.astype(np.int8))
        column.create_dataset("categories", data=values.astype("S"))


def write_h5ad(path: Path, x: np.ndarray, **options: Any) -> Path:
    import h5py

    with h5py.File(path, "w") as root:
        fill(root, x, **options)
    return path
