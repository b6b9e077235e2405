# /// script
# requires-python = ">=3.10"
# dependencies = ["hf-adalip[recipes]"]
#
# [tool.uv.sources]
# hf-adalip = { path = ".." }
# ///
"""MNIST with the paper's network: §5.1, Table 2, and the learning rates per layer of §6.1, Fig. 5.

    accelerate launch recipes/mnist.py --optim adamlip
    python recipes/mnist.py --optim adalip --learning_rate 0.05 --seed 3 --output_dir outputs/a
    python recipes/mnist.py --optim sgd                    # the optimizer to compare with
    python recipes/mnist.py --dataset_name digits          # small, and without a download
    python recipes/mnist.py --checkpointing_steps epoch    # then --resume_from_checkpoint latest
    torchrun --nproc-per-node 2 recipes/mnist.py --cpu

As in the paper: the network of Table 6, images in [0, 1] and no augmentation, a constant learning
rate, unbounded S with γ = 0.8, RMSProp's smoothing constant 0.999. Batches of 128 and 15 epochs are
the published experiments'. Each default learning rate is from the middle of the grid of §5.1.
"""

import sys

import torch
from torch import nn

from hf_adalip.recipe.image.models import MNISTNet
from hf_adalip.recipe.image.training import Recipe, main


def build_model(image_shape: tuple[int, int, int], num_classes: int) -> nn.Module:
    channels, height, width = image_shape
    return MNISTNet(channels, (height, width), num_classes)


RECIPE = Recipe(
    name="mnist",
    description=__doc__,
    build_model=build_model,
    defaults={
        "dataset_name": "ylecun/mnist",
        "per_device_train_batch_size": 128,
        "num_train_epochs": 15,
    },
    optimizer_defaults={
        torch.optim.SGD: {"lr": 0.1},
        torch.optim.RMSprop: {"lr": 7e-4, "alpha": 0.999},
        torch.optim.Adam: {"lr": 1e-3},
    },
)

if __name__ == "__main__":
    sys.exit(main(RECIPE))
