"""Figures of a run as PNG files: the loss curves and the latent space."""

import io
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from . import files

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["save_latents", "save_loss_curve"]

_DPI = 120
_POINTS = 5000  # more points would cover each other
_CLASSES = 20  # the number of colours that can be told apart


def save_loss_curve(records: Sequence[Mapping[str, float]], path: Path, unit: str = "datum") -> None:
    """Plot the negative ELBO and the KL over the epochs, in nats per `unit`, from the records of metrics.csv.

    Raises InputError if the file cannot be written.
    """

    def column(name: str) -> Any:
        return np.array([record.get(name, np.nan) for record in records], dtype=float)

    figure = _figure(9.6, 4.2)
    losses, divergences = figure.subplots(1, 2)
    epochs = column("epoch")
    style: dict[str, Any] = {"lw": 1.8, "marker": "o" if len(records) < 25 else "", "ms": 3.5}
    train, val = {"color": "C0", "label": "training"}, {"color": "C1", "label": "validation"}
    for axes, title, train_values, val_values in (
        (losses, "negative ELBO", column("train_nll") + column("train_kl"), column("val_neg_elbo")),
        (divergences, "KL of the posterior from the prior", column("train_kl"), column("val_kl")),
    ):
        axes.plot(epochs, train_values, **style, **train)
        axes.plot(epochs, val_values, **style, **val)
        axes.set_title(title, fontsize=11)
        axes.set_ylabel(f"nats per {unit}")
        axes.set_xlabel("epoch")
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    _crop_first_epochs(losses)
    handles, names = losses.get_legend_handles_labels()
    beta = column("beta")
    if np.ptp(beta) > 0:
        right = divergences.twinx()
        handles += right.plot(epochs, beta, color="0.5", ls="--", lw=1.2)
        names += ["weight of the KL (right)"]
        right.set_ylim(0, 1.05 * beta.max())
        right.set_ylabel("weight of the KL, beta")
        right.spines["top"].set_visible(False)
    divergences.legend(handles, names, frameon=False)
    _save(figure, path)


def _crop_first_epochs(axes: Any) -> None:
    """Let the curves of the first epochs leave the plot at the top if they would flatten the rest."""
    for count in (1, 2, 3):
        values = np.concatenate([line.get_ydata() for line in axes.lines])
        later = np.concatenate([line.get_ydata()[count:] for line in axes.lines])
        values, later = values[np.isfinite(values)], later[np.isfinite(later)]
        if len(later) >= 6 and np.ptp(values) > 3 * np.ptp(later) > 0:
            axes.set_ylim(later.min() - 0.05 * np.ptp(later), later.max() + 0.25 * np.ptp(later))
            return


def save_latents(
    mu: Tensor,
    labels: Tensor | None,
    path: Path,
    *,
    names: Sequence[str] = (),
    what: str = "validation data",
) -> None:
    """Plot posterior means (N, L) as points, coloured by their integer labels (N,).

    `names` are the names of the classes, indexed by label; without them the legend shows the labels themselves.

    More than two dimensions are projected onto their first two principal components, and a single one becomes a
    histogram. If there are too many points, an evenly spaced subset is plotted. Raises InputError if the file cannot
    be written.
    """
    mu = mu.double().cpu()
    finite = mu.isfinite().all(1)
    mu, labels = mu[finite], None if labels is None else labels.cpu()[finite]
    indices = torch.linspace(0, len(mu) - 1, min(len(mu), _POINTS)).long()
    points, axis_names = mu[indices], ["z0", "z1"]
    if mu.shape[1] > 2:
        directions, shares = _principal_components(mu)
        points = (points - mu.mean(0)) @ directions
        axis_names = [
            f"{ordinal} principal component ({share:.0%} of the variance)"
            for ordinal, share in zip(("first", "second"), shares.tolist(), strict=True)
        ]
    classes = torch.zeros(len(indices)) if labels is None else labels[indices]
    present = classes.unique().tolist() or [0]
    if len(present) > _CLASSES:
        classes, present = torch.zeros(len(indices)), [0]
    colours = _colours(len(present))
    groups = [points[classes == label].numpy() for label in present]
    size = min(60.0, 6 + 6000 / max(1, len(points)))  # the area of a point
    class_names = _class_names(present, names)

    figure = _figure(7.2, 6.4)
    axes = figure.subplots()
    if mu.shape[1] == 1:
        edges = np.histogram_bin_edges(points.numpy(), 60).tolist()
        axes.hist([group[:, 0] for group in groups], edges, stacked=True, color=colours, label=class_names)
        axes.set_xlabel("z0")
        axes.set_ylabel(what)
    else:
        for group, colour, text in zip(groups, colours, class_names, strict=True):
            axes.scatter(group[:, 0], group[:, 1], size, alpha=0.7, lw=0, color=colour, label=text)
        axes.set_aspect("equal", "datalim")
        axes.set_xlabel(axis_names[0])
        axes.set_ylabel(axis_names[1])
        axes.grid(alpha=0.25)
    axes.set_title(f"posterior means of {what}", fontsize=11)
    axes.spines[["top", "right"]].set_visible(False)
    if len(present) > 1:
        position: dict[str, Any] = {"loc": "center left", "bbox_to_anchor": (1.0, 0.5)}
        axes.legend(title="label", frameon=False, markerscale=math.sqrt(60 / size), **position)
    _save(figure, path)


def _principal_components(mu: Tensor) -> tuple[Tensor, Tensor]:
    """Return the two directions (L, 2) of largest variance of (N, L), and their shares of the total variance (2,)."""
    centred = mu - mu.mean(0)
    variances, vectors = torch.linalg.eigh(centred.T @ centred)  # in ascending order
    directions = vectors[:, [-1, -2]]
    # The sign of an eigenvector is arbitrary. Fixing it keeps the picture from flipping between epochs.
    largest = directions.gather(0, directions.abs().argmax(0, keepdim=True))
    return directions * largest.sign(), variances[[-1, -2]].clamp(min=0) / variances.sum().clamp(min=1e-30)


def _class_names(present: list[Any], names: Sequence[str]) -> list[str]:
    return [names[int(n)][:24] if 0 <= n < len(names) else str(int(n)) for n in present]


def _colours(count: int) -> list[Any]:
    from matplotlib import colormaps

    return [colormaps["tab10" if count <= 10 else "tab20"](i) for i in range(count)]


def _figure(width: float, height: float) -> "Figure":
    # pyplot would keep the figure and might look for a display.
    from matplotlib.figure import Figure

    return Figure((width, height), dpi=_DPI, layout="constrained")


def _save(figure: "Figure", path: Path) -> None:
    png = io.BytesIO()
    figure.savefig(png, format="png")
    files.write(path, png.getvalue())
