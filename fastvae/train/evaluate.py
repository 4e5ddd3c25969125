"""`fastvae evaluate`: measure a run on its held-out data, whatever they are."""

from pathlib import Path
from typing import Literal

from rich import get_console

from . import files, messages, registry, runs

__all__ = ["EVALUATION", "evaluate"]

EVALUATION = "evaluation.json"


def evaluate(
    path: Path,
    *,
    data: str | None = None,
    checkpoint: Literal["best", "last"] = "best",
    samples: int | None = None,
    limit: int | None = None,
    seed: int = 0,
) -> None:
    """Measure a run, write evaluation.json into its folder, and say the numbers.

    `samples` are importance samples; None takes what is usual for the kind of data. `limit` takes the first held-out
    data only. Raises InputError as `runs.load`, and for a number out of range.
    """
    kind, *_ = registry.read_run(path)
    run = runs.load(kind, path, data=data, checkpoint=checkpoint)
    files.prepare_folder(path, [EVALUATION])
    done = kind.evaluate(
        run,
        get_console(),
        checkpoint=checkpoint,
        samples=kind.samples if samples is None else samples,
        limit=limit,
        seed=seed,
    )
    done.write(path / EVALUATION)
    of = f"{messages.count(done.count, f'held-out {kind.datum}')} of {done.data}"
    messages.say(f"{path}: {of}; epoch {done.epoch} ({checkpoint})\n")
    get_console().print(done.table())
    messages.say(f"\nwritten to {path / EVALUATION}")
    for line in kind.after_evaluation(run, seed):
        messages.say(line)
