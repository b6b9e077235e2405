"""Many runs of one image recipe at once, in one process: what makes the paper's protocol fit a GPU.

The members of an ensemble differ in seed and learning rate. Their parameters are stacked along a
first dimension, and `torch.func.vmap` runs all networks as one. The optimizer is given the slices,
so that every member has an S per layer of its own; weights, order of the images and augmentation
are those of `recipes/*` with the same seed.
"""

from __future__ import annotations

import copy
import math
import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from accelerate.utils import set_seed
from torch import Tensor, nn
from torch.func import functional_call, stack_module_state, vmap

from ..errors import UsageError
from ..files import whole
from ..monitor import RECORDS, layerwise
from ..recipe.image.batches import EpochSampler, augmentation_draws
from ..recipe.image.data import ImageData, ImageDataset
from ..recipe.image.options import Recipe, TrainingArguments, optimizer_arguments
from ..recipe.image.results import scores
from ..registry import create_optimizer

Tensors = dict[str, Tensor]


@dataclass(frozen=True)
class Member:
    """One run of an ensemble."""

    learning_rate: float
    seed: int


class Ensemble:
    """Runs of one recipe with one optimizer, trained together.

    Args:
        recipe: the network, the defaults of the optimizers, the augmentation.
        args: of all members, but for `learning_rate` and `seed`, which are each member's own. The
            learning rate is constant, a step has one batch, gradients are not clipped.
        data: to train and to evaluate on; all of it is put on the device.
        members: their learning rates and seeds.
        device: where to.

    Raises:
        UsageError: for an option that an ensemble does not have, or a bad one of the optimizer.

    Examples:
        ensemble = Ensemble(RECIPE, args, data, [Member(1e-3, 0), Member(1e-2, 0)], device)
        while not ensemble.done:
            ensemble.train_epoch()
        accuracies = [run["eval_accuracy"] for run in ensemble.results()]
    """

    def __init__(
        self,
        recipe: Recipe,
        args: TrainingArguments,
        data: ImageData,
        members: Sequence[Member],
        device: torch.device,
    ) -> None:
        _check(args, members)
        self.recipe, self.args, self.data = recipe, args, data
        self.members, self.device = list(members), device
        nets = [self._build(member) for member in self.members]
        parameters, buffers = stack_module_state(nets)
        self.parameters = {name: _with_grad(p, device) for name, p in parameters.items()}
        self.buffers = {name: buffer.to(device) for name, buffer in buffers.items()}
        self.net = copy.deepcopy(nets[0]).to("meta")  # the code; the numbers are the stacked ones
        self.optimizer = self._optimizer()
        self.train, self.test = (_on(part, device) for part in (data.train, data.test))
        self.steps_per_epoch = math.ceil(len(self.train) / args.per_device_train_batch_size)
        self.record_every = math.ceil(self.steps_per_epoch * args.num_train_epochs / RECORDS)
        self.epochs: list[list[dict[str, float]]] = []  # of each epoch, by member
        self.scales: list[list[float]] = [[] for _ in self.members]  # S of all layers and records
        self.seconds = 0.0
        set_seed(self.members[0].seed)  # dropout draws for all members at once

    def _build(self, member: Member) -> nn.Module:
        set_seed(member.seed)
        return self.recipe.build_model(self.data.image_shape, self.data.num_classes)

    def _optimizer(self) -> torch.optim.Optimizer:
        """One over the slices of all members, with a group for each learning rate."""
        groups: dict[float, list[tuple[str, Tensor]]] = {}
        for i, member in enumerate(self.members):
            slices = ((f"{i}.{name}", _slice(p, i)) for name, p in self.parameters.items())
            groups.setdefault(member.learning_rate, []).extend(slices)
        args = replace(self.args, learning_rate=max(groups))
        return create_optimizer(
            [{"params": params, "lr": rate} for rate, params in groups.items()],
            args.optim,
            **optimizer_arguments(args, self.recipe),
        )

    @property
    def done(self) -> bool:
        """Whether all epochs have been trained."""
        return len(self.epochs) >= self.args.num_train_epochs

    def train_epoch(self) -> None:
        """Trains all members for an epoch, and evaluates them."""
        started, step = time.perf_counter(), len(self.epochs) * self.steps_per_epoch
        totals = torch.zeros(2, len(self.members), dtype=torch.float64, device=self.device)
        self.net.train()
        for images, targets, labels in self._batches():
            for stacked in self.parameters.values():
                assert stacked.grad is not None
                stacked.grad.zero_()
            logits = self._logits(images, 0)
            losses = _cross_entropy(logits, targets)
            torch.autograd.backward(losses.mean(1).sum())
            self.optimizer.step()
            right = (logits.argmax(-1) == labels).sum(1)
            totals += torch.stack([losses.detach().double().sum(1), right.double()])
            step += 1
            if step % self.record_every == 0:
                self._record()
        train = (totals / len(self.train)).T.tolist()
        test = self._evaluate().T.tolist()
        self.seconds += time.perf_counter() - started
        self.epochs.append(
            [
                {
                    "epoch": float(len(self.epochs) + 1),
                    "step": step,
                    **dict(zip(("train_loss", "train_accuracy"), of_train, strict=True)),
                    **dict(zip(("eval_loss", "eval_accuracy"), of_test, strict=True)),
                    "seconds": self.seconds,
                }
                for of_train, of_test in zip(train, test, strict=True)
            ]
        )

    def _logits(self, images: Tensor, images_dim: int | None) -> Tensor:
        """[members, batch, classes]; images_dim: 0 for images of each member's own, else None."""

        def one(parameters: Tensors, buffers: Tensors, own: Tensor) -> Tensor:
            logits: Tensor = functional_call(self.net, (parameters, buffers), (own,))
            return logits

        together = vmap(one, in_dims=(0, 0, images_dim), randomness="different")
        return together(self.parameters, self.buffers, images)

    def _batches(self) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Images [members, batch, ...], targets and labels of each member's own order."""
        epoch, seeds = len(self.epochs), [member.seed for member in self.members]
        orders = {seed: self._order(seed, epoch) for seed in set(seeds)}
        order = torch.stack([orders[seed] for seed in seeds]).to(self.device)
        augment = self.recipe.augment
        if augment is not None:
            size = len(self.train), augment.draws
            tables = {seed: augmentation_draws(seed, epoch, *size) for seed in set(seeds)}
            draws = torch.stack([tables[seed] for seed in seeds]).to(self.device)
            member = torch.arange(len(seeds), device=self.device)[:, None]
        for chosen in torch.split(order, self.args.per_device_train_batch_size, dim=1):
            images, labels = self._images(self.train, chosen), self.train.labels[chosen]
            targets = labels
            if augment is not None:
                flat = augment(
                    images.flatten(0, 1), labels.flatten(), draws[member, chosen].flatten(0, 1)
                )
                images, targets = (x.reshape(*chosen.shape, *x.shape[1:]) for x in flat)
            yield images, targets, labels

    def _order(self, seed: int, epoch: int) -> Tensor:
        sampler = EpochSampler(len(self.train), seed)
        sampler.epoch = epoch
        return torch.tensor(list(sampler))

    @staticmethod
    def _images(part: ImageDataset, chosen: Tensor) -> Tensor:
        return part.images[chosen].float().div_(255.0)

    @torch.no_grad()
    def _evaluate(self) -> Tensor:
        """Mean loss and accuracy of every member, [2, members]."""
        self.net.eval()
        totals = torch.zeros(2, len(self.members), dtype=torch.float64, device=self.device)
        indices = torch.arange(len(self.test), device=self.device)
        for chosen in torch.split(indices, self.args.per_device_train_batch_size):
            labels = self.test.labels[chosen].expand(len(self.members), -1)
            logits = self._logits(self._images(self.test, chosen), None)
            right = (logits.argmax(-1) == labels).sum(1)
            losses = _cross_entropy(logits, labels).double().sum(1)
            totals += torch.stack([losses, right.double()])
        return totals / len(self.test)

    def _record(self) -> None:
        if (optimizer := layerwise(self.optimizer)) is not None:
            for name, rate in optimizer.layer_learning_rates().items():
                self.scales[int(name.partition(".")[0])].append(rate.scale)

    def results(self) -> list[dict[str, Any]]:
        """Of each member, what a recipe's all_results.json says of the run."""
        return [
            {
                **scores([epoch[i] for epoch in self.epochs]),
                "recipe": self.recipe.name,
                "optimizer": self.args.optim.lower(),
                "learning_rate": member.learning_rate,
                "seed": member.seed,
                "median_scale": statistics.median(scales) if (scales := self.scales[i]) else None,
                "epochs": [epoch[i] for epoch in self.epochs],
            }
            for i, member in enumerate(self.members)
        ]

    def save(self, path: Path) -> None:
        """Writes all that training goes on from."""
        state = {
            "parameters": {name: p.detach() for name, p in self.parameters.items()},
            "buffers": self.buffers,
            "optimizer": self.optimizer.state_dict(),
            "epochs": self.epochs,
            "scales": self.scales,
            "seconds": self.seconds,
            "generators": _generators(self.device),
        }
        whole(path, lambda partial: torch.save(state, partial))

    def load(self, path: Path) -> None:
        """Goes on from what `save` wrote, of an ensemble with the same arguments."""
        state = torch.load(path, map_location="cpu", weights_only=True)
        with torch.no_grad():
            for name, saved in state["parameters"].items():
                self.parameters[name].copy_(saved)
            for name, saved in state["buffers"].items():
                self.buffers[name].copy_(saved)
        self.optimizer.load_state_dict(state["optimizer"])
        self.epochs, self.scales = state["epochs"], state["scales"]
        self.seconds = state["seconds"]
        torch.set_rng_state(state["generators"][0])
        if self.device.type == "cuda":
            torch.cuda.set_rng_state(state["generators"][1], self.device)


def _check(args: TrainingArguments, members: Sequence[Member]) -> None:
    if not members:
        raise UsageError("members must name one run at least, got none")
    usual = TrainingArguments()
    for name in (
        *("lr_scheduler_type", "max_grad_norm", "gradient_accumulation_steps"),
        *("max_train_steps", "mixed_precision"),
    ):
        if (value := getattr(args, name)) != getattr(usual, name):
            raise UsageError(f"--{name} {value}: an ensemble has no such option; leave it out")


def _with_grad(stacked: Tensor, device: torch.device) -> Tensor:
    """A leaf whose gradient stays where it is, so that slices of it are the slices' gradients."""
    leaf = stacked.detach().to(device).requires_grad_()
    leaf.grad = torch.zeros_like(leaf)
    return leaf


def _slice(stacked: Tensor, i: int) -> Tensor:
    """Member i's part as a leaf in the same memory."""
    assert stacked.grad is not None
    own = stacked.detach()[i].requires_grad_()
    own.grad = stacked.grad[i]
    return own


def _on(part: ImageDataset, device: torch.device) -> ImageDataset:
    return ImageDataset(part.images.to(device), part.labels.to(device))


def _cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """The losses of all images, [members, batch]."""
    losses = F.cross_entropy(logits.float().flatten(0, 1), targets.flatten(0, 1), reduction="none")
    return losses.view(logits.shape[:2])


def _generators(device: torch.device) -> list[Tensor]:
    own = [torch.cuda.get_rng_state(device)] if device.type == "cuda" else []
    return [torch.get_rng_state(), *own]
