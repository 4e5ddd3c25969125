"""Train on sparse counts with `fastvae train counts` and with scvi-tools: the same file and the same network.

    python -m benchmarks.cells [--cells 6400] [--densities 0.09,0.03] [--epochs 1] [--turns 5] [--threads 2] [--docs]
    python -m benchmarks.cells --disk FILE [--docs]
    python -m benchmarks.cells --accuracy FILE[,FILE] [--epochs 40[,40]] [--seeds 3] [--cells 16384] [--docs]

The first form times training steps. The cells are simulated: eight kinds of cells, gamma-Poisson counts of 20,000
genes, of which 9 % or 3 % are not 0, as CSR in an .npz file. Both sides train a ZINB with hidden layers of 128 units,
10 latents and batches of 128, with their own trainers. The sides take turns of some epochs each; a side's time is that
of its fastest epoch without validation, divided by its steps. Products in bfloat16 are timed only where the CPU has
instructions for them.

`--disk` times the first epoch over a file, each side in a process of its own: fastvae reads it from disk, after the
kernel was asked to drop its pages, and scvi-tools has the matrix in memory. The memory is the peak of a process.

`--accuracy` compares the ELBO of held-out cells after equal epochs with the same split and the same warm-up of the KL,
and the accuracy of 15 nearest neighbours in the latent space if the cells have labels. The tables have the floors that
were aimed at, and whether they are met. `--docs` saves the results and writes the table into docs/counts.md.
"""

import argparse
import contextlib
import io
import json
import logging
import os
import resource
import subprocess
import sys
import tempfile
import time
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from . import machine, scvi
from .report import RESULTS, ROOT, align, put_between, slug

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
DISK_SPEED, DISK_SHARE, DISK_BYTES = 3.0, 0.5, 1.5e9
ELBO_SHARE, BF16_SHARE = 0.003, 0.001
DOCS = ROOT / "docs" / "counts.md"
WARMUP = 20
"""Epochs of the KL's warm-up on both sides, or half of the epochs if they are fewer than 40."""


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

    def __init__(self, file: Path, folder: Path, **settings: Any) -> None:
        from fastvae.train import counts, runs
        from fastvae.train.counts.recipe import Counts

        self.settings = Counts(
            data=str(file),
            batch_size=BATCH,
            accelerator="cpu",
            warmup_epochs=warmup(settings.get("epochs", 2 * WARMUP)),
            **settings,
        )
        self.kind, self.folder = counts.KIND, folder
        folder.mkdir(parents=True, exist_ok=True)
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

    def elbo(self) -> float:
        """The ELBO of the validation cells, in nats per cell."""
        from fastvae.train.batches import Batches

        model = self.model.eval()
        batches: Batches = self.kind.batches(model, self.data, self.form, self.settings).val_dataloader()
        total = 0.0
        with torch.no_grad():
            for number, (x, _) in enumerate(batches):
                mu, logvar = model.encode(x)
                z, kl = model.elbo.reparameterize(mu, logvar, seed=torch.tensor([number, 0]))
                nll = model.elbo.likelihood.nll(model.params(z, x), model.target(x))
                total -= float((nll + kl).sum())
        return total / len(self.data.val)

    def latents(self) -> Any:
        from fastvae.train.counts.callbacks import posterior_means

        return posterior_means(self.model.eval(), self.data, torch.arange(len(self.data.library))).numpy()


class ScviSide:
    """scvi-tools' own model and training on the same counts."""

    def __init__(self, matrix: Any, seed: int = 0) -> None:
        import anndata
        import scvi as scvi_tools

        scvi_tools.settings.seed = seed
        data = anndata.AnnData(matrix)
        scvi_tools.model.SCVI.setup_anndata(data)
        self.model = scvi_tools.model.SCVI(
            data, n_hidden=128, n_layers=1, n_latent=10, gene_likelihood="zinb"
        )
        self.steps = -(-data.n_obs // BATCH)

    def train(self, epochs: int) -> list[float]:
        return [seconds / self.steps for seconds in scvi.train(self.model, epochs, "cpu")]

    def train_on(self, cells: Any, others: Any, epochs: int) -> None:
        """Train on these cells, with the same warm-up as the other side."""
        self.model.train(
            max_epochs=epochs,
            batch_size=BATCH,
            accelerator="cpu",
            enable_progress_bar=False,
            datasplitter_kwargs={"external_indexing": [cells, others, np.array([], dtype=int)]},
            plan_kwargs={"n_epochs_kl_warmup": warmup(epochs)},
        )


def warmup(epochs: int) -> int:
    return min(WARMUP, epochs // 2)


def has_bf16() -> bool:
    """Whether the CPU has instructions for products in bfloat16."""
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def measure(
    cells: int, density: float, epochs: int, turns: int, folder: Path
) -> tuple[dict[str, float], float]:
    """Return the milliseconds of a step of every side, and the share of the counts that is stored."""
    import scipy.sparse

    matrix = simulate(cells, density)
    file = folder / f"cells-{density:g}.npz"
    scipy.sparse.save_npz(file, matrix, compressed=False)
    sides: dict[str, Any] = {
        "scvi": ScviSide(matrix.astype(np.float32)),
        "fp32": OurSide(file, folder / "fp32", precision="32-true"),
    }
    if has_bf16():
        sides["bf16"] = OurSide(file, folder / "bf16", precision="bf16-mixed")
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
        if floor.side not in times:
            lines.append(
                f"| {floor.title} | {stored:.1%} | - | - | - | {floor.ratio:g}, no bf16 instructions |"
            )
            continue
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


# ---------------------------------------------------------------------------------------------------------------------
# From disk
# ---------------------------------------------------------------------------------------------------------------------


def _load_matrix(file: Path) -> Any:
    """The counts of a file as a scipy.sparse.csr_matrix of float32."""
    import scipy.sparse

    from fastvae.train.counts import cells
    from fastvae.train.counts.recipe import Counts

    return scipy.sparse.csr_matrix(cells.load(Counts(data=str(file), memory=1e6)).counts.rows(slice(None)))


def first_epoch(side: str, file: Path, folder: Path) -> dict[str, float]:
    """Train for an epoch in this process, and return the seconds of a step and the peak memory in bytes."""
    if side == "scvi":
        (seconds,) = ScviSide(_load_matrix(file)).train(1)
    else:
        ours = OurSide(file, folder)
        drop_pages(file)
        (seconds,) = ours.train(1)
    return {"seconds": seconds, "bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024}


def drop_pages(file: Path) -> None:
    """Ask the kernel to forget the contents of a file, so that they are read from disk."""
    with file.open("rb") as opened:
        os.fsync(opened.fileno())
        os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def disk(file: Path, threads: int) -> tuple[list[str], dict[str, Any]]:
    found = {}
    for side in ("scvi", "fastvae"):
        command = [sys.executable, "-m", "benchmarks.cells", "--disk", str(file), "--side", side]
        done = subprocess.run(
            [*command, "--threads", str(threads)], cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True
        )
        found[side] = json.loads(done.stdout.splitlines()[-1])
    theirs, ours = found["scvi"], found["fastvae"]
    ratio, share = theirs["seconds"] / ours["seconds"], ours["bytes"] / theirs["bytes"]
    few = share <= DISK_SHARE and ours["bytes"] <= DISK_BYTES
    return [
        "| first epoch | scvi-tools, in memory | fastvae, from disk | × | floor |",
        "|---|--:|--:|--:|--:|",
        f"| ms a step | {1e3 * theirs['seconds']:.1f} | {1e3 * ours['seconds']:.1f} | {ratio:.2f} | "
        f"{DISK_SPEED:g} {'✓' if ratio >= DISK_SPEED else '✗'} |",
        f"| peak memory of the process, GB | {theirs['bytes'] / 1e9:.2f} | {ours['bytes'] / 1e9:.2f} | {share:.2f} | "
        f"{DISK_SHARE:g}, {DISK_BYTES / 1e9:g} GB {'✓' if few else '✗'} |",
    ], found


# ---------------------------------------------------------------------------------------------------------------------
# Accuracy
# ---------------------------------------------------------------------------------------------------------------------


def accuracy(
    file: Path, epochs: int, seeds: int, limit: int, folder: Path
) -> tuple[list[str], dict[str, Any]]:
    """The ELBO of held-out cells and the accuracy of nearest neighbours: lines of a table, and all values by side."""
    import scipy.sparse

    matrix, name = _load_matrix(file), file.stem
    if matrix.shape[0] > limit:
        matrix, file = matrix[:limit], folder / "few.npz"
        scipy.sparse.save_npz(file, matrix, compressed=False)
    precisions = {"fp32": "32-true"} | ({"bf16": "bf16-mixed"} if has_bf16() else {})
    elbos: dict[str, list[float]] = {side: [] for side in ("scvi", *precisions)}
    scores: dict[str, list[float]] = {side: [] for side in elbos}
    for seed in range(seeds):
        latents = {}
        for side, precision in precisions.items():
            ours = OurSide(file, folder / side, seed=seed, epochs=epochs, precision=precision)
            ours.train(epochs)
            elbos[side].append(ours.elbo())
            latents[side] = ours.latents()
        data = ours.data
        train, val = data.train.numpy(), data.val.numpy()
        theirs = ScviSide(matrix, seed)
        theirs.train_on(train, val, epochs)
        elbos["scvi"].append(float(theirs.model.get_elbo(indices=val)))
        if data.labels is None:
            continue
        latents["scvi"] = theirs.model.get_latent_representation()
        for side, z in latents.items():
            scores[side].append(neighbours(z, data.labels.numpy(), train, val))
    name = f"{name}, {matrix.shape[0]:,} cells, {epochs} epochs"
    means = {side: float(np.mean(values)) for side, values in elbos.items()}
    allowed = max(ELBO_SHARE * abs(means["scvi"]), _deviation(elbos["scvi"]))
    floors = [f"within {allowed:.2f} {'✓' if means['fp32'] >= means['scvi'] - allowed else '✗'}"]
    if "bf16" in means:
        lost = 1 - means["bf16"] / means["fp32"]
        floors.append(f"bf16 within {BF16_SHARE:.1%} of fp32 {'✓' if abs(lost) <= BF16_SHARE else '✗'}")
    lines = [_row(f"ELBO, {name}", elbos, 2, "; ".join(floors))]
    if scores["scvi"]:
        good = np.mean(scores["fp32"]) >= np.mean(scores["scvi"]) - _deviation(scores["scvi"])
        lines.append(_row(f"accuracy of neighbours, {name}", scores, 3, f"as good {'✓' if good else '✗'}"))
    return lines, {"elbo": elbos, "neighbours": scores}


def _row(title: str, values: dict[str, list[float]], digits: int, floor: str) -> str:
    cells = []
    for side in ("scvi", "fp32", "bf16"):
        found = values.get(side)
        cells.append(f"{np.mean(found):.{digits}f} ± {_deviation(found):.{digits}f}" if found else "-")
    return "| " + " | ".join((title, *cells, floor)) + " |"


def _deviation(values: list[float]) -> float:
    return float(np.std(values, ddof=1)) if len(values) > 1 else 0.0


def neighbours(z: Any, labels: Any, train: Any, val: Any) -> float:
    from sklearn.neighbors import KNeighborsClassifier

    return float(KNeighborsClassifier(15).fit(z[train], labels[train]).score(z[val], labels[val]))


# ---------------------------------------------------------------------------------------------------------------------


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.cells", description=__doc__.split("\n\n")[0])
    parser.add_argument("--cells", type=int, help="6,400 by default, and at most 16,384 for --accuracy")
    parser.add_argument("--densities", default="0.09,0.03")
    parser.add_argument(
        "--epochs", default="", help="epochs in each turn (1), or of --accuracy for each file (40)"
    )
    parser.add_argument("--seeds", type=int, default=3, help="of --accuracy")
    parser.add_argument("--disk", type=Path, metavar="FILE", help="time an epoch from disk, and the memory")
    parser.add_argument("--accuracy", metavar="FILE[,FILE]", help="compare the ELBO of held-out cells")
    parser.add_argument("--side", choices=("scvi", "fastvae"), help=argparse.SUPPRESS)
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--docs", action="store_true", help=f"write the table into {DOCS.relative_to(ROOT)}")
    parser.add_argument("--folder", type=Path, help="where to put the files; by default a temporary folder")
    options = parser.parse_args()

    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    device = machine.configure("cpu", options.threads)
    load_monitor = machine.LoadMonitor()
    with contextlib.ExitStack() as stack:
        folder = options.folder or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        folder.mkdir(parents=True, exist_ok=True)
        if options.side:
            print(json.dumps(first_epoch(options.side, options.disk, folder)), flush=True)
            stack.close()
            os._exit(0)  # scvi-tools' process has crashed in its destructors
        # Not before, because each side's memory is that of a process which imports no other package than its own.
        import scvi as scvi_tools

        if options.disk:
            mode, what = "disk", f"{options.disk.name}, batches of {BATCH}"
            lines, results = disk(options.disk, options.threads)
        elif options.accuracy:
            mode, limit = "accuracy", options.cells or 16384
            lines = ["| what | scvi-tools | fastvae | fastvae, bf16 | floor |", "|---|--:|--:|--:|--:|"]
            results = {}
            files = options.accuracy.split(",")
            of_files = options.epochs.split(",") if "," in options.epochs else [options.epochs] * len(files)
            if len(of_files) != len(files):
                parser.error(
                    f"--epochs must be one number, or {len(files)} for as many files, got {options.epochs}"
                )
            for file, epochs in zip(files, of_files, strict=True):
                more, results[Path(file).stem] = accuracy(
                    Path(file), int(epochs or 40), options.seeds, limit, folder
                )
                lines += more
            what = f"mean ± standard deviation over {options.seeds} seeds, nats per cell"
        else:
            mode, cells, epochs = "steps", options.cells or 6400, int(options.epochs or 1)
            densities = map(float, options.densities.split(","))
            results = {d: measure(cells, d, epochs, options.turns, folder) for d in densities}
            lines = table(results)
            what = (
                f"{cells:,} cells x {GENES:,} genes, batches of {BATCH}, fastest of {epochs * options.turns} epochs a "
                "side"
            )
    others = load_monitor.cores_used_by_others() or 0.0
    run = machine.describe(device)
    threads = f"{run['threads']} thread{'s' * (run['threads'] > 1)}"
    caption = (
        f"{run['machine']}; {threads}; scvi-tools {scvi_tools.__version__}, torch "
        f"{run['versions']['torch']}, fastvae {run['versions']['fastvae']}; {run['date']}; {what}"
        + (f". Other processes kept {others:.1f} cores busy." if others > 0.1 and mode == "steps" else ".")
    )
    print("\n".join((*align(lines), "", caption)))
    if options.docs:
        path = RESULTS / f"{slug(run['machine'])}-cells.json"
        saved = json.loads(path.read_text()) if path.exists() else {}
        saved[mode] = run | {"scvi": scvi_tools.__version__, "what": what, "results": results}
        path.write_text(json.dumps(saved, indent=1) + "\n")
        print(f"wrote {path.relative_to(ROOT)}")
        put_between(DOCS, f"cells-{mode}", "\n".join((*lines, "", caption)))


if __name__ == "__main__":
    main()
