"""`fastvae doctor`."""

import fastvae
from fastvae import backend, cli


def test_doctor(capsys):
    assert cli.main(["doctor"]) == 0
    text, errors = capsys.readouterr()
    assert text == fastvae.show_config() + "\n"
    assert errors == ""


def test_doctor_without_the_extension(capsys, monkeypatch):
    reason = "the compiled extension is not installed; build it with: pip install ."
    monkeypatch.setattr(backend, "_loaded", {"reference": backend._reference})
    monkeypatch.setattr(backend, "_missing", {"native": reason})
    assert cli.main(["doctor"]) == 1
    text, errors = capsys.readouterr()
    assert text.startswith(f"fastvae {fastvae.__version__}\n")
    assert errors == f"fastvae: native does not serve the CPU: {reason}\n"
