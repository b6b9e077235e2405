"""The networks of the paper's experiments (Appendix B). They return logits, not probabilities."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn


class MNISTNet(nn.Module):
    """Table 6: two 3×3 convolutions without padding (32, 64), 2×2 max pooling, dense 128, dense C.

    As in the published experiments, no layer has a bias and the weights are Glorot-uniform.

    Args:
        in_channels: channels of the images.
        image_size: height and width of the images in pixels, 6 at least.
        num_classes: C, the number of logits.

    Raises:
        ValueError: if the images are too small for two convolutions and the pooling.
    """

    def __init__(
        self,
        in_channels: int = 1,
        image_size: tuple[int, int] = (28, 28),
        num_classes: int = 10,
    ) -> None:
        super().__init__()
        if min(image_size) < 6:
            raise ValueError(f"MNISTNet needs images of at least 6x6 pixels, got {image_size}")
        height, width = ((side - 4) // 2 for side in image_size)
        self.conv1 = nn.Conv2d(in_channels, 32, kernel_size=3, bias=False)
        self.conv2 = nn.Conv2d(32, 64, kernel_size=3, bias=False)
        self.fc1 = nn.Linear(64 * height * width, 128, bias=False)
        self.fc2 = nn.Linear(128, num_classes, bias=False)
        glorot_uniform_(self)

    def forward(self, images: Tensor) -> Tensor:
        """Logits [batch, num_classes] of images [batch, in_channels, height, width]."""
        x = F.relu(self.conv1(images))
        x = F.relu(self.conv2(x))
        x = F.max_pool2d(x, 2).flatten(1)
        x = F.relu(self.fc1(x))
        logits: Tensor = self.fc2(x)
        return logits


def glorot_uniform_(model: nn.Module) -> None:
    """Draws the weights of convolutions and dense layers anew from U(-a, a), a² = 6/(in + out)."""
    for module in model.modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            nn.init.xavier_uniform_(module.weight)
