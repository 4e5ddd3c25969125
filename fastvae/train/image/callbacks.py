"""The callback that saves pictures during training."""

from pathlib import Path

import torch
from torch import Tensor

from fastvae.train import figures
from fastvae.train.callbacks import SaveExamples
from fastvae.train.seeding import seeded_generator

from . import pictures
from .data import Images
from .loader import prepare, val_batch_size
from .module import ImageVAE
from .settings import ImageSettings

__all__ = ["SaveImages"]

_DRAWN = 2000  # number of points in latents.png


class SaveImages(SaveExamples):
    """Saves samples.png, reconstructions.png and latents.png."""

    def __init__(self, folder: Path, images: Images, settings: ImageSettings) -> None:
        self.folder = folder
        self.images = images
        self.settings = settings

    @torch.no_grad()
    def save_examples(self, model: ImageVAE) -> None:
        settings, device = self.settings, model.device
        precision = model.trainer.precision_plugin  # as in Lightning's own loops

        def encode_means(x: Tensor) -> Tensor:
            with precision.forward_context():
                return model.encode(precision.convert_input(x.to(device)))[0]

        def decode_means(z: Tensor) -> Tensor:
            with precision.forward_context():
                mean = model.likelihood.mean(model.decode(precision.convert_input(z)))
            return mean.float().cpu().permute(0, 2, 3, 1)

        z = model.sample_prior(64, seeded_generator(settings.seed, 2)).to(device)
        pictures.save_samples(decode_means(z), self.folder / "samples.png")

        val, labels = self.images.val[:_DRAWN], self.images.val_labels
        x = prepare(val, settings, seeded_generator(settings.seed, 3))
        mu = torch.cat([encode_means(part) for part in x.split(val_batch_size(settings, val.shape[1:]))])
        labels = None if labels is None else labels[:_DRAWN]
        figures.save_latents(
            mu,
            labels,
            self.folder / "latents.png",
            names=self.images.label_names,
            what="validation images",
        )

        pictures.save_reconstructions(
            val[:30] / 255, decode_means(mu[:30]), self.folder / "reconstructions.png"
        )
