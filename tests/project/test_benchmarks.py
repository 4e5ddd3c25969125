"""What the benchmarks compare is the same computation: their check finds a baseline that computes something else.

Their table goes to its place in docs/benchmarks.md.
"""

import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

sys.path.append(str(Path(__file__).parents[2]))  # last: the fastvae under test is the one that is installed

from benchmarks import report
from benchmarks.cases import CASES, Case
from benchmarks.timing import _check, _result

CPU = torch.device("cpu")
NAMED = {case.name: case for case in CASES}
STEP = NAMED["ELBO step: latent 128 x 20, Bernoulli 128 x 784"]
Outputs = tuple[Tensor, ...]


def check(case: Case) -> None:
    torch.manual_seed(0)
    inputs = case.setup(CPU)
    functions = {"fused": case.fused(CPU), "eager": case.written}
    _check(case, inputs, {side: _result(function, inputs) for side, function in functions.items()})


@pytest.mark.parametrize(
    "name", [name for name, case in NAMED.items() if case.moves < 1 << 25 and "20000" not in name]
)
def test_both_sides_of_a_case_agree(name: str) -> None:
    check(NAMED[name])


def seven_times(mu: Tensor, logvar: Tensor, recon: Tensor, x: Tensor) -> Outputs:
    """As it must be in the first gradient, mu's."""
    loss, z = STEP.written(mu, logvar, 7 * recon, x)
    return loss, z


def shifted(mu: Tensor, logvar: Tensor, recon: Tensor, x: Tensor) -> Outputs:
    loss, z = STEP.written(mu, logvar, recon, x)
    return loss + 100, z


def frozen(mu: Tensor, logvar: Tensor, recon: Tensor, x: Tensor) -> Outputs:
    loss, z = STEP.written(mu, logvar, recon.detach(), x)
    return loss + 0 * recon.sum(), z


@pytest.mark.parametrize(
    ("written", "what"),
    [
        (seven_times, "the gradients of recon"),
        (shifted, "the losses"),
        (frozen, "the gradients of recon"),
    ],
)
def test_another_loss_is_found(written: Callable[..., Outputs], what: str) -> None:
    with pytest.raises(AssertionError, match=what):
        check(replace(STEP, written=written))


def test_the_table_goes_between_its_markers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before, begin, rest = report.PAGE.read_text().partition(report.BEGIN)
    _, end, after = rest.partition(report.END)
    page = tmp_path / "benchmarks.md"
    page.write_text(f"{before}{begin}{rest}")
    monkeypatch.setattr(report, "PAGE", page)
    report._into_docs("| case |")
    assert page.read_text() == f"{before}{begin}\n| case |\n{end}{after}"
    assert before
    assert after

    page.write_text(before)
    with pytest.raises(SystemExit, match=r"benchmarks\.md has no <!-- bench:begin -->"):
        report._into_docs("| case |")
