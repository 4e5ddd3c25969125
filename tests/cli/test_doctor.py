"""`fastvae doctor`."""

import fastvae
from fastvae import cli
from fastvae.backends import available


def test_doctor_prints_the_configuration(capsys):
    assert cli.main(["doctor"]) == 0
    text, errors = capsys.readouterr()
    assert text == fastvae.show_config() + "\n"
    assert errors == ""


def test_doctor_without_extension_fails_with_reason(capsys, monkeypatch):
    reason = "the compiled extension is not installed; build it with: pip install ."
    monkeypatch.setattr(available, "loaded", {"reference": available.REFERENCE})
    monkeypatch.setattr(available, "missing", {"native": reason})
    assert cli.main(["doctor"]) == 1
    text, errors = capsys.readouterr()
    assert text.startswith(f"fastvae {fastvae.__version__}\n")
    assert errors == f"fastvae: the native kernels do not run on the CPU: {reason}\n"
