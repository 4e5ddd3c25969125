"""PSNR and SSIM, compared with their formulas."""

import math

import numpy as np
import pytest
import torch
from ssim_by_hand import structural_similarity

from fastvae.train.image import evaluate

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("shape", [(70, 1, 11, 11), (3, 3, 14, 23), (2, 1, 64, 40)])
def test_psnr_and_ssim_agree_with_their_formulas(shape):
    rng = np.random.default_rng(0)
    a = rng.random(shape)
    a[-1, :, :, :9] = 1  # a part with zero variance
    b = a + rng.normal(0, 0.1, shape) * np.linspace(0.2, 3, shape[0])[:, None, None, None]
    clipped = b.clip(0, 1)
    assert (clipped != b).any()
    x, y = torch.from_numpy(a), torch.from_numpy(b)
    expected = [10 * math.log10(1 / ((p - q) ** 2).mean()) for p, q in zip(a, clipped, strict=True)]
    assert evaluate.psnr(y, x).tolist() == pytest.approx(expected, rel=1e-6)
    expected = [structural_similarity(p, q) for p, q in zip(a, clipped, strict=True)]
    assert max(expected) - min(expected) > 0.05
    assert evaluate.ssim(y.float(), x.float()).tolist() == pytest.approx(expected, abs=1e-5)


def test_psnr_and_ssim_of_equal_images_have_their_maximum():
    x = torch.rand(3, 1, 16, 16)
    levels = torch.arange(256.0).view(1, 1, 16, 16)
    assert evaluate.ssim(x, x).tolist() == pytest.approx([1, 1, 1])
    assert evaluate.psnr(x, x).tolist() == pytest.approx([10 * math.log10(12 * 255**2)] * 3)
    # The error of rounding to bytes is close to the bound; an error of a whole level is far from it.
    noise = torch.linspace(-0.5, 0.5, 256).view(1, 1, 16, 16)
    near = levels.clamp(1, 254)
    assert evaluate.psnr((near + noise) / 255, near / 255).item() == pytest.approx(58.9, abs=0.05)
    assert evaluate.psnr((near + 1) / 255, near / 255).item() == pytest.approx(20 * math.log10(255), abs=1e-4)
