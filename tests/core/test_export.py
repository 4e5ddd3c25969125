"""Models that hold an ELBO leave PyTorch, or are made without values first: export, TorchScript, ONNX, meta tensors."""

import io
import runpy
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import fastvae

ROOT = Path(__file__).parents[2]


class VAE(nn.Module):
    """Its forward is what runs after training, without the ELBO."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Linear(6, 4)
        self.decoder = nn.Linear(2, 6)
        self.elbo = fastvae.ELBO(fastvae.likelihoods.Gaussian("learned"), beta=0.5)

    def forward(self, x: Tensor) -> Tensor:
        return self.decoder(self.encoder(x)[:, :2])


class Training(VAE):
    def forward(self, x: Tensor) -> Tensor:
        mu, logvar = self.encoder(x).chunk(2, 1)
        _, kl = self.elbo.reparameterize(mu, logvar)
        return self.elbo(self.decoder(mu), x, kl=kl).loss


X = torch.rand(3, 6)


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("kind", [VAE, Training])
def test_export_gives_what_the_model_gives(kind: type[VAE], strict: bool) -> None:
    model = kind()
    exported = torch.export.export(model, (X,), strict=strict).module()
    torch.testing.assert_close(exported(X), model(X))


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_torchscript_compiles_a_model_that_does_not_call_its_elbo() -> None:
    model = VAE()
    torch.testing.assert_close(torch.jit.script(model)(X), model(X))
    with pytest.raises(torch.jit.frontend.NotSupportedError, match="keyword-only arguments"):
        torch.jit.script(Training())


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_the_old_onnx_exporter_names_the_op_it_does_not_know(tmp_path: Path) -> None:
    pytest.importorskip("onnx", reason="onnx is not installed")
    torch.onnx.export(VAE(), (X,), io.BytesIO(), dynamo=False)
    with pytest.raises(torch.onnx.errors.UnsupportedOperatorError, match="fastvae::reparameterize_kl"):
        torch.onnx.export(Training(), (X,), io.BytesIO(), dynamo=False)


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_the_onnx_example_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("onnxscript", reason="onnx and onnxscript are not installed")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["onnx_export.py", "2"])
    runpy.run_path(str(ROOT / "examples" / "onnx_export.py"))
    difference = float(capsys.readouterr().out.split()[-1])
    assert difference < 1e-4
    assert sorted(path.name for path in tmp_path.iterdir()) == ["decoder.onnx", "encoder.onnx"]


def test_load_state_dict_assign_fills_a_model_made_on_meta() -> None:
    trained = Training()
    with torch.no_grad():
        trained.elbo.likelihood.logvar.fill_(-1)
    with torch.device("meta"):
        model = Training()
    model.load_state_dict(trained.state_dict(), assign=True)
    assert model.elbo.beta.item() == 0.5
    torch.manual_seed(0)
    want = trained(X)
    torch.manual_seed(0)
    torch.testing.assert_close(model(X), want)


def test_load_state_dict_leaves_a_beta_that_has_a_value_alone() -> None:
    model = Training()
    beta = model.elbo.beta
    model.elbo.beta = 0.25
    model.load_state_dict(Training().state_dict(), assign=True)
    assert model.elbo.beta is beta
    assert beta.item() == 0.25
