"""Time training on sparse counts: `fastvae train counts` in turns with scvi-tools, on the same file and network.

    python -m benchmarks.cells [--cells 6400] [--epochs 1] [--turns 5] [--threads 2] [--folder DIR]

The cells are simulated: eight kinds of cells, gamma-Poisson counts of 20,000 genes, of which 9 % or 3 % are not 0, as
CSR in an .npz file. Both sides train a ZINB with hidden layers of 128 units, 10 latents and batches of 128, with their
own trainers. The sides take turns of some epochs each; a side's time is that of its fastest epoch without validation,
divided by its steps. The table has the floors that were aimed at, and whether they are met.
"""

import argparse
import contextlib
import io
import logging
import tempfile
import time
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from . import machine, scvi
from .report import align

GENES, BATCH = 20_000, 128


@dataclass(frozen=True)
class Floor:
    title: str
    density: float
    side: str
    ratio: float


FLOORS = (
    Floor("training step, ZINB, 9 % stored, fp32", 0.09, "fp32", 3.0),
    Floor("training step, ZINB, 3 % stored, fp32", 0.03, "fp32", 3.4),
    Floor("training step, ZINB, 9 % stored, bf16 products", 0.09, "bf16", 4.5),
    Floor("training step, ZINB, 3 % stored, bf16 products", 0.03, "bf16", 4.5),
)


def simulate(cells: int, density: float) -> Any:
    """Counts of eight kinds of cells as a scipy.sparse.csr_matrix, of which about this share is not 0."""
    import scipy.sparse

    rng = np.random.default_rng(0)
    kinds = rng.gamma(0.3, 0.4, (8, GENES)) * rng.lognormal(0, 0.7, (8, GENES))
    if density < 0.09:
        kinds *= density / 0.09 * 0.8
    parts = []
    for start in range(0, cells, 512):
        count = min(512, cells - start)
        mean = kinds[rng.integers(8, size=count)] * rng.lognormal(0, 0.4, (count, 1))
        parts.append(scipy.sparse.csr_matrix(rng.poisson(rng.gamma(1.0, mean)).astype(np.int32)))
    return scipy.sparse.vstack(parts).tocsr()


class OurSide:
    """The model, the data and the trainer of `fastvae train counts`."""

    def __init__(self, file: Path, precision: str, folder: Path) -> None:
        from fastvae.train import counts, runs
        from fastvae.train.counts.recipe import Counts

        self.settings = Counts(
            data=str(file), batch_size=BATCH, precision=precision, accelerator="cpu", dropout=0.1
        )
        self.kind, self.folder = counts.KIND, folder
        self.data = self.kind.load(self.settings)
        self.form = self.kind.make_form(self.settings, self.data)
        self.model = runs.new_model(self.kind, self.settings, self.form, self.data)

    def train(self, epochs: int) -> list[float]:
        """Train for some epochs, and return the seconds of a step in each."""
        import dataclasses

        from lightning.pytorch.callbacks import Callback

        from fastvae.train import trainer

        seconds: list[float] = []

        class Clock(Callback):
            def on_train_epoch_start(self, *_: Any) -> None:
                self.start = time.perf_counter()

            def on_validation_epoch_start(self, trainer: Any, *_: Any) -> None:
                seconds.append((time.perf_counter() - self.start) / trainer.num_training_batches)

        settings = dataclasses.replace(self.settings, epochs=epochs)
        lightning_trainer = trainer.make_trainer(settings, self.folder, Clock())
        with contextlib.redirect_stdout(io.StringIO()):
            batches = self.kind.batches(self.model, self.data, self.form, settings)
            lightning_trainer.fit(self.model, datamodule=batches)
        return seconds


class ScviSide:
    """scvi-tools' own model and training on the same counts."""

    def __init__(self, matrix: Any) -> None:
        import anndata
        from scvi.model import SCVI

        data = anndata.AnnData(matrix.astype(np.float32))
        SCVI.setup_anndata(data)
        self.model = SCVI(data, n_hidden=128, n_layers=1, n_latent=10, gene_likelihood="zinb")
        self.steps = -(-data.n_obs // BATCH)

    def train(self, epochs: int) -> list[float]:
        return [seconds / self.steps for seconds in scvi.train(self.model, epochs, "cpu")]


def measure(
    cells: int, density: float, epochs: int, turns: int, folder: Path
) -> tuple[dict[str, float], float]:
    """Return the milliseconds of a step of every side, and the share of the counts that is stored."""
    import scipy.sparse

    matrix = simulate(cells, density)
    file = folder / f"cells-{density:g}.npz"
    scipy.sparse.save_npz(file, matrix, compressed=False)
    sides: dict[str, Any] = {
        "scvi": ScviSide(matrix),
        "fp32": OurSide(file, "32-true", folder / "fp32"),
        "bf16": OurSide(file, "bf16-mixed", folder / "bf16"),
    }
    seconds: dict[str, list[float]] = {side: [] for side in sides}
    names = list(sides)
    for turn in range(turns):
        for side in names[turn % len(names) :] + names[: turn % len(names)]:
            seconds[side] += sides[side].train(epochs)
    return {side: 1e3 * min(times) for side, times in seconds.items()}, matrix.nnz / np.prod(matrix.shape)


def table(results: dict[float, tuple[dict[str, float], float]]) -> list[str]:
    lines = ["| what | stored | scvi-tools, ms | fastvae, ms | × | floor |", "|---|--:|--:|--:|--:|--:|"]
    for floor in FLOORS:
        if floor.density not in results:
            continue
        times, stored = results[floor.density]
        ratio = times["scvi"] / times[floor.side]
        verdict = "✓" if ratio >= floor.ratio else "✗"
        cells = (
            floor.title,
            f"{stored:.1%}",
            f"{times['scvi']:.1f}",
            f"{times[floor.side]:.1f}",
            f"{ratio:.2f}",
        )
        lines.append("| " + " | ".join((*cells, f"{floor.ratio:g} {verdict}")) + " |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.cells", description=__doc__.split("\n\n")[0])
    parser.add_argument("--cells", type=int, default=6400)
    parser.add_argument("--densities", default="0.09,0.03")
    parser.add_argument("--epochs", type=int, default=1, help="epochs in each turn")
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--folder", type=Path, help="where to put the files; by default a temporary folder")
    options = parser.parse_args()

    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    device = machine.configure("cpu", options.threads)
    import scvi as scvi_tools

    load_monitor = machine.LoadMonitor()
    results = {}
    with contextlib.ExitStack() as stack:
        folder = options.folder or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        folder.mkdir(parents=True, exist_ok=True)
        for density in map(float, options.densities.split(",")):
            results[density] = measure(options.cells, density, options.epochs, options.turns, folder)
    others = load_monitor.cores_used_by_others() or 0.0
    run = machine.describe(device)
    print("\n".join(align(table(results))))
    print(
        f"\n{run['machine']}; {run['threads']} threads; scvi-tools {scvi_tools.__version__}, torch "
        f"{run['versions']['torch']}, fastvae {run['versions']['fastvae']}; {run['date']}; {options.cells:,} cells x "
        f"{GENES:,} genes, batches of {BATCH}, fastest of {options.epochs * options.turns} epochs a side"
        + (f". Other processes kept {others:.1f} cores busy." if others > 0.1 else ".")
    )


if __name__ == "__main__":
    main()
