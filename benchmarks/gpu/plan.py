"""The stages of `make gpu`: their order, which part of the time is theirs, and what each of them runs."""

import importlib.util
import os
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).parents[2]
REHEARSAL = os.environ.get("FASTVAE_REHEARSAL") == "1"  # of a stage's process

# Seconds of 480. What a stage leaves of its share the next ones have. What is left over of the sum is for interrupts.
SHARES = {
    "build": 105,
    "smoke": 30,
    "passes": 25,
    "versus": 105,
    "steps": 60,
    "cuda_tests": 50,
    "triton_tests": 50,
    "tuning": 25,
}

CUDA, GRAPHS = "tests/backends/cuda/test_cuda.py", "tests/core/test_graphs.py"
TRITON = "tests/backends/triton/test_triton.py"
# What most faults of a first run would show in, in the order in which it is to be known.
SMOKE = (
    "test_auto_takes or test_against_the_reference or test_seeds or test_four_launches or test_no_host_sync "
    "or nobody_moved or test_graph_replays or test_replays_are"
)
SMOKE_OF_TRITON = "test_against_the_reference and (bernoulli or kl_with_z)"


@dataclass(frozen=True)
class Stage:
    name: str
    commands: list[list[str]]
    """One after the other. A stage that measures has one, this package's `--stage NAME`; others run tests."""
    environment: dict[str, str] = field(default_factory=dict)


def sees_gpu() -> bool:
    """Asked in another process: this one is to stay clear of CUDA, and of the extension that is built."""
    question = "import sys, torch; sys.exit(not torch.cuda.is_available())"
    return subprocess.run([sys.executable, "-c", question]).returncode == 0


def stages(rehearse: bool = False) -> list[Stage]:
    found = [tests(name, rehearse) or Stage(name, [own(name)]) for name in SHARES]
    rehearsal = {"FASTVAE_REHEARSAL": "1", "CUDA_VISIBLE_DEVICES": ""} if rehearse else {}
    return [Stage(s.name, s.commands, s.environment | rehearsal) for s in found]


def own(name: str) -> list[str]:
    return [sys.executable, "-m", "benchmarks.gpu", "--stage", name]


def tests(name: str, rehearse: bool) -> Stage | None:
    """A stage of tests, a process for each core and a thread each; None for others."""
    if rehearse:
        # What needs no GPU, to see pytest start, be interrupted, and tell of failures.
        few = ["tests/project/test_thinning.py"]
        selections = {key: [few] for key in ("smoke", "cuda_tests", "triton_tests")}
    else:
        selections = {
            "smoke": [
                ["--tests", "few", CUDA, "-k", SMOKE],
                ["--tests", "few", TRITON, "-k", SMOKE_OF_TRITON],
            ],
            "cuda_tests": [["--tests", "all", CUDA, GRAPHS]],
            # Every point of every grid would be 1,759 compilations.
            "triton_tests": [["--tests", "few", TRITON]],
        }
    if name not in selections:
        return None
    pytest = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--durations=5"]
    if importlib.util.find_spec("xdist") and not rehearse:
        # Half of them where the GPU's memory and its profiler are shared, and not the compilers.
        processes = min(16, os.cpu_count() or 1) // (1 if name == "triton_tests" else 2)
        pytest += ["-n", str(max(1, processes)), "--dist", "worksteal"]
    return Stage(name, [[*pytest, *selection] for selection in selections[name]], {"OMP_NUM_THREADS": "1"})
