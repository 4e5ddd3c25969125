"""Errors when output cannot be written, torch is missing, or Ctrl-C comes during imports: one line on stderr."""

import os
import sys
from pathlib import Path

import pytest
import rich
from run_files import error_line, run_python

from fastvae import cli

DIGITS = ("train", "mlp", "--data", "digits", "--epochs", "1", "--accelerator", "cpu")


def test_output_to_closed_pipe_fails_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """This is what happens in `fastvae train ... | head -1`."""
    for arguments in (["--version"], [*DIGITS, "--out", str(tmp_path / "run")]):
        reading, writing = os.pipe()
        os.close(reading)
        with os.fdopen(writing, "w") as pipe, monkeypatch.context() as patched:
            patched.setattr(sys, "stdout", pipe)
            assert cli.main(arguments) == 2
        assert error_line(capsys) == "fastvae: cannot write to standard output: broken pipe\n"
        rich.print("What this process prints afterwards is shown.")
        assert capsys.readouterr().out == "What this process prints afterwards is shown.\n"


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no /dev/full")
def test_output_to_full_disk_fails_in_one_line(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with open("/dev/full", "w") as full, monkeypatch.context() as patched:
        patched.setattr(sys, "stdout", full)
        assert cli.main(["--version"]) == 2
    assert error_line(capsys) == "fastvae: cannot write to standard output: no space left on device\n"


def test_closed_output_fails_in_one_line(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patched:
        patched.setattr(sys, "stdout", None)
        assert cli.main(["--version"]) == 2
    assert error_line(capsys) == "fastvae: standard output is closed\n"


def test_other_os_error_is_not_reported_as_output_error(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fail() -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(cli, "app", fail)
    with pytest.raises(OSError, match="Input/output error"):
        cli.main(["--version"])


def test_path_that_is_not_utf_8_fails_in_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([*DIGITS, "--out", os.fsdecode(b"caf\xe9")]) == 2
    assert (
        error_line(capsys)
        == "fastvae: 'caf\\udce9': not valid UTF-8; rename the file, or create a link to it\n"
    )


IMPORTS = """
import sys
class Finder:
    def find_spec(self, name, *rest):
        if name == "torch":
            raise {}
sys.meta_path.insert(0, Finder())
from fastvae.cli import main
sys.exit(main(["doctor"]))
"""


@pytest.mark.parametrize(
    ("raised", "code", "line"),
    [
        (
            'ModuleNotFoundError("No module named \'torch\'", name="torch")',
            2,
            "torch is not installed; install it with: pip install torch",
        ),
        ("KeyboardInterrupt", 130, "interrupted"),
    ],
)
def test_error_while_importing_torch_fails_in_one_line(raised: str, code: int, line: str) -> None:
    """`import fastvae` does not import torch, so the command line has to handle errors of that import."""
    result = run_python("-c", IMPORTS.format(raised))
    assert (result.returncode, result.stderr) == (code, f"fastvae: {line}\n")
