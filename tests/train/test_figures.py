"""The figures of the losses and of the latent space."""

import math
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fastvae.train import figures
from fastvae.train.errors import InputError
from fastvae.train.image import pictures

pytestmark = pytest.mark.usefixtures("one_thread")


def shape_of(path: Path) -> tuple[int, int]:
    with Image.open(path) as picture:
        picture.load()
        assert np.asarray(picture.convert("L")).std() > 5  # there is something to see
        return picture.size


@pytest.mark.parametrize("epochs", [1, 2, 30])
def test_loss_curve_is_drawn(tmp_path, epochs):
    rows = [
        {
            "epoch": e + 1,
            "train_nll": 100 + 400 * math.exp(-e),
            "train_kl": 10.0 - 5 / (e + 1),
            "val_neg_elbo": 112 + 300 * math.exp(-e),
            "val_kl": 11.0,
            "beta": min(1.0, e / 10),
        }
        for e in range(epochs)
    ]
    if epochs > 2:
        rows[1]["train_nll"] = math.nan  # every step of this epoch was skipped
    figures.save_loss_curve(rows, tmp_path / "loss.png")
    width, height = shape_of(tmp_path / "loss.png")
    assert width > 1000
    assert height > 400
    assert os.listdir(tmp_path) == ["loss.png"]


@pytest.mark.parametrize(("latents", "labels"), [(1, 3), (1, None), (2, 1), (2, None), (7, 15), (7, 100)])
def test_latents_are_drawn_for_any_dimension(tmp_path, latents, labels):
    mu = torch.randn(300, latents)
    labels_given = None if labels is None else torch.randint(labels, (300,))
    figures.save_latents(mu, labels_given, tmp_path / "latents.png")
    shape_of(tmp_path / "latents.png")


def test_latents_of_degenerate_posteriors_are_drawn(tmp_path):
    """A single image, a collapsed posterior, and one without finite values."""
    for dimensions in (1, 2, 5):
        mu = torch.randn(50, dimensions)
        mu[3] = torch.nan
        for mu_given in (mu, mu * torch.inf):
            figures.save_latents(mu_given, torch.arange(50) % 3, tmp_path / "latents.png")
            shape_of(tmp_path / "latents.png")
    for mu in (torch.zeros(1, 5), torch.zeros(50, 5), torch.zeros(50, 2), torch.zeros(50, 1)):
        figures.save_latents(mu, torch.zeros(len(mu)).long(), tmp_path / "latents.png")
        assert (tmp_path / "latents.png").stat().st_size > 1000


@pytest.mark.parametrize("points", [11, 300])
def test_latents_legend_names_the_classes(tmp_path, monkeypatch, points):
    """The legend has the names of the classes, and its markers stay small even with few points."""
    drawn = []
    save = figures._save
    monkeypatch.setattr(figures, "_save", lambda figure, path: (save(figure, path), drawn.append(figure)))
    labels = torch.arange(points) % 2
    figures.save_latents(torch.randn(points, 3), labels, tmp_path / "latents.png", names=("cats", "dogs"))
    (axes,) = drawn[0].axes
    legend = axes.get_legend()
    assert [text.get_text() for text in legend.get_texts()] == ["cats", "dogs"]
    assert all(area <= 61 for mark in legend.legend_handles for area in mark.get_sizes())


def test_principal_finds_the_largest_variances():
    scales = torch.tensor([0.1, 5.0, 0.2, 2.0]).double()
    mu = torch.randn(4000, 4).double() * scales + 3
    directions, shares = figures._principal_components(mu)
    torch.testing.assert_close(directions[[1, 3], [0, 1]], torch.ones(2).double(), rtol=0, atol=1e-2)
    expected = scales[[1, 3]].square() / scales.square().sum()
    torch.testing.assert_close(shares, expected, rtol=0.05, atol=0)


def test_figures_in_missing_folder_fail(tmp_path):
    for draw in (
        lambda path: figures.save_latents(torch.randn(5, 2), None, path),
        lambda path: pictures.save_grid([torch.rand(2, 4, 4, 1)], path),
    ):
        with pytest.raises(InputError, match="cannot be written: no such file or directory"):
            draw(tmp_path / "none" / "picture.png")
