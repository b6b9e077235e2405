"""Deprecated: `hf_adalip.recipe.image.data` has what was here."""

from .deprecated import moved
from .errors import DataError
from .recipe.data import DIGITS, load_splits
from .recipe.image.data import Batch, ImageData, ImageDataset, load_image_dataset

__all__ = [
    "DIGITS",
    "Batch",
    "DataError",
    "ImageData",
    "ImageDataset",
    "load_image_dataset",
    "load_splits",
]

moved(__name__, "hf_adalip.recipe.image.data")
