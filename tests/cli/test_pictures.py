"""The commands that draw pictures from a run: reconstruct, interpolate, traverse and inpaint."""

import numpy as np
import pytest
import torch
from PIL import Image
from run_files import read_grid, run_command

from fastvae.train import image
from fastvae.train.image import generate, pictures

pytestmark = pytest.mark.usefixtures("one_thread")


GREY = pictures.BACKGROUND


def test_reconstruct_draws_images_above_reconstructions(run, capsys):
    text = run_command(capsys, "reconstruct", run, "-n", 13)
    out = run / "reconstructions.png"
    assert text == f"{out}: 13 validation images, each above its reconstruction\n"
    opened = image.load(run)
    with Image.open(out) as picture:
        assert picture.size == (10 * 66 + 2, 4 * 66 + 2 + 8)
        pixels = np.asarray(picture)
    original = opened.images.val[12, ..., 0].numpy().repeat(8, 0).repeat(8, 1)
    below = 2 + 2 * 66 + 8  # the top of the second pair of lines
    np.testing.assert_array_equal(pixels[below : below + 64, 2 + 2 * 66 :][:, :64], original)
    with torch.no_grad():
        x = (opened.images.val[12:13] >= 128).float().permute(0, 3, 1, 2)
        shown = torch.sigmoid(opened.model.decode(opened.model.encode(x)[0]))[0, 0].numpy()
    drawn_pixels = pixels[below + 66 : below + 66 + 64 : 8, 2 + 2 * 66 :][:, :64:8]
    np.testing.assert_allclose(drawn_pixels, shown * 255, atol=1)
    assert (pixels[below : below + 64, 2 + 3 * 66 :] == GREY).all()


def test_pictures_of_few_images_contain_all_of_them(colour_run, tmp_path, capsys):
    out = tmp_path / "few.png"
    assert f"{out}: 6 validation images, " in run_command(capsys, "reconstruct", colour_run, "--out", out)
    assert f"{out}: 6 validation images, " in run_command(capsys, "inpaint", colour_run, "--out", out)
    with Image.open(out) as picture:
        assert picture.mode == "RGB"
    assert "0 to 1, 2 to 3, 4 to 5" in run_command(capsys, "interpolate", colour_run, "--out", out)


def test_interpolate_draws_images_between_pairs(run, capsys):
    out = run / "interpolations.png"
    text = run_command(
        capsys, "interpolate", run, "--from", 3, "--to", 5, "--from", 298, "--to", 0, "--steps", 7
    )
    pairs = "3 to 5, 298 to 0"
    assert text == f"{out}: validation images {pairs}, with 7 decoded images between the two originals\n"
    with Image.open(out) as picture:
        assert picture.size == (9 * 66 + 2 + 16, 2 * 66 + 2)
        pixels = np.asarray(picture)
    val = image.load(run).images.val[..., 0].numpy()
    np.testing.assert_array_equal(pixels[2:66:8, 2:66:8], val[3])
    np.testing.assert_array_equal(pixels[2:66:8, -66:-2:8], val[5])
    np.testing.assert_array_equal(pixels[68:132:8, -66:-2:8], val[0])
    # An interpolation starts and ends with the reconstructions.
    run_command(capsys, "reconstruct", run, "-n", 6)
    with Image.open(run / "reconstructions.png") as picture:
        recon = np.asarray(picture)[68:132]
    np.testing.assert_array_equal(pixels[2:66, 2 + 66 + 8 :][:, :64], recon[:, 2 + 3 * 66 :][:, :64])
    np.testing.assert_array_equal(pixels[2:66, -66 - 8 - 66 :][:, :64], recon[:, 2 + 5 * 66 :][:, :64])
    text = run_command(capsys, "interpolate", run)
    assert "12 to 13, 14 to 15, with 10 decoded" in text


def test_traverse_varies_the_most_active_dimensions(run, capsys):
    text = run_command(capsys, "traverse", run, "--image", 4, "--steps", 5)
    out = run / "traversals.png"
    dimensions = "6 dimensions, the most active first"
    assert text == f"{out}: validation image 4, varied from -3 to 3 along {dimensions}\n"
    with Image.open(out) as picture:
        width, height = picture.size
        assert height == 6 * 66 + 2
        assert width > 5 * 66 + 2  # there is room for the labels
    opened = image.load(run)
    order = generate.traverse(opened, run / "again.png", image=4, steps=5)
    assert (run / "again.png").read_bytes() == out.read_bytes()
    with torch.no_grad():
        x = (opened.images.val >= 128).float().permute(0, 3, 1, 2)
        mu = opened.model.encode(x)[0]
    assert order == mu.var(0).argsort(descending=True).tolist()
    assert "along 2 dimensions, " in run_command(capsys, "traverse", run, "-n", 2)
    # Check the lines of the most and of the least active dimension.
    with Image.open(run / "again.png") as picture:
        pixels = np.asarray(picture)
    for row in (0, 5):
        z = mu[4].repeat(5, 1)
        z[:, order[row]] = torch.linspace(-3, 3, 5)
        with torch.no_grad():
            expected = (
                torch.sigmoid(opened.model.decode(z))[:, 0].permute(1, 0, 2) * 255
            )  # next to each other
        images = pixels[2 + row * 66 :, width - 5 * 66 :][:64:8]
        drawn_pixels = np.stack([images[:, c * 66 :][:, :64:8] for c in range(5)], 1)
        np.testing.assert_allclose(drawn_pixels, expected, atol=1)


@pytest.mark.parametrize(
    ("mask", "box"),
    [
        ("left", (0, 0, 4, 8)),
        ("right", (4, 0, 8, 8)),
        ("top", (0, 0, 8, 4)),
        ("bottom", (0, 4, 8, 8)),
        ("center", (2, 2, 6, 6)),
        ("1,0,8,3", (1, 0, 8, 3)),
    ],
)
def test_inpaint_fills_only_the_mask(run, capsys, mask, box):
    text = run_command(capsys, "inpaint", run, "--mask", mask, "-n", 4, "--steps", 3)
    out = run / "inpainting.png"
    assert text == f"{out}: 4 validation images, each masked, inpainted and as it was\n"
    masked, filled, whole = read_grid(out, 4, 3)[:, :, ::8, ::8]
    np.testing.assert_array_equal(whole, image.load(run).images.val[:4, ..., 0].numpy())
    x0, y0, x1, y1 = box
    hidden = np.zeros((8, 8), bool)
    hidden[y0:y1, x0:x1] = True
    assert (masked[:, hidden] == GREY).all()
    np.testing.assert_array_equal(masked[:, ~hidden], whole[:, ~hidden])
    np.testing.assert_array_equal(filled[:, ~hidden], whole[:, ~hidden])
    assert (filled[:, hidden] != whole[:, hidden]).any()


def test_inpaint_with_same_seed_repeats(run, capsys):
    def draw(*options: object) -> bytes:
        run_command(capsys, "inpaint", run, "-n", 4, "--steps", 3, *options)
        return (run / "inpainting.png").read_bytes()

    assert draw() == draw()
    assert draw() != draw("--seed", 1)


def test_inpaint_of_one_step_equals_reconstruction(run):
    opened = image.load(run)
    x = (opened.images.val[:4] >= 128).float().permute(0, 3, 1, 2)
    x[..., 4:].uniform_(generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = torch.sigmoid(opened.model.decode(opened.model.encode(x)[0]))[:, 0] * 255
    filled_by_steps = {}
    for steps in (1, 2):
        generate.inpaint(opened, run / "inpainting.png", steps=steps, n=4)
        filled_by_steps[steps] = read_grid(run / "inpainting.png", 4, 3)[1, :, ::8, ::8][..., 4:]
    np.testing.assert_allclose(filled_by_steps[1], expected[..., 4:], atol=1)
    assert (filled_by_steps[1] != filled_by_steps[2]).any()


def test_box_of_odd_image_size_rounds_down():
    assert generate.box("left", 9, 7) == (0, 0, 3, 9)
    assert generate.box("right", 9, 7) == (4, 0, 7, 9)
    assert generate.box("center", 9, 7) == (1, 2, 6, 7)
