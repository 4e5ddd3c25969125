"""Networks and their optimiser: activations, initial weights, weight decay and the epsilon of Adam."""

import math

import pytest
import torch
from run_files import command_error, train, weights
from torch import nn

from fastvae import cli
from fastvae.train import image, networks, runs
from fastvae.train.counts.recipe import Counts
from fastvae.train.image import KIND, data
from fastvae.train.image.recipes import MLP, Conv

pytestmark = pytest.mark.usefixtures("one_thread", "no_pictures")


@pytest.mark.parametrize(
    ("name", "function"),
    [
        ("relu", torch.relu),
        ("tanh", torch.tanh),
        ("elu", nn.functional.elu),
        ("silu", nn.functional.silu),
        ("gelu", nn.functional.gelu),
        ("softplus", nn.functional.softplus),
    ],
)
def test_activation_is_used_between_the_layers(name, function):
    encoder, decoder = MLP(likelihood="bernoulli", hidden=7, layers=2, activation=name).build((2, 3, 1))
    for network, x in ((encoder[1:], torch.randn(5, 6)), (decoder[:-1], torch.randn(5, 20))):
        first, _, second, _, last = network
        torch.testing.assert_close(network(x), last(function(second(function(first(x))))))
    counts, _ = Counts(data="x", activation=name).networks(9, 1)
    assert type(counts.layers[2]) is type(encoder[2])


def test_gated_layers_are_linear_functions_times_sigmoids_of_others():
    encoder, decoder = MLP(likelihood="bernoulli", hidden=7, layers=2, activation="gated").build((2, 3, 1))
    for network, x in ((encoder[1:], torch.randn(5, 6)), (decoder[:-1], torch.randn(5, 20))):
        *gated, last = network
        assert [layer.out_features for layer in gated] == [14, 14]
        h = x
        for layer in gated:
            weight, bias = layer.weight, layer.bias
            h = (h @ weight[:7].T + bias[:7]) * torch.sigmoid(h @ weight[7:].T + bias[7:])
        torch.testing.assert_close(network(x), last(h))


def test_xavier_gives_each_half_of_a_gated_layer_the_variance_of_a_layer():
    torch.manual_seed(0)
    layer = networks.Gated(300, 200)
    networks.initialize(layer, "xavier")
    for half in layer.weight.chunk(2):
        assert half.var().item() == pytest.approx(2 / (300 + 200), rel=0.02)


def test_xavier_and_kaiming_have_the_published_variance():
    torch.manual_seed(0)
    for init, variance in (("xavier", 2 / (300 + 200)), ("kaiming", 2 / 300)):
        network = nn.Sequential(nn.Flatten(), nn.Linear(300, 200))
        networks.initialize(network, init)
        weight = network[1].weight
        assert weight.var().item() == pytest.approx(variance, rel=0.02)
        assert weight.mean().item() == pytest.approx(0, abs=1e-3)
        if init == "xavier":  # uniform
            assert weight.abs().max().item() == pytest.approx(math.sqrt(6 / (300 + 200)), rel=1e-3)
        assert not network[1].bias.any()


def test_default_weights_are_those_of_torch():
    torch.manual_seed(1)
    expected = nn.Linear(64, 400)
    torch.manual_seed(1)
    encoder, _ = MLP(likelihood="bernoulli").build((8, 8, 1))
    assert torch.equal(encoder[1].weight, expected.weight)


@pytest.mark.parametrize("binarize", ["threshold", "dynamic"])
def test_output_bias_is_the_logit_of_the_mean(binarize):
    images = data.load("digits")
    settings = MLP(likelihood="bernoulli", binarize=binarize, bias_at_mean=True)
    model = runs.new_model(KIND, settings, (8, 8, 1), images)
    pixels = images.train.double().flatten(1)
    mean = (pixels / 255 if binarize == "dynamic" else (pixels >= 128).double()).mean(0).clamp(0.001, 0.999)
    bias = model.decoder[-2].bias.detach().double()
    torch.testing.assert_close(bias, torch.log(mean / (1 - mean)), rtol=1e-4, atol=1e-5)
    assert (mean == 0.001).any(), "some pixels of the digits are always black"
    # The last layer of a convolutional network has one bias for all positions of a colour.
    model = runs.new_model(KIND, Conv(likelihood="bernoulli", bias_at_mean=True), (8, 8, 1), images)
    mean = (pixels >= 128).double().mean()
    bias = model.decoder[-1].bias.detach().double()
    torch.testing.assert_close(bias, torch.log(mean / (1 - mean)).reshape(1), rtol=1e-4, atol=0)


def test_output_bias_is_random_by_default():
    images = data.load("digits")
    biases = [
        runs.new_model(KIND, MLP(likelihood="bernoulli", bias_at_mean=at_mean), (8, 8, 1), images)
        .decoder[-2]
        .bias
        for at_mean in (False, True)
    ]
    assert biases[0].abs().max() <= 1 / math.sqrt(400)
    assert biases[1].abs().max() > 1


def test_weight_decay_reaches_the_optimiser(tmp_path):
    """Gradients far below the epsilon of Adam change nothing, so that only the decay is left."""
    options = ("--likelihood", "gaussian", "--lr", "0.01", "--clip", "1e-30", "--weight-decay", "0.5")
    assert train(tmp_path / "run", *options, "--epochs", "1") == 0
    assert cli.main(["resume", str(tmp_path / "run"), "--epochs", "2"]) == 0
    run = image.load(tmp_path / "run", checkpoint="last")
    fresh = runs.new_model(KIND, run.settings, run.form, run.images).state_dict()
    for name, weight in weights(tmp_path / "run").items():
        # The learned variance does not decay.
        share = 1.0 if name.startswith("elbo.") else (1 - 0.01 * 0.5) ** 24
        torch.testing.assert_close(weight, share * fresh[name], rtol=1e-5, atol=1e-7, msg=name)


def test_adam_eps_reaches_the_optimiser(tmp_path):
    assert train(tmp_path / "run", "--adam-eps", "1e9", "--epochs", "1") == 0
    run = image.load(tmp_path / "run")
    fresh = runs.new_model(KIND, run.settings, run.form, run.images).state_dict()
    for name, weight in weights(tmp_path / "run").items():
        torch.testing.assert_close(weight, fresh[name], rtol=0, atol=1e-6, msg=name)


@pytest.mark.parametrize("form", ["log_std", "softplus", "variance"])
def test_posterior_form_is_that_of_the_encoder(form):
    settings = MLP(likelihood="bernoulli", posterior=form)
    model = runs.new_model(KIND, settings, (8, 8, 1), data.load("digits"))
    x = torch.rand(3, 1, 8, 8)
    mu, v = model.encoder(x).chunk(2, dim=1)
    std = {
        "log_std": v.exp(),
        "softplus": torch.nn.functional.softplus(v) + 1e-4,
        "variance": (v.exp() + 1e-4).sqrt(),
    }
    mean, logvar = model.encode(x)
    torch.testing.assert_close(mean, mu)
    torch.testing.assert_close(logvar, 2 * std[form].log())


def test_run_without_the_newer_settings_is_read_with_their_defaults(tmp_path):
    run = tmp_path / "run"
    assert train(run, "--epochs", "1") == 0
    config = run / "config.toml"
    newer = {
        "posterior": "logvar", "lr_schedule": "constant", "adam_eps": 1e-8, "weight_decay": 0.0, "objective": "elbo",
        "samples": 1, "capacity": 0.0, "bias_at_mean": False, "activation": "relu", "init": "default",
        "prior": "standard", "components": 0, "mmd_weight": 1000.0, "val": 0,
    }  # fmt: skip
    lines = config.read_text().splitlines(keepends=True)
    kept = [line for line in lines if line.partition(" ")[0] not in newer]
    assert len(kept) == len(lines) - len(newer)
    config.write_text("".join(kept))
    settings = image.load(run).settings
    assert {name: getattr(settings, name) for name in newer} == newer
    assert cli.main(["resume", str(run), "--epochs", "2"]) == 0


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (
            ("--activation", "sine"),
            "--activation must be one of relu, tanh, elu, silu, gelu, softplus, gated, got 'sine'",
        ),
        (("--init", "zeros"), "--init must be one of default, xavier, kaiming, got 'zeros'"),
        (("--weight-decay", "-1"), "--weight-decay must be at least 0, got -1"),
        (("--adam-eps", "0"), "--adam-eps must be above 0, got 0"),
        (("--lr-schedule", "step"), "--lr-schedule must be one of constant, cosine, burda, got 'step'"),
        (
            ("--bias-at-mean", "--likelihood", "gaussian"),
            "--bias-at-mean only applies to --likelihood bernoulli",
        ),
    ],
)
def test_train_with_bad_options_fails_in_one_line(tmp_path, capsys, options, words):
    assert words in command_error(capsys, "train", "mlp", "--out", tmp_path / "run", *options)
    assert not (tmp_path / "run").exists()
