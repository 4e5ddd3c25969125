"""Runs the stages: each has its deadline, is interrupted when it is out of time, and leaves what it has."""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any

from . import table
from .plan import ROOT, SHARES, Stage
from .stage import merge

# Becomes the command, which ends with this process also when that is killed, and can end nobody: PR_SET_PDEATHSIG is 1.
_ENDS_WITH_PARENT = """
import ctypes, os, signal, sys
ctypes.CDLL(None).prctl(1, signal.SIGKILL)
signal.signal(signal.SIGINT, signal.SIG_DFL)  # a shell's background jobs ignore it, and their children would, too
os.execvp(sys.argv[1], sys.argv[1:])
"""

GRACE = 6.0  # seconds in which a stage that was interrupted says what it had, before its processes are ended
TOTAL = 480.0


def all_stages(stages: Sequence[Stage], out: Path, seconds: float, limits: Mapping[str, float]) -> int:
    """Returns the exit status: 0 where every stage came to its end and nothing failed."""
    signal.signal(signal.SIGTERM, _stop)
    out = out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    start, due = time.monotonic(), 0.0
    kept: dict[str, Any] = {"failures": [], "seconds": {}}
    work = Path(tempfile.mkdtemp(prefix="fastvae-gpu-"))
    try:
        with (out / "log.txt").open("wb") as log:
            for stage in stages:
                due += SHARES[stage.name] * seconds / TOTAL
                began = time.monotonic()
                limit = limits.get(stage.name, max(1.0, start + due - began))
                _say(
                    log, f"\n== {stage.name}: at {began - start:.0f} s, until {began - start + limit:.0f} s\n"
                )
                failures = run_stage(stage, work, limit, log)
                kept["seconds"][stage.name] = round(time.monotonic() - began, 1)
                found = _results(work / f"{stage.name}.json")
                kept["failures"] += [
                    f"{stage.name}: {text}" for text in (*failures, *found.pop("failures", []))
                ]
                merge(kept, found)
                write(kept, out)
            _say(log, "\n" + "\n".join(table.lines(kept)) + "\n")
            _say(log, f"\nwrote {out}; {time.monotonic() - start:.0f} s in all\n")
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return 1 if kept["failures"] else 0


def _stop(*_: object) -> None:
    """Of SIGTERM: end as for an interrupt, so that the stage's processes are ended, too."""
    raise KeyboardInterrupt


def _say(log: IO[bytes], text: str) -> None:
    print(text, end="", flush=True)
    log.write(text.encode())
    log.flush()


def _results(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text()) if path.exists() else {}


def write(kept: Mapping[str, Any], out: Path) -> None:
    """What there is so far. Through another name: who cuts the run in the middle of it finds the last one whole."""
    name = table.slug(kept)
    for suffix, text in (
        ("json", json.dumps(table.record(kept), indent=1) + "\n"),
        ("txt", "\n".join(table.lines(kept)) + "\n"),
    ):
        new = out / f"{name}.{suffix}.new"
        new.write_text(text)
        new.replace(out / f"{name}.{suffix}")
    if name != table.UNNAMED:
        for path in out.glob(f"{table.UNNAMED}.*"):
            path.unlink()


def run_stage(stage: Stage, work: Path, limit: float, log: IO[bytes]) -> list[str]:
    """What failed of it. Its results, where it has any, are in `work`."""
    failures, deadline = [], time.monotonic() + limit
    for command in stage.commands:
        if "--stage" in command:
            left = max(0.1, deadline - time.monotonic())
            command = [*command, "--out", str(work), "--seconds", f"{left:.1f}"]
        status = run(command, stage.environment, deadline, log)
        if status is None:
            failures.append(f"out of time after {limit:.0f} s")
            break
        if status != 0:
            failures.append(f"{_short(command)} ended with status {status}; see log.txt")
    return failures


def _short(command: Sequence[str]) -> str:
    return (
        " ".join(Path(word).name for word in command if word.endswith(".py") or word == "--stage")
        or command[0]
    )


def run(
    command: Sequence[str], environment: Mapping[str, str], deadline: float, log: IO[bytes]
) -> int | None:
    """The exit status; None where the time was up. What it prints goes on as it comes.

    It leads a process group of its own. At the deadline it alone is interrupted, so that pytest stops and tells what
    has failed; then whatever is left of the group is ended, as when it ends by itself or this process does.
    """
    process = subprocess.Popen(
        [sys.executable, "-c", _ENDS_WITH_PARENT, *command],
        cwd=ROOT,
        env={**os.environ, "PYTHONUNBUFFERED": "1", **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )
    assert process.stdout is not None
    reader = threading.Thread(target=_hand_on, args=(process.stdout, log), daemon=True)
    reader.start()
    late = False
    try:
        process.wait(max(0.0, deadline - time.monotonic()))
    except subprocess.TimeoutExpired:
        late = True
        process.send_signal(signal.SIGINT)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(GRACE)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        reader.join(2.0)
    return None if late else process.returncode


def _hand_on(source: IO[bytes], log: IO[bytes]) -> None:
    while text := os.read(source.fileno(), 1 << 16):
        sys.stdout.buffer.write(text)
        sys.stdout.buffer.flush()
        log.write(text)
        log.flush()
