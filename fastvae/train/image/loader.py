"""Batches of images for Lightning. They are indexed from one tensor, without worker processes."""

from collections.abc import Iterator, Sequence

import torch
from lightning.pytorch import LightningDataModule
from torch import Tensor

from fastvae.train.batches import Batches
from fastvae.train.seeding import seeded_generator

from .data import Images
from .settings import ImageSettings

__all__ = ["ImageData", "augment", "prepare", "val_batch_size"]


def val_batch_size(settings: ImageSettings, shape: Sequence[int]) -> int:
    """Return how many images (H, W, C) to process at a time without gradients.

    This is 1000, or as many as fit into 32 MiB of float32. The size counts the images or the output of the decoder,
    whichever is larger: dmol has ten numbers for each component of a pixel.

    On 2 cores with MNIST, mlp is fastest with 500 to 1000 images, and conv hardly depends on the number from 100 on.
    Fewer calls also mean less waiting between threads on a busy machine.
    """
    height, width, channels = shape
    numbers = height * width * max(channels, settings.output_channels(channels))
    return max(1, min(1000, 2**23 // numbers))


def prepare(images: Tensor, settings: ImageSettings, generator: torch.Generator | None = None) -> Tensor:
    """Convert uint8 images (B, H, W, C) to the input of the likelihood: (B, C, H, W), float in [0, 1] or uint8.

    - discretized-logistic, dmol: the bytes.
    - bernoulli: zeros and ones, either by a threshold (1 from 128 on) or drawn with probability image / 255.
    - gaussian: uniformly dequantised, (image + u) / 256, so that nll / (D ln 2) + 8 bounds the bits per dimension
      (Theis et al. 2016, section 3.1).

    Random numbers are drawn on the CPU, from `generator` or from torch's default generator.
    """
    images = images.permute(0, 3, 1, 2)
    if settings.models_bytes:
        return images.contiguous()
    if settings.likelihood == "gaussian":
        noise = torch.rand(images.shape, generator=generator)
        return noise.add_(images).div_(256)
    if settings.binarize == "threshold":
        return (images >= 128).float().contiguous()
    # A uniform byte from 0 to 254 is less than `image` with a probability of exactly image / 255.
    level = torch.empty(images.shape, dtype=torch.uint8).random_(0, 255, generator=generator)
    return (level < images).float().contiguous()


def augment(images: Tensor, generator: torch.Generator) -> Tensor:
    """Mirror half of the uint8 images (B, H, W, C) left to right, and shift each by at most 1/32 of its side.

    Uncovered pixels repeat the edge. The draws are independent for each image.
    """
    count, height, width, _ = images.shape
    mirrored = torch.rand(count, 1, generator=generator) < 0.5

    def shifted(side: int) -> Tensor:
        max_shift = side // 32
        shift = torch.randint(-max_shift, max_shift + 1, (count, 1), generator=generator)
        return (torch.arange(side) + shift).clamp(0, side - 1)  # (B, side)

    indices, columns = shifted(height), shifted(width)
    columns = torch.where(mirrored, columns.flip(1), columns)
    return images[torch.arange(count)[:, None, None], indices[:, :, None], columns[:, None, :]]


class ImageData(LightningDataModule):
    """The images of a run as batches (x, index of x[0] in the whole batch), where x (B, C, H, W) is prepared.

    The order of epoch e depends on (seed, e), and the draws of its batch b on (seed, e, b); see `Batches`.
    """

    def __init__(self, images: Images, settings: ImageSettings) -> None:
        super().__init__()
        self.images = images
        self.settings = settings

    def train_dataloader(self) -> "ImageBatches":
        return ImageBatches(self, val=False)

    def val_dataloader(self) -> "ImageBatches":
        return ImageBatches(self, val=True)


class ImageBatches(Batches):
    def __init__(self, data: ImageData, val: bool) -> None:
        self.images = data.images.val if val else data.images.train
        self.settings = settings = data.settings
        size = val_batch_size(settings, self.images.shape[1:]) if val else settings.batch_size
        super().__init__(data, len(self.images), size, val)

    def __iter__(self) -> Iterator[tuple[Tensor, int]]:
        settings = self.settings
        if self.is_val:
            key, order = [settings.seed, 1], torch.arange(len(self.images))
        else:
            key = [settings.seed, 0, self.epoch]
            order = torch.randperm(len(self.images), generator=seeded_generator(*key))
        for number, indices in enumerate(order.split(self.size)[: len(self)]):
            draws = seeded_generator(*key, number)
            images = self.images[indices]
            if settings.augment and not self.is_val:
                images = augment(images, draws)
            x = prepare(images, settings, draws)
            rows = self.process_slice(len(x))
            yield x[rows], rows.start
