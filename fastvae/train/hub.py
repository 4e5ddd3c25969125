"""Loading datasets from the Hugging Face hub."""

import logging
from typing import Any

from .errors import InputError

__all__ = ["load_splits"]


def load_splits(name: str) -> Any:
    """Load a dataset of the Hugging Face hub as a dict of splits, one of which is `train`.

    Raises InputError if the package `datasets` is missing or the dataset cannot be loaded.
    """
    try:
        import datasets
    except ModuleNotFoundError as error:
        if error.name != "datasets":
            raise
        raise InputError(
            f"{name}: no such file or folder. If it is a Hugging Face dataset, install the package datasets first: "
            "pip install datasets"
        ) from None
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # it logs every attempt to connect
    try:
        found = datasets.load_dataset(name)
    except Exception as error:  # the network, the hub and the dataset's files can raise many types
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        raise InputError(
            f"{name}: no such file or folder, and not a Hugging Face dataset that can be loaded: {reason}"
        ) from error
    if "train" not in found:
        raise InputError(f"{name}: this dataset has no split `train`, only {', '.join(found)}")
    return found
