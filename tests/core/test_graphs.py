"""`fastvae.graph_step` where there is no GPU: the step runs as it is. What a graph does is in test_cuda.py."""

import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

import fastvae
from fastvae import graphs


@pytest.fixture(autouse=True)
def _eager_warned(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graphs, "_eager_warned", True)


def twice(batch: Any) -> Any:
    return {"doubled": 2 * batch} if isinstance(batch, Tensor) else [2 * t for t in batch]


def test_the_step_of_the_reader() -> None:
    """The docstring's example, on the CPU: every call is one step, and the losses are those of plain calls."""

    def losses(graphed: bool) -> list[float]:
        torch.manual_seed(0)
        encoder, decoder = torch.nn.Linear(12, 8), torch.nn.Linear(4, 12)
        optimizer = torch.optim.Adam([*encoder.parameters(), *decoder.parameters()], lr=1e-2)
        elbo = fastvae.ELBO("bernoulli")

        def train_step(x: Tensor) -> Tensor:
            optimizer.zero_grad()
            z, kl = elbo.reparameterize(*encoder(x).chunk(2, 1))
            loss = elbo(decoder(z), x, kl=kl).loss
            loss.backward()
            optimizer.step()
            return loss

        step = fastvae.graph_step(train_step, torch.empty(5, 12)) if graphed else train_step
        return [step(torch.rand(5, 12)).item() for _ in range(8)]

    assert losses(True) == losses(False)


def test_results_are_detached() -> None:
    step = fastvae.graph_step(twice, torch.empty(3))
    leaf = torch.ones(3, requires_grad=True)
    assert not step(leaf)["doubled"].requires_grad
    out = fastvae.graph_step(lambda x: fastvae.ELBOOutput(x, x * 2, x * 3), torch.empty(3))(leaf)
    assert isinstance(out, fastvae.ELBOOutput)
    assert not out.nll.requires_grad


ONCE = """
import torch, warnings, fastvae
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    for _ in range(2):
        step = fastvae.graph_step(lambda x: x + 1, torch.empty(2))
        for _ in range(2):
            assert step(torch.zeros(2)).eq(1).all()
print(*[f"{w.category.__name__} {w.filename} {w.message}" for w in caught], sep="\\n")
"""


def test_it_says_once_that_there_is_no_graph() -> None:
    done = subprocess.run(
        [sys.executable, "-c", ONCE], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    reason = "`example_batch` is on the CPU" if torch.cuda.is_available() else "torch sees no GPU"
    assert done.stdout.splitlines() == [
        f"UserWarning <string> fastvae.graph_step: no CUDA graph, the step runs as it is: {reason}"
    ]


@pytest.mark.parametrize(
    ("example", "batch", "message"),
    [
        (
            torch.empty(8, 3),
            torch.empty(5, 3),
            r"`batch` must be as in `example_batch`, \(8, 3\), float32, got \(5, 3\), float32; .*drop_last=True",
        ),
        (torch.empty(2), torch.empty(2).double(), r"`batch` must .*, \(2,\), float32, got \(2,\), float64"),
        (
            (torch.empty(2), {"y": torch.empty(3)}),
            (torch.empty(2), {"y": torch.empty(4)}),
            r"`batch\[1\]\['y'\]` must be as in `example_batch`, \(3,\), float32, got \(4,\), float32",
        ),
        (
            (torch.empty(2), 3),
            (torch.empty(2), 4),
            r"`batch\[1\]` must be as in `example_batch`, 3, got 4",
        ),
        (
            (torch.empty(2), 3),
            (torch.empty(2), torch.empty(2)),
            r"`batch\[1\]` must be as in `example_batch`, 3, got a tensor",
        ),
        (
            [torch.empty(2), torch.empty(2)],
            torch.empty(2),
            r"the batch must be nested as `example_batch`, \[\*, \*\], got \*",
        ),
    ],
)
def test_a_batch_that_differs(example: Any, batch: Any, message: str) -> None:
    """The same on a CPU as on a GPU, so that what runs here runs there."""
    step = fastvae.graph_step(lambda batch: torch.zeros(()), example)
    step(example)
    with pytest.raises(ValueError, match=f"fastvae.graph_step: {message}"):
        step(batch)


def test_wrong_arguments() -> None:
    with pytest.raises(TypeError, match=r"`step_fn` must be a function of a batch, got Tensor"):
        fastvae.graph_step(torch.empty(2), torch.empty(2))  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"`example_batch` must hold at least one tensor, got none"):
        fastvae.graph_step(twice, (1, 2))
    with pytest.raises(ValueError, match=r"must be on one device, got cpu and meta"):
        fastvae.graph_step(twice, (torch.empty(2), torch.empty(2, device="meta")))
    with pytest.raises(ValueError, match=r"`warmup` must be at least 1, got 0"):
        fastvae.graph_step(twice, torch.empty(2), warmup=0)


def test_optimisers_that_a_graph_cannot_hold() -> None:
    """Before the first step, by name, with the argument that mends it; and only while a step is looked at."""
    weight = torch.ones(2, requires_grad=True)
    weight.grad = torch.ones(2)
    adam, sgd = torch.optim.Adam([weight]), torch.optim.SGD([weight], lr=0.1)
    with graphs._capturable_optimizers_only():
        sgd.step()
        before = weight.detach().clone()
        with pytest.raises(
            RuntimeError, match=r"Adam must have `capturable` True .*Adam\(\.\.\., capturable=True\)"
        ):
            adam.step()
        assert torch.equal(weight, before)
    adam.step()


# ---------------------------------------------------------------------------------------------------------------------
# Warm-up, capture, replay: with a graph that remembers a Python function
# ---------------------------------------------------------------------------------------------------------------------


class Recorder:
    """Stands in for torch.cuda: a "graph" whose replay calls what `replayed` says, and a log of what happened."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, replayed: Callable[[], None]) -> None:
        self.log: list[str] = []
        self.generators: list[torch.Generator] = []
        self.broken = False

        def replay() -> None:
            self.log.append("replay")
            replayed()

        graph = SimpleNamespace(replay=replay, register_generator_state=self.generators.append)
        current = SimpleNamespace(wait_stream=lambda other: None)
        side = SimpleNamespace(wait_stream=lambda other: None)

        @contextmanager
        def stream(which: Any) -> Iterator[None]:
            assert which is side
            self.log.append("warm-up")
            yield

        @contextmanager
        def capture(which: Any, *, stream: Any, capture_error_mode: str) -> Iterator[None]:
            assert which is graph
            assert stream is side
            self.log.append("capture")
            try:
                yield
            finally:
                if self.broken:
                    raise RuntimeError("ending the capture failed")

        monkeypatch.setattr(graphs, "_device_of", lambda leaves: torch.device("cpu"))
        for name, value in {
            "Stream": lambda device: side,
            "current_stream": lambda device=None: current,
            "stream": stream,
            "device": lambda device: nullcontext(),
            "CUDAGraph": lambda: graph,
            "graph": capture,
            "set_stream": lambda which: self.log.append("back" if which is current else "lost"),
        }.items():
            monkeypatch.setattr(torch.cuda, name, value)


def test_every_call_is_one_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """Warm-ups and the capture read the same tensors, which every call fills; a replay gives the capture's result."""
    seen: list[Any] = []

    def double(batch: Any) -> Tensor:
        seen.append(batch)
        return 2 * batch["x"] + batch["n"]

    results: list[Tensor] = []
    recorder = Recorder(monkeypatch, lambda: results[-1].copy_(2 * seen[-1]["x"] + seen[-1]["n"]))
    generator = torch.Generator()
    example = {"x": torch.full((3,), torch.nan), "n": 5}
    step = fastvae.graph_step(double, example, warmup=2, generators=[generator])
    for i in range(5):
        batch = {"x": torch.full((3,), float(i)), "n": 5}
        if i == 2:
            monkeypatch.setattr(graphs, "_detach", lambda out: results.append(out.detach()) or results[-1])
        out = step(batch)
        assert torch.equal(out, 2 * batch["x"] + 5), i
    assert recorder.log == ["warm-up", "warm-up", "capture", "replay", "replay", "replay"]
    assert recorder.generators == [generator]
    assert out is results[0]
    assert len(seen) == 3
    assert len({batch["x"].data_ptr() for batch in seen}) == 1
    assert example["x"].isnan().all()
    assert seen[0]["x"].data_ptr() != example["x"].data_ptr()


def test_a_capture_that_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first error is told, and torch is put back on its stream. A mistake in the step stays what it is."""
    errors: list[Exception] = []

    def fails(x: Tensor) -> Tensor:
        if errors:
            raise errors[0]
        return x

    recorder = Recorder(monkeypatch, lambda: None)
    recorder.broken = True
    step = fastvae.graph_step(fails, torch.zeros(2), warmup=1)
    step(torch.zeros(2))
    errors.append(RuntimeError("operation not permitted when stream is capturing\nmore"))
    with pytest.raises(
        RuntimeError, match=r"captured as a CUDA graph: operation not permitted when .* capturing; "
    ):
        step(torch.zeros(2))
    assert recorder.log == ["warm-up", "capture", "back"]
    recorder.broken = False
    errors[0] = KeyError("mistake")
    with pytest.raises(KeyError, match="mistake"):
        step(torch.zeros(2))
    errors.clear()
    step(torch.zeros(2))
    assert recorder.log[-2:] == ["capture", "replay"]
