"""Augmentation of whole batches on the device, with random numbers of each image's own."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Protocol

import torch
import torch.nn.functional as F
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


@dataclass(frozen=True)
class RandomAffine:
    """Flips, rotates and shifts each image by an amount of its own: §5.3's augmentation.

    An image is flipped (left to right), then rotated about its centre, then shifted, all in one
    bilinear interpolation; what comes in from outside repeats the nearest pixel of the border.

    Args:
        degrees: rotation is by an angle uniform in ±degrees, counter-clockwise if positive.
        translate: shifts to the right and down are uniform in ± these fractions of width, height.
        hflip: probability of a flip.

    Raises:
        ValueError: for a negative angle, or a fraction or probability outside of 0 to 1.
    """

    degrees: float = 0.0
    translate: tuple[float, float] = (0.0, 0.0)
    hflip: float = 0.0
    draws: ClassVar[int] = 4  # angle, horizontal shift, vertical shift, flip

    def __post_init__(self) -> None:
        if not 0 <= self.degrees < math.inf:
            raise ValueError(f"degrees must be a number from 0 on, got {self.degrees}")
        if len(self.translate) != 2 or not all(0 <= part <= 1 for part in self.translate):
            raise ValueError(f"translate must be two fractions from 0 to 1, got {self.translate}")
        if not 0 <= self.hflip <= 1:
            raise ValueError(f"hflip must be a probability, got {self.hflip}")

    def __call__(self, images: Tensor, labels: Tensor, draws: Tensor) -> tuple[Tensor, Tensor]:
        height, width = images.shape[-2:]
        signed = 2 * draws - 1
        angle = math.radians(self.degrees) * signed[:, 0]
        # positions are from -1 to 1, so that a fraction of the side is twice as much
        right, down = 2 * self.translate[0] * signed[:, 1], 2 * self.translate[1] * signed[:, 2]
        mirror = torch.where(draws[:, 3] < self.hflip, -1.0, 1.0)
        cos, sin = angle.cos(), angle.sin()
        # Where does the pixel at (x, y) come from? Back through the shift, rotation and flip:
        #   from_x = ±(cos (x - right) - sin (y - down)), from_y = sin (x - right) + cos (y - down),
        # with the ratio of the sides in the sines. Each is a number of the column plus one of the
        # row: a sum, where `affine_grid` has a matrix product that takes longer than the rest.
        x = _positions(width, images) - right[:, None]
        y = _positions(height, images) - down[:, None]
        from_x = _sum(mirror * cos, x, -mirror * sin * height / width, y)
        from_y = _sum(sin * width / height, x, cos, y)
        # x and y apart in memory, as grid_sample works on them: half the time on a CPU
        grid = torch.stack([from_x, from_y], dim=1).permute(0, 2, 3, 1)
        return F.grid_sample(images, grid, padding_mode="border", align_corners=False), labels


def _positions(size: int, like: Tensor) -> Tensor:
    """The middles of pixels in a side from -1 to 1."""
    return (2 * torch.arange(size, dtype=like.dtype, device=like.device) + 1) / size - 1


def _sum(a: Tensor, x: Tensor, b: Tensor, y: Tensor) -> Tensor:
    """a·x + b·y [batch, height, width] of a, b [batch], x [batch, width] and y [batch, height]."""
    return (a[:, None] * x)[:, None, :] + (b[:, None] * y)[:, :, None]
