# /// script
# requires-python = ">=3.10"
# dependencies = ["hf-adalip[recipes]"]
#
# [tool.uv.sources]
# hf-adalip = { path = ".." }
# ///
"""CIFAR-100 with the paper's network and augmentation: §5.3, Table 4 and Fig. 4.

    accelerate launch recipes/cifar100.py --optim adamlip
    python recipes/cifar100.py --optim rmslip --learning_rate 1e-3 --seed 3 --output_dir outputs/a
    python recipes/cifar100.py --optim sgd                 # the optimizer to compare with
    python recipes/cifar100.py --dataset_name /path/to/cifar100
    python recipes/cifar100.py --label_column_name coarse_label             # its 20 superclasses
    python recipes/cifar100.py --checkpointing_steps epoch # then --resume_from_checkpoint latest

As in the paper: the network of Table 8 with batch normalisation and dropout of 0.5, images in
[0, 1], random rotations, flips and shifts, a constant learning rate, unbounded S with γ = 0.8.
As in the published experiments: rotations within 15 degrees, shifts within a tenth of the side,
biases, batches of 128, 70 epochs, RMSProp's smoothing constant 0.999. Each default learning rate
is from the middle of the grid of §5.3. An image's rotation, flip and shift are a function of
(seed, epoch, image) alone: the same in a resumed run, and on any number of processes.
"""

import sys

import torch
from torch import nn

from hf_adalip.recipe.image.augment import RandomAffine
from hf_adalip.recipe.image.models import CIFAR100Net
from hf_adalip.recipe.image.training import Recipe, main


def build_model(image_shape: tuple[int, int, int], num_classes: int) -> nn.Module:
    channels, height, width = image_shape
    return CIFAR100Net(channels, (height, width), num_classes)


RECIPE = Recipe(
    name="cifar100",
    description=__doc__,
    build_model=build_model,
    defaults={
        "dataset_name": "uoft-cs/cifar100",
        "label_column_name": "fine_label",
        "per_device_train_batch_size": 128,
        "num_train_epochs": 70,
    },
    optimizer_defaults={
        torch.optim.SGD: {"lr": 0.1},
        torch.optim.RMSprop: {"lr": 7e-4, "alpha": 0.999},
        torch.optim.Adam: {"lr": 1e-3},
    },
    augment=RandomAffine(degrees=15, translate=(0.1, 0.1), hflip=0.5),
)

if __name__ == "__main__":
    sys.exit(main(RECIPE))
