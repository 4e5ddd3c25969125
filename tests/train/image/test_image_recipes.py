"""The recipes for colour and photos, and the VAE-GAN: their networks, their options, what each update reaches."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from run_files import assert_same_run, error_line, read_metrics, weights
from torch import nn

from fastvae import cli, functional, reference
from fastvae.train import callbacks, runs, trainer
from fastvae.train.errors import InputError
from fastvae.train.image import KIND, data, generate, init_weights, layers, load, loader
from fastvae.train.image.gan import AdversarialVAE as Module
from fastvae.train.image.recipes.conv_lstm import ConvLSTM
from fastvae.train.image.recipes.resnet import Photos, ResNet
from fastvae.train.image.recipes.vae_gan import VAEGAN, Discriminator
from fastvae.train.seeding import seeded_generator

pytestmark = pytest.mark.usefixtures("one_thread", "no_pictures")

SMALL = ("--accelerator", "cpu", "--channels", "4", "--latent", "3", "--batch-size", "16")


@pytest.fixture(scope="module")
def colours(tmp_path_factory) -> Path:
    """60 images of 16 x 20 pixels, bright or dark in their upper half, 20 of them held out."""
    path = tmp_path_factory.mktemp("colours") / "colours.npz"
    rng = np.random.default_rng(0)
    x = rng.integers(0, 40, (60, 16, 20, 3), dtype=np.uint8) + np.array([200, 100, 20], np.uint8)
    x[::2, :8] -= 20
    np.savez(path, x_train=x[:40], x_test=x[40:])
    return path


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> Path:
    """A folder of 24 pictures of several sizes."""
    folder = tmp_path_factory.mktemp("pictures")
    rng = np.random.default_rng(0)
    for i in range(24):
        pixels = rng.integers(0, 256, (40 + i, 60, 3), dtype=np.uint8)
        pixels[: 10 + i] = 255
        Image.fromarray(pixels).save(folder / f"{i}.png")
    return folder


def train(recipe: str, out: Path, source: Path, *options: str) -> int:
    return cli.main(["train", recipe, "--data", str(source), "--out", str(out), *SMALL, *options])


# ---------------------------------------------------------------------------------------------------------------------
# Networks
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(8, 8, 1), (28, 28, 1), (15, 33, 3), (31, 9, 3), (64, 64, 3)])
@pytest.mark.parametrize("recipe", [ConvLSTM, ResNet, Photos, VAEGAN])
def test_networks_keep_every_size(recipe, shape):
    settings = recipe(channels=4, latent=5, likelihood="gaussian")
    encoder, decoder = settings.build(shape)
    height, width, channels = shape
    assert encoder(torch.rand(2, channels, height, width)).shape == (2, 10)
    assert decoder(torch.randn(2, 5)).shape == (2, channels, height, width)


@pytest.mark.parametrize("recipe", ["conv-lstm", "resnet", "photos", "vae-gan"])
def test_too_small_images(recipe, tmp_path, capsys):
    np.savez(tmp_path / "small.npz", x_train=np.zeros((9, 7, 20, 3), np.uint8))
    assert train(recipe, tmp_path / "run", tmp_path / "small.npz") == 2
    assert f"{recipe}: images must be at least 8 x 8 pixels, got 7 x 20" in error_line(capsys)


def test_halves():
    assert layers.halved("", 28, 28) == [(28, 28), (14, 14), (7, 7)]
    assert layers.halved("", 15, 33) == [(15, 33), (8, 17), (4, 9)]


def test_a_residual_block_starts_as_nothing():
    block = layers.Residual(3)
    x = torch.randn(2, 3, 5, 5)
    assert torch.equal(block(x), x)
    block(x).square().sum().backward()
    assert block.layers[-1].weight.grad.abs().sum() > 0


def test_four_pixels_start_equal():
    pixels = layers.Pixels(3, 2, (7, 10))(torch.randn(2, 3, 4, 5))
    assert pixels.shape == (2, 2, 7, 10)
    assert torch.equal(pixels[:, :, 0:6:2, ::2], pixels[:, :, 1:7:2, 1::2])
    assert not torch.equal(pixels[:, :, :, 0], pixels[:, :, :, 2])


def test_the_decoders_lstm_has_a_step_for_each_row():
    """And the encoder's: a change in the last row of an image is a change in the last step alone."""
    encoder, decoder = ConvLSTM(latent=4, channels=4, hidden=8).build((28, 28, 1))
    given: list[torch.Tensor] = []
    encoder.lstm.register_forward_pre_hook(lambda module, inputs: given.append(inputs[0]))
    x = torch.rand(1, 1, 28, 28)
    encoder(x)
    x[:, :, -1] = 0
    encoder(x)
    before, after = given
    assert before.shape == (1, 7, 8 * 7)
    assert torch.equal(before[:, :-1], after[:, :-1])
    assert not torch.equal(before[:, -1], after[:, -1])
    made: list[torch.Tensor] = []
    decoder.lstm.register_forward_hook(lambda module, inputs, outputs: made.append(outputs[0]))
    decoder(torch.randn(3, 4))
    assert made[0].shape == (3, 7, 8)


# ---------------------------------------------------------------------------------------------------------------------
# Options
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variance", ["fixed", "learned", "per-element"])
def test_variances(colours, tmp_path, capsys, variance):
    out = tmp_path / "run"
    options = ["--sigma", "0.5"] if variance == "fixed" else ["--logvar-min", "-9", "--logvar-max", "1"]
    assert train("resnet", out, colours, "--epochs", "2", "--variance", variance, *options) == 0
    likelihood = load(out).model.likelihood
    expected = {"fixed": 0.5, "learned": "learned", "per-element": "per_element"}[variance]
    assert likelihood.scale == expected
    assert likelihood.logvar_bounds == (None if variance == "fixed" else (-9, 1))
    words = {"fixed": "standard deviation 0.5", "learned": "one learned variance"}
    assert words.get(variance, "a variance for each pixel") in capsys.readouterr().out
    bits = float(read_metrics(out)[-1]["val_neg_elbo"]) / (16 * 20 * 3 * math.log(2)) + 8
    assert float(read_metrics(out)[-1]["val_bits_per_dim"]) == pytest.approx(bits, rel=1e-5)


def test_a_variance_per_pixel_starts_from_the_data(colours):
    images = data.load(str(colours))
    model = runs.new_model(KIND, ResNet(variance="per-element", channels=4), (16, 20, 3), images)
    x = loader.prepare(images.train, model_settings := ResNet(), torch.Generator().manual_seed(0))
    assert model_settings.likelihood == "gaussian"
    with torch.no_grad():
        params = model.decode(torch.randn(20, model.latents))
    _, logvar = params.chunk(2, 1)
    error = (x - x.mean((0, 2, 3), keepdim=True)).square().mean()
    started = reference.bounded_logvar(logvar, model.likelihood.logvar_bounds).exp().mean()
    assert started.item() == pytest.approx(error.item(), rel=0.2)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--sigma", "2"], "--sigma only applies to --variance fixed"),
        (["--likelihood", "dmol", "--variance", "fixed"], "--variance only applies to --likelihood gaussian"),
        (["--components", "3"], "--components only applies to --likelihood dmol"),
        (
            ["--variance", "fixed", "--logvar-max", "1"],
            "--logvar-max only applies to --variance learned or per-element",
        ),
        (["--logvar-max", "inf"], "--logvar-max must be at least -50 and at most 50 and finite, got inf"),
        (["--logvar-min", "3"], "--logvar-min must be below --logvar-max 2, got 3"),
        (["--variance", "each"], "each"),
        (["--sigma", "0", "--variance", "fixed"], "--sigma must be at least 0.0001"),
        (["--init-from", "/nowhere"], "--init-from /nowhere: this path does not exist"),
        (["--size", "32"], "--size only applies to folders and datasets"),
    ],
)
def test_options_that_do_not_fit(colours, tmp_path, capsys, options, words):
    assert train("resnet", tmp_path / "run", colours, *options) == 2
    assert words in error_line(capsys)
    assert not (tmp_path / "run").exists()


def test_photos_of_any_size(pictures, tmp_path, capsys):
    out = tmp_path / "run"
    assert train("photos", out, pictures, "--size", "32", "--epochs", "2") == 0
    assert "32 x 32 x 3, 20 training images, 4 validation images" in capsys.readouterr().out
    assert train("photos", tmp_path / "other", pictures, "--epochs", "1") == 0
    assert "64 x 64 x 3" in capsys.readouterr().out
    # A file's images are taken as they are, whatever the default of --size.
    np.savez(tmp_path / "x.npz", x_train=np.zeros((9, 16, 16, 3), np.uint8))
    assert train("photos", tmp_path / "third", tmp_path / "x.npz", "--epochs", "1") == 0
    assert load(tmp_path / "third").settings.size == 0
    assert train("photos", tmp_path / "fourth", tmp_path / "x.npz", "--size", "32") == 2


def test_augmentation():
    x = torch.zeros(200, 33, 64, 3, dtype=torch.uint8)
    x[:, 16, 10] = 255
    made = loader.augment(x, seeded_generator(0))
    assert made.shape == x.shape
    assert made.dtype == torch.uint8
    places = (made[..., 0] == 255).nonzero()
    assert len(places) == 200, "each image keeps its one bright pixel"
    assert set(places[:, 1].tolist()) == {15, 16, 17}
    columns = set(places[:, 2].tolist())
    assert columns == {8, 9, 10, 11, 12, 51, 52, 53, 54, 55}
    mirrored = (places[:, 2] > 32).float().mean()
    assert 0.3 < mirrored < 0.7
    assert torch.equal(made, loader.augment(x, seeded_generator(0)))
    # What a shift uncovers repeats the edge.
    edge = torch.zeros(100, 32, 32, 1, dtype=torch.uint8)
    edge[:, 0] = 7
    moved = loader.augment(edge, seeded_generator(1))
    assert set(moved.unique().tolist()) == {0, 7}
    assert set((moved == 7).sum((1, 2, 3)).tolist()) == {0, 32, 64}


def test_only_training_images_are_augmented(colours):
    images = data.load(str(colours))
    for augment in (False, True):
        settings = ResNet(likelihood="discretized-logistic", augment=augment, batch_size=40)
        batches = loader.ImageData(images, settings)
        x, _ = next(iter(batches.val_dataloader()))
        assert torch.equal(x, images.val.permute(0, 3, 1, 2))
        x, _ = next(iter(batches.train_dataloader()))
        given = {image.numpy().tobytes() for image in images.train.permute(0, 3, 1, 2).contiguous()}
        same = sum(image.numpy().tobytes() in given for image in x)
        assert (same == 40) is not augment


@pytest.mark.parametrize("recipe", ["conv-lstm", "resnet", "photos"])
def test_a_stopped_run_goes_on_as_if_it_had_not(colours, tmp_path, recipe):
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    assert train(recipe, whole, colours, "--epochs", "3", "--ema", "0.9") == 0
    assert train(recipe, stopped, colours, "--epochs", "2", "--ema", "0.9") == 0
    assert cli.main(["resume", str(stopped), "--epochs", "3"]) == 0
    assert_same_run(stopped, whole)


STILL = ("--epochs", "1", "--lr", "1e-12", "--ema", "0")


def test_weights_to_start_from(colours, tmp_path, capsys):
    first, second = tmp_path / "first", tmp_path / "second"
    assert train("resnet", first, colours, "--epochs", "2") == 0
    assert train("resnet", second, colours, "--init-from", str(first), *STILL) == 0
    taken, made = weights(first, "best"), weights(second)
    assert f"init: copied 100% of the weights from {first}" in capsys.readouterr().out
    for name, weight in made.items():
        torch.testing.assert_close(weight, taken[name], rtol=0, atol=1e-6, msg=name)
    # A run that has begun goes on without them.
    (first / "checkpoints" / "best.ckpt").unlink()
    (first / "checkpoints" / "last.ckpt").unlink()
    assert cli.main(["resume", str(second), "--epochs", "2"]) == 0
    assert train("resnet", tmp_path / "third", colours, "--init-from", str(first)) == 2
    assert f"--init-from {first}: {first}" in error_line(capsys)
    # One that has not cannot, and says where that is written.
    for name in ("best", "last"):
        (second / "checkpoints" / f"{name}.ckpt").unlink()
    assert cli.main(["resume", str(second)]) == 2
    assert f"{second / 'config.toml'}: init_from {first}: {first}" in error_line(capsys)


@pytest.mark.parametrize(
    "options",
    [("--likelihood", "discretized-logistic"), ("--variance", "per-element"), ("--logvar-max", "0")],
)
def test_what_another_likelihood_knew_is_not_taken(colours, tmp_path, options):
    first, second = tmp_path / "first", tmp_path / "second"
    assert train("resnet", first, colours, "--epochs", "2") == 0
    assert train("resnet", second, colours, "--init-from", str(first), *options, *STILL) == 0
    taken, made = weights(first, "best"), weights(second)
    last = init_weights.last_layer(load(second).model)[0]
    for name, weight in made.items():
        if name.startswith((f"{last}.", "elbo.likelihood")):
            assert weight.shape != taken[name].shape or not torch.allclose(weight, taken[name], atol=1e-6)
        else:
            torch.testing.assert_close(weight, taken[name], rtol=0, atol=1e-6, msg=name)


def test_a_run_does_not_start_from_what_it_replaces(colours, tmp_path, capsys):
    out = tmp_path / "run"
    assert train("resnet", out, colours, "--epochs", "1") == 0
    assert train("resnet", out, colours, "--overwrite", "--init-from", str(out)) == 2
    assert "this path is inside the run that would be replaced; choose another --out" in error_line(capsys)
    assert (out / "checkpoints" / "best.ckpt").exists()


def test_photos_give_a_vae_gan_all_but_the_discriminator(colours, tmp_path, capsys):
    assert train("photos", tmp_path / "photos", colours, "--epochs", "1", "--ema", "0") == 0
    assert train("vae-gan", tmp_path / "gan", colours, "--init-from", str(tmp_path / "photos"), *STILL) == 0
    taken, made = weights(tmp_path / "photos"), weights(tmp_path / "gan")
    networks = [name for name in made if name.startswith(("encoder.", "decoder."))]
    assert len(networks) > 20
    for name in networks:
        torch.testing.assert_close(made[name], taken[name], rtol=0, atol=1e-6, msg=name)


def test_weights_that_fit_nowhere(colours, tmp_path, capsys):
    assert train("resnet", tmp_path / "run", colours, "--epochs", "1") == 0
    capsys.readouterr()
    file = tmp_path / "run" / "checkpoints" / "last.ckpt"
    assert train("conv-lstm", tmp_path / "other", colours, "--init-from", str(file)) == 2
    assert f"--init-from {file}: none of its weights has a name and shape" in error_line(capsys)
    torch.save({"state_dict": {"encoder.0.weight": 3}, "epoch": 0, "loops": 0, "optimizer_states": 0}, file)
    assert train("resnet", tmp_path / "other", colours, "--init-from", str(file)) == 2
    assert "not a fastvae checkpoint, or damaged" in error_line(capsys)
    file.write_bytes(b"nothing")
    assert train("resnet", tmp_path / "other", colours, "--init-from", str(file)) == 2
    assert "not a fastvae checkpoint, or damaged" in error_line(capsys)


# ---------------------------------------------------------------------------------------------------------------------
# VAE-GAN
# ---------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def steps(colours, tmp_path, monkeypatch) -> list[tuple[str, dict[str, torch.Tensor]]]:
    """Of one epoch of a VAE-GAN: at each step of an optimiser, its name and every gradient there is."""
    seen: list[tuple[str, dict[str, torch.Tensor]]] = []
    step = torch.optim.Adam.step

    def look(self, *args, **kwargs):
        own = {id(p) for group in self.param_groups for p in group["params"]}
        named = dict(model[0].named_parameters())
        mine = [name for name, p in named.items() if id(p) in own]
        whose = mine[0].partition(".")[0]  # scales come after the decoder's weights
        seen.append((whose, {name: p.grad.clone() for name, p in named.items() if p.grad is not None}))
        return step(self, *args, **kwargs)

    model: list[nn.Module] = []
    build = KIND.build
    monkeypatch.setattr(KIND, "build", lambda *args: model.append(build(*args)) or model[-1])
    monkeypatch.setattr(torch.optim.Adam, "step", look)
    assert train("vae-gan", tmp_path / "run", colours, "--epochs", "1", "--ema", "0") == 0
    return seen


def test_what_each_update_reaches(steps):
    """Of the discriminator's, no weight of the others; of the others', no weight of the discriminator."""
    assert [whose for whose, _ in steps] == ["discriminator", "encoder", "decoder"] * 3
    for whose, gradients in steps:
        parts = {name.partition(".")[0] for name in gradients}
        if whose == "discriminator":
            assert parts == {"discriminator"}
        elif whose == "encoder":
            assert parts == {"encoder", "decoder", "elbo", "pixels"}
        else:
            assert parts == {"decoder", "elbo", "pixels"}, "the encoder's are used up"
        assert all(gradient.isfinite().all() for gradient in gradients.values())
        assert sum(gradient.abs().sum() for gradient in gradients.values()) > 0


def make(**changes) -> "nn.Module":
    torch.manual_seed(0)
    settings = VAEGAN(channels=4, latent=3, **changes)
    images = data.Images(
        "", torch.randint(0, 256, (8, 16, 16, 3), dtype=torch.uint8), torch.zeros(1, 16, 16, 3)
    )
    return runs.new_model(KIND, settings, (16, 16, 3), images)  # fmt: skip


class Recorder:
    """In an optimiser's place: keeps the gradients, and moves nothing."""

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
    ("batch_idx", "done", "clip"), [(0, 10**6, 0.0), (1, 10**6, 0.0), (16, 125, 0.0), (1, 10**6, 0.5)]
)
def test_the_gradients_of_a_step(monkeypatch, batch_idx, done, clip):
    """Of each network, against what the three losses, written out, give by autograd."""
    model = make(adversarial=0.7, penalty=3.0, beta=5.0, clip=clip)
    monkeypatch.setattr(Module, "steps_done", done)
    scales = [*model.elbo.parameters(), *model.pixels.parameters()]
    parts = [list(net.parameters()) for net in (model.encoder, model.decoder, model.discriminator)]
    optimizers = [Recorder(parts[0]), Recorder([*parts[1], *scales]), Recorder(parts[2])]
    monkeypatch.setattr(model, "optimizers", lambda: optimizers)
    monkeypatch.setattr(model, "manual_backward", lambda loss, **options: loss.backward(**options))
    model.on_train_epoch_start()
    x = torch.rand(6, 3, 16, 16)
    model.training_step((x, 40), batch_idx)

    def noise(seed: int, mu: torch.Tensor, logvar: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return functional.reparameterize_kl(mu, logvar, seed=torch.tensor([seed, 4 * done]), row_offset=40)

    mu, logvar = model.encode(x)
    z, kl = noise(0, mu, logvar)
    drawn, _ = noise(2, torch.zeros(6, 3), torch.zeros(6, 3))
    made, new = model.decode(z), model.decode(drawn)
    discriminator = model.discriminator
    fakes = torch.cat((made, new)).detach()
    own = -F.logsigmoid(discriminator(x)[1]).mean() - F.logsigmoid(-discriminator(fakes)[1]).mean()
    if batch_idx % 16 == 0:
        given = x.clone().requires_grad_()
        (slope,) = torch.autograd.grad(discriminator(given)[1].sum(), given, create_graph=True)
        own = own + 16 * 3.0 / 2 * slope.flatten(1).square().sum(1).mean()
    features, real = discriminator(made)[0], discriminator(x)[0]
    matching = sum(
        reference.gaussian_nll(
            features[name], real[name].detach(), likelihood.logvar, logvar_bounds=likelihood.logvar_bounds
        )
        for name, likelihood in model.elbo.likelihood.parts.items()
    )
    loss = (matching + 5.0 * kl).mean()
    score = -F.logsigmoid(discriminator(torch.cat((made, new)))[1]).mean()

    def gradients(of: torch.Tensor, parameters: list[nn.Parameter]) -> torch.Tensor:
        found = torch.autograd.grad(of, parameters, retain_graph=True)
        return torch.cat([gradient.flatten() for gradient in found])

    encoder, decoder = gradients(loss, parts[0]), gradients(loss, parts[1])
    adversary = gradients(score, parts[1])
    share = 0.7 * min(1, done / 500)
    decoder = decoder + share * decoder.norm() / adversary.norm() * adversary
    if clip:
        length = torch.cat((encoder, decoder)).norm()
        assert length > clip
        encoder, decoder = (clip / length * gradient for gradient in (encoder, decoder))
    measured = reference.gaussian_nll(
        made.detach(), x, model.pixels.logvar, logvar_bounds=model.pixels.logvar_bounds
    ).mean()
    expected = [
        encoder,
        torch.cat((decoder, gradients(loss, scales[:-1]), gradients(measured, scales[-1:]))),
        gradients(own, parts[2]),
    ]
    for optimizer, gradient in zip(optimizers, expected, strict=True):
        found = torch.cat([g.flatten() for g in optimizer.gradients])
        torch.testing.assert_close(found, gradient, rtol=2e-3, atol=2e-4 * gradient.abs().max().item())


def test_rates(colours, tmp_path, monkeypatch):
    """Also after a run was resumed with another one: the scales' tenfold, the discriminator's twice the others'."""
    out = tmp_path / "run"
    assert train("vae-gan", out, colours, "--epochs", "1", "--lr", "0.001") == 0
    config = out / "config.toml"
    config.write_text(config.read_text().replace("lr = 0.001", "lr = 0.002"))
    seen: list[list[float]] = []
    start = Module.on_train_epoch_start
    monkeypatch.setattr(
        Module,
        "on_train_epoch_start",
        lambda self: (
            seen.extend([g["lr"] for g in o.param_groups] for o in self.trainer.optimizers),
            start(self),
        ),
    )
    assert cli.main(["resume", str(out), "--epochs", "2"]) == 0
    assert seen == [[0.002], [0.002, 0.02], [0.004]]


def test_the_best_is_the_last(tmp_path):
    made = trainer.make_trainer(VAEGAN(accelerator="cpu"), tmp_path, callbacks.Callback())
    (best,) = (kept for kept in made.callbacks if isinstance(kept, callbacks.SaveBest))
    assert best.monitor is None
    made = trainer.make_trainer(Photos(accelerator="cpu"), tmp_path, callbacks.Callback())
    (best,) = (kept for kept in made.callbacks if isinstance(kept, callbacks.SaveBest))
    assert best.monitor == callbacks.MONITOR


def test_features_start_with_their_own_variance():
    model = make()
    x = torch.rand(64, 3, 16, 16)
    model.init_from_images(x)
    features, _ = model.discriminator(x)
    for name, likelihood in model.elbo.likelihood.parts.items():
        logvar = reference.bounded_logvar(likelihood.logvar, likelihood.logvar_bounds)
        assert logvar.exp().item() == pytest.approx(
            features[name].var(0, correction=0).mean().item(), rel=0.2
        )


def test_discriminator():
    torch.manual_seed(0)
    discriminator = Discriminator(layers.halved("", 33, 64), 3, 4)
    features, score = discriminator(torch.rand(5, 3, 33, 64))
    assert score.shape == (5,)
    assert list(features) == discriminator.feature_names == ["layer0", "layer1", "layer2"]
    assert features["layer1"].shape == (5, 8, 8, 16)
    small = Discriminator(layers.halved("", 8, 8), 1, 4)
    assert list(small(torch.rand(2, 1, 8, 8))[0]) == ["layer0"]


def test_the_penalty_is_the_squared_gradient():
    model = make()
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
def gan(colours, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("gan") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fastvae.train.callbacks.should_save_examples", lambda trainer: False)
        assert train("vae-gan", out, colours, "--epochs", "2") == 0
    return out


def test_a_stopped_vae_gan_goes_on_as_if_it_had_not(colours, gan, tmp_path):
    out = tmp_path / "stopped"
    assert train("vae-gan", out, colours, "--epochs", "1") == 0
    assert cli.main(["resume", str(out), "--epochs", "2"]) == 0
    assert_same_run(out, gan)


def test_a_vae_gan_is_used_as_any_run(gan, tmp_path, capsys):
    assert weights(gan, "best").keys() == weights(gan).keys()
    assert all(
        torch.equal(a, b) for a, b in zip(weights(gan, "best").values(), weights(gan).values(), strict=True)
    )
    row = read_metrics(gan)[-1]
    assert float(row["train_features"]) != float(row["train_nll"])
    for command in ("sample", "reconstruct", "interpolate", "traverse", "inpaint"):
        assert cli.main([command, str(gan), "--out", str(tmp_path / "x.png")]) == 0
    capsys.readouterr()
    assert cli.main(["evaluate", str(gan), "--samples", "3"]) == 0
    said = capsys.readouterr().out
    for name in ("generated.png", "neighbours.png"):
        assert str(gan / name) in said
        with Image.open(gan / name) as image:
            image.load()
    assert "bits per dimension" in said


def test_neighbours_are_of_the_images_trained_on(gan, colours, tmp_path, capsys):
    np.savez(tmp_path / "others.npz", x_train=np.zeros((9, 16, 20, 3), np.uint8))
    before = (gan / "neighbours.png").read_bytes() if (gan / "neighbours.png").exists() else b""
    options = ["--data", str(tmp_path / "others.npz"), "--samples", "2"]
    assert cli.main(["evaluate", str(gan), *options]) == 0
    assert "neighbours.png is not drawn" in capsys.readouterr().out
    assert ((gan / "neighbours.png").read_bytes() if before else b"") == before


def test_neighbours_are_the_nearest(gan, tmp_path, monkeypatch):
    """Mirrored ones too."""
    run = load(gan)
    train = run.images.train
    shown = torch.stack([train[7].flip(1), train[3]]) / 255
    monkeypatch.setattr(generate, "_decode_means", lambda run, z: shown + 0.01)
    drawn = []
    monkeypatch.setattr(generate.pictures, "save_grid", lambda rows, path: drawn.extend(rows))
    generate.nearest_neighbours(run, tmp_path / "x.png", n=2, near=2)
    new, first, second = drawn
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
def test_options_of_no_use_to_a_vae_gan(colours, tmp_path, capsys, options, words):
    assert train("vae-gan", tmp_path / "run", colours, *options) == 2
    assert words in error_line(capsys)


def test_a_step_that_is_not_finite_is_skipped(colours, tmp_path, monkeypatch, capsys):
    add = Module._add_adversarial

    def spoil(self, loss, share):
        add(self, loss, share)
        if self.global_step < 3:  # the first batch
            next(self.decoder.parameters()).grad.fill_(math.nan)

    monkeypatch.setattr(Module, "_add_adversarial", spoil)
    assert train("vae-gan", tmp_path / "run", colours, "--epochs", "1", "--clip", "0") == 0
    assert "warning: 1 of 3 steps were skipped" in capsys.readouterr().out
    assert all(value.isfinite().all() for value in weights(tmp_path / "run").values())


def test_an_epoch_of_steps_that_are_not_finite(colours, tmp_path, monkeypatch, capsys):
    """The discriminator has stepped meanwhile: the learning rate may be the cause from the first epoch on."""
    add = Module._add_adversarial

    def spoil(self, loss, share):
        add(self, loss, share)
        next(self.decoder.parameters()).grad.fill_(math.nan)

    monkeypatch.setattr(Module, "_add_adversarial", spoil)
    assert train("vae-gan", tmp_path / "run", colours, "--epochs", "1") == 2
    assert (
        "every step of epoch 1 was skipped because the gradient of step 1 is not finite; try a smaller --lr"
        in (error_line(capsys))
    )


def test_input_error_names_the_recipe():
    with pytest.raises(InputError, match="photos: images must be at least 8 x 8"):
        Photos().build((7, 7, 3))
