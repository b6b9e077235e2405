# /// script
# requires-python = ">=3.10"
# dependencies = ["hf-adalip[recipes]"]
#
# [tool.uv.sources]
# hf-adalip = { path = ".." }
# ///
"""CIFAR-10 with the paper's network: §5.2, Table 3 and Fig. 3.

    accelerate launch recipes/cifar10.py --optim adamlip
    python recipes/cifar10.py --optim adalip --learning_rate 0.2 --seed 3 --output_dir outputs/a
    python recipes/cifar10.py --optim adam                 # the optimizer to compare with
    python recipes/cifar10.py --dataset_name /path/to/cifar10
    python recipes/cifar10.py --max_train_samples 5000 --num_train_epochs 3     # a quick look
    python recipes/cifar10.py --checkpointing_steps epoch  # then --resume_from_checkpoint latest

As in the paper: the network of Table 7, images in [0, 1] and no augmentation, a constant learning
rate, unbounded S with γ = 0.8. As in the published experiments: no biases, Glorot-uniform weights,
batches of 128, 30 epochs, RMSProp's smoothing constant 0.999. Each default learning rate is from
the middle of the grid of §5.2.
"""

import sys

import torch
from torch import nn

from hf_adalip.recipe.image.models import CIFAR10Net
from hf_adalip.recipe.image.training import Recipe, main


def build_model(image_shape: tuple[int, int, int], num_classes: int) -> nn.Module:
    channels, height, width = image_shape
    return CIFAR10Net(channels, (height, width), num_classes)


RECIPE = Recipe(
    name="cifar10",
    description=__doc__,
    build_model=build_model,
    defaults={
        "dataset_name": "uoft-cs/cifar10",
        "per_device_train_batch_size": 128,
        "num_train_epochs": 30,
    },
    optimizer_defaults={
        torch.optim.SGD: {"lr": 0.1},
        torch.optim.RMSprop: {"lr": 7e-4, "alpha": 0.999},
        torch.optim.Adam: {"lr": 7e-4},
    },
)

if __name__ == "__main__":
    sys.exit(main(RECIPE))
