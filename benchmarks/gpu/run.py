"""Runs the stages. Each has a deadline, is interrupted when its time is up, and keeps the results it has."""

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

# Replaced by the command. It ends with this process, even if this one is killed. PR_SET_PDEATHSIG is 1.
_ENDS_WITH_PARENT = """
import ctypes, os, signal, sys
ctypes.CDLL(None).prctl(1, signal.SIGKILL)
signal.signal(signal.SIGINT, signal.SIG_DFL)  # background jobs of a shell ignore it, and so would their children
os.execvp(sys.argv[1], sys.argv[1:])
"""

GRACE = 6.0  # seconds that an interrupted stage has to report its results, before its processes are killed
TOTAL = 480.0


def all_stages(stages: Sequence[Stage], out: Path, seconds: float, limits: Mapping[str, float]) -> int:
    """Run all stages and return the exit status: 0 if every stage completed and nothing failed."""
    signal.signal(signal.SIGTERM, _raise_interrupt)
    out = out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    start, due = time.monotonic(), 0.0
    results: dict[str, Any] = {"failures": [], "seconds": {}}
    work = Path(tempfile.mkdtemp(prefix="fastvae-gpu-"))
    try:
        with (out / "log.txt").open("wb") as log:
            for stage in stages:
                due += SHARES[stage.name] * seconds / TOTAL
                began = time.monotonic()
                limit = limits.get(stage.name, max(1.0, start + due - began))
                _print(
                    log, f"\n== {stage.name}: at {began - start:.0f} s, until {began - start + limit:.0f} s\n"
                )
                failures = run_stage(stage, work, limit, log)
                results["seconds"][stage.name] = round(time.monotonic() - began, 1)
                stage_results = _read_results(work / f"{stage.name}.json")
                results["failures"] += [
                    f"{stage.name}: {text}" for text in (*failures, *stage_results.pop("failures", []))
                ]
                merge(results, stage_results)
                write(results, out)
            _print(log, "\n" + "\n".join(table.lines(results)) + "\n")
            _print(log, f"\nwrote {out}; {time.monotonic() - start:.0f} s in all\n")
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return 1 if results["failures"] else 0


def _raise_interrupt(*_: object) -> None:
    """Handle SIGTERM like an interrupt, so that the stage's processes are ended too."""
    raise KeyboardInterrupt


def _print(log: IO[bytes], text: str) -> None:
    print(text, end="", flush=True)
    log.write(text.encode())
    log.flush()


def _read_results(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text()) if path.exists() else {}


def write(results: Mapping[str, Any], out: Path) -> None:
    """Write the results so far. They replace the previous ones atomically, so that a cut never leaves half a file."""
    name = table.slug(results)
    for suffix, text in (
        ("json", json.dumps(table.record(results), indent=1) + "\n"),
        ("txt", "\n".join(table.lines(results)) + "\n"),
    ):
        new = out / f"{name}.{suffix}.new"
        new.write_text(text)
        new.replace(out / f"{name}.{suffix}")
    if name != table.UNNAMED:
        for path in out.glob(f"{table.UNNAMED}.*"):
            path.unlink()


def run_stage(stage: Stage, work: Path, limit: float, log: IO[bytes]) -> list[str]:
    """Run a stage and return its failures. Its results, if any, are in `work`."""
    failures, deadline = [], time.monotonic() + limit
    for command in stage.commands:
        if "--stage" in command:
            seconds_left = max(0.1, deadline - time.monotonic())
            command = [*command, "--out", str(work), "--seconds", f"{seconds_left:.1f}"]
        status = run(command, stage.environment, deadline, log)
        if status is None:
            failures.append(f"out of time after {limit:.0f} s")
            break
        if status != 0:
            failures.append(f"{_describe(command)} ended with status {status}; see log.txt")
    return failures


def _describe(command: Sequence[str]) -> str:
    return (
        " ".join(Path(word).name for word in command if word.endswith(".py") or word == "--stage")
        or command[0]
    )


def run(
    command: Sequence[str], environment: Mapping[str, str], deadline: float, log: IO[bytes]
) -> int | None:
    """Run a command, pass its output on, and return its exit status, or None if the time was up.

    The command leads its own process group. At the deadline only the command is interrupted, so that pytest stops and
    reports failures. Then the rest of the group is killed, as it is when the command ends by itself or this process
    does.
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
    reader = threading.Thread(target=_copy_output, args=(process.stdout, log), daemon=True)
    reader.start()
    timed_out = False
    try:
        process.wait(max(0.0, deadline - time.monotonic()))
    except subprocess.TimeoutExpired:
        timed_out = True
        process.send_signal(signal.SIGINT)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(GRACE)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        reader.join(2.0)
    return None if timed_out else process.returncode


def _copy_output(source: IO[bytes], log: IO[bytes]) -> None:
    while text := os.read(source.fileno(), 1 << 16):
        sys.stdout.buffer.write(text)
        sys.stdout.buffer.flush()
        log.write(text)
        log.flush()
