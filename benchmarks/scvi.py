"""scvi-tools' own training, as it is and with fastvae.integrations.scvi, in turns.

    python -m benchmarks.scvi [--rows zinb,nb] [--epochs 2] [--turns 3] [--threads 2] [--dense] [--docs]
    python -m benchmarks.scvi --accuracy [--docs]

Each case is a model of scvi-tools that is trained by its own `train()` on 1,280 cells in batches of 128, about 95 % of
whose counts are 0, a CSR matrix as AnnData usually has (`--dense`: an array, which their loader reads faster). The
sides take turns of a few epochs each; what counts is the shortest epoch. The memory is what a step holds at most above
what was there before it, in a process of its own each.

`--accuracy` compares numbers instead: float32 against scvi-tools' formula in float64, with many values of theta.
`--docs` puts what was found into docs/scvi-tools.md.
"""

import argparse
import json
import logging
import subprocess
import sys
import time
import warnings
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastvae.integrations.scvi import accelerate

from . import machine
from .report import RESULTS, ROOT, _aligned, slug
from .timing import peak_bytes

CELLS, BATCH = 1280, 128
DOCS = ROOT / "docs" / "scvi-tools.md"


@dataclass(frozen=True)
class Row:
    title: str
    floor: float | None
    genes: int = 20_000
    model: str = "SCVI"
    fused_floor: float | None = None  # with fused Adam as well
    memory_floor: float | None = None  # the share of scvi-tools' peak memory that is allowed
    options: dict[str, Any] = field(default_factory=dict)


ROWS = {
    "zinb": Row("SCVI, ZINB", 2.0, fused_floor=2.3, memory_floor=1 / 2),
    "nb": Row("SCVI, NB", 2.0, memory_floor=2 / 3, options={"gene_likelihood": "nb"}),
    "scanvi": Row("SCANVI", 1.7, model="SCANVI"),
    "autozi": Row("AUTOZI", 2.0, model="AUTOZI"),
    "totalvi": Row("TOTALVI, 20 proteins", 1.4, model="TOTALVI"),
    "zinb-2000": Row("SCVI, ZINB", 1.4, genes=2_000),
    "nb-2000": Row("SCVI, NB", None, genes=2_000, options={"gene_likelihood": "nb"}),
    "poisson": Row("SCVI, Poisson", None, options={"gene_likelihood": "poisson"}),
}


def sides(row: Row) -> dict[str, AbstractContextManager[Any]]:
    """Contexts by the names of the sides: scvi-tools as it is comes first."""
    found: dict[str, AbstractContextManager[Any]] = {"scvi": nullcontext(), "fastvae": _Accelerated(False)}
    if row.fused_floor:
        found["fused Adam"] = _Accelerated(True)
    return found


class _Accelerated(AbstractContextManager[None]):
    """`accelerate`, strict, and to be entered more than once."""

    def __init__(self, fused_adam: bool) -> None:
        self.fused_adam = fused_adam

    def __enter__(self) -> None:
        self.handle = accelerate(strict=True, fused_adam=self.fused_adam)

    def __exit__(self, *error: object) -> None:
        self.handle.undo()


@cache
def cells(genes: int, dense: bool = False) -> Any:
    """Counts of two kinds of cells in two batches, of which some 95 % are 0."""
    import anndata
    import numpy as np
    import scipy.sparse

    generator = torch.Generator().manual_seed(0)
    kind = torch.arange(CELLS) % 2
    log_mean = 1.8 * torch.randn(2, genes, generator=generator) - 4.5
    depth = torch.exp(0.3 * torch.randn(CELLS, 1, generator=generator))
    shape = torch.full((CELLS, genes), 2.0)
    rate = torch.exp(log_mean[kind]) * depth * torch._standard_gamma(shape, generator=generator) / 2
    counts = torch.poisson(rate, generator=generator)
    counts[:, 0] += 1  # no cell is empty
    data = anndata.AnnData(counts.numpy() if dense else scipy.sparse.csr_matrix(counts.numpy()))
    data.obs["batch"] = np.array(["a", "b"])[np.arange(CELLS) // 2 % 2]
    data.obs["kind"] = np.array(["one", "two", "unknown"])[np.where(np.arange(CELLS) % 4 == 3, 2, kind)]
    data.obsm["proteins"] = torch.poisson(torch.full((CELLS, 20), 10.0), generator=generator).numpy()
    return data


def made(row: Row, dense: bool = False) -> Any:
    import scvi

    scvi.settings.seed = 0
    data = cells(row.genes, dense).copy()
    cls = getattr(scvi.model, row.model)
    more: dict[str, Any] = {}
    if row.model == "SCANVI":
        more = {"labels_key": "kind", "unlabeled_category": "unknown"}
    elif row.model == "TOTALVI":
        more = {"protein_expression_obsm_key": "proteins"}
    cls.setup_anndata(data, batch_key="batch", **more)
    return cls(data, **row.options)


def train(model: Any, epochs: int) -> list[float]:
    """scvi-tools' own training; the seconds of every epoch."""
    from lightning.pytorch.callbacks import Callback

    seconds: list[float] = []

    class Clock(Callback):
        def on_train_epoch_start(self, *_: Any) -> None:
            self.start = time.perf_counter()

        def on_train_epoch_end(self, *_: Any) -> None:
            seconds.append(time.perf_counter() - self.start)

    # TOTALVI would look at a validation set otherwise, of which there is none.
    quiet: dict[str, Any] = {}
    if type(model).__name__ == "TOTALVI":
        quiet = {"early_stopping": False, "reduce_lr_on_plateau": False}
    model.train(
        max_epochs=epochs,
        batch_size=BATCH,
        train_size=1.0,
        accelerator="cpu",
        enable_progress_bar=False,
        callbacks=[Clock()],
        **quiet,
    )
    return seconds


def peak(row: Row, accelerated: bool) -> int:
    """Bytes that a training step holds at most above what was there before it."""
    model = made(row)
    loader = model._make_data_loader(adata=model.adata, batch_size=BATCH, shuffle=False)
    tensors = next(iter(loader))
    optimizer = torch.optim.Adam(model.module.parameters())
    model.module.train()

    def step() -> None:
        optimizer.zero_grad()
        # Of all that the module returns, as in a step of scvi-tools' training plan, only this lives on.
        loss = model.module(tensors)[2].loss
        loss.backward()
        optimizer.step()

    with accelerate(strict=True) if accelerated else nullcontext():
        step()
        return peak_bytes(step, torch.device("cpu"))


def _peak_elsewhere(name: str, accelerated: bool) -> int:
    command = [
        sys.executable,
        "-m",
        "benchmarks.scvi",
        "--rows",
        name,
        "--threads",
        str(torch.get_num_threads()),
    ]
    command += ["--peak", "fastvae" if accelerated else "scvi"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode != 0:
        sys.exit(done.stderr)
    return int(done.stdout.split()[-1])


def measured(name: str, epochs: int, turns: int, dense: bool) -> dict[str, Any]:
    row = ROWS[name]
    contexts = sides(row)
    models = {side: made(row, dense) for side in contexts}
    seconds: dict[str, list[float]] = {side: [] for side in contexts}
    order = list(contexts)
    for turn in range(turns):
        for side in order[turn % len(order) :] + order[: turn % len(order)]:
            with contexts[side]:
                seconds[side] += train(models[side], epochs)
    result: dict[str, Any] = {"row": name, "fastest_epoch_s": {side: min(s) for side, s in seconds.items()}}
    result["epochs_s"] = seconds
    if row.memory_floor:
        result["peak_bytes"] = {
            side: _peak_elsewhere(name, side == "fastvae") for side in ("scvi", "fastvae")
        }
    return result


def table(results: Sequence[dict[str, Any]]) -> list[str]:
    """Markdown, a line for each side of a case; floors in brackets."""
    lines = [
        "| model | genes | scvi-tools, ms a step | with fastvae | × | peak memory of a step, MiB |",
        "|---|--:|--:|--:|--:|--:|",
    ]
    for result in results:
        row, times = ROWS[result["row"]], result["fastest_epoch_s"]
        steps = CELLS / BATCH
        for side, floor in (("fastvae", row.floor), ("fused Adam", row.fused_floor)):
            if side not in times:
                continue
            ratio = times["scvi"] / times[side]
            memory = ""
            if side == "fastvae" and "peak_bytes" in result and row.memory_floor:
                before, after = (result["peak_bytes"][each] / 2**20 for each in ("scvi", "fastvae"))
                share = after / before
                verdict = "✓" if share <= row.memory_floor else "✗"
                memory = f"{before:.0f} → {after:.0f}: × {share:.2f} ({row.memory_floor:.2f} {verdict})"
            cells_ = [row.title + (" and fused Adam" if side == "fused Adam" else ""), f"{row.genes:,}"]
            cells_ += [f"{1e3 * times['scvi'] / steps:.1f}", f"{1e3 * times[side] / steps:.1f}"]
            cells_ += [
                f"{ratio:.2f}" + (f" ({floor:g} {'✓' if ratio >= floor else '✗'})" if floor else ""),
                memory,
            ]
            lines.append("| " + " | ".join(cells_) + " |")
    return lines


def caption(run: dict[str, Any]) -> str:
    others = run["cores_used_by_others"] or 0.0
    busy = f" (not a quiet machine: others kept {others:.1f} cores busy)" if others > 0.1 else ""
    return (
        f"{run['machine']}; {run['threads']} threads; scvi-tools {run['scvi']}, torch {run['versions']['torch']}, "
        f"fastvae {run['versions']['fastvae']}; {run['date']}{busy}. scvi-tools' own `train()`, {CELLS:,} cells "
        f"({'an array' if run['dense'] else 'CSR'}) in batches of {BATCH}, in turns, the shortest of {run['epochs']} "
        "epochs a side. In brackets the floor that a case was built to, and whether it is met."
    )


# ---------------------------------------------------------------------------------------------------------------------
# Numbers
# ---------------------------------------------------------------------------------------------------------------------

THETAS = (
    1.0,
    1e1,
    1e2,
    1e3,
    1e4,
    1e5,
)  # from 1e6 on, float64 has lost too many digits of the gradient itself


def accuracy() -> list[str]:
    """Markdown: how far float32 is off scvi-tools' formula in float64, a line for each theta."""
    from scvi.distributions import NegativeBinomial

    lines = [
        "| θ of every gene | rows, scvi-tools | rows, with fastvae | ∂/∂θ, scvi-tools | ∂/∂θ, with fastvae |",
        "|--:|--:|--:|--:|--:|",
    ]
    generator = torch.Generator().manual_seed(0)
    mean = torch.exp(1.5 * torch.randn(128, 2000, generator=generator) - 1)
    for value in THETAS:
        theta = torch.full((2000,), value)
        shape = theta.expand_as(mean).contiguous()
        rate = mean * torch._standard_gamma(shape, generator=generator) / value
        x = torch.poisson(rate, generator=generator)

        def rows(dtype: torch.dtype, theta: Tensor = theta, x: Tensor = x) -> tuple[Tensor, Tensor]:
            leaf = theta.to(dtype).requires_grad_()
            log_p = NegativeBinomial(mu=mean.to(dtype), theta=leaf).log_prob(x.to(dtype)).sum(-1)
            return log_p.detach().double(), torch.autograd.grad(log_p.sum(), leaf)[0].double()

        truth, slope = rows(torch.float64)
        off = []
        for accelerated in (False, True):
            with accelerate(strict=True) if accelerated else nullcontext():
                found, gradient = rows(torch.float32)
            off.append(((found - truth) / truth).abs().max().item())
            off.append(((gradient - slope).norm() / slope.norm()).item())
        lines.append(f"| {value:g} | {off[0]:.0e} | {off[2]:.0e} | {_share(off[1])} | {_share(off[3])} |")
    return lines


def _share(off: float) -> str:
    if off < 1e-3:
        return f"{off:.0e}"
    return f"{off:.1%}" if off < 1 else f"{off:.0f} times"


# ---------------------------------------------------------------------------------------------------------------------


def _into_docs(name: str, text: str) -> None:
    begin, end = f"<!-- {name}:begin -->", f"<!-- {name}:end -->"
    before, found, rest = DOCS.read_text().partition(begin)
    _, also, after = rest.partition(end)
    if not found or not also:
        sys.exit(f"{DOCS.name} has no {begin} ... {end} to put the table between")
    DOCS.write_text(f"{before}{begin}\n{text}\n{end}{after}")
    print(f"wrote {DOCS.relative_to(ROOT)}")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.scvi", description=__doc__.split("\n\n")[0])
    parser.add_argument("--rows", default=",".join(ROWS), help=f"some of {','.join(ROWS)}; default: all")
    parser.add_argument("--epochs", type=int, default=2, help="of a turn")
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--dense", action="store_true", help="counts as an array in place of CSR")
    parser.add_argument("--accuracy", action="store_true", help="the table of numbers in place of times")
    parser.add_argument("--docs", action="store_true", help=f"put the table into {DOCS.relative_to(ROOT)}")
    parser.add_argument("--peak", choices=("scvi", "fastvae"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    names = options.rows.split(",")
    if unknown := set(names) - set(ROWS):
        parser.error(f"--rows: unknown {', '.join(sorted(unknown))}")

    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    machine.settle("cpu", options.threads)
    if options.peak:
        print(peak(ROWS[names[0]], options.peak == "fastvae"))
        return
    if options.accuracy:
        lines = accuracy()
        print("\n".join(_aligned(lines)))
        if options.docs:
            _into_docs("accuracy", "\n".join(lines))
        return

    import scvi

    neighbours = machine.Neighbours()
    results = []
    for name in names:
        results.append(measured(name, options.epochs, options.turns, options.dense))
        print("\n".join(_aligned(table(results[-1:]))[1 if len(results) > 1 else 0 :]), flush=True)
    run = machine.describe(torch.device("cpu")) | {
        "scvi": scvi.__version__,
        "epochs": options.epochs * options.turns,
    }
    run |= {"dense": options.dense, "cores_used_by_others": neighbours.cores(), "results": results}
    print("\n" + caption(run))
    if options.docs:
        path: Path = RESULTS / f"{slug(run['machine'])}-scvi.json"
        path.write_text(json.dumps(run, indent=1) + "\n")
        print(f"wrote {path.relative_to(ROOT)}")
        _into_docs("bench", "\n".join([*table(results), "", caption(run)]))


if __name__ == "__main__":
    main()
