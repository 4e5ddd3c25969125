"""What a run of images leaves beside its tables: pictures."""

from pathlib import Path

import torch
from torch import Tensor

from fastvae.train import figures
from fastvae.train.callbacks import Drawer
from fastvae.train.draws import generator

from . import pictures
from .data import Images
from .loader import held_out_batch, prepare
from .module import ImageVAE
from .settings import ImageSettings

__all__ = ["Pictures"]

_DRAWN = 2000  # points in latents.png


class Pictures(Drawer):
    """Draws samples.png, reconstructions.png and latents.png."""

    def __init__(self, folder: Path, images: Images, settings: ImageSettings) -> None:
        self.folder = folder
        self.images = images
        self.settings = settings

    @torch.no_grad()
    def draw(self, model: ImageVAE) -> None:
        settings, device = self.settings, model.device
        precision = model.trainer.precision_plugin  # what Lightning's own loops go through

        def encoded(x: Tensor) -> Tensor:
            with precision.forward_context():
                return model.encode(precision.convert_input(x.to(device)))[0]

        def shown(z: Tensor) -> Tensor:
            with precision.forward_context():
                mean = model.likelihood.mean(model.decode(precision.convert_input(z)))
            return mean.float().cpu().permute(0, 2, 3, 1)

        z = torch.randn(64, model.latents, generator=generator(settings.seed, 2)).to(device)
        pictures.save_samples(shown(z), self.folder / "samples.png")

        held_out, labels = self.images.held_out[:_DRAWN], self.images.held_out_labels
        x = prepare(held_out, settings, generator(settings.seed, 3))
        mu = torch.cat([encoded(part) for part in x.split(held_out_batch(settings, held_out.shape[1:]))])
        labels = None if labels is None else labels[:_DRAWN]
        figures.save_latents(
            mu, labels, self.folder / "latents.png", names=self.images.label_names, what="held-out images"
        )

        pictures.save_reconstructions(
            held_out[:30] / 255, shown(mu[:30]), self.folder / "reconstructions.png"
        )
