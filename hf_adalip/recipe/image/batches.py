"""The batches of an epoch: their order, what augmentation makes of them, their share of a step.

Order and augmentation are functions of (seed, epoch) alone, so that a run that is resumed, or is on
more processes, sees the same images.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from .augment import Augmentation
from .data import Batch, ImageDataset


class EpochSampler(torch.utils.data.Sampler[int]):
    """A random order that is a function of (seed, epoch) alone."""

    def __init__(self, size: int, seed: int) -> None:
        self.size, self.seed = size, seed
        self.epoch = 0  # no set_epoch(): accelerate would call it with a count of its own

    def __len__(self) -> int:
        return self.size

    def __iter__(self) -> Iterator[int]:
        generator = _generator(f"{self.seed} {self.epoch}")
        yield from torch.randperm(self.size, generator=generator).tolist()


def augmentation_draws(seed: int, epoch: int, images: int, draws: int) -> Tensor:
    """What augmentation draws for each image in an epoch: [images, draws], uniform in [0, 1).

    They are of all images, in the order of the dataset: whichever process an image is on, and
    however many of them are left, it finds its own.
    """
    return torch.rand(images, draws, generator=_generator(f"augment {seed} {epoch}"))


def augmentation(
    augment: Augmentation | None, seed: int, epoch: int, size: int, device: torch.device
) -> Callable[[Batch], tuple[Tensor, Tensor]]:
    """Images and targets of a batch, as the recipe wants them.

    Args:
        augment: of the recipe.
        seed: of the run.
        epoch: of the batches.
        size: how many images the dataset has.
        device: where the batches are.
    """
    if augment is None:
        return lambda batch: (batch["pixel_values"], batch["labels"])
    table = augmentation_draws(seed, epoch, size, augment.draws).to(device)
    return lambda batch: augment(batch["pixel_values"], batch["labels"], table[batch["indices"]])


def _generator(key: str) -> torch.Generator:
    digest = hashlib.sha256(key.encode()).digest()[:8]
    return torch.Generator().manual_seed(int.from_bytes(digest, "big") >> 1)


def make_loader(
    dataset: ImageDataset, batch_size: int, sampler: EpochSampler | None = None
) -> torch.utils.data.DataLoader[Any]:
    """Whole batches of images in the order of the sampler, or of the dataset."""
    return torch.utils.data.DataLoader(
        dataset,
        batch_size,
        sampler=sampler,
        collate_fn=dataset.collate,
        # of its own: an iterator draws a number when it is made, and a resumed run makes one more
        generator=torch.Generator(),
        pin_memory=torch.cuda.is_available(),
    )


def batches_left(loader: Any, seen: int, accelerator: Any) -> Any:
    """The batches of an epoch that a resumed run has not seen."""
    if not seen:
        return loader
    if seen == len(loader):
        return ()
    return accelerator.skip_first_batches(loader, seen)


def share_of_step(
    rows: int, batch: int, batch_size: int, size: int, accelerator: Any
) -> tuple[int, float]:
    """How many rows of a batch are not filled up with images that the epoch has had, which are
    the last ones; and the factor that makes a step's gradient the mean over its images.

    accelerate divides a loss by the batches of a step and the gradient by the processes,
    however few of them an epoch has left for its last step.

    Args:
        rows: of the batch.
        batch: how many there were before in the epoch.
        batch_size: of this process.
        size: how many images the epoch has.
        accelerator: that the run trains with.
    """
    together = batch_size * accelerator.num_processes
    steps = accelerator.gradient_accumulation_steps
    left = size - batch * together
    own = min(rows, max(left - accelerator.process_index * batch_size, 0))
    left_of_step = size - batch // steps * steps * together
    images = min(left_of_step, steps * together)
    return own, steps * accelerator.num_processes / images
