"""Time scvi-tools' own training, without and with fastvae.integrations.scvi, in turns.

    python -m benchmarks.scvi [--cases zinb,nb] [--epochs 2] [--turns 3] [--threads 2] [--device cuda] [--dense]
                               [--docs]
    python -m benchmarks.scvi --accuracy [--docs]

Each case is a model of scvi-tools that its own `train()` trains on 1,280 cells in batches of 128. About 95 % of the
counts are 0, in a CSR matrix as AnnData usually has (`--dense` uses an array, which scvi-tools' loader reads faster).
The sides take turns of a few epochs each, and the fastest epoch counts. The memory is the maximum that a step holds
above what was allocated before it, measured in a separate process for each side.

`--accuracy` compares numbers instead: float32 with scvi-tools' formula in float64, for many values of theta.
`--docs` writes the results into docs/scvi-tools.md.
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
from .report import RESULTS, ROOT, align, put_between, slug
from .timing import peak_bytes

CELLS, BATCH = 1280, 128
DOCS = ROOT / "docs" / "scvi-tools.md"


@dataclass(frozen=True)
class Case:
    title: str
    floor: float | None
    genes: int = 20_000
    model: str = "SCVI"
    fused_floor: float | None = None  # with fused Adam in addition
    memory_floor: float | None = None  # the permitted share of scvi-tools' peak memory
    options: dict[str, Any] = field(default_factory=dict)


CASES = {
    "zinb": Case("SCVI, ZINB", 2.0, fused_floor=2.3, memory_floor=1 / 2),
    "nb": Case("SCVI, NB", 2.0, memory_floor=2 / 3, options={"gene_likelihood": "nb"}),
    "scanvi": Case("SCANVI", 1.7, model="SCANVI"),
    "autozi": Case("AUTOZI", 2.0, model="AUTOZI"),
    "totalvi": Case("TOTALVI, 20 proteins", 1.4, model="TOTALVI"),
    "zinb-2000": Case("SCVI, ZINB", 1.4, genes=2_000),
    "nb-2000": Case("SCVI, NB", None, genes=2_000, options={"gene_likelihood": "nb"}),
    "poisson": Case("SCVI, Poisson", None, options={"gene_likelihood": "poisson"}),
}


def sides(case: Case) -> dict[str, AbstractContextManager[Any]]:
    """The context of each side; the first is scvi-tools without fastvae."""
    contexts: dict[str, AbstractContextManager[Any]] = {"scvi": nullcontext(), "fastvae": _Accelerated(False)}
    if case.fused_floor:
        contexts["fused Adam"] = _Accelerated(True)
    return contexts


class _Accelerated(AbstractContextManager[None]):
    """`accelerate` in strict mode, as a context that can be entered repeatedly."""

    def __init__(self, fused_adam: bool) -> None:
        self.fused_adam = fused_adam

    def __enter__(self) -> None:
        self.handle = accelerate(strict=True, fused_adam=self.fused_adam)

    def __exit__(self, *error: object) -> None:
        self.handle.undo()


@cache
def cells(genes: int, dense: bool = False) -> Any:
    """Counts of two kinds of cells in two batches, about 95 % of which are 0."""
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


def create_model(case: Case, dense: bool = False) -> Any:
    import scvi

    scvi.settings.seed = 0
    data = cells(case.genes, dense).copy()
    cls = getattr(scvi.model, case.model)
    keys: dict[str, Any] = {}
    if case.model == "SCANVI":
        keys = {"labels_key": "kind", "unlabeled_category": "unknown"}
    elif case.model == "TOTALVI":
        keys = {"protein_expression_obsm_key": "proteins"}
    cls.setup_anndata(data, batch_key="batch", **keys)
    return cls(data, **case.options)


def train(model: Any, epochs: int, device: str) -> list[float]:
    """Run scvi-tools' own training, and return the seconds of every epoch."""
    from lightning.pytorch.callbacks import Callback

    seconds: list[float] = []
    synchronize = torch.cuda.synchronize if device == "cuda" else lambda: None

    class Clock(Callback):
        def on_train_epoch_start(self, *_: Any) -> None:
            synchronize()
            self.start = time.perf_counter()

        def on_train_epoch_end(self, *_: Any) -> None:
            synchronize()
            seconds.append(time.perf_counter() - self.start)

    # TOTALVI would otherwise evaluate on a validation set, but there is none.
    no_validation: dict[str, Any] = {}
    if type(model).__name__ == "TOTALVI":
        no_validation = {"early_stopping": False, "reduce_lr_on_plateau": False}
    model.train(
        max_epochs=epochs,
        batch_size=BATCH,
        train_size=1.0,
        accelerator="gpu" if device == "cuda" else "cpu",
        enable_progress_bar=False,
        callbacks=[Clock()],
        **no_validation,
    )
    return seconds


def peak(case: Case, accelerated: bool, device: torch.device) -> int:
    """The maximum number of bytes that a training step holds above what was allocated before it."""
    model = create_model(case)
    loader = model._make_data_loader(adata=model.adata, batch_size=BATCH, shuffle=False)
    tensors = {name: tensor.to(device) for name, tensor in next(iter(loader)).items()}
    model.module.to(device)
    optimizer = torch.optim.Adam(model.module.parameters())
    model.module.train()

    def step() -> None:
        optimizer.zero_grad()
        # As in a step of scvi-tools' training plan, only the loss survives of all that the module returns.
        loss = model.module(tensors)[2].loss
        loss.backward()
        optimizer.step()

    with accelerate(strict=True) if accelerated else nullcontext():
        step()
        return peak_bytes(step, device)


def _peak_in_subprocess(name: str, accelerated: bool, device: str) -> int:
    command = [
        sys.executable,
        "-m",
        "benchmarks.scvi",
        "--cases",
        name,
        "--threads",
        str(torch.get_num_threads()),
    ]
    command += ["--device", device, "--peak", "fastvae" if accelerated else "scvi"]
    process = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if process.returncode != 0:
        sys.exit(process.stderr)
    return int(process.stdout.split()[-1])


def measure(name: str, epochs: int, turns: int, dense: bool, device: str) -> dict[str, Any]:
    case = CASES[name]
    contexts = sides(case)
    models = {side: create_model(case, dense) for side in contexts}
    seconds: dict[str, list[float]] = {side: [] for side in contexts}
    order = list(contexts)
    for turn in range(turns):
        for side in order[turn % len(order) :] + order[: turn % len(order)]:
            with contexts[side]:
                seconds[side] += train(models[side], epochs, device)
    result: dict[str, Any] = {"case": name, "fastest_epoch_s": {side: min(s) for side, s in seconds.items()}}
    result["epochs_s"] = seconds
    if case.memory_floor:
        result["peak_bytes"] = {
            side: _peak_in_subprocess(name, side == "fastvae", device) for side in ("scvi", "fastvae")
        }
    return result


def table(results: Sequence[dict[str, Any]]) -> list[str]:
    """The results as a Markdown table, one line for each side of a case, with floors in brackets."""
    lines = [
        "| model | genes | scvi-tools, ms a step | with fastvae | × | peak memory of a step, MiB |",
        "|---|--:|--:|--:|--:|--:|",
    ]
    for result in results:
        case, times = CASES[result["case"]], result["fastest_epoch_s"]
        steps = CELLS / BATCH
        for side, floor in (("fastvae", case.floor), ("fused Adam", case.fused_floor)):
            if side not in times:
                continue
            ratio = times["scvi"] / times[side]
            memory = ""
            if side == "fastvae" and "peak_bytes" in result and case.memory_floor:
                before, after = (result["peak_bytes"][each] / 2**20 for each in ("scvi", "fastvae"))
                share = after / before
                verdict = "✓" if share <= case.memory_floor else "✗"
                memory = f"{before:.0f} → {after:.0f}: × {share:.2f} ({case.memory_floor:.2f} {verdict})"
            cells_ = [case.title + (" and fused Adam" if side == "fused Adam" else ""), f"{case.genes:,}"]
            cells_ += [f"{1e3 * times['scvi'] / steps:.1f}", f"{1e3 * times[side] / steps:.1f}"]
            cells_ += [
                f"{ratio:.2f}" + (f" ({floor:g} {'✓' if ratio >= floor else '✗'})" if floor else ""),
                memory,
            ]
            lines.append("| " + " | ".join(cells_) + " |")
    return lines


def caption(run: dict[str, Any]) -> str:
    others = run["cores_used_by_others"] or 0.0
    busy = f" (other processes kept {others:.1f} cores busy)" if others > 0.1 else ""
    return (
        f"{run['machine']}; {run['threads']} threads; scvi-tools {run['scvi']}, torch {run['versions']['torch']}, "
        f"fastvae {run['versions']['fastvae']}; {run['date']}{busy}. scvi-tools' own `train()`, {CELLS:,} cells "
        f"({'an array' if run['dense'] else 'CSR'}) in batches of {BATCH}; the sides take turns, and the table shows "
        f"the fastest of {run['epochs']} epochs per side. The numbers in brackets are the floors that were aimed at, "
        "and whether they are met."
    )


# ---------------------------------------------------------------------------------------------------------------------
# Accuracy
# ---------------------------------------------------------------------------------------------------------------------

THETAS = (
    1.0,
    1e1,
    1e2,
    1e3,
    1e4,
    1e5,
)  # from 1e6 on, the gradient in float64 has itself lost too many digits


def accuracy() -> list[str]:
    """The error of float32 against scvi-tools' formula in float64, as a Markdown table with one line for each theta."""
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

        def evaluate(dtype: torch.dtype, theta: Tensor = theta, x: Tensor = x) -> tuple[Tensor, Tensor]:
            leaf = theta.to(dtype).requires_grad_()
            log_p = NegativeBinomial(mu=mean.to(dtype), theta=leaf).log_prob(x.to(dtype)).sum(-1)
            return log_p.detach().double(), torch.autograd.grad(log_p.sum(), leaf)[0].double()

        exact, exact_gradient = evaluate(torch.float64)
        errors = []
        for accelerated in (False, True):
            with accelerate(strict=True) if accelerated else nullcontext():
                log_p, gradient = evaluate(torch.float32)
            errors.append(((log_p - exact) / exact).abs().max().item())
            errors.append(((gradient - exact_gradient).norm() / exact_gradient.norm()).item())
        cells_ = [f"{errors[0]:.0e}", f"{errors[2]:.0e}", _format_error(errors[1]), _format_error(errors[3])]
        lines.append(f"| {value:g} | " + " | ".join(cells_) + " |")
    return lines


def _format_error(error: float) -> str:
    if error < 1e-3:
        return f"{error:.0e}"
    return f"{error:.1%}" if error < 1 else f"{error:.0f} times"


# ---------------------------------------------------------------------------------------------------------------------


def _write_docs(name: str, text: str) -> None:
    put_between(DOCS, name, text)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.scvi", description=__doc__.split("\n\n")[0])
    parser.add_argument(
        "--cases", default=",".join(CASES), help=f"a selection of {','.join(CASES)}; default: all"
    )
    parser.add_argument("--epochs", type=int, default=2, help="epochs in each turn")
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--dense", action="store_true", help="pass the counts as an array instead of CSR")
    parser.add_argument("--accuracy", action="store_true", help="compare the accuracy instead of the time")
    parser.add_argument("--docs", action="store_true", help=f"write the table into {DOCS.relative_to(ROOT)}")
    parser.add_argument("--peak", choices=("scvi", "fastvae"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    names = options.cases.split(",")
    if unknown := set(names) - set(CASES):
        parser.error(f"--cases: unknown {', '.join(sorted(unknown))}")

    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    device = machine.configure(options.device, options.threads)
    if options.peak:
        print(peak(CASES[names[0]], options.peak == "fastvae", device))
        return
    if options.accuracy:
        lines = accuracy()
        print("\n".join(align(lines)))
        if options.docs:
            _write_docs("accuracy", "\n".join(lines))
        return

    import scvi

    load_monitor = machine.LoadMonitor()
    results = []
    for name in names:
        results.append(measure(name, options.epochs, options.turns, options.dense, options.device))
        print("\n".join(align(table(results[-1:]))[1 if len(results) > 1 else 0 :]), flush=True)
    run = machine.describe(device) | {
        "scvi": scvi.__version__,
        "epochs": options.epochs * options.turns,
    }
    run |= {"dense": options.dense, "cores_used_by_others": load_monitor.cores_used_by_others()}
    run |= {"results": results}
    print("\n" + caption(run))
    if options.docs:
        path: Path = RESULTS / f"{slug(run['machine'])}-scvi.json"
        path.write_text(json.dumps(run, indent=1) + "\n")
        print(f"wrote {path.relative_to(ROOT)}")
        _write_docs("bench", "\n".join([*table(results), "", caption(run)]))


if __name__ == "__main__":
    main()
