"""The process of a measuring stage, which writes its results after every item."""

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
    """Write the results of the items so far, and under "failures" those that failed, to `work`/NAME.json."""
    assert name in SHARES
    module = importlib.import_module(f".{name}", __package__)
    results: Results = {"failures": []}
    for result in isolated(module.items(), time.monotonic() + seconds):
        merge(results, result)
        new = work / f"{name}.json.new"
        new.write_text(json.dumps(results))
        new.replace(work / f"{name}.json")


def isolated(items: Iterable[Item], deadline: float) -> Iterator[Results]:
    """Yield the results of the items. If one fails, this reports and records it, and continues with the others.

    After a fault of the GPU, the other items of this stage fail as well, but other stages do not, as they are separate
    processes.
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


def merge(results: Results, result: Results) -> None:
    """Merge a result: lists are extended, dicts are merged, and other values are replaced."""
    for key, value in result.items():
        if isinstance(value, list):
            results.setdefault(key, []).extend(value)
        elif isinstance(value, dict):
            merge(results.setdefault(key, {}), value)
        else:
            results[key] = value
