"""The structural similarity of images, written out."""

import numpy as np


def windows(image: np.ndarray) -> np.ndarray:
    """All 11 x 11 windows of an image (H, W)."""
    return np.lib.stride_tricks.sliding_window_view(image.astype(np.float64), (11, 11))


def structural_similarity(a: np.ndarray, b: np.ndarray) -> float:
    """Wang et al. 2004, equation 13 with weighted moments (14 to 16), for images (C, H, W) in [0, 1]."""
    distance = np.arange(11) - 5
    weights = np.exp(-(distance[:, None] ** 2 + distance**2) / (2 * 1.5**2))
    weights /= weights.sum()
    c1, c2 = 0.01**2, 0.03**2
    values = []
    for first, second in zip(a, b, strict=True):
        x, y = windows(first), windows(second)
        mu_x, mu_y = ((weights * part).sum((-1, -2), keepdims=True) for part in (x, y))
        var_x = (weights * (x - mu_x) ** 2).sum((-1, -2))
        var_y = (weights * (y - mu_y) ** 2).sum((-1, -2))
        covariance = (weights * (x - mu_x) * (y - mu_y)).sum((-1, -2))
        mu_x, mu_y = mu_x[..., 0, 0], mu_y[..., 0, 0]
        luminance = (2 * mu_x * mu_y + c1) / (mu_x**2 + mu_y**2 + c1)
        values.append(luminance * (2 * covariance + c2) / (var_x + var_y + c2))
    return float(np.mean(values))
