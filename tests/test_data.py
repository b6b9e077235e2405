"""Decode-once image datasets: what is loaded, and what is said when it cannot be."""

from pathlib import Path
from typing import Any

import datasets
import huggingface_hub
import numpy as np
import pytest
import torch
from PIL import Image

from hf_adalip.errors import DataError
from hf_adalip.recipe.data import load_splits
from hf_adalip.recipe.image.data import ImageData, load_image_dataset


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))


def picture(value: int = 7, size: tuple[int, int] = (8, 6), mode: str = "L") -> Image.Image:
    return Image.new(mode, size, value)


def write(folder: Path, pictures: list[Any], split: str, **names: str) -> str:
    """A parquet file in the Hub's layout: columns image and label, or renamed."""
    columns = {"image": pictures, "label": [i % 3 for i in range(len(pictures))]}
    features = datasets.Features(
        {"image": datasets.Image(), "label": datasets.ClassLabel(names=["a", "b", "c"])}
    )
    made = datasets.Dataset.from_dict(columns, features=features).rename_columns(names)
    (folder / "data").mkdir(parents=True, exist_ok=True)
    made.to_parquet(folder / "data" / f"{split}-00000-of-00001.parquet")
    return str(folder)


def write_both(folder: Path, pictures: list[Any], **names: str) -> str:
    write(folder, pictures, "test", **names)
    return write(folder, pictures, "train", **names)


@pytest.fixture(scope="module")
def digits() -> ImageData:
    return load_image_dataset("digits")


def test_digits(digits: ImageData) -> None:
    assert (len(digits.train), len(digits.test)) == (1437, 360)
    assert (digits.image_shape, digits.num_classes) == ((1, 8, 8), 10)
    assert digits.train.images.dtype == torch.uint8
    assert (int(digits.train.images.min()), int(digits.train.images.max())) == (0, 255)
    assert digits.test.labels.bincount().min() > 30
    assert digits.fingerprint() == "ac0903af54157144"


def test_batches_are_floats_in_the_unit_interval(digits: ImageData) -> None:
    batch = digits.train.__getitems__([3, 0, 3])
    assert batch["pixel_values"].dtype == torch.float32
    expected = digits.train.images[[3, 0, 3]] / 255
    assert torch.equal(batch["pixel_values"], expected)
    assert torch.equal(batch["pixel_values"][0], batch["pixel_values"][2])
    assert torch.equal(batch["labels"], digits.train.labels[[3, 0, 3]])
    assert batch["indices"].tolist() == [3, 0, 3]
    assert torch.equal(digits.train[3]["pixel_values"], batch["pixel_values"][0])


def test_a_loader_fetches_whole_batches(digits: ImageData) -> None:
    loader = torch.utils.data.DataLoader(digits.test, 100, collate_fn=digits.test.collate)
    assert [len(batch["labels"]) for batch in loader] == [100, 100, 100, 60]


def test_sample_limits(digits: ImageData) -> None:
    small = load_image_dataset("digits", max_train_samples=50, max_eval_samples=9999)
    assert (len(small.train), len(small.test)) == (50, 360)
    assert small.fingerprint() != digits.fingerprint()
    again = load_image_dataset("digits", max_train_samples=50, max_eval_samples=9999)
    assert small.fingerprint() == again.fingerprint()


def test_a_local_folder_decodes_as_it_was(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    arrays = [rng.integers(0, 256, (6, 8), dtype=np.uint8) for _ in range(1003)]
    folder = write_both(tmp_path / "set", [Image.fromarray(array) for array in arrays])
    data = load_image_dataset(folder)
    assert torch.equal(data.train.images[:, 0], torch.from_numpy(np.stack(arrays)))
    assert data.train.labels.tolist() == [i % 3 for i in range(1003)]
    assert (data.image_shape, data.num_classes) == ((1, 6, 8), 3)
    assert len(load_image_dataset(folder, max_train_samples=10).train) == 10


def test_colour_and_renamed_columns(tmp_path: Path) -> None:
    red = Image.new("RGB", (4, 5), (255, 1, 0))
    folder = write_both(tmp_path / "set", [red] * 3, image="img", label="fine")
    for columns in ({}, {"image_column_name": "img", "label_column_name": "fine"}):
        data = load_image_dataset(folder, **columns)
        assert data.image_shape == (3, 5, 4)
        assert data.train.images[0, :, 0, 0].tolist() == [255, 1, 0]
    with pytest.raises(DataError, match=r"no column 'image'; it has img \(Image\), fine \(ClassL"):
        load_image_dataset(folder, image_column_name="image")
    with pytest.raises(DataError, match=r"column 'fine' of .* has no images"):
        load_image_dataset(folder, image_column_name="fine")


def test_no_column_of_images(tmp_path: Path) -> None:
    for split in ("train", "test"):
        datasets.Dataset.from_dict({"text": ["a"], "label": [0]}).to_parquet(
            tmp_path / "set" / f"{split}.parquet"
        )
    with pytest.raises(DataError, match=r"no column of type Image: there are text \(Value\)"):
        load_image_dataset(str(tmp_path / "set"))


@pytest.mark.parametrize("split", ["train", "test"])
def test_a_split_is_missing(tmp_path: Path, split: str) -> None:
    other = "test" if split == "train" else "train"
    folder = write(tmp_path / "set", [picture()], other)
    with pytest.raises(DataError, match=f"has no {split} split; it has {other}"):
        load_image_dataset(folder)


def test_without_a_test_split_the_validation_split_is_evaluated_on(tmp_path: Path) -> None:
    write(tmp_path / "set", [picture(1)] * 3, "validation")
    folder = write(tmp_path / "set", [picture(2)] * 9, "train")
    data = load_image_dataset(folder, max_eval_samples=2)
    assert (len(data.train), len(data.test), data.eval_split) == (9, 2, "validation")
    assert data.test.images.unique().tolist() == [1]
    write(tmp_path / "set", [picture(3)] * 4, "test")
    data = load_image_dataset(folder)
    assert (len(data.test), data.eval_split) == (4, "test")


@pytest.mark.parametrize(
    ("pictures", "message"),
    [
        ([picture(), picture(size=(8, 7))], "image 0 is 8x6 L, image 1 is 8x7 L"),
        ([picture(), picture(mode="RGB")], "image 0 is 8x6 L, image 1 is 8x6 RGB"),
        ([picture(mode="P")], "images of mode 'P'; they must be L"),
        ([picture(), None], "cannot decode one of images 0 to"),
    ],
)
def test_images_that_do_not_fit(tmp_path: Path, pictures: list[Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        load_image_dataset(write_both(tmp_path / "set", pictures))


@pytest.mark.parametrize("label", [True, 10**10, -1, 0.5, "cat", None])
def test_labels_that_are_no_class_numbers(tmp_path: Path, label: Any) -> None:
    for split in ("train", "test"):
        columns = {"image": [picture(), picture()], "label": [label, label]}
        made = datasets.Dataset.from_dict(columns).cast_column("image", datasets.Image())
        (tmp_path / "set").mkdir(exist_ok=True)
        made.to_parquet(tmp_path / "set" / f"{split}.parquet")
    with pytest.raises(DataError, match=rf"column 'label' must have .* has {label!r}; choose"):
        load_image_dataset(str(tmp_path / "set"), label_column_name="label")


def test_train_and_test_differ(tmp_path: Path) -> None:
    write(tmp_path / "set", [picture(size=(9, 9))], "test")
    with pytest.raises(DataError, match="differ in shape"):
        load_image_dataset(write(tmp_path / "set", [picture()], "train"))


def test_unknown_and_empty_folders(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="there is no folder /no/such/folder"):
        load_image_dataset("/no/such/folder")
    with pytest.raises(DataError, match="cannot load"):
        load_image_dataset(str(tmp_path))


def test_the_hub_cannot_be_reached(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    with pytest.raises(DataError) as caught:
        load_image_dataset("someone/not-in-the-cache")
    message = str(caught.value)
    assert "--dataset_name /path/to/a/copy or --dataset_name digits" in message
    assert "\n" not in message
    assert not huggingface_hub.constants.HF_HUB_OFFLINE  # of what comes later


def test_without_the_hub_the_cache_is_looked_into(monkeypatch: pytest.MonkeyPatch) -> None:
    def hiccup(*_: Any, **__: Any) -> None:
        raise TimeoutError

    def load(name: str, config: str | None) -> Any:
        assert huggingface_hub.constants.HF_HUB_OFFLINE
        return {name: config}

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", hiccup)
    monkeypatch.setattr(datasets, "load_dataset", load)
    assert load_splits("someone/set") == {"someone/set": None}
    assert not huggingface_hub.constants.HF_HUB_OFFLINE
