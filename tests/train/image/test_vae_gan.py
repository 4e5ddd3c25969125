"""The recipe `vae-gan`: the gradients of its updates, and its runs."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from run_files import assert_same_run, error_line, read_metrics, train_images, weights
from torch import nn

from fastvae import cli, functional, reference
from fastvae.train import callbacks, runs, trainer
from fastvae.train.image import KIND, data, generate, layers, load
from fastvae.train.image.gan import AdversarialVAE as Module
from fastvae.train.image.recipes.resnet import Photos
from fastvae.train.image.recipes.vae_gan import VAEGAN, Discriminator

pytestmark = pytest.mark.usefixtures("one_thread", "no_pictures")


@pytest.fixture
def steps(colours, tmp_path, monkeypatch) -> list[tuple[str, dict[str, torch.Tensor]]]:
    """Train a VAE-GAN for one epoch, and return the network and all gradients of each optimiser step."""
    recorded: list[tuple[str, dict[str, torch.Tensor]]] = []
    step = torch.optim.Adam.step

    def record_step(self, *args, **kwargs):
        own = {id(p) for group in self.param_groups for p in group["params"]}
        named = dict(model[0].named_parameters())
        mine = [name for name, p in named.items() if id(p) in own]
        network = mine[0].partition(".")[0]  # the scales come after the decoder's weights
        recorded.append((network, {name: p.grad.clone() for name, p in named.items() if p.grad is not None}))
        return step(self, *args, **kwargs)

    model: list[nn.Module] = []
    build = KIND.build
    monkeypatch.setattr(KIND, "build", lambda *args: model.append(build(*args)) or model[-1])
    monkeypatch.setattr(torch.optim.Adam, "step", record_step)
    assert train_images("vae-gan", tmp_path / "run", colours, "--epochs", "1", "--ema", "0") == 0
    return recorded


def test_each_update_has_gradients_of_its_networks_only(steps):
    """The discriminator's update has no gradients of the other networks, and vice versa."""
    assert [network for network, _ in steps] == ["discriminator", "encoder", "decoder"] * 3
    for network, gradients in steps:
        parts = {name.partition(".")[0] for name in gradients}
        if network == "discriminator":
            assert parts == {"discriminator"}
        elif network == "encoder":
            assert parts == {"encoder", "decoder", "elbo", "pixels"}
        else:
            assert parts == {"decoder", "elbo", "pixels"}, "the encoder's are used up"
        assert all(gradient.isfinite().all() for gradient in gradients.values())
        assert sum(gradient.abs().sum() for gradient in gradients.values()) > 0


def new_vae_gan(**changes) -> "nn.Module":
    torch.manual_seed(0)
    settings = VAEGAN(channels=4, latent=3, **changes)
    images = data.Images(
        "", torch.randint(0, 256, (8, 16, 16, 3), dtype=torch.uint8), torch.zeros(1, 16, 16, 3)
    )
    return runs.new_model(KIND, settings, (16, 16, 3), images)  # fmt: skip


class Recorder:
    """Stands for an optimiser: it keeps the gradients and changes no weights."""

    def __init__(self, parameters: list[nn.Parameter]) -> None:
        self.param_groups = [{"params": parameters}]
        self.optimizer = self
        self.gradients: list[torch.Tensor] = []

    def step(self) -> None:
        self.gradients = [p.grad.clone() for p in self.param_groups[0]["params"]]

    def zero_grad(self) -> None:
        for p in self.param_groups[0]["params"]:
            p.grad = None


@pytest.mark.parametrize(
    ("batch_idx", "steps_done", "clip"), [(0, 10**6, 0.0), (1, 10**6, 0.0), (16, 125, 0.0), (1, 10**6, 0.5)]
)
def test_step_gradients_agree_with_autograd_of_written_out_losses(monkeypatch, batch_idx, steps_done, clip):
    """Compares the gradients of each network with those of the three losses by autograd."""
    model = new_vae_gan(adversarial=0.7, penalty=3.0, beta=5.0, clip=clip)
    monkeypatch.setattr(Module, "steps_done", steps_done)
    scales = [*model.elbo.parameters(), *model.pixels.parameters()]
    parts = [list(net.parameters()) for net in (model.encoder, model.decoder, model.discriminator)]
    optimizers = [Recorder(parts[0]), Recorder([*parts[1], *scales]), Recorder(parts[2])]
    monkeypatch.setattr(model, "optimizers", lambda: optimizers)
    monkeypatch.setattr(model, "manual_backward", lambda loss, **options: loss.backward(**options))
    model.on_train_epoch_start()
    x = torch.rand(6, 3, 16, 16)
    model.training_step((x, 40), batch_idx)

    def noise(seed: int, mu: torch.Tensor, logvar: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return functional.reparameterize_kl(
            mu, logvar, seed=torch.tensor([seed, 4 * steps_done]), row_offset=40
        )

    mu, logvar = model.encode(x)
    z, kl = noise(0, mu, logvar)
    prior_z, _ = noise(2, torch.zeros(6, 3), torch.zeros(6, 3))
    reconstruction, new = model.decode(z), model.decode(prior_z)
    discriminator = model.discriminator
    fakes = torch.cat((reconstruction, new)).detach()
    own = -F.logsigmoid(discriminator(x)[1]).mean() - F.logsigmoid(-discriminator(fakes)[1]).mean()
    if batch_idx % 16 == 0:
        given = x.clone().requires_grad_()
        (gradient_of_score,) = torch.autograd.grad(discriminator(given)[1].sum(), given, create_graph=True)
        own = own + 16 * 3.0 / 2 * gradient_of_score.flatten(1).square().sum(1).mean()
    features, real = discriminator(reconstruction)[0], discriminator(x)[0]
    matching = sum(
        reference.gaussian_nll(
            features[name], real[name].detach(), likelihood.logvar, logvar_bounds=likelihood.logvar_bounds
        )
        for name, likelihood in model.elbo.likelihood.parts.items()
    )
    loss = (matching + 5.0 * kl).mean()
    score = -F.logsigmoid(discriminator(torch.cat((reconstruction, new)))[1]).mean()

    def gradients(of: torch.Tensor, parameters: list[nn.Parameter]) -> torch.Tensor:
        found = torch.autograd.grad(of, parameters, retain_graph=True)
        return torch.cat([gradient.flatten() for gradient in found])

    encoder, decoder = gradients(loss, parts[0]), gradients(loss, parts[1])
    adversary = gradients(score, parts[1])
    share = 0.7 * min(1, steps_done / 500)
    decoder = decoder + share * decoder.norm() / adversary.norm() * adversary
    if clip:
        length = torch.cat((encoder, decoder)).norm()
        assert length > clip
        encoder, decoder = (clip / length * gradient for gradient in (encoder, decoder))
    measured = reference.gaussian_nll(
        reconstruction.detach(), x, model.pixels.logvar, logvar_bounds=model.pixels.logvar_bounds
    ).mean()
    expected = [
        encoder,
        torch.cat((decoder, gradients(loss, scales[:-1]), gradients(measured, scales[-1:]))),
        gradients(own, parts[2]),
    ]
    for optimizer, gradient in zip(optimizers, expected, strict=True):
        found = torch.cat([g.flatten() for g in optimizer.gradients])
        torch.testing.assert_close(found, gradient, rtol=2e-3, atol=2e-4 * gradient.abs().max().item())


def test_learning_rates_follow_config_after_resume(colours, tmp_path, monkeypatch):
    """The scales have ten times the learning rate and the discriminator twice, also after it was changed."""
    out = tmp_path / "run"
    assert train_images("vae-gan", out, colours, "--epochs", "1", "--lr", "0.001") == 0
    config = out / "config.toml"
    config.write_text(config.read_text().replace("lr = 0.001", "lr = 0.002"))
    recorded: list[list[float]] = []
    start = Module.on_train_epoch_start
    monkeypatch.setattr(
        Module,
        "on_train_epoch_start",
        lambda self: (
            recorded.extend([g["lr"] for g in o.param_groups] for o in self.trainer.optimizers),
            start(self),
        ),
    )
    assert cli.main(["resume", str(out), "--epochs", "2"]) == 0
    assert recorded == [[0.002], [0.002, 0.02], [0.004]]


def test_best_checkpoint_is_the_last_epoch(tmp_path):
    reconstruction = trainer.make_trainer(VAEGAN(accelerator="cpu"), tmp_path, callbacks.Callback())
    (best,) = (kept for kept in reconstruction.callbacks if isinstance(kept, callbacks.SaveBest))
    assert best.monitor is None
    reconstruction = trainer.make_trainer(Photos(accelerator="cpu"), tmp_path, callbacks.Callback())
    (best,) = (kept for kept in reconstruction.callbacks if isinstance(kept, callbacks.SaveBest))
    assert best.monitor == callbacks.MONITOR


def test_init_from_images_sets_feature_variances():
    model = new_vae_gan()
    x = torch.rand(64, 3, 16, 16)
    model.init_from_images(x)
    features, _ = model.discriminator(x)
    for name, likelihood in model.elbo.likelihood.parts.items():
        logvar = reference.bounded_logvar(likelihood.logvar, likelihood.logvar_bounds)
        assert logvar.exp().item() == pytest.approx(
            features[name].var(0, correction=0).mean().item(), rel=0.2
        )


def test_discriminator_returns_features_and_score():
    torch.manual_seed(0)
    discriminator = Discriminator(layers.halving_sides("", 33, 64), 3, 4)
    features, score = discriminator(torch.rand(5, 3, 33, 64))
    assert score.shape == (5,)
    assert list(features) == discriminator.feature_names == ["layer0", "layer1", "layer2"]
    assert features["layer1"].shape == (5, 8, 8, 16)
    small = Discriminator(layers.halving_sides("", 8, 8), 1, 4)
    assert list(small(torch.rand(2, 1, 8, 8))[0]) == ["layer0"]


def test_r1_penalty_agrees_with_finite_differences():
    model = new_vae_gan()
    x = torch.rand(2, 3, 16, 16)
    model.discriminator.double()
    found = model._r1_penalty(x.double())
    step, lengths = 1e-4, []
    for image in x.double():
        moved = image + step * torch.eye(768).view(768, 3, 16, 16).double()
        up = model.discriminator(moved)[1]
        down = model.discriminator(2 * image - moved)[1]
        lengths.append(((up - down) / (2 * step)).square().sum())
    assert found.item() == pytest.approx(torch.stack(lengths).mean().item(), rel=1e-4)
    found.backward()
    assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in model.discriminator.parameters())


@pytest.fixture(scope="module")
def gan_run(colours, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("gan") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fastvae.train.callbacks.should_save_examples", lambda trainer: False)
        assert train_images("vae-gan", out, colours, "--epochs", "2") == 0
    return out


def test_resumed_run_equals_uninterrupted_run(colours, gan_run, tmp_path):
    out = tmp_path / "stopped"
    assert train_images("vae-gan", out, colours, "--epochs", "1") == 0
    assert cli.main(["resume", str(out), "--epochs", "2"]) == 0
    assert_same_run(out, gan_run)


def test_commands_support_vae_gan_runs(gan_run, tmp_path, capsys):
    assert weights(gan_run, "best").keys() == weights(gan_run).keys()
    assert all(
        torch.equal(a, b)
        for a, b in zip(weights(gan_run, "best").values(), weights(gan_run).values(), strict=True)
    )
    row = read_metrics(gan_run)[-1]
    assert float(row["train_features"]) != float(row["train_nll"])
    for command in ("sample", "reconstruct", "interpolate", "traverse", "inpaint"):
        assert cli.main([command, str(gan_run), "--out", str(tmp_path / "x.png")]) == 0
    capsys.readouterr()
    assert cli.main(["evaluate", str(gan_run), "--samples", "3"]) == 0
    output = capsys.readouterr().out
    for name in ("generated.png", "neighbours.png"):
        assert str(gan_run / name) in output
        with Image.open(gan_run / name) as image:
            image.load()
    assert "bits per dimension" in output


def test_evaluate_with_other_data_draws_no_neighbours(gan_run, colours, tmp_path, capsys):
    np.savez(tmp_path / "others.npz", x_train=np.zeros((9, 16, 20, 3), np.uint8))
    before = (gan_run / "neighbours.png").read_bytes() if (gan_run / "neighbours.png").exists() else b""
    options = ["--data", str(tmp_path / "others.npz"), "--samples", "2"]
    assert cli.main(["evaluate", str(gan_run), *options]) == 0
    assert "neighbours.png is not drawn" in capsys.readouterr().out
    assert ((gan_run / "neighbours.png").read_bytes() if before else b"") == before


def test_nearest_neighbours_include_mirrored_images(gan_run, tmp_path, monkeypatch):
    """The nearest image of the first example is mirrored."""
    run = load(gan_run)
    train = run.images.train
    shown = torch.stack([train[7].flip(1), train[3]]) / 255
    monkeypatch.setattr(generate, "_decode_means", lambda run, z: shown + 0.01)
    prior_z = []
    monkeypatch.setattr(generate.pictures, "save_grid", lambda rows, path: prior_z.extend(rows))
    generate.nearest_neighbours(run, tmp_path / "x.png", n=2, num_neighbours=2)
    new, first, second = prior_z
    assert torch.equal(new, shown + 0.01)
    assert torch.equal(first, train[[7, 3]] / 255)
    assert not torch.equal(second[0], first[0])


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--likelihood", "dmol"], "vae-gan compares the features of a discriminator"),
        (["--variance", "fixed"], "vae-gan compares the features of a discriminator"),
        (["--devices", "2"], "needs one device and --precision 32-true or bf16-mixed, got --devices 2"),
        (["--precision", "16-mixed"], "got --devices 1 --strategy auto --precision 16-mixed"),
        (["--strategy", "ddp"], "got --devices 1 --strategy ddp"),
        (["--sigma", "2"], "--sigma does not apply to vae-gan, which has no such likelihood"),
        (["--adversarial", "-1"], "--adversarial must be at least 0 and at most 100, got -1"),
    ],
)
def test_train_with_unsupported_option_fails(colours, tmp_path, capsys, options, words):
    assert train_images("vae-gan", tmp_path / "run", colours, *options) == 2
    assert words in error_line(capsys)


def test_non_finite_step_is_skipped(colours, tmp_path, monkeypatch, capsys):
    add = Module._add_adversarial

    def spoil(self, loss, share):
        add(self, loss, share)
        if self.global_step < 3:  # only for the first batch
            next(self.decoder.parameters()).grad.fill_(math.nan)

    monkeypatch.setattr(Module, "_add_adversarial", spoil)
    assert train_images("vae-gan", tmp_path / "run", colours, "--epochs", "1", "--clip", "0") == 0
    assert "warning: 1 of 3 steps were skipped" in capsys.readouterr().out
    assert all(value.isfinite().all() for value in weights(tmp_path / "run").values())


def test_epoch_of_non_finite_steps_fails(colours, tmp_path, monkeypatch, capsys):
    """The discriminator has already made a step, so the learning rate may be the cause even in the first epoch."""
    add = Module._add_adversarial

    def spoil(self, loss, share):
        add(self, loss, share)
        next(self.decoder.parameters()).grad.fill_(math.nan)

    monkeypatch.setattr(Module, "_add_adversarial", spoil)
    assert train_images("vae-gan", tmp_path / "run", colours, "--epochs", "1") == 2
    assert (
        "every step of epoch 1 was skipped because the gradient of step 1 is not finite; try a smaller --lr"
        in (error_line(capsys))
    )


def test_learning_rate_of_all_three_networks_follows_the_schedule(colours, tmp_path, monkeypatch):
    rates, step = [], torch.optim.Adam.step

    def record(self, *args, **kwargs):
        rates.append([group["lr"] for group in self.param_groups])
        return step(self, *args, **kwargs)

    monkeypatch.setattr(torch.optim.Adam, "step", record)
    options = ("--lr", "1e-4", "--lr-schedule", "cosine", "--epochs", "2", "--batch-size", "40")
    assert train_images("vae-gan", tmp_path / "run", colours, *options) == 0
    step_rates = [[2e-4], [1e-4], [1e-4, 1e-3]]
    expected = [[factor * rate for rate in group] for factor in (1, 0.5) for group in step_rates]
    assert [len(group) for group in rates] == [len(group) for group in expected]
    np.testing.assert_allclose(np.concatenate(rates), np.concatenate(expected), rtol=1e-12)
