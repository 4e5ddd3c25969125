"""The networks of the image recipes."""

import numpy as np
import pytest
import torch
from run_files import error_line, train_images

from fastvae.train.errors import InputError
from fastvae.train.image import layers
from fastvae.train.image.recipes.conv_lstm import ConvLSTM
from fastvae.train.image.recipes.resnet import Photos, ResNet
from fastvae.train.image.recipes.vae_gan import VAEGAN

pytestmark = pytest.mark.usefixtures("one_thread", "no_pictures")


@pytest.mark.parametrize("shape", [(8, 8, 1), (28, 28, 1), (15, 33, 3), (31, 9, 3), (64, 64, 3)])
@pytest.mark.parametrize("recipe", [ConvLSTM, ResNet, Photos, VAEGAN])
def test_networks_of_any_image_size_have_matching_shapes(recipe, shape):
    settings = recipe(channels=4, latent=5, likelihood="gaussian")
    encoder, decoder = settings.build(shape)
    height, width, channels = shape
    assert encoder(torch.rand(2, channels, height, width)).shape == (2, 10)
    assert decoder(torch.randn(2, 5)).shape == (2, channels, height, width)


@pytest.mark.parametrize("recipe", ["conv-lstm", "resnet", "photos", "vae-gan"])
def test_train_on_tiny_images_fails(recipe, tmp_path, capsys):
    np.savez(tmp_path / "small.npz", x_train=np.zeros((9, 7, 20, 3), np.uint8))
    assert train_images(recipe, tmp_path / "run", tmp_path / "small.npz") == 2
    assert f"{recipe}: images must be at least 8 x 8 pixels, got 7 x 20" in error_line(capsys)


def test_halved_rounds_sides_up():
    assert layers.halving_sides("", 28, 28) == [(28, 28), (14, 14), (7, 7)]
    assert layers.halving_sides("", 15, 33) == [(15, 33), (8, 17), (4, 9)]


def test_residual_block_is_initially_the_identity():
    block = layers.Residual(3)
    x = torch.randn(2, 3, 5, 5)
    assert torch.equal(block(x), x)
    block(x).square().sum().backward()
    assert block.layers[-1].weight.grad.abs().sum() > 0


def test_pixels_layer_starts_with_equal_pixels():
    pixels = layers.Pixels(3, 2, (7, 10))(torch.randn(2, 3, 4, 5))
    assert pixels.shape == (2, 2, 7, 10)
    assert torch.equal(pixels[:, :, 0:6:2, ::2], pixels[:, :, 1:7:2, 1::2])
    assert not torch.equal(pixels[:, :, :, 0], pixels[:, :, :, 2])


def test_conv_lstm_has_a_step_per_line_of_the_feature_map():
    """In the encoder, a change in the last line of an image only changes the last step."""
    encoder, decoder = ConvLSTM(latent=4, channels=4, hidden=8).build((28, 28, 1))
    inputs_seen: list[torch.Tensor] = []
    encoder.lstm.register_forward_pre_hook(lambda module, inputs: inputs_seen.append(inputs[0]))
    x = torch.rand(1, 1, 28, 28)
    encoder(x)
    x[:, :, -1] = 0
    encoder(x)
    before, after = inputs_seen
    assert before.shape == (1, 7, 8 * 7)
    assert torch.equal(before[:, :-1], after[:, :-1])
    assert not torch.equal(before[:, -1], after[:, -1])
    outputs_seen: list[torch.Tensor] = []
    decoder.lstm.register_forward_hook(lambda module, inputs, outputs: outputs_seen.append(outputs[0]))
    decoder(torch.randn(3, 4))
    assert outputs_seen[0].shape == (3, 7, 8)


def test_build_for_tiny_images_names_the_recipe():
    with pytest.raises(InputError, match="photos: images must be at least 8 x 8"):
        Photos().build((7, 7, 3))
