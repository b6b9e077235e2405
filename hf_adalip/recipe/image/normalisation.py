"""What batch normalisation needs of a loop: modes, statistics in common, batches large enough."""

from __future__ import annotations

import torch
from accelerate.utils import broadcast
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ...errors import UsageError
from .data import ImageData
from .options import TrainingArguments


def train_mode(model: nn.Module) -> None:
    """Training mode, but evaluation mode for what is frozen: no dropout, no batch statistics."""
    model.train()
    for module in model.modules():
        parameters = list(module.parameters())
        if parameters and not any(parameter.requires_grad for parameter in parameters):
            module.eval()


def share_buffers(model: nn.Module) -> None:
    """Gives all processes the first one's batch statistics, which are each one's own."""
    for buffer in model.buffers():
        broadcast(buffer)


def check_batches(
    model: nn.Module, data: ImageData, args: TrainingArguments, num_processes: int
) -> None:
    """Batch normalisation of one value per image and channel takes no batch of one image.

    Raises:
        UsageError: if there would be one, perhaps at the end of the first epoch only.
    """
    batch_size, size = args.per_device_train_batch_size, len(data.train)
    last = size % batch_size if num_processes == 1 else batch_size  # accelerate fills up the others
    if 1 in (batch_size, last) and _normalises_single_values(model, data.image_shape):
        raise UsageError(
            f"--per_device_train_batch_size {batch_size} makes a batch of one of {size} images, "
            "which the network's batch normalisation cannot take; choose another number"
        )


def _normalises_single_values(model: nn.Module, image_shape: tuple[int, int, int]) -> bool:
    train_mode(model)
    norms = [m for m in model.modules() if isinstance(m, _BatchNorm) and m.training]
    found: list[bool] = []

    def look(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        found.append(inputs[0].numel() == 2 * inputs[0].shape[1])

    hooks = [norm.register_forward_pre_hook(look) for norm in norms]
    with torch.no_grad():
        model.eval()(torch.zeros(2, *image_shape))  # evaluation leaves the statistics as they are
    for hook in hooks:
        hook.remove()
    return any(found)
