"""`make gpu` without a GPU: if a stage fails or times out, existing results are kept and no process is left over."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
sys.path.append(str(ROOT))  # last, so that the installed fastvae is tested

from benchmarks import cases  # noqa: E402
from benchmarks.gpu import build, plan, run, stage, steps, table  # noqa: E402
from benchmarks.gpu.plan import Stage  # noqa: E402

NAMES = list(plan.SHARES)
MACHINE = {"machine": "NVIDIA H200", "instruction_set": "cuda", "backend": "native", "copy_gb_per_s": 4300}

# A substitute for a stage: it writes results, prints, and then behaves as requested.
FAKE_STAGE = """
import json, pathlib, subprocess, sys, time
name, work, then = sys.argv[1], sys.argv[sys.argv.index("--out") + 1], sys.argv[2]
result = {"passes": [{"pass": name, "gb_per_s": {"native": 4000}, "of_copy": {"native": 0.93}}]}
if name == "passes":
    result |= MACHINE
pathlib.Path(work, name + ".json").write_text(json.dumps(result))
print("began", name)
if then == "hangs":
    # A child that no interrupt reaches, and which outlives its parent unless somebody ends it.
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    print("child", child.pid, flush=True)
    try:
        time.sleep(60)
    except KeyboardInterrupt:
        print("interrupted", name, flush=True)
if then == "fails":
    sys.exit("broken " + name)
""".replace("MACHINE", repr(MACHINE))


def fake_stages(behaviour: dict[str, str]) -> list[Stage]:
    """All stages, of which those in `behaviour` misbehave. "--stage" marks those that get an output folder."""
    return [
        Stage(name, [[sys.executable, "-c", FAKE_STAGE, name, behaviour.get(name, "ends"), "--stage", name]])
        for name in NAMES
    ]


def is_running(pid: int) -> bool:
    stat = Path(f"/proc/{pid}/stat")
    return stat.exists() and stat.read_text().rpartition(")")[2].split()[0] != "Z"


def remaining_children(out: Path) -> list[int]:
    """The children of hanging stages that still exist after a short wait."""
    pids = [int(pid) for pid in re.findall(r"child (\d+)", (out / "log.txt").read_text())]
    assert pids
    for _ in range(50):
        if not any(map(is_running, pids)):
            return []
        time.sleep(0.05)
    return [pid for pid in pids if is_running(pid)]


def test_counts_are_timed_dense_and_sparse_and_in_a_whole_step() -> None:
    timed = [case.name for case in cases.GPU_CASES]
    for name in ("NB", "ZINB", "multinomial"):
        for rows in (128, 512):
            assert f"{name} {rows} x 20000" in timed
            assert f"{name} {rows} x 20000, CSR" in timed
    assert "hand-written ZINB, 128 x 20000" in steps.MODELS


# The first stage, one with results and the last; the others are handled in the same way.
CUTS = [
    pytest.param(name, marks=() if name in ("build", "versus", "tuning") else pytest.mark.slow)
    for name in NAMES
]


@pytest.mark.parametrize("cut", CUTS)
def test_stage_that_times_out_keeps_its_results(cut: str, tmp_path: Path) -> None:
    status = run.all_stages(fake_stages({cut: "hangs"}), tmp_path, 480, {cut: 3.0})
    assert status == 1
    results = json.loads((tmp_path / "nvidia-h200.json").read_text())["runs"]["cuda"]
    assert results["failures"] == [f"{cut}: out of time after 3 s"]
    # Including the stage that timed out, with the results it had written.
    assert [item["pass"] for item in results["passes"]] == NAMES
    assert list(results["seconds"]) == NAMES
    log = (tmp_path / "log.txt").read_text()
    assert f"interrupted {cut}" in log
    text = (tmp_path / "nvidia-h200.txt").read_text()
    assert f"FAILED: {cut}: out of time" in text
    assert "93.0%" in text
    assert remaining_children(tmp_path) == []
    assert {path.name for path in tmp_path.iterdir()} == {"log.txt", "nvidia-h200.json", "nvidia-h200.txt"}


def test_failing_stage_is_reported_and_others_run(tmp_path: Path) -> None:
    assert run.all_stages(fake_stages({"build": "fails"}), tmp_path, 480, {}) == 1
    results = json.loads((tmp_path / "nvidia-h200.json").read_text())["runs"]["cuda"]
    assert [item["pass"] for item in results["passes"]] == NAMES
    assert results["failures"] == ["build: --stage ended with status 1; see log.txt"]
    assert "broken build" in (tmp_path / "log.txt").read_text()
    assert run.all_stages(fake_stages({}), tmp_path, 480, {}) == 0


RUNS = """
import sys
sys.path[:0] = {paths!r}
from pathlib import Path
import test_gpu_run as t
sys.exit(t.run.all_stages(t.fake_stages({{"versus": "hangs"}}), Path(sys.argv[1]), 480, {{}}))
"""


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL], ids=lambda s: s.name)
def test_terminated_run_keeps_results_and_ends_processes(how: signal.Signals, tmp_path: Path) -> None:
    """Previous stages keep their results, and the processes of the current stage end."""
    script = RUNS.format(paths=[str(Path(__file__).parent), str(ROOT / "tests"), str(ROOT)])
    process = subprocess.Popen(
        [sys.executable, "-c", script, str(tmp_path)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        preexec_fn=lambda: signal.signal(
            signal.SIGINT, signal.SIG_DFL
        ),  # which may be ignored where tests run
    )
    try:
        log = tmp_path / "log.txt"
        for _ in range(600):
            if log.exists() and "child" in log.read_text():
                break
            time.sleep(0.05)
        stage_pid = next(
            int(pid)
            for pid in os.listdir("/proc")
            if pid.isdigit() and str(process.pid) == parent_of(int(pid))
        )
        process.send_signal(how)
        process.wait(20)
    finally:
        process.kill()
    results = json.loads((tmp_path / "nvidia-h200.json").read_text())["runs"]["cuda"]
    assert list(results["seconds"]) == NAMES[: NAMES.index("versus")]
    for _ in range(50):
        if not is_running(stage_pid):
            break
        time.sleep(0.05)
    assert not is_running(stage_pid)
    if how != signal.SIGKILL:
        assert remaining_children(tmp_path) == []
    else:  # whose children only a process group can reach
        for pid in remaining_children(tmp_path):
            os.kill(pid, signal.SIGKILL)


def parent_of(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1]
    except OSError:
        return ""


def test_shares_and_interrupts_fit_into_the_total() -> None:
    """Including the time for interrupting every stage."""
    assert sum(plan.SHARES.values()) + run.GRACE * 5 <= run.TOTAL == 480


def test_failing_item_is_reported_and_others_run(capsys: pytest.CaptureFixture[str]) -> None:
    def broken() -> stage.Results:
        raise ValueError("not this one\nmore")

    items = [("a", lambda: {"x": [1]}), ("b", broken), ("c", lambda: {"x": [2], "y": {"k": 3}})]
    results: stage.Results = {}
    for result in stage.isolated(items, time.monotonic() + 60):
        stage.merge(results, result)
    assert results == {"x": [1, 2], "y": {"k": 3}, "failures": ["b: ValueError: not this one"]}
    assert "FAILED: b" in capsys.readouterr().out
    late = list(stage.isolated(items, time.monotonic() - 1))
    assert late == [{"failures": ["out of time before a"]}]


def test_sources_digest_equals_that_of_setup() -> None:
    from fastvae import _build_info

    assert build.sources() == _build_info.SOURCES


def test_selected_tests_exist() -> None:
    for one in plan.stages():
        for word in (word for command in one.commands for word in command):
            if word.endswith(".py"):
                assert (ROOT / word).exists(), word
    source = "".join((ROOT / file).read_text() for file in (plan.CUDA, plan.TRITON))
    for name in re.findall(r"\w*_\w+", plan.SMOKE):
        assert re.search(rf"\b(def )?test_\w*{name.removeprefix('test_')}|{name}", source), name


# ---------------------------------------------------------------------------------------------------------------------
# Complete runs on the CPU
# ---------------------------------------------------------------------------------------------------------------------


def rehearse(out: Path, *options: str) -> tuple[dict, str]:
    command = [sys.executable, "-m", "benchmarks.gpu", "--rehearse", "--out", str(out), *options]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=900)
    records = list(out.glob("*.json"))
    assert len(records) == 1, done.stdout[-5000:] + done.stderr[-5000:]
    (results,) = json.loads(records[0].read_text())["runs"].values()
    return results, done.stdout


@pytest.mark.slow
def test_rehearsal_completes_all_stages(tmp_path: Path) -> None:
    results, printed = rehearse(tmp_path, "--seconds", "2000")
    assert results["failures"] == [], printed[-8000:]
    assert results["build"] == "kept"
    assert {item["pass"].partition(",")[0] for item in results["passes"]} >= {
        "Bernoulli forward + gradient",
        "Gaussian forward + gradient",
        "reparameterise + KL forward",
        "scaling a gradient",
    }
    assert len(results["cases"]) == 3
    assert all("wall_us" in row for row in results["cases"])
    assert len(results["steps"]) == 3
    for item in results["steps"]:
        assert item["us"].keys() == {
            "fused",
            "eager",
            "compile",
            "compile(fused)",
            "graph_step(fused)",
            "graph_step(eager)",
        }
    assert results["tuned"].keys() == {"nll", "sample", "sample_gradient", "scale"}
    assert len(re.findall(r"\b\d+ passed", printed)) == 3
    assert "\n".join(table.lines(results)) in printed


@pytest.mark.slow
def test_rehearsal_with_a_timeout_keeps_other_stages(tmp_path: Path) -> None:
    """With a real stage; test_stage_that_times_out_keeps_its_results has substitutes of all stages."""
    cut = "steps"
    results, printed = rehearse(tmp_path, "--seconds", "2000", "--limit", f"{cut}=0.5")
    assert [text for text in results["failures"] if not text.startswith(f"{cut}: ")] == [], printed[-8000:]
    assert f"{cut}: out of time after 0 s" in results["failures"]
    assert list(results["seconds"]) == NAMES
    assert {"passes", "cases", "tuned"} <= results.keys()
