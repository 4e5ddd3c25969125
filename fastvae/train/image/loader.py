"""Batches of images for Lightning: rows of one tensor, indexed a batch at a time and without worker processes."""

from collections.abc import Iterator, Sequence

import torch
from lightning.pytorch import LightningDataModule
from torch import Tensor

from fastvae.train.batches import Batches
from fastvae.train.draws import generator

from .data import Images
from .settings import ImageSettings

__all__ = ["ImageData", "augment", "held_out_batch", "prepare"]


def held_out_batch(settings: ImageSettings, shape: Sequence[int]) -> int:
    """How many images (H, W, C) to take at a time without gradients: 1000, or as many as make 32 MiB of float32.

    They, or what the decoder makes of them where that is more: dmol has ten numbers for each component of a pixel.

    Measured on 2 cores with MNIST: mlp is fastest with 500 to 1000, conv cares little from 100 on; and the fewer calls,
    the less the threads wait for one another on a busy machine.
    """
    height, width, channels = shape
    numbers = height * width * max(channels, settings.planes(channels))
    return max(1, min(1000, 2**23 // numbers))


def prepare(images: Tensor, settings: ImageSettings, generator: torch.Generator | None = None) -> Tensor:
    """uint8 images (B, H, W, C) as the likelihood takes them: (B, C, H, W), float in [0, 1], or the bytes themselves.

    dlogistic, dmol: the bytes. bernoulli: zeros and ones, by threshold (1 from 128 on) or dynamically (1 with
    probability image / 255). gaussian: uniformly dequantised, (image + u) / 256, so that nll / (D ln 2) + 8 bounds the
    bits per dimension (Theis et al. 2016, section 3.1). What is drawn is drawn on the CPU, from `generator` or torch's
    own.
    """
    images = images.permute(0, 3, 1, 2)
    if settings.of_bytes:
        return images.contiguous()
    if settings.likelihood == "gaussian":
        noise = torch.rand(images.shape, generator=generator)
        return noise.add_(images).div_(256)
    if settings.binarize == "threshold":
        return (images >= 128).float().contiguous()
    # A byte of 0 to 254, each equally likely, is below `image` with probability image / 255, exactly.
    level = torch.empty(images.shape, dtype=torch.uint8).random_(0, 255, generator=generator)
    return (level < images).float().contiguous()


def augment(images: Tensor, generator: torch.Generator) -> Tensor:
    """uint8 images (B, H, W, C), half of them mirrored left to right, each shifted by at most 1/32 of its side.

    What a shift uncovers repeats the edge. The draws are independent for every image.
    """
    count, height, width, _ = images.shape
    mirrored = torch.rand(count, 1, generator=generator) < 0.5

    def places(side: int) -> Tensor:
        most = side // 32
        shift = torch.randint(-most, most + 1, (count, 1), generator=generator)
        return (torch.arange(side) + shift).clamp(0, side - 1)  # (B, side)

    rows, columns = places(height), places(width)
    columns = torch.where(mirrored, columns.flip(1), columns)
    return images[torch.arange(count)[:, None, None], rows[:, :, None], columns[:, None, :]]


class ImageData(LightningDataModule):
    """The images of a run as batches (x, the place of x[0] in the whole batch), x being prepared: (B, C, H, W).

    Epoch e shuffles by (seed, e), and batch b of it draws by (seed, e, b); see `Batches`.
    """

    def __init__(self, images: Images, settings: ImageSettings) -> None:
        super().__init__()
        self.images = images
        self.settings = settings

    def train_dataloader(self) -> "ImageBatches":
        return ImageBatches(self, held_out=False)

    def val_dataloader(self) -> "ImageBatches":
        return ImageBatches(self, held_out=True)


class ImageBatches(Batches):
    def __init__(self, data: ImageData, held_out: bool) -> None:
        self.images = data.images.held_out if held_out else data.images.train
        self.settings = settings = data.settings
        size = held_out_batch(settings, self.images.shape[1:]) if held_out else settings.batch_size
        super().__init__(data, len(self.images), size, held_out)

    def __iter__(self) -> Iterator[tuple[Tensor, int]]:
        settings = self.settings
        if self.is_held_out:
            key, order = [settings.seed, 1], torch.arange(len(self.images))
        else:
            key = [settings.seed, 0, self.epoch]
            order = torch.randperm(len(self.images), generator=generator(*key))
        for number, rows in enumerate(order.split(self.size)[: len(self)]):
            draws = generator(*key, number)
            images = self.images[rows]
            if settings.augment and not self.is_held_out:
                images = augment(images, draws)
            x = prepare(images, settings, draws)
            own = self.own(len(x))
            yield x[own], own.start
