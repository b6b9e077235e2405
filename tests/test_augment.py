"""Augmentation: what each image is given, in a run, a resumed one, and on two ranks."""

import json
import math
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState, GradientState
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from hf_adalip.recipe.image.augment import RandomAffine
from hf_adalip.recipe.image.training import Recipe, main
from tests.distributed.ranks import run as run_on_ranks


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


IMAGES = torch.rand(6, 3, 12, 20, generator=torch.Generator().manual_seed(0))
LABELS = torch.arange(6)


def affine(draws: list[float], images: Tensor = IMAGES, **options: Any) -> Tensor:
    table = torch.tensor(draws).expand(len(images), 4)
    found, labels = RandomAffine(**options)(images, LABELS[: len(images)], table)
    assert torch.equal(labels, LABELS[: len(images)])
    return found


def test_nothing_asked_for_is_nothing_done() -> None:
    assert torch.allclose(affine([0.9, 0.9, 0.9, 0.9]), IMAGES, atol=1e-5)


def test_a_flip() -> None:
    assert torch.allclose(affine([0.5, 0.5, 0.5, 0.49], hflip=0.5), IMAGES.flip(-1), atol=1e-5)
    assert torch.allclose(affine([0.5, 0.5, 0.5, 0.5], hflip=0.5), IMAGES, atol=1e-5)


def test_a_shift_repeats_the_border() -> None:
    """0.2 of 20 to the right, 0.25 of 12 up."""
    moved = affine([0.5, 1.0, 0.0, 0.5], translate=(0.2, 0.25))
    expected = F.pad(IMAGES, (4, 0, 0, 3), mode="replicate")[..., 3:, :20]
    assert torch.allclose(moved, expected, atol=1e-5)
    half = affine([0.5, 0.75, 0.5, 0.5], translate=(0.05, 0.0))  # of a pixel
    expected = (IMAGES[..., 1:] + IMAGES[..., :-1]) / 2
    assert torch.allclose(half[..., 1:], expected, atol=1e-5)


def test_a_rotation_is_one_on_the_screen_whatever_the_sides() -> None:
    square = IMAGES[..., :12]
    turned = affine([1.0, 0.5, 0.5, 0.5], square, degrees=90)
    assert torch.allclose(turned, square.rot90(1, (-2, -1)), atol=1e-4)
    wide = affine([1.0, 0.5, 0.5, 0.5], degrees=90)[..., 4:16]  # of 12x20, the square in the middle
    assert torch.allclose(wide, IMAGES[..., 4:16].rot90(1, (-2, -1)), atol=1e-4)


def test_first_the_flip_then_the_rotation_then_the_shift() -> None:
    square = IMAGES[..., :12]
    found = affine([1.0, 1.0, 0.5, 0.0], square, degrees=90, translate=(0.25, 0.0), hflip=1.0)
    expected = square.flip(-1).rot90(1, (-2, -1))[..., :-3]
    assert torch.allclose(found[..., 3:], expected, atol=1e-4)


@settings(deadline=None, max_examples=25)
@given(st.tuples(*[st.floats(0, 0.99)] * 4), st.floats(0, 180), st.floats(0, 1), st.data())
def test_affine_grid_agrees(
    draws: tuple[float, ...], degrees: float, fraction: float, data: st.DataObject
) -> None:
    """Torch's own grid, from the product of the three matrices."""
    height, width = data.draw(st.tuples(st.integers(2, 9), st.integers(2, 9)))
    ramps = torch.stack(torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij"))
    images = ramps[None].double()  # smooth, so that rounding does not matter
    angle = math.radians(degrees * (2 * draws[0] - 1))
    right, down = (fraction * (2 * draw - 1) * 2 for draw in draws[1:3])
    cos, sin = math.cos(angle), math.sin(angle)
    to_pixels = torch.diag(torch.tensor([width / 2, height / 2, 1.0], dtype=torch.float64))
    flip = torch.diag(torch.tensor([-1.0 if draws[3] < 0.5 else 1.0, 1, 1], dtype=torch.float64))
    # y points down, so that this turns counter-clockwise
    turn = torch.tensor([[cos, sin, 0], [-sin, cos, 0], [0, 0, 1]], dtype=torch.float64)
    shift = torch.tensor([[1, 0, right], [0, 1, down], [0, 0, 1]], dtype=torch.float64)
    there = shift @ to_pixels.inverse() @ turn @ to_pixels @ flip
    theta = there.inverse()[None, :2]
    grid = F.affine_grid(theta, [1, 2, height, width], align_corners=False)
    expected = F.grid_sample(images, grid, padding_mode="border", align_corners=False)
    augment = RandomAffine(degrees, (fraction, fraction), 0.5)
    table = torch.tensor([draws], dtype=torch.float64)
    found, _ = augment(images, LABELS[:1], table)
    assert torch.allclose(found, expected, atol=1e-6)


def test_an_image_is_the_same_in_any_batch() -> None:
    """Bit for bit: a resumed run and one on more processes have other batches."""
    augment = RandomAffine(15, (0.1, 0.1), 0.5)
    draws = torch.rand(6, 4)
    together, _ = augment(IMAGES, LABELS, draws)
    for i in range(6):
        alone, _ = augment(IMAGES[i : i + 1], LABELS[i : i + 1], draws[i : i + 1])
        assert torch.equal(alone[0], together[i])
    turned, _ = augment(IMAGES.flip(0), LABELS, draws.flip(0))
    assert torch.equal(turned.flip(0), together)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"degrees": -1}, "degrees must be a number from 0 on, got -1"),
        ({"degrees": math.nan}, "degrees must be a number from 0 on, got nan"),
        ({"translate": (0.1, 1.1)}, r"translate must be two fractions .* got \(0.1, 1.1\)"),
        ({"translate": (0.1,)}, r"translate must be two fractions .* got \(0.1,\)"),
        ({"hflip": 2}, "hflip must be a probability, got 2"),
    ],
)
def test_amounts_that_make_no_sense(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RandomAffine(**options)


def one_of_two(folder: Path) -> None:
    augment = Recorded()
    run(augment, folder / "two", "--per_device_train_batch_size=25")
    seen = [[image.hex(), drawn.hex()] for image, drawn in augment.seen]
    (folder / f"seen{os.environ['RANK']}.json").write_text(json.dumps(seen))


@pytest.mark.slow
def test_two_processes_see_the_images_of_one(tmp_path: Path) -> None:
    run_on_ranks(2, __file__, str(tmp_path))
    alone = Recorded()
    found = run(alone, tmp_path / "one", "--per_device_train_batch_size=50")
    ranks = [json.loads((tmp_path / f"seen{rank}.json").read_text()) for rank in (0, 1)]
    seen = [(bytes.fromhex(image), bytes.fromhex(drawn)) for each in ranks for image, drawn in each]
    assert len(seen) == 250
    assert set(seen) == set(alone.seen)
    two = json.loads((tmp_path / "two" / "all_results.json").read_text())
    assert (two["num_processes"], found["num_processes"]) == (2, 1)
    assert two["eval_loss"] == pytest.approx(found["eval_loss"], rel=1e-5)


if __name__ == "__main__":
    one_of_two(Path(sys.argv[1]))
