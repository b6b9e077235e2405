"""The networks of the paper's experiments (Appendix B). They return logits, not probabilities.

model = CIFAR10Net.from_pretrained("outputs/a")   # what a recipe wrote there
model = CIFAR10Net.from_pretrained("USER/NAME")                 # or from the Hub
model.push_to_hub("USER/NAME")
"""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

try:
    from huggingface_hub import PyTorchModelHubMixin
except ImportError as error:
    raise ImportError(
        "hf_adalip.recipe.image.models needs huggingface_hub: pip install 'hf-adalip[recipes]'"
    ) from error


class _PaperNet(
    nn.Module,
    PyTorchModelHubMixin,
    library_name="hf_adalip",
    pipeline_tag="image-classification",
    tags=["adalip"],
):
    """A model of the Hub, whose config.json has the arguments that it was made with."""

    @property
    def config(self) -> dict[str, Any]:
        """The arguments of the constructor by name."""
        config = self._hub_mixin_config
        assert isinstance(config, dict)
        return config

    @classmethod
    def from_pretrained(cls, *args: Any, strict: bool = True, **kwargs: Any) -> Any:
        """The model of a folder or a repository of the Hub, in evaluation mode.

        As in huggingface_hub, but weights that are missing or left over are an error.
        """
        return super().from_pretrained(*args, strict=strict, **kwargs)


def _check_size(image_size: tuple[int, int], least: int, name: str) -> None:
    height, width = image_size
    if min(height, width) < least:
        raise ValueError(
            f"{name} needs images of at least {least}x{least} pixels, got {height}x{width}"
        )


class MNISTNet(_PaperNet):
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
        _check_size(image_size, 6, "MNISTNet")
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


class CIFAR10Net(_PaperNet):
    """Table 7: three pairs of 3×3 convolutions (32, 64, and 128 with padding), each with 2×2 max
    pooling after it, dense 200, dense C.

    As in the published experiments, no layer has a bias and the weights are Glorot-uniform.

    Args:
        in_channels: channels of the images.
        image_size: height and width of the images in pixels, 20 at least.
        num_classes: C, the number of logits.

    Raises:
        ValueError: if the images are too small for the convolutions and the poolings.
    """

    def __init__(
        self,
        in_channels: int = 3,
        image_size: tuple[int, int] = (32, 32),
        num_classes: int = 10,
    ) -> None:
        super().__init__()
        _check_size(image_size, 20, "CIFAR10Net")
        height, width = (((side - 4) // 2 - 4) // 2 // 2 for side in image_size)
        self.conv1 = nn.Conv2d(in_channels, 32, kernel_size=3, bias=False)
        self.conv2 = nn.Conv2d(32, 32, kernel_size=3, bias=False)
        self.conv3 = nn.Conv2d(32, 64, kernel_size=3, bias=False)
        self.conv4 = nn.Conv2d(64, 64, kernel_size=3, bias=False)
        self.conv5 = nn.Conv2d(64, 128, kernel_size=3, padding="same", bias=False)
        self.conv6 = nn.Conv2d(128, 128, kernel_size=3, padding="same", bias=False)
        self.fc1 = nn.Linear(128 * height * width, 200, bias=False)
        self.fc2 = nn.Linear(200, num_classes, bias=False)
        glorot_uniform_(self)

    def forward(self, images: Tensor) -> Tensor:
        """Logits [batch, num_classes] of images [batch, in_channels, height, width]."""
        x = F.relu(self.conv1(images))
        x = F.relu(self.conv2(x))
        x = F.max_pool2d(x, 2)
        x = F.relu(self.conv3(x))
        x = F.relu(self.conv4(x))
        x = F.max_pool2d(x, 2)
        x = F.relu(self.conv5(x))
        x = F.relu(self.conv6(x))
        x = F.max_pool2d(x, 2).flatten(1)
        x = F.relu(self.fc1(x))
        logits: Tensor = self.fc2(x)
        return logits


class CIFAR100Net(_PaperNet):
    """Table 8: eight 3×3 convolutions with padding (64, 128, 256, 256, then 512), five 2×2 max
    poolings (after the 1st, 2nd, 4th, 6th and 8th), dense 512, dropout, dense C.

    Batch normalisation comes after the ReLU of each layer but the last. All layers have biases;
    the weights begin Glorot-uniform, the biases at zero. Of batch normalisation's constants the
    paper says nothing: they are torch's.

    Args:
        in_channels: channels of the images.
        image_size: height and width of the images in pixels, 32 at least.
        num_classes: C, the number of logits.
        dropout: probability with which an input of the last layer is dropped in training.

    Raises:
        ValueError: if the images are too small for the poolings.
    """

    def __init__(
        self,
        in_channels: int = 3,
        image_size: tuple[int, int] = (32, 32),
        num_classes: int = 100,
        dropout: float = 0.5,
    ) -> None:
        super().__init__()
        _check_size(image_size, 32, "CIFAR100Net")
        height, width = (side // 32 for side in image_size)
        self.conv1, self.bn1 = nn.Conv2d(in_channels, 64, 3, padding="same"), nn.BatchNorm2d(64)
        self.conv2, self.bn2 = nn.Conv2d(64, 128, 3, padding="same"), nn.BatchNorm2d(128)
        self.conv3, self.bn3 = nn.Conv2d(128, 256, 3, padding="same"), nn.BatchNorm2d(256)
        self.conv4, self.bn4 = nn.Conv2d(256, 256, 3, padding="same"), nn.BatchNorm2d(256)
        self.conv5, self.bn5 = nn.Conv2d(256, 512, 3, padding="same"), nn.BatchNorm2d(512)
        self.conv6, self.bn6 = nn.Conv2d(512, 512, 3, padding="same"), nn.BatchNorm2d(512)
        self.conv7, self.bn7 = nn.Conv2d(512, 512, 3, padding="same"), nn.BatchNorm2d(512)
        self.conv8, self.bn8 = nn.Conv2d(512, 512, 3, padding="same"), nn.BatchNorm2d(512)
        self.fc1, self.bn9 = nn.Linear(512 * height * width, 512), nn.BatchNorm1d(512)
        self.dropout = nn.Dropout(dropout)
        self.fc2 = nn.Linear(512, num_classes)
        glorot_uniform_(self)

    def forward(self, images: Tensor) -> Tensor:
        """Logits [batch, num_classes] of images [batch, in_channels, height, width]."""
        x = self.bn1(F.relu(self.conv1(images)))
        x = F.max_pool2d(x, 2)
        x = self.bn2(F.relu(self.conv2(x)))
        x = F.max_pool2d(x, 2)
        x = self.bn3(F.relu(self.conv3(x)))
        x = self.bn4(F.relu(self.conv4(x)))
        x = F.max_pool2d(x, 2)
        x = self.bn5(F.relu(self.conv5(x)))
        x = self.bn6(F.relu(self.conv6(x)))
        x = F.max_pool2d(x, 2)
        x = self.bn7(F.relu(self.conv7(x)))
        x = self.bn8(F.relu(self.conv8(x)))
        x = F.max_pool2d(x, 2).flatten(1)
        x = self.dropout(self.bn9(F.relu(self.fc1(x))))
        logits: Tensor = self.fc2(x)
        return logits


def glorot_uniform_(model: nn.Module) -> None:
    """Draws the weights of convolutions and dense layers anew from U(-a, a), a² = 6/(in + out);
    their biases, where they have some, become zero."""
    for module in model.modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            nn.init.xavier_uniform_(module.weight)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
