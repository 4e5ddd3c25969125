"""Runs of images: what they do in their own way.

config.toml (with `shape`)  samples.png  reconstructions.png  loss.png  latents.png, and what `later` names
"""

import dataclasses
import math
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastvae.train import folder, messages
from fastvae.train.errors import InputError
from fastvae.train.kind import Kind

from . import data as image_data
from .data import Images, Shape, shape_of, size_of
from .recipes import MLP, VAEGAN, Colour, Conv, ConvLSTM, Photos
from .run import ImageRun
from .settings import ImageSettings

if TYPE_CHECKING:
    from lightning.pytorch import Callback
    from rich.console import Console

    from .evaluate import Evaluation
    from .loader import ImageData
    from .module import ImageVAE

__all__ = ["ImageKind"]


class ImageKind(Kind[ImageSettings, Shape, Images, ImageRun]):
    name = "image"
    a_datum = "an image"
    recipes = (MLP, Conv, ConvLSTM, Colour, Photos, VAEGAN)
    run = ImageRun
    head = ("shape",)
    left = ("samples.png", "reconstructions.png", "loss.png", "latents.png")
    later = (
        "evaluation.json", "interpolations.png", "traversals.png", "inpainting.png", "generated.png", "neighbours.png",
    )  # fmt: skip
    samples = 500
    elsewhere = "a run of images"

    def load(self, settings: ImageSettings, form: Shape | None = None, *, others: bool = False) -> Images:
        # Files are brought to the shape of a run that is there, whatever they would be by themselves.
        return image_data.load(
            settings.data, seed=settings.seed, size=settings.size, shape=form, whole=others
        )

    def settle(self, settings: ImageSettings, data: Images) -> ImageSettings:
        settings = settings.resolve(shape_of(data)[2])
        settings.refuse_unused()
        if settings.data == "digits" or settings.data.endswith(".npz"):
            if settings.size != type(settings).size:
                raise InputError(
                    f"--size is of folders and datasets: the images of {settings.data} are taken as they are"
                )
            settings = dataclasses.replace(settings, size=0)
        return settings

    def settle_again(self, settings: ImageSettings, form: Shape) -> ImageSettings:
        return settings.resolve(form[2])

    def make_form(self, settings: ImageSettings, data: Images) -> Shape:
        return shape_of(data)

    def read_form(self, path: Path, head: dict[str, Any]) -> Shape:
        shape = head["shape"]
        if not (isinstance(shape, list) and len(shape) == 3 and all(type(n) is int and n > 0 for n in shape)):
            raise InputError(
                f"{path / folder.CONFIG}: `shape` must be [height, width, channels], got {shape!r}"
            )
        height, width, channels = shape
        return height, width, channels

    def head_lines(self, form: Shape) -> str:
        return f"shape = {list(form)}  # of an image: height, width, channels\n"

    def suit(self, data: Images, form: Shape, settings: ImageSettings, path: Path) -> Images:
        if shape_of(data) != form:
            raise InputError(
                f"{settings.data}: the images are {size_of(shape_of(data))}, those of {path} {size_of(form)}"
            )
        return data

    def build(self, settings: ImageSettings, form: Shape) -> "ImageVAE":
        try:
            return settings.make_module(
                form,
                dimensions=math.prod(form),
                bits_offset=8 if settings.likelihood == "gaussian" else 0,
                **settings.module_options(),
            )
        except RuntimeError as error:  # torch's, of sizes that no memory holds
            raise InputError(f"this model cannot be made: {str(error).strip().splitlines()[0]}") from error

    def begin(self, model: "ImageVAE", settings: ImageSettings, data: Images) -> None:
        from . import start

        start.begin(model, settings, data)

    def initialise(self, model: "ImageVAE", settings: ImageSettings, out: Path, *, resumed: bool) -> None:
        from . import start

        if settings.init_from:
            start.initialise(model, settings, out, resumed=resumed)

    def drawer(self, data: Images, form: Shape, settings: ImageSettings, folder: Path) -> "Callback":
        from .callbacks import Pictures

        return Pictures(folder, data, settings)

    def batches(self, model: "ImageVAE", data: Images, form: Shape, settings: ImageSettings) -> "ImageData":
        from .loader import ImageData

        return ImageData(data, settings)

    def introduce(
        self, model: "ImageVAE", data: Images, form: Shape, settings: ImageSettings, batches: "ImageData"
    ) -> Iterator[str]:
        size = size_of(form)
        yield f"data: {data.name}, {size}: {len(data.train)} to train on, {len(data.held_out)} held out"
        for note in data.notes:
            yield f"warning: {note}"
        yield messages.model_line(model, settings)
        yield f"       {settings.described}"

    def evaluate(
        self,
        run: ImageRun,
        console: "Console",
        *,
        checkpoint: str,
        samples: int,
        limit: int | None,
        seed: int,
    ) -> "Evaluation":
        from .evaluate import evaluate

        return evaluate(run, console, checkpoint=checkpoint, samples=samples, limit=limit, seed=seed)

    def after_evaluation(self, run: ImageRun, seed: int) -> Iterator[str]:
        from . import generate

        if hasattr(run.model, "realism"):  # a GAN, which may have learned images by heart
            generated, neighbours = run.path / "generated.png", run.path / "neighbours.png"
            generate.beside(run, generated, seed=seed)
            yield f"{generated}: new images, above held-out ones"
            if run.others:
                yield "neighbours.png is not drawn: it is of the images trained on, and --data are others"
                return
            generate.neighbours(run, neighbours, seed=seed)
            yield f"{neighbours}: new images, each above the nearest of those trained on"
