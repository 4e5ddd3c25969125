"""An opened run of images."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from fastvae.train.kind import Run

from .data import Images, Shape
from .settings import ImageSettings

if TYPE_CHECKING:
    from .module import ImageVAE

__all__ = ["ImageRun"]


@dataclass
class ImageRun(Run[ImageSettings, Shape, Images]):
    """A run of images."""

    model: "ImageVAE"

    @property
    def shape(self) -> Shape:
        """The shape of an image: H, W, C."""
        return self.form

    @property
    def images(self) -> Images:
        """The run's data. If they are a folder given with --data, all of its images are validation images."""
        return self.data
