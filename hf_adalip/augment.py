"""Augmentation of whole batches on the device, with random numbers of each image's own."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor


class Augmentation(Protocol):
    """What a recipe does to a batch of training images on the device, before the network.

    It draws nothing itself: the training gives it numbers that are a function of (seed, epoch,
    image) alone, so that a resumed run, or one on more processes, sees the same images. Its repr
    is kept in checkpoints and results; a dataclass has a good one.
    """

    @property
    def draws(self) -> int:
        """How many numbers it needs for an image."""

    def __call__(self, images: Tensor, labels: Tensor, draws: Tensor) -> tuple[Tensor, Tensor]:
        """The images and targets to train with.

        Args:
            images: float32 [batch, channels, height, width] in [0, 1].
            labels: int64 [batch].
            draws: float32 [batch, self.draws], uniform in [0, 1).

        Returns:
            Images, and what `torch.nn.functional.cross_entropy` takes as target: the labels, or
            float [batch, num_classes] probabilities. Accuracy is counted with the labels given.
        """
