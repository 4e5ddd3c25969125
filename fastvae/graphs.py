"""A whole training step as one CUDA graph: `graph_step`."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer, register_optimizer_step_pre_hook
from torch.utils import _pytree as pytree  # noqa: PLC2701

from ._warn import warn

__all__ = ["graph_step"]

Batch = TypeVar("Batch")
Result = TypeVar("Result")


def graph_step(
    step_fn: Callable[[Batch], Result],
    example_batch: Batch,
    *,
    warmup: int = 3,
    generators: Sequence[torch.Generator] = (),
) -> Callable[[Batch], Result]:
    """Return a function that does what `step_fn` does by replaying one CUDA graph.

    A small model spends its time launching kernels rather than running them. A graph launches them all at once::

        def train_step(x):
            optimizer.zero_grad()
            mu, logvar = encoder(x)
            z, kl = elbo.reparameterize(mu, logvar)
            loss = elbo(decoder(z), x, kl=kl).loss
            loss.backward()
            optimizer.step()
            return loss

        step = fastvae.graph_step(train_step, torch.empty(128, 784, device="cuda"))
        for x in loader:
            loss = step(x)

    Every call is one step. The first `warmup` calls run `step_fn` on a separate stream. The next call captures it, and
    later calls copy the batch into the graph's input tensors and replay it. Each replay draws fresh noise, the same
    noise that a call of `step_fn` would have drawn in its place, and respects `elbo.beta = ...`.

    A captured step must not wait for the GPU (`.item()`, printing a tensor), and its Python code runs only once, during
    the capture. Optimisers must count their steps on the GPU (`capturable=True`), and a learning rate that a schedule
    changes must be a tensor, `lr=torch.tensor(1e-3)`. If `step_fn` passes `generator=`, list that generator in
    `generators`.

    Without a GPU, or with an example on the CPU, calls run `step_fn` directly, and the first call warns about it.

    Args:
        step_fn: the step, a function of a batch. It returns tensors, in any nesting of tuples, lists and dicts.
        example_batch: a tensor on the GPU, or any nesting of such tensors. Only its shapes, dtypes and devices are
            used.
        warmup: the number of calls before the capture, at least 1, in which libraries and optimisers initialise.
        generators: generators that the step draws from, other than torch's default one.

    Returns:
        A function of a batch like `example_batch`, on any device (copying from pinned memory does not block Python). It
        returns the detached result of `step_fn`. The next call overwrites these tensors, so `.clone()` what you keep.

    Raises:
        ValueError: If a batch differs from `example_batch` in shape, dtype or nesting.
        TypeError: If `example_batch` contains no tensors, or `step_fn` is not callable.
        RuntimeError: If an optimiser is not capturable, or the step cannot be captured.
    """
    if not callable(step_fn):
        raise TypeError(
            f"fastvae.graph_step: `step_fn` must be a function of a batch, got {type(step_fn).__name__}"
        )
    if warmup < 1:
        raise ValueError(f"fastvae.graph_step: `warmup` must be at least 1, got {warmup}")
    return _Step(step_fn, example_batch, warmup, generators)


class _Step(Generic[Batch, Result]):
    def __init__(
        self,
        step_fn: Callable[[Batch], Result],
        example: Batch,
        warmup: int,
        generators: Sequence[torch.Generator],
    ) -> None:
        self._step_fn = step_fn
        leaves, self._structure = pytree.tree_flatten(example)
        self._device = _device_of(leaves)
        # The tensors that the graph reads. Values that are not tensors become constants of the graph.
        self._slots = [_slot(leaf, self._device) for leaf in leaves]
        self._warmups_left = warmup
        self._generators = tuple(generators)
        self._graph: torch.cuda.CUDAGraph | None = None
        self._result: Any = None
        if self._device is not None:
            self._stream = torch.cuda.Stream(self._device)

    def __call__(self, batch: Batch) -> Result:
        leaves, structure = pytree.tree_flatten(batch)
        self._check(batch, leaves, structure)
        if self._device is None:
            _warn_of_eager_step()
            return _detach(self._step_fn(batch))
        with torch.no_grad():
            for slot, leaf in zip(self._slots, leaves, strict=True):
                if isinstance(slot, Tensor):
                    slot.copy_(leaf, non_blocking=True)
        if self._graph is None:
            # An autocast context around the calls caches the weights it has cast for as long as it lasts, so later
            # steps and all replays would use the weights of the first step.
            torch.clear_autocast_cache()
            try:
                if self._warmups_left:
                    return self._run_on_side_stream()
                self._graph = self._capture()
            finally:
                torch.clear_autocast_cache()
        self._graph.replay()
        return self._result

    def _check(self, batch: Batch, leaves: list[Any], structure: pytree.TreeSpec) -> None:
        if structure != self._structure:
            raise ValueError(
                f"fastvae.graph_step: the batch must be nested as `example_batch`, {_nesting_of(self._structure)}, "
                f"got {_nesting_of(structure)}"
            )
        for number, (slot, leaf) in enumerate(zip(self._slots, leaves, strict=True)):
            if isinstance(slot, Tensor) and isinstance(leaf, Tensor):
                if leaf.shape == slot.shape and leaf.dtype == slot.dtype:
                    continue
                expected, found = (f"{tuple(t.shape)}, {str(t.dtype)[6:]}" for t in (slot, leaf))
            elif not isinstance(slot, Tensor) and not isinstance(leaf, Tensor) and leaf == slot:
                continue
            else:
                expected, found = (
                    "a tensor" if isinstance(value, Tensor) else repr(value) for value in (slot, leaf)
                )
            raise ValueError(
                f"fastvae.graph_step: {_name_of_leaf(batch, number)} must be as in `example_batch`, {expected}, "
                f"got {found}; for a last batch of another size, use DataLoader(drop_last=True) or call `step_fn` "
                "directly"
            )

    def _static_batch(self) -> Any:
        return pytree.tree_unflatten(self._slots, self._structure)

    def _run_on_side_stream(self) -> Result:
        with torch.cuda.device(self._device):
            current = torch.cuda.current_stream()
            self._stream.wait_stream(current)
            with torch.cuda.stream(self._stream), _capturable_optimizers_only():
                result = _detach(self._step_fn(self._static_batch()))
            current.wait_stream(self._stream)
        self._warmups_left -= 1
        return result

    def _capture(self) -> torch.cuda.CUDAGraph:
        graph = torch.cuda.CUDAGraph()
        for generator in self._generators:
            graph.register_generator_state(generator)
        current = torch.cuda.current_stream(self._device)
        cause: RuntimeError | None = None
        # cuBLAS keeps its workspaces between calls. One that the warm-up left would be freed by the next graph that
        # torch.compile records, although this graph goes on using it. The capture makes its own, which belong to it.
        _free_cublas_workspaces()
        try:
            # "thread_local" rather than "global", because a DataLoader's thread may pin memory at the same time.
            with (
                torch.cuda.device(self._device),
                torch.cuda.graph(graph, stream=self._stream, capture_error_mode="thread_local"),
            ):
                try:
                    self._result = _detach(self._step_fn(self._static_batch()))
                except RuntimeError as error:
                    cause = error
                    raise
        except RuntimeError as error:
            # Ending a broken capture raises a second, less helpful error and leaves torch on the capture stream.
            torch.cuda.set_stream(current)
            cause = cause or error
            first_line = str(cause).partition("\n")[0]
            raise RuntimeError(
                f"fastvae.graph_step: the step cannot be captured as a CUDA graph: {first_line}; it must not wait for "
                "the GPU (.item(), .cpu(), printing a tensor) or copy from memory that is not pinned"
            ) from cause
        finally:
            _free_cublas_workspaces()
        return graph


def _free_cublas_workspaces() -> None:
    # Builds of torch without CUDA have no cuBLAS.
    getattr(torch._C, "_cuda_clearCublasWorkspaces", lambda: None)()


# ---------------------------------------------------------------------------------------------------------------------
# Batches
# ---------------------------------------------------------------------------------------------------------------------


def _device_of(leaves: list[Any]) -> torch.device | None:
    """The GPU that holds the example's tensors, or None if they are not on a GPU."""
    devices = list(dict.fromkeys(leaf.device for leaf in leaves if isinstance(leaf, Tensor)))
    if not devices:
        raise TypeError("fastvae.graph_step: `example_batch` must hold at least one tensor, got none")
    if len(devices) > 1:
        raise ValueError(
            "fastvae.graph_step: the tensors of `example_batch` must be on one device, got "
            + " and ".join(map(str, devices))
        )
    return devices[0] if devices[0].type == "cuda" else None


def _slot(leaf: Any, device: torch.device | None) -> Any:
    if not isinstance(leaf, Tensor) or device is None:
        return leaf
    return torch.empty_like(leaf, requires_grad=False)


def _nesting_of(structure: pytree.TreeSpec) -> str:
    return str(pytree.tree_unflatten(["*"] * structure.num_leaves, structure)).replace("'*'", "*")


def _name_of_leaf(batch: Any, number: int) -> str:
    paths, _ = pytree.tree_flatten_with_path(batch)
    return f"`batch{pytree.keystr(paths[number][0])}`"


def _detach(result: Any) -> Any:
    """Detach the result: nobody differentiates through a finished step, and its autograd graph would keep memory."""
    return pytree.tree_map_only(Tensor, Tensor.detach, result)


# ---------------------------------------------------------------------------------------------------------------------
# Warnings and errors for common mistakes
# ---------------------------------------------------------------------------------------------------------------------

_eager_warned = False


def _warn_of_eager_step() -> None:
    global _eager_warned
    if not _eager_warned:
        _eager_warned = True
        reason = "`example_batch` is on the CPU" if torch.cuda.is_available() else "torch sees no GPU"
        warn(
            f"fastvae.graph_step: the step runs eagerly, without a CUDA graph, because {reason}", UserWarning
        )


@contextmanager
def _capturable_optimizers_only() -> Iterator[None]:
    """Refuse an optimiser that cannot be captured before its first step, not only when the capture fails."""

    def check_capturable(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        for group in optimizer.param_groups:
            if group.get("capturable") is False:
                name = type(optimizer).__name__
                raise RuntimeError(
                    f"fastvae.graph_step: `capturable` of {name} must be True in a CUDA graph, got False; create the "
                    f"optimiser as {name}(..., capturable=True), or, if it must also run on a CPU, with "
                    "capturable=torch.cuda.is_available()"
                )

    handle = register_optimizer_step_pre_hook(check_capturable)
    try:
        yield
    finally:
        handle.remove()
