"""A stage that measures, in a process of its own: it writes its results down after every item."""

import importlib
import json
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from .plan import SHARES

Results = dict[str, Any]
Item = tuple[str, Callable[[], Results]]


def main(name: str, work: Path, seconds: float) -> None:
    """`work`/NAME.json: what the items gave so far, and under "failures" those that failed."""
    assert name in SHARES
    module = importlib.import_module(f".{name}", __package__)
    kept: Results = {"failures": []}
    for result in isolated(module.items(), time.monotonic() + seconds):
        merge(kept, result)
        new = work / f"{name}.json.new"
        new.write_text(json.dumps(kept))
        new.replace(work / f"{name}.json")


def isolated(items: Iterable[Item], deadline: float) -> Iterator[Results]:
    """The results of the items. One that fails is told of and kept in mind, and the rest goes on.

    After a fault of the GPU the others of the stage fail as well, and those of other stages, processes apart, do not.
    """
    for name, item in items:
        if time.monotonic() > deadline:
            print(f"out of time before: {name}", flush=True)
            yield {"failures": [f"out of time before {name}"]}
            return
        try:
            yield item()
        except Exception as error:
            traceback.print_exc()
            print(f"FAILED: {name}", flush=True)
            first_line = str(error).strip().partition("\n")[0]
            yield {"failures": [f"{name}: {type(error).__name__}: {first_line}"]}


def merge(kept: Results, result: Results) -> None:
    """Lists grow, dicts are joined, the rest is replaced."""
    for key, value in result.items():
        if isinstance(value, list):
            kept.setdefault(key, []).extend(value)
        elif isinstance(value, dict):
            merge(kept.setdefault(key, {}), value)
        else:
            kept[key] = value
