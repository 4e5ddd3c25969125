"""Datasets of the Hugging Face hub."""

import logging
from typing import Any

from .errors import InputError

__all__ = ["splits"]


def splits(name: str) -> Any:
    """A dataset of the Hugging Face hub, by its splits, of which one is `train`.

    Raises InputError where the package `datasets` is missing, and for what cannot be loaded.
    """
    try:
        import datasets
    except ModuleNotFoundError as error:
        if error.name != "datasets":
            raise
        raise InputError(
            f"{name}: no such file or folder; if it is a Hugging Face dataset, get the package first: "
            "pip install datasets"
        ) from None
    logging.getLogger("huggingface_hub").setLevel(
        logging.ERROR
    )  # it tells of every attempt without a network
    try:
        found = datasets.load_dataset(name)
    except Exception as error:  # whatever the network, the hub and the dataset's own files may raise
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        raise InputError(
            f"{name}: no such file or folder, and it cannot be loaded as a Hugging Face dataset: {reason}"
        ) from error
    if "train" not in found:
        raise InputError(f"{name}: this dataset has no split `train`, only {', '.join(found)}")
    return found
