"""An opened run of images."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor

from fastvae.train.errors import InputError
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

    def evaluated_images(self, test: bool) -> Tensor:
        """The validation images, or those of the test. For other data, their validation images are the test images.

        Raises InputError if the run has no images left for a test.
        """
        if not test:
            return self.images.val
        if not self.settings.val:
            raise InputError(
                "--test needs a run that was trained with --val, the number of training images to validate with; this "
                f"run has validated with all {len(self.images.val)} images that it was not trained on"
            )
        return self.images.val if self.images.test is None else self.images.test
