"""Initialisation of an image model from the data, or from another run."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastvae.train import processes, registry
from fastvae.train.checkpoints import open_checkpoint
from fastvae.train.errors import InputError
from fastvae.train.run_folder import CHECKPOINTS, CONFIG
from fastvae.train.seeding import seeded_generator

from .data import Images
from .loader import prepare
from .module import ImageVAE, unbounded_logvar
from .settings import ImageSettings

__all__ = ["init_from_data", "init_from_run", "last_layer"]


@torch.no_grad()
def init_from_data(model: ImageVAE, settings: ImageSettings, images: Images) -> None:
    """Initialise a Gaussian likelihood with the mean and the variance of the images, and the pseudo-inputs of a
    VampPrior with images.

    For a Bernoulli, if the settings say so, initialise the output bias with the logits of the mean binary image.
    """
    if settings.prior == "vamp":
        prior: Any = model.prior
        prior.pseudo_inputs.copy_(_random_inputs(images, settings))
    _, last = last_layer(model)

    def per_bias(mean: Tensor) -> Tensor:
        # The mean image, or the mean colour if the last layer is a convolution.
        return mean if isinstance(last, nn.Linear) else mean.mean((1, 2), keepdim=True)

    def set_bias(start: Tensor) -> None:
        if last.bias is not None and last.bias.numel() % start.numel() == 0:
            last.bias.copy_(start.flatten().repeat_interleave(last.bias.numel() // start.numel()))

    if settings.bias_at_mean:
        is_drawn = settings.binarize == "dynamic"
        train = images.train if is_drawn else images.train >= 128
        mean = train.sum(0, dtype=torch.int64).permute(2, 0, 1) / (len(train) * (255 if is_drawn else 1))
        # Some pixels are black in all images; their logit would be infinite.
        set_bias(torch.logit(per_bias(mean).clamp(0.001, 0.999)))
    if settings.likelihood == "gaussian":
        # The decoder starts with the mean, and the scale with the remaining variance. If the scale started at 1, far
        # above that of any image, the reconstruction would count so little that the posterior collapses before the
        # scale has adapted.
        pixels = images.train[:1000].permute(0, 3, 1, 2).add(0.5).div(256)
        mean = per_bias(pixels.mean(0))
        variance = (pixels - mean).square().mean() + 1 / (12 * 256**2)
        start = mean.flatten()
        if settings.variance != "fixed":
            logvar = unbounded_logvar(variance.log(), (settings.logvar_min, settings.logvar_max))
            if settings.variance == "per-element":
                start = torch.cat((start, logvar.expand_as(start)))
            else:
                model.likelihood.logvar.fill_(logvar)
        set_bias(start)
        model.init_from_images(pixels)


def _random_inputs(images: Images, settings: ImageSettings) -> Tensor:
    """Return random training images as the encoder gets them, (M, C, H, W), a little inside of the range [0, 1].

    At the ends of the range, the first step could take a pixel out of it, where it has no gradient.
    """
    draws = seeded_generator(settings.seed, 5)
    chosen = torch.randperm(len(images.train), generator=draws)[: settings.components]
    x = prepare(images.train[chosen], settings, draws)
    return 0.05 + 0.9 * (x.float() / 255 if x.dtype == torch.uint8 else x)


def last_layer(model: ImageVAE) -> tuple[str, Any]:
    """Return the name and the module of the decoder's last layer."""
    layers = (nn.Linear, nn.Conv2d, nn.ConvTranspose2d)
    return [
        (f"decoder.{name}", layer)
        for name, layer in model.decoder.named_modules()
        if isinstance(layer, layers)
    ][-1]


@torch.no_grad()
def init_from_run(model: ImageVAE, settings: ImageSettings, out: Path, *, resumed: bool) -> None:
    """Copy weights from `settings.init_from`, a run or a checkpoint, wherever names and shapes agree.

    If that run has another likelihood, the decoder's last layer and the variance have another meaning and are not
    copied. `out` is the folder of the model's own run, which is new or `resumed`.

    Raises InputError if there is no checkpoint, if none of its weights fit, or if the new run would replace it.
    """
    source = f"--init-from {settings.init_from}"
    if resumed:
        source = f"{out / CONFIG}: init_from {settings.init_from}"
    elif Path(settings.init_from).is_relative_to(out.resolve()):
        raise InputError(
            f"{source}: this path is inside the run that would be replaced; choose another --out"
        )
    path = file = Path(settings.init_from)
    if path.is_dir():
        candidates = [path / CHECKPOINTS / f"{name}.ckpt" for name in ("best", "last")]
        file = next((candidate for candidate in candidates if candidate.exists()), candidates[0])
    if not file.exists():
        raise InputError(f"{source}: {file if path.is_dir() else 'this path'} does not exist")
    weights = open_checkpoint(file)["state_dict"]
    parameters = dict(model.named_parameters())
    names = [name for name in parameters if name in weights and weights[name].shape == parameters[name].shape]
    if (file.parent.parent / CONFIG).exists():
        _, source_settings, _ = registry.read_run(file.parent.parent)
        options = ("likelihood", "variance", "pixel_components", "logvar_min", "logvar_max")
        if any(getattr(source_settings, name, None) != getattr(settings, name) for name in options):
            last, _ = last_layer(model)
            names = [name for name in names if not name.startswith(("elbo.", f"{last}."))]
    if all(name.startswith("elbo.") for name in names):
        raise InputError(f"{source}: none of its weights has a name and shape that this model has")
    for name in names:
        if not weights[name].isfinite().all():
            raise InputError(f"{file}: `{name}` contains NaN or infinity, so the weights cannot be used")
        parameters[name].copy_(weights[name])
    share = sum(parameters[name].numel() for name in names) / sum(
        weight.numel() for weight in parameters.values()
    )
    processes.print_once(f"init: copied {share:.0%} of the weights from {file}")
