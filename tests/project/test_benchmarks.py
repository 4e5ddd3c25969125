"""Both sides of a benchmark compute the same: its check detects a baseline that computes something else.

The tables are written to their place in the docs.
"""

import re
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

sys.path.append(str(Path(__file__).parents[2]))  # last, so that the installed fastvae is tested

from benchmarks import report, steps
from benchmarks.cases import CASES, Case
from benchmarks.timing import _check, _result

CPU = torch.device("cpu")
NAMED = {case.name: case for case in CASES}
STEP = NAMED["ELBO step: latent 128 x 20, Bernoulli 128 x 784"]
Outputs = tuple[Tensor, ...]


def check(case: Case) -> None:
    torch.manual_seed(0)
    inputs = case.setup(CPU)
    functions = {"fused": case.fused(CPU), "eager": case.baseline}
    _check(case, inputs, {side: _result(function, inputs) for side, function in functions.items()})


@pytest.mark.parametrize(
    "name",
    [
        name
        for name, case in NAMED.items()
        if case.moves < 1 << 25 and not re.search("20000|1024 x 1024", name)
    ],
)
def test_sides_of_a_case_give_the_same_results(name: str) -> None:
    check(NAMED[name])


def seven_times(mu: Tensor, logvar: Tensor, recon: Tensor, x: Tensor) -> Outputs:
    """The wrong gradient that must not be accepted is not the first one, which is that of mu."""
    loss, z = STEP.baseline(mu, logvar, 7 * recon, x)
    return loss, z


def shifted(mu: Tensor, logvar: Tensor, recon: Tensor, x: Tensor) -> Outputs:
    loss, z = STEP.baseline(mu, logvar, recon, x)
    return loss + 100, z


def frozen(mu: Tensor, logvar: Tensor, recon: Tensor, x: Tensor) -> Outputs:
    loss, z = STEP.baseline(mu, logvar, recon.detach(), x)
    return loss + 0 * recon.sum(), z


@pytest.mark.parametrize(
    ("baseline", "what"),
    [
        (seven_times, "the gradients of recon"),
        (shifted, "the losses"),
        (frozen, "the gradients of recon"),
    ],
)
def test_check_of_a_different_baseline_raises(baseline: Callable[..., Outputs], what: str) -> None:
    with pytest.raises(AssertionError, match=what):
        check(replace(STEP, baseline=baseline))


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow if name == "scvi" else ()) for name in steps.STEPS]
)
@torch.no_grad()
def test_losses_of_a_step_agree(name: str) -> None:
    """Up to the noise, which is different on each side."""
    _, kind = steps.STEPS[name]
    if name == "scvi":
        pytest.importorskip("scvi", reason="scvi-tools is not installed")
    torch.manual_seed(0)
    model, x = kind(), kind.batch()
    torch.testing.assert_close(model.fused(x), model.baseline(x), rtol=0.01, atol=0)


def test_put_between_replaces_the_text_between_markers(tmp_path: Path) -> None:
    for original, mark in ((report.PAGE, "bench"), (report.ROOT / "README.md", "steps")):
        page = tmp_path / original.name
        page.write_text(original.read_text())
        before, begin, rest = page.read_text().partition(f"<!-- {mark}:begin -->")
        _, end, after = rest.partition(f"<!-- {mark}:end -->")
        report.put_between(page, mark, "| case |")
        assert page.read_text() == f"{before}{begin}\n| case |\n{end}{after}"
        assert before
        assert after
        page.write_text(before)
        with pytest.raises(SystemExit, match=rf"{page.name} has no <!-- {mark}:begin -->"):
            report.put_between(page, mark, "| case |")
