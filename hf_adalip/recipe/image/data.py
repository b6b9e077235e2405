"""Images decoded once: a whole dataset as uint8 tensors in memory, fetched a batch at a time."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any, TypedDict

import numpy as np
import torch
from torch import Tensor

from ...errors import DataError
from ..data import DIGITS, load_splits

try:
    import datasets
    from PIL import Image, ImageOps
except ImportError as error:
    raise ImportError(
        "hf_adalip.recipe.image.data needs datasets: pip install 'hf-adalip[recipes]'"
    ) from error

_DIGITS_TEST = 360
_DECODE = 1000  # images decoded at a time
_MODES = ("L", "RGB")
_MOST_CLASSES = 1_000_000  # of numbers without names: the network gets an output for each up to it


class Batch(TypedDict):
    """What a model and a loss are given."""

    pixel_values: Tensor  # float32 [batch, channels, height, width] in [0, 1]
    labels: Tensor  # int64 [batch]
    indices: Tensor  # int64 [batch], of the images in their set


class ImageDataset(torch.utils.data.Dataset[Batch]):
    """Images and labels in memory; give `collate` to the DataLoader as collate_fn.

    Args:
        images: uint8 [n, channels, height, width].
        labels: int64 [n].
    """

    def __init__(self, images: Tensor, labels: Tensor) -> None:
        self.images, self.labels = images, labels

    def __len__(self) -> int:
        return len(self.labels)

    def __getitems__(self, indices: list[int]) -> Batch:
        """A whole batch at once, which is what makes it fast; DataLoader looks for this method."""
        chosen = torch.as_tensor(indices)
        images = self.images[chosen].to(torch.float32).div_(255.0)
        return {"pixel_values": images, "labels": self.labels[chosen], "indices": chosen}

    def __getitem__(self, index: int) -> Batch:
        batch = self.__getitems__([index])
        return {
            "pixel_values": batch["pixel_values"][0],
            "labels": batch["labels"][0],
            "indices": batch["indices"][0],
        }

    @staticmethod
    def collate(batch: Any) -> Any:
        return batch  # as __getitems__ made it


@dataclass(frozen=True)
class ImageData:
    """A training and a test set of images of one shape.

    Args:
        name: as given to `load_image_dataset`.
        train: the images to train on.
        test: the images to evaluate on.
        num_classes: labels are 0 … num_classes - 1.
        eval_split: the name of the split that `test` is.
    """

    name: str
    train: ImageDataset
    test: ImageDataset
    num_classes: int
    eval_split: str = "test"

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Channels, height, width."""
        channels, height, width = self.train.images.shape[1:]
        return channels, height, width

    def fingerprint(self) -> str:
        """16 hexadecimal digits of a sha256 over shapes, pixels and labels of both sets."""
        digest = hashlib.sha256()
        for part in (self.train, self.test):
            digest.update(str(tuple(part.images.shape)).encode())
            digest.update(part.images.numpy().data)
            digest.update(part.labels.numpy().data)
        return digest.hexdigest()[:16]


def load_image_dataset(
    name: str,
    image_column_name: str | None = None,
    label_column_name: str | None = None,
    max_train_samples: int | None = None,
    max_eval_samples: int | None = None,
    image_size: int | None = None,
) -> ImageData:
    """Loads, checks and decodes the `train` and `test` splits of an image classification dataset.

    Where there is no `test`, a split whose name begins with `validation` is evaluated on.

    Args:
        name: a Hub id ("ylecun/mnist"), a folder in any layout that `datasets.load_dataset`
            takes, or "digits": scikit-learn's 1797 handwritten digits of 8×8 pixels, of which the
            last 360 in the file's order are the test set (the order is kept because neighbours
            in the file come from one writer); their pixels 0..16 are scaled to 0..255.
        image_column_name: None for the only column of images.
        label_column_name: None for the only column of class labels.
        max_train_samples: at most so many images, drawn without replacement and always the same
            ones; None for all.
        max_eval_samples: the same for the test set.
        image_size: s, to make every image RGB of s×s pixels, of the largest square in its middle;
            None to take the images as they are.

    Raises:
        DataError: if there is no such dataset, it cannot be reached, lacks a split or a column,
            or its images have several sizes or modes.
    """
    if name == DIGITS:
        if image_size is not None:
            raise DataError(f"--image_size {image_size}: the digits are arrays of 8x8 numbers")
        train, test = _digits()
        train, test = _sample(train, max_train_samples), _sample(test, max_eval_samples)
        return ImageData(name, train, test, num_classes=10)
    splits = load_splits(name)
    validation = [split for split in splits if split.startswith("validation")]
    held_out = "test" if "test" in splits or not validation else validation[0]
    limits = {"train": max_train_samples, held_out: max_eval_samples}
    missing = [split for split in limits if split not in splits]
    if missing:
        raise DataError(
            f"{name} has no {' and no '.join(missing)} split; it has {', '.join(splits)}"
        )
    features = splits["train"].features
    image = _column(features, datasets.Image, image_column_name, "image", name)
    label = _column(features, datasets.ClassLabel, label_column_name, "label", name)
    classes = getattr(features[label], "num_classes", _MOST_CLASSES)
    train, test = (
        _decode(splits[s], image, label, classes, n, f"{name}, {s}", image_size)
        for s, n in limits.items()
    )
    if train.images.shape[1:] != test.images.shape[1:]:
        shapes = f"{tuple(train.images.shape[1:])} and {tuple(test.images.shape[1:])}"
        raise DataError(f"the train and {held_out} images of {name} differ in shape: {shapes}")
    highest = int(max(train.labels.max(), test.labels.max()))
    num_classes = getattr(features[label], "num_classes", highest + 1)
    return ImageData(name, train, test, num_classes, held_out)


def _digits() -> tuple[ImageDataset, ImageDataset]:
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ImportError(
            "the digits need scikit-learn: pip install 'hf-adalip[recipes]'"
        ) from error
    found = load_digits()
    images = torch.from_numpy(found.images).mul(255.0 / 16.0).round().to(torch.uint8)[:, None]
    labels = torch.from_numpy(found.target).long()
    return (
        ImageDataset(images[:-_DIGITS_TEST], labels[:-_DIGITS_TEST]),
        ImageDataset(images[-_DIGITS_TEST:], labels[-_DIGITS_TEST:]),
    )


def _column(features: Any, kind: type, given: str | None, what: str, name: str) -> str:
    columns = ", ".join(f"{key} ({type(value).__name__})" for key, value in features.items())
    if given is not None:
        if given not in features:
            raise DataError(f"{name} has no column {given!r}; it has {columns}")
        if kind is datasets.Image and not isinstance(features[given], kind):
            raise DataError(f"column {given!r} of {name} has no images; there are {columns}")
        return given
    found = [str(key) for key, feature in features.items() if isinstance(feature, kind)]
    if len(found) != 1:
        several = "several columns" if found else "no column"
        choose = f"; choose one with --{what}_column_name"
        raise DataError(
            f"{name} has {several} of type {kind.__name__}: there are {columns}"
            f"{'' if kind is datasets.Image and not found else choose}"
        )
    return found[0]


def _chosen(size: int, limit: int | None) -> Tensor:
    if limit is None or limit >= size:
        return torch.arange(size)
    return torch.randperm(size, generator=torch.Generator().manual_seed(0))[:limit]


def _sample(dataset: ImageDataset, limit: int | None) -> ImageDataset:
    chosen = _chosen(len(dataset), limit)
    return ImageDataset(dataset.images[chosen], dataset.labels[chosen])


def _decode(
    split: Any,
    image: str,
    label: str,
    classes: int,
    limit: int | None,
    where: str,
    size: int | None,
) -> ImageDataset:
    """Decodes a split; without a size, every image must be of the mode and size of the first."""
    if not len(split):
        raise DataError(f"{where} is empty")
    if limit is not None and limit < len(split):
        split = split.select(_chosen(len(split), limit).tolist())
    split = split.select_columns([image, label])
    kinds: dict[tuple[str, tuple[int, int]], int] = {}  # the first image of each mode and size
    parts: list[Tensor] = []
    labels: list[int] = []
    for start in range(0, len(split), _DECODE):
        try:
            rows = split[start : start + _DECODE]
            pictures = rows[image]
            if size is not None:
                pictures = [
                    ImageOps.fit(picture.convert("RGB"), (size, size), Image.Resampling.BICUBIC)
                    for picture in pictures
                ]
            arrays = [np.asarray(picture) for picture in pictures]
            for i, picture in enumerate(pictures, start):
                kinds.setdefault((picture.mode, picture.size), i)
        except Exception as error:  # PIL's many
            raise DataError(
                f"{where}: cannot decode one of images {start} to {start + _DECODE - 1}: {error}"
            ) from error
        _check(kinds, where)
        stacked = torch.from_numpy(np.stack(arrays))
        parts.append(stacked[:, None] if stacked.ndim == 3 else stacked.permute(0, 3, 1, 2))
        labels += rows[label]
    for value in labels:
        if type(value) is not int or not 0 <= value < classes:  # a bool is an int, too
            raise DataError(
                f"{where}: column {label!r} must have class numbers from 0 to {classes - 1}, and "
                f"has {value!r}; choose another with --label_column_name"
            )
    return ImageDataset(torch.cat(parts).contiguous(), torch.tensor(labels))


def _check(kinds: dict[tuple[str, tuple[int, int]], int], where: str) -> None:
    """Modes matter: the array of a palette image, for one, has the palette's numbers."""
    if len(kinds) > 1:
        examples = [f"image {i} is {w}x{h} {mode}" for (mode, (w, h)), i in kinds.items()]
        raise DataError(
            f"{where}: images must have one size and mode, but {', '.join(examples)}; "
            "--image_size makes them so"
        )
    (mode, _), *_ = kinds
    if mode not in _MODES:
        raise DataError(f"{where}: images of mode {mode!r}; they must be L (grey) or RGB")
