"""The weights that a run of images starts from."""

from pathlib import Path
from typing import Any

import torch
from torch import nn

from fastvae.train import processes, registry
from fastvae.train.checkpoints import open_checkpoint
from fastvae.train.errors import InputError
from fastvae.train.folder import CHECKPOINTS, CONFIG

from .data import Images
from .module import ImageVAE, unbounded_logvar
from .settings import ImageSettings

__all__ = ["begin", "initialise", "last_layer"]


@torch.no_grad()
def begin(model: ImageVAE, settings: ImageSettings, images: Images) -> None:
    """Let a Gaussian begin with the mean image."""
    if settings.likelihood == "gaussian":
        # The decoder begins with the mean image, or the mean colour where its last layer is a convolution, and the
        # scale with what is left of the images then. From 1, far above any image's, too little of the reconstruction
        # would count: the posterior collapses before the scale has come down.
        pixels = images.train[:1000].permute(0, 3, 1, 2).add(0.5).div(256)
        mean = pixels.mean(0)
        _, last = last_layer(model)
        if not isinstance(last, nn.Linear):
            mean = mean.mean((1, 2), keepdim=True)
        variance = (pixels - mean).square().mean() + 1 / (12 * 256**2)
        start = mean.flatten()
        if settings.variance != "fixed":
            logvar = unbounded_logvar(variance.log(), (settings.logvar_min, settings.logvar_max))
            if settings.variance == "per-pixel":
                start = torch.cat((start, logvar.expand_as(start)))
            else:
                model.likelihood.logvar.fill_(logvar)
        if last.bias is not None and last.bias.numel() % start.numel() == 0:
            last.bias.copy_(start.repeat_interleave(last.bias.numel() // start.numel()))
        model.start(pixels)


def last_layer(model: ImageVAE) -> tuple[str, Any]:
    """Of the decoder, by its name in the model."""
    layers = (nn.Linear, nn.Conv2d, nn.ConvTranspose2d)
    return [
        (f"decoder.{name}", layer)
        for name, layer in model.decoder.named_modules()
        if isinstance(layer, layers)
    ][-1]


@torch.no_grad()
def initialise(model: ImageVAE, settings: ImageSettings, out: Path, *, resumed: bool) -> None:
    """Give the model the weights of `settings.init_from`, a run or a checkpoint, where names and shapes are the same.

    The decoder's last layer and the variance of another likelihood mean something else, and are not taken. `out` is the
    folder of the model's own run, which is new or `resumed`.

    Raises InputError for a path without a checkpoint, for one that fits nowhere, and for one that a new run would
    replace.
    """
    given = f"--init-from {settings.init_from}"
    if resumed:
        given = f"{out / CONFIG}: init_from {settings.init_from}"
    elif Path(settings.init_from).is_relative_to(out.resolve()):
        raise InputError(f"{given}: it is in the run that would be replaced; give another --out")
    path = file = Path(settings.init_from)
    if path.is_dir():
        kept = [path / CHECKPOINTS / f"{name}.ckpt" for name in ("best", "last")]
        file = next((one for one in kept if one.exists()), kept[0])
    if not file.exists():
        raise InputError(f"{given}: there is no {file if path.is_dir() else 'such file'}")
    weights = open_checkpoint(file)["state_dict"]
    own = dict(model.named_parameters())
    same = [name for name in own if name in weights and weights[name].shape == own[name].shape]
    if (file.parent.parent / CONFIG).exists():
        _, theirs, _ = registry.read_run(file.parent.parent)
        of = ("likelihood", "variance", "components", "logvar_min", "logvar_max")
        if any(getattr(theirs, name, None) != getattr(settings, name) for name in of):
            last, _ = last_layer(model)
            same = [name for name in same if not name.startswith(("elbo.", f"{last}."))]
    if all(name.startswith("elbo.") for name in same):
        raise InputError(f"{given}: no weight in it has the name and shape of one of this model")
    for name in same:
        if not weights[name].isfinite().all():
            raise InputError(f"{file}: `{name}` holds NaN or infinity: these weights are of no use")
        own[name].copy_(weights[name])
    taken = sum(own[name].numel() for name in same) / sum(weight.numel() for weight in own.values())
    processes.speaker()(f"init: {taken:.0%} of the weights from {file}")
