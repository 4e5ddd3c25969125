"""The stages of `make gpu`: their order, their share of the time, and their commands."""

import importlib.util
import os
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).parents[2]
REHEARSAL = os.environ.get("FASTVAE_REHEARSAL") == "1"  # set in the process of a stage

# Shares of 480 seconds. Time that a stage does not use goes to the following ones. The rest of the sum is for
# interrupts.
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
TRITON_COUNTS = "tests/backends/triton/test_triton_counts.py"
# The tests that are most likely to show faults of a first run, the most important ones first.
SMOKE = (
    "test_auto_selects or test_against_the_reference or test_manual_seed_and_generator or launches_four_kernels "
    "or does_not_synchronise or not_moved_to_the_gpu or test_graph_replays or test_graph_step_replays"
)
SMOKE_OF_TRITON = "test_against_the_reference and (bernoulli or kl_with_z)"


@dataclass(frozen=True)
class Stage:
    name: str
    commands: list[list[str]]
    """Run one after the other. A measuring stage has one command, this package's `--stage NAME`; others run tests."""
    environment: dict[str, str] = field(default_factory=dict)


def sees_gpu() -> bool:
    """Ask another process, because this one must not initialise CUDA or load the extension that is being built."""
    question = "import sys, torch; sys.exit(not torch.cuda.is_available())"
    return subprocess.run([sys.executable, "-c", question]).returncode == 0


def stages(rehearse: bool = False) -> list[Stage]:
    stages = [stage_of_tests(name, rehearse) or Stage(name, [stage_command(name)]) for name in SHARES]
    rehearsal = {"FASTVAE_REHEARSAL": "1", "CUDA_VISIBLE_DEVICES": ""} if rehearse else {}
    return [Stage(s.name, s.commands, s.environment | rehearsal) for s in stages]


def stage_command(name: str) -> list[str]:
    return [sys.executable, "-m", "benchmarks.gpu", "--stage", name]


def stage_of_tests(name: str, rehearse: bool) -> Stage | None:
    """A stage that runs tests, in one process per core with one thread each; None for other stages."""
    if rehearse:
        # A test that needs no GPU, to check that pytest starts, can be interrupted, and reports failures.
        selection = ["tests/project/test_thinning.py"]
        selections = {key: [selection] for key in ("smoke", "cuda_tests", "triton_tests")}
    else:
        selections = {
            "smoke": [
                ["--tests", "few", CUDA, "-k", SMOKE],
                ["--tests", "few", TRITON, "-k", SMOKE_OF_TRITON],
            ],
            "cuda_tests": [["--tests", "all", CUDA, GRAPHS]],
            # All points of all grids would need 1,759 compilations.
            "triton_tests": [["--tests", "few", TRITON, TRITON_COUNTS]],
        }
    if name not in selections:
        return None
    pytest = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--durations=5"]
    if importlib.util.find_spec("xdist") and not rehearse:
        # Only half as many if the GPU's memory and profiler are the shared resource, and not the compilers.
        processes = min(16, os.cpu_count() or 1) // (1 if name == "triton_tests" else 2)
        pytest += ["-n", str(max(1, processes)), "--dist", "worksteal"]
    return Stage(name, [[*pytest, *selection] for selection in selections[name]], {"OMP_NUM_THREADS": "1"})
