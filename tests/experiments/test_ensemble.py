"""Runs that are trained together are the runs that `recipes/*` make one by one."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from hf_adalip.errors import UsageError
from hf_adalip.experiments.ensemble import Ensemble, Member
from hf_adalip.recipe.image.augment import RandomAffine
from hf_adalip.recipe.image.data import load_image_dataset
from hf_adalip.recipe.image.models import CIFAR100Net
from hf_adalip.recipe.image.options import Recipe, parse
from hf_adalip.recipe.image.training import train

sys.path.insert(0, str(Path(__file__).parents[2] / "recipes"))

from mnist import RECIPE as MNIST

CPU = torch.device("cpu")
ARGV = ["--dataset_name=digits", "--max_train_samples=300", "--max_eval_samples=100"]
MEMBERS = [Member(0.1, 0), Member(0.02, 0), Member(0.1, 1)]


def ensemble(recipe: Recipe, *argv: str, members: Any = MEMBERS) -> Ensemble:
    args = parse(recipe, [*ARGV, "--num_train_epochs=2", *argv])
    data = load_image_dataset(
        args.dataset_name,
        max_train_samples=args.max_train_samples,
        max_eval_samples=args.max_eval_samples,
    )
    return Ensemble(recipe, args, data, members, CPU)


def trained(found: Ensemble) -> list[dict[str, Any]]:
    while not found.done:
        found.train_epoch()
    return found.results()


class Small(torch.nn.Sequential):
    """Batch normalisation; no dropout, which members draw together, and no bias before the
    normalisation, whose gradient is rounding alone, of which Adam makes whole steps."""

    def __init__(self) -> None:
        super().__init__(
            torch.nn.Conv2d(1, 8, 3, bias=False),
            torch.nn.BatchNorm2d(8),
            torch.nn.ReLU(),
            torch.nn.Flatten(),
            torch.nn.Linear(8 * 36, 10),
        )


NORMALISED = replace(
    MNIST,
    name="normalised",
    build_model=lambda shape, classes: Small(),
    augment=RandomAffine(degrees=10, translate=(0.1, 0.1), hflip=0.5),
)


@pytest.mark.slow
@pytest.mark.parametrize("optim", ["sgd", "adalip", "adamlip", "adamlipu"])
@pytest.mark.parametrize("recipe", [MNIST, NORMALISED], ids=lambda recipe: recipe.name)
def test_equals_single_runs(tmp_path: Path, recipe: Recipe, optim: str) -> None:
    scale = 1.0 if optim in ("sgd", "adalip") else 0.01
    members = [Member(m.learning_rate * scale, m.seed) for m in MEMBERS]
    together = trained(ensemble(recipe, f"--optim={optim}", members=members))
    for i, (member, found) in enumerate(zip(members, together, strict=True)):
        options = {
            "optim": optim,
            "learning_rate": member.learning_rate,
            "seed": member.seed,
            "num_train_epochs": 2,
            "output_dir": tmp_path / str(i),
        }
        argv = [*ARGV, "--cpu", *(f"--{name}={value}" for name, value in options.items())]
        alone = train(recipe, argv).results(finished=True)
        assert len(found["epochs"]) == len(alone["epochs"]) == 2
        for one, other in zip(found["epochs"], alone["epochs"], strict=True):
            assert one["step"] == other["step"]
            for name in ("train_loss", "eval_loss"):
                assert one[name] == pytest.approx(other[name], rel=2e-3), name
            for name in ("train_accuracy", "eval_accuracy"):
                assert one[name] == pytest.approx(other[name], abs=0.011), name
    assert (together[0]["median_scale"] is None) == (optim == "sgd")


def test_a_member_that_diverges_leaves_the_others_alone() -> None:
    argv = ["--optim=sgd"]
    alone = trained(ensemble(MNIST, *argv, members=[Member(0.1, 0)]))
    together = trained(ensemble(MNIST, *argv, members=[Member(0.1, 0), Member(1e4, 0)]))
    assert together[0]["train_loss"] == pytest.approx(alone[0]["train_loss"], rel=1e-4)
    assert not together[1]["train_loss"] < 10


def test_goes_on_from_what_was_saved(tmp_path: Path) -> None:
    recipe = replace(
        NORMALISED,
        name="dropout",
        build_model=lambda shape, classes: torch.nn.Sequential(Small(), torch.nn.Dropout(0.1)),
    )
    argv = ["--optim=adamlip"]
    members = [Member(1e-3, 0), Member(1e-3, 1)]
    whole = trained(ensemble(recipe, *argv, members=members))
    first = ensemble(recipe, *argv, members=members)
    first.train_epoch()
    first.save(tmp_path / "state.pt")
    again = ensemble(recipe, *argv, members=members)
    again.load(tmp_path / "state.pt")
    for one, other in zip(trained(again), whole, strict=True):
        one, other = ([e | {"seconds": 0} for e in run["epochs"]] for run in (one, other))
        assert one == other


@pytest.mark.parametrize("option", ["max_grad_norm=1.0", "lr_scheduler_type=linear"])
def test_what_an_ensemble_has_not_is_refused(option: str) -> None:
    name, value = option.split("=")
    with pytest.raises(UsageError, match=f"--{name} {value}: an ensemble has no such option"):
        ensemble(MNIST, f"--{option}")


@pytest.mark.slow
def test_the_network_of_cifar100_trains() -> None:
    """Dropout and batch normalisation; its images are too large for the digits."""
    net = replace(MNIST, build_model=lambda shape, classes: CIFAR100Net(1, (32, 32), classes))
    argv = ["--optim=adamlip", "--max_train_samples=40", "--max_eval_samples=10"]
    argv += ["--per_device_train_batch_size=20", "--num_train_epochs=3"]
    found = ensemble(net, *argv, members=[Member(1e-3, 0), Member(1e-3, 1)])
    for part in (found.train, found.test):
        part.images = torch.nn.functional.interpolate(part.images.float(), (32, 32)).byte()
    runs = trained(found)
    assert all(run["epochs"][-1]["train_loss"] < run["epochs"][0]["train_loss"] for run in runs)
