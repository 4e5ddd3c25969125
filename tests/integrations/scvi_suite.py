"""Runs scvi-tools' own tests with fastvae: `make test-scvi`, or python tests/integrations/scvi_suite.py.

They are part of the source distribution of the installed version, which pip downloads into build/scvi-tools once. This
runs those of distributions, modules and models, including external ones. A few fail by themselves, because of missing
or incompatible packages, and some are random. Therefore, tests that fail with fastvae are run without it too, and those
that pass then, once more with it. A test that fails only with fastvae, twice, is an error.

This file is also the plugin of those runs (`-p scvi_suite`).
"""

import os
import subprocess
import sys
import tarfile
import xml.etree.ElementTree as ElementTree
from importlib import metadata
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
SWITCH = "FASTVAE_IN_SCVI"
FOLDERS = ("tests/distributions", "tests/module", "tests/model", "tests/external")


def pytest_configure(config: Any) -> None:
    import rich.pretty  # noqa: F401  what their tests take for imported

    if os.environ.get(SWITCH) == "1":
        from fastvae.integrations.scvi import accelerate

        accelerate()


def pytest_unconfigure(config: Any) -> None:
    if os.environ.get(SWITCH) == "1":
        from fastvae.integrations.scvi import status

        found, served = status(), ROOT / "build" / "scvi-tools" / "served"
        assert found.active
        served.mkdir(exist_ok=True)
        (served / f"{os.getpid()}.txt").write_text(str(sum(found.served.values())))


def fetched(version: str) -> Path:
    """The folder of scvi-tools' source distribution."""
    build = ROOT / "build" / "scvi-tools"
    folder = build / f"scvi_tools-{version}"
    if not (folder / "tests").is_dir():
        print(f"== fetching the source distribution of scvi-tools {version}", flush=True)
        build.mkdir(parents=True, exist_ok=True)
        pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "download", "-q", "-d", str(build)]
        subprocess.run([*pip, "--no-deps", "--no-binary", "scvi-tools", f"scvi-tools=={version}"], check=True)
        (archive,) = build.glob(f"scvi_tools-{version}.tar.gz")
        with tarfile.open(archive) as tar:
            tar.extractall(build, filter="data")
    return folder


def run(folder: Path, accelerated: bool, *tests: str) -> dict[str, bool]:
    """Test name -> whether it passed, for every test that was not skipped."""
    report = folder.parent / f"{'with' if accelerated else 'without'}.xml"
    report.unlink(missing_ok=True)
    environment = {
        **os.environ,
        SWITCH: str(int(accelerated)),
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join((str(ROOT), str(Path(__file__).parent))),
    }
    command = [sys.executable, "-m", "pytest", "-q", "-p", "scvi_suite", "-p", "no:cacheprovider"]
    command += [
        "--tb=no",
        "-W",
        "ignore",
        "--continue-on-collection-errors",
        f"--junitxml={report}",
        "-o",
        "junit_family=xunit1",
    ]
    try:
        import xdist  # noqa: F401
    except ImportError:
        pass
    else:
        command += ["-n", str(min(os.cpu_count() or 1, 8)), "--dist", "worksteal"]
    subprocess.run([*command, *tests], cwd=folder, env=environment, stdout=subprocess.DEVNULL, check=False)
    if not report.exists():
        sys.exit(f"scvi-tools' tests did not run: {' '.join(command)}, in {folder}")
    outcomes: dict[str, bool] = {}
    for case in ElementTree.parse(report).iter("testcase"):
        kinds = {child.tag for child in case}
        if "skipped" not in kinds:
            file, classname = case.get("file", ""), case.get("classname", "")
            inside = classname.removeprefix(file.removesuffix(".py").replace("/", ".")).strip(".")
            name = "::".join(filter(None, (file, *inside.split("."), case.get("name"))))
            if not classname:  # the whole file, where importing it failed
                name = file
            # An error outside the test, as in its teardown, has a second entry.
            outcomes[name] = outcomes.get(name, True) and not kinds & {"failure", "error"}
    return outcomes


def main() -> int:
    try:
        version = metadata.version("scvi-tools")
    except metadata.PackageNotFoundError:
        print("== scvi-tools is not installed (its Python begins with 3.11): none of its tests are run")
        return 0
    folder = fetched(version)
    served = folder.parent / "served"
    for old in served.glob("*.txt"):
        old.unlink()
    print(f"== scvi-tools' own tests, {version}", flush=True)
    outcomes = run(folder, True, *FOLDERS)
    calls = sum(int(file.read_text()) for file in served.glob("*.txt"))
    failed = sorted(name for name, passed in outcomes.items() if not passed)
    print(
        f"   with fastvae: {len(outcomes)} run, {len(failed)} failed; {calls} calls were served", flush=True
    )
    if len(outcomes) < 100 or calls == 0:
        print("   too few: something is wrong with the run itself")
        return 1
    for accelerated in (False, True):
        # Without fastvae, those that pass remain; with it, those that fail again.
        outcomes = run(folder, accelerated, *failed) if failed else {}
        failed = [name for name in failed if outcomes.get(name, not accelerated) is not accelerated]
        if not accelerated:
            print(f"   of which {len(failed)} pass without", flush=True)
    for name in failed:
        print(f"   fails only with fastvae: {name}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
