"""`fastvae evaluate` for all kinds of runs."""

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
    """Evaluate a run, write evaluation.json into its folder, and print the results.

    `samples` is the number of importance samples; None takes the default of the kind of data. `limit` takes only the
    first validation examples. Raises InputError as `runs.load` does, and if a number is out of range.
    """
    kind, *_ = registry.read_run(path)
    run = runs.load(kind, path, data=data, checkpoint=checkpoint)
    files.prepare_folder(path, [EVALUATION])
    done = kind.evaluate(
        run,
        get_console(),
        checkpoint=checkpoint,
        samples=kind.default_samples if samples is None else samples,
        limit=limit,
        seed=seed,
    )
    done.write(path / EVALUATION)
    of = f"{messages.pluralize(done.num_examples, f'validation {kind.datum}')} of {done.data}"
    messages.print_line(f"{path}: {of}; epoch {done.epoch} ({checkpoint})\n")
    get_console().print(done.table())
    messages.print_line(f"\nThe results were written to {path / EVALUATION}")
    for line in kind.after_evaluation(run, seed):
        messages.print_line(line)
