"""`fastvae evaluate` for all kinds of runs."""

from pathlib import Path
from typing import Literal

from rich import get_console

from . import factors as known_factors
from . import files, messages, registry, runs
from .errors import InputError
from .factors import Factors

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
    test: bool = False,
    factors: Path | None = None,
) -> None:
    """Evaluate a run, write evaluation.json into its folder, and print the results.

    `samples` is the number of importance samples; None takes the default of the kind of data. `limit` takes only the
    first examples. `test` takes the data that neither training nor validation has used, if the run has any. `factors`
    is a file with known factors, for the mutual information gap. Raises InputError as `runs.load` does, if a number is
    out of range, and if an option does not fit the run.
    """
    kind, *_ = registry.read_run(path)
    for name, given, served in (("--test", test, kind.has_test), ("--factors", factors, kind.has_factors)):
        if given and not served:
            raise InputError(f"{name} does not apply to {path}: this is a run of {kind.name}")
    run = runs.load(kind, path, data=data, checkpoint=checkpoint)
    known: Factors | None = None
    if factors is not None:
        rows = kind.evaluated_rows(run, test)
        known = known_factors.read(factors, rows.total, kind.datum)
        chosen = known.values if rows.chosen is None else known.values[rows.chosen]
        known = known._replace(values=chosen[:limit])
    files.prepare_folder(path, [EVALUATION])
    done = kind.evaluate(
        run,
        get_console(),
        checkpoint=checkpoint,
        samples=kind.default_samples if samples is None else samples,
        limit=limit,
        seed=seed,
        test=test,
        factors=known,
    )
    done.write(path / EVALUATION)
    part = "test" if test else "validation"
    of = f"{messages.pluralize(done.num_examples, f'{part} {kind.datum}')} of {done.data}"
    messages.print_line(f"{path}: {of}; epoch {done.epoch} ({checkpoint})\n")
    get_console().print(done.table())
    messages.print_line(f"\nThe results were written to {path / EVALUATION}")
    for line in kind.after_evaluation(run, seed):
        messages.print_line(line)
