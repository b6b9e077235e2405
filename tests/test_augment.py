"""Augmentation: what each image is given, in a run, a resumed one, and on two ranks."""

import json
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState, GradientState
from torch import Tensor, nn
from torch.nn import functional as F

from hf_adalip.training import Recipe, main


@pytest.fixture(autouse=True)
def _fresh_accelerate() -> Iterator[None]:
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


class Dense(nn.Sequential):
    def __init__(self, shape: tuple[int, int, int], classes: int) -> None:
        super().__init__(nn.Flatten(), nn.Linear(64, classes))


@dataclass
class Recorded:
    """Dims each image by a number of its own, and remembers which it was."""

    draws: int = 2
    seen: list[tuple[bytes, bytes]] = field(default_factory=list, repr=False)

    def __call__(self, images: Tensor, labels: Tensor, draws: Tensor) -> tuple[Tensor, Tensor]:
        assert draws.shape == (len(labels), self.draws)
        pairs = zip(images.numpy(), draws.numpy(), strict=True)
        self.seen += [(image.tobytes(), drawn.tobytes()) for image, drawn in pairs]
        return images * draws[:, 0, None, None, None], labels


RECIPE = Recipe("toy", "", Dense, {"dataset_name": "digits", "cpu": True})


def run(augment: Any, folder: Path, *options: str) -> dict[str, Any]:
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    small = ("--max_train_samples=300", "--max_train_steps=5", f"--output_dir={folder}")
    assert main(replace(RECIPE, augment=augment), [*small, *options]) == 0
    found: dict[str, Any] = json.loads((folder / "all_results.json").read_text())
    return found


def test_an_image_has_numbers_of_its_own_in_every_epoch(tmp_path: Path) -> None:
    """The same ones whatever the batch is; others for another epoch, image or seed."""
    seen = {}
    for name, options in {
        "a": ["--max_train_steps=6"],
        "b": ["--max_train_steps=20", "--per_device_train_batch_size=30"],
        "c": ["--max_train_steps=6", "--seed=1"],
    }.items():
        augment = Recorded()
        run(augment, tmp_path / name, *options)
        assert len(augment.seen) == len(set(augment.seen)) == 600
        seen[name] = [set(augment.seen[:300]), set(augment.seen[300:])]
    assert seen["a"] == seen["b"]
    assert not seen["a"][0] & seen["a"][1]
    assert not seen["a"][0] & seen["c"][0]
    numbers = [torch.frombuffer(bytearray(drawn), dtype=torch.float32) for _, drawn in seen["a"][0]]
    assert torch.stack(numbers).mean(0).tolist() == pytest.approx([0.5, 0.5], abs=0.07)


def test_a_resumed_run_goes_on_with_the_same_images(tmp_path: Path) -> None:
    whole = run(Recorded(), tmp_path / "a", "--checkpointing_steps=1")
    weights = (tmp_path / "a" / "model.safetensors").read_bytes()
    for step in (2, 3):  # in an epoch, and at the end of one
        again = f"--resume_from_checkpoint={tmp_path / 'a' / f'step_{step}'}"
        resumed = run(Recorded(), tmp_path / f"b{step}", again)
        assert (tmp_path / f"b{step}" / "model.safetensors").read_bytes() == weights
        assert resumed["eval_loss"] == whole["eval_loss"]
    assert whole["augmentation"] == "Recorded(draws=2)"


def test_a_run_cannot_be_resumed_with_another_augmentation(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run(None, tmp_path / "a", "--checkpointing_steps=2")
    again = f"--resume_from_checkpoint={tmp_path / 'a' / 'step_2'}"
    augmented = replace(RECIPE, augment=Recorded())
    options = ["--max_train_samples=300", f"--output_dir={tmp_path / 'b'}", again]
    assert main(augmented, options) == 2
    assert "augmentation was None, is 'Recorded(draws=2)'" in capsys.readouterr().err


@dataclass
class Mixed:
    """Targets of probabilities."""

    draws: int = 0

    def __call__(self, images: Tensor, labels: Tensor, draws: Tensor) -> tuple[Tensor, Tensor]:
        targets = F.one_hot(labels, 10).float()
        return images.lerp(images.flip(0), 0.3), targets.lerp(targets.flip(0), 0.3)


def test_targets_may_be_probabilities(tmp_path: Path) -> None:
    found = run(Mixed(), tmp_path / "a", "--max_train_steps=30", "--learning_rate=0.01")
    assert found["train_accuracy"] > 0.5  # counted with the labels; 0.1 by chance
