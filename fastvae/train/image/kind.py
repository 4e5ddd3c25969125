"""The kind of runs that are trained on images.

Files: config.toml (with `shape`)  samples.png  reconstructions.png  loss.png  latents.png  and `command_files`
"""

import dataclasses
import math
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastvae.train import messages, run_folder
from fastvae.train.errors import InputError
from fastvae.train.factors import Factors
from fastvae.train.kind import EvaluatedRows, Kind

from . import data as image_data
from .data import Images, Shape, format_size, shape_of
from .recipes import MLP, VAEGAN, Conv, ConvLSTM, Photos, ResNet
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
    datum_with_article = "an image"
    recipes = (MLP, Conv, ConvLSTM, ResNet, Photos, VAEGAN)
    run = ImageRun
    form_keys = ("shape",)
    training_files = ("samples.png", "reconstructions.png", "loss.png", "latents.png")
    command_files = (
        "evaluation.json", "interpolations.png", "traversals.png", "inpainting.png", "generated.png", "neighbours.png",
    )  # fmt: skip
    default_samples = 500
    has_test = True
    has_factors = True
    wrong_kind_message = "this is a run of images"

    def load(self, settings: ImageSettings, form: Shape | None = None, *, other_data: bool = False) -> Images:
        # The files of an existing run are always resized to its shape.
        return image_data.load(
            settings.data,
            seed=settings.seed,
            size=settings.size,
            shape=form,
            validation_only=other_data,
            val=0 if other_data else settings.val,
        )

    def resolve_settings(self, settings: ImageSettings, data: Images) -> ImageSettings:
        settings = settings.resolve(shape_of(data)[2])
        settings.refuse_unused()
        if settings.data == "digits" or settings.data.endswith(".npz"):
            if settings.size != type(settings).size:
                raise InputError(
                    f"--size only applies to folders and datasets; the images of {settings.data} keep their size"
                )
            settings = dataclasses.replace(settings, size=0)
        return settings

    def resolve_on_resume(self, settings: ImageSettings, form: Shape) -> ImageSettings:
        return settings.resolve(form[2])

    def make_form(self, settings: ImageSettings, data: Images) -> Shape:
        return shape_of(data)

    def read_form(self, path: Path, form_values: dict[str, Any]) -> Shape:
        shape = form_values["shape"]
        if not (isinstance(shape, list) and len(shape) == 3 and all(type(n) is int and n > 0 for n in shape)):
            raise InputError(
                f"{path / run_folder.CONFIG}: `shape` must be [height, width, channels], got {shape!r}"
            )
        height, width, channels = shape
        return height, width, channels

    def form_lines(self, form: Shape) -> str:
        return f"shape = {list(form)}  # height, width and channels of an image\n"

    def adapt_data(self, data: Images, form: Shape, settings: ImageSettings, path: Path) -> Images:
        if shape_of(data) != form:
            raise InputError(
                f"{settings.data}: the images must be {format_size(form)} as in {path}, got "
                f"{format_size(shape_of(data))}"
            )
        return data

    def build(self, settings: ImageSettings, form: Shape) -> "ImageVAE":
        height, width, channels = form
        try:
            model = settings.make_module(
                form,
                dimensions=math.prod(form),
                bits_offset=8 if settings.likelihood == "gaussian" else 0,
                **settings.module_options(),
            )
            if settings.prior == "vamp":
                model.set_vamp_prior(settings.components, (channels, height, width), bounds=(0.0, 1.0))
            return model
        except RuntimeError as error:  # torch raises it for sizes that do not fit into memory
            raise InputError(f"cannot build this model: {str(error).strip().splitlines()[0]}") from error

    def init_from_data(self, model: "ImageVAE", settings: ImageSettings, data: Images) -> None:
        from . import init_weights

        init_weights.init_from_data(model, settings, data)

    def init_from_run(self, model: "ImageVAE", settings: ImageSettings, out: Path, *, resumed: bool) -> None:
        from . import init_weights

        if settings.init_from:
            init_weights.init_from_run(model, settings, out, resumed=resumed)

    def examples_callback(
        self, data: Images, form: Shape, settings: ImageSettings, folder: Path
    ) -> "Callback":
        from .callbacks import SaveImages

        return SaveImages(folder, data, settings)

    def batches(self, model: "ImageVAE", data: Images, form: Shape, settings: ImageSettings) -> "ImageData":
        from .loader import ImageData

        return ImageData(data, settings)

    def describe_run(
        self, model: "ImageVAE", data: Images, form: Shape, settings: ImageSettings, batches: "ImageData"
    ) -> Iterator[str]:
        size = format_size(form)
        test = "" if data.test is None else f", {len(data.test)} test images"
        yield (
            f"data: {data.name}, {size}, {len(data.train)} training images, {len(data.val)} validation images{test}"
        )
        for note in data.notes:
            yield f"warning: {note}"
        yield messages.describe_model(model, settings)
        yield f"       {settings.likelihood_description}"

    def evaluate(
        self,
        run: ImageRun,
        console: "Console",
        *,
        checkpoint: str,
        samples: int,
        limit: int | None,
        seed: int,
        test: bool,
        factors: Factors | None,
    ) -> "Evaluation":
        from .evaluate import evaluate

        return evaluate(
            run,
            console,
            checkpoint=checkpoint,
            samples=samples,
            limit=limit,
            seed=seed,
            test=test,
            factors=factors,
        )

    def evaluated_rows(self, run: ImageRun, test: bool) -> EvaluatedRows:
        images = run.images
        if images.val_rows is None or test:
            return EvaluatedRows(len(run.evaluated_images(test)))
        return EvaluatedRows(len(images.train) + len(images.val), images.val_rows)

    def after_evaluation(self, run: ImageRun, seed: int) -> Iterator[str]:
        from . import generate

        if hasattr(run.model, "realism"):  # a GAN, which may have memorised images
            generated, neighbours = run.path / "generated.png", run.path / "neighbours.png"
            generate.compare_with_real(run, generated, seed=seed)
            yield f"{generated}: new images, above validation images"
            if run.is_other_data:
                yield "neighbours.png is not drawn, because it shows training images and --data gives other data"
                return
            generate.nearest_neighbours(run, neighbours, seed=seed)
            yield f"{neighbours}: new images, each above the nearest training images"
