"""recipes/cifar10.py and cifar100.py, on a few images of noise in the layout of the Hub's."""

import importlib.util
import json
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState, GradientState
from PIL import Image

from hf_adalip.recipe.image.models import CIFAR10Net, CIFAR100Net
from hf_adalip.recipe.image.training import main
from tests.distributed.ranks import kill_when, start

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[1]


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"recipe_{name}", ROOT / "recipes" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


RECIPES = {name: load(name).RECIPE for name in ("cifar10", "cifar100")}


@pytest.fixture(autouse=True)
def _fresh_accelerate() -> Iterator[None]:
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The columns of uoft-cs/cifar10 and uoft-cs/cifar100."""
    rng, folder = np.random.default_rng(0), tmp_path_factory.mktemp("data")
    labels = {"cifar10": {"label": 10}, "cifar100": {"fine_label": 100, "coarse_label": 20}}
    for name, columns in labels.items():
        for split, size in (("train", 22), ("test", 6)):
            pixels = rng.integers(0, 256, (size, 32, 32, 3), dtype=np.uint8)
            table = {"img": [Image.fromarray(each) for each in pixels]}
            table |= {key: (np.arange(size) % n).tolist() for key, n in columns.items()}
            features: dict[str, Any] = {"img": datasets.Image()}
            features |= {key: datasets.ClassLabel(num_classes=n) for key, n in columns.items()}
            made = datasets.Dataset.from_dict(table, features=datasets.Features(features))
            made.to_parquet(folder / name / f"{split}.parquet")
    return {name: str(folder / name) for name in labels}


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))


def options(data: str, folder: Path) -> list[str]:
    short = ["--cpu", "--per_device_train_batch_size=8", "--num_train_epochs=2"]
    return [f"--dataset_name={data}", f"--output_dir={folder}", *short]


def run(name: str, *given: str) -> int:
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    return main(RECIPES[name], given)


def numbers(folder: Path) -> dict[str, Any]:
    """Everything that a run came to, but times."""
    found: dict[str, Any] = json.loads((folder / "all_results.json").read_text())
    for timed in (found, *found["epochs"]):
        del timed["seconds"]
    del found["command"]
    found["rates"] = json.loads((folder / "layer_learning_rates.json").read_text())
    found["weights"] = (folder / "model.safetensors").read_bytes()
    return found


def test_the_papers_experiments() -> None:
    """Sections 5.2 and 5.3: what a run does when nothing else is asked for."""
    ten, hundred = RECIPES["cifar10"], RECIPES["cifar100"]
    batches = {"per_device_train_batch_size": 128}
    assert ten.defaults == {**batches, "dataset_name": "uoft-cs/cifar10", "num_train_epochs": 30}
    assert hundred.defaults == {
        **batches,
        "dataset_name": "uoft-cs/cifar100",
        "label_column_name": "fine_label",
        "num_train_epochs": 70,
    }
    assert ten.augment is None
    assert repr(hundred.augment) == "RandomAffine(degrees=15, translate=(0.1, 0.1), hflip=0.5)"
    grids = {  # of learning rates, for those on top of SGD, Adam and RMSProp
        "cifar10": (
            [0.005, 0.01, 0.05, 0.07, 0.1, 0.2, 0.3, 0.5, 0.7, 1.0],
            [0.0002, 0.0003, 0.0005, 0.0007, 0.001, 0.005, 0.01],
            [0.0003, 0.0005, 0.0007, 0.001, 0.005],
        ),
        "cifar100": (
            [0.005, 0.01, 0.05, 0.1, 0.5, 0.7],
            [0.0005, 0.001, 0.005, 0.01],
            [0.0003, 0.0005, 0.0007, 0.001, 0.005, 0.01],
        ),
    }
    bases = (torch.optim.SGD, torch.optim.Adam, torch.optim.RMSprop)
    for name, recipe in RECIPES.items():
        assert set(recipe.optimizer_defaults) == set(bases)
        assert recipe.optimizer_defaults[torch.optim.RMSprop]["alpha"] == 0.999
        for base, grid in zip(bases, grids[name], strict=True):
            place = grid.index(recipe.optimizer_defaults[base]["lr"])
            assert abs(place - (len(grid) - 1) / 2) <= 1  # in the middle


def test_cifar10(folders: dict[str, str], tmp_path: Path) -> None:
    assert run("cifar10", *options(folders["cifar10"], tmp_path / "a"), "--optim=rmslip") == 0
    found = numbers(tmp_path / "a")
    assert (found["step"], found["learning_rate"], found["augmentation"]) == (6, 7e-4, None)
    assert (found["parameters"], found["optimizer_arguments"]["alpha"]) == (390_960, 0.999)
    assert found["optimizer_arguments"]["scale_bounds"] is None
    assert len(found["rates"]["lr"]) == 8
    model = CIFAR10Net.from_pretrained(tmp_path / "a")
    assert model.config == {"in_channels": 3, "image_size": [32, 32], "num_classes": 10}


@pytest.fixture(scope="module")
def whole(folders: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of six steps that nobody stopped."""
    folder = tmp_path_factory.mktemp("whole") / "a"
    assert run("cifar100", *options(folders["cifar100"], folder)) == 0
    return folder


def test_cifar100(whole: Path) -> None:
    found = numbers(whole)
    assert found["augmentation"] == repr(RECIPES["cifar100"].augment)
    assert found["optimizer_arguments"]["scale_bounds"] is None
    assert found["optimizer_arguments"]["layers"] == "tensor"
    assert len(found["rates"]["lr"]) == 38  # weight and bias of 10 layers and 9 normalisations
    model = CIFAR100Net.from_pretrained(whole)
    assert model.config["num_classes"] == 100
    assert model(torch.rand(1, 3, 32, 32)).shape == (1, 100)


def test_cifar100_killed_and_resumed(whole: Path, folders: dict[str, str], tmp_path: Path) -> None:
    """kill -9 in the middle of an epoch; augmentation, dropout and batch normalisation go on as if
    nothing had been."""
    folder = tmp_path / "a"
    given = [*options(folders["cifar100"], folder), "--checkpointing_steps=2"]
    process = start(str(ROOT / "recipes" / "cifar100.py"), *given)
    kill_when((folder / "step_2").exists, process)
    assert not (folder / "all_results.json").exists()
    assert run("cifar100", *given, "--resume_from_checkpoint=latest") == 0
    assert numbers(folder) == numbers(whole)


def test_the_superclasses_by_name(folders: dict[str, str], tmp_path: Path) -> None:
    given = [*options(folders["cifar100"], tmp_path / "a"), "--max_train_steps=1", "--optim=sgd"]
    assert run("cifar100", *given, "--label_column_name=coarse_label") == 0
    assert CIFAR100Net.from_pretrained(tmp_path / "a").config["num_classes"] == 20


@pytest.mark.parametrize(("name", "least"), [("cifar10", 20), ("cifar100", 32)])
def test_images_that_are_too_small(
    name: str, least: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(name, *options("digits", tmp_path / "a")) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert f"needs images of at least {least}x{least} pixels, got 8x8" in line
    assert not (tmp_path / "a").exists()


@pytest.mark.parametrize("size", [1, 7])
def test_a_batch_of_one_image_is_refused_before_the_run(
    size: int, folders: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """22 images by sevens leave one, which batch normalisation would stop at."""
    given = [*options(folders["cifar100"], tmp_path / "a"), f"--per_device_train_batch_size={size}"]
    assert run("cifar100", *given) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert f"--per_device_train_batch_size {size} makes a batch of one of 22 images" in line
    assert not (tmp_path / "a").exists()
