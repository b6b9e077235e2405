"""ms-swift: importing this, in a file for `--external_plugins`, makes `--optimizer adamlip` known.

ms-swift reads `--optim` before it imports the plug-ins, so it is `--optimizer NAME` that names
them. Learning rate, weight decay, betas and epsilon are ms-swift's, the rest `--optim_args
gamma=0.9`. `attach` is called for the Trainer.
"""

from __future__ import annotations

from typing import Any

from swift.optimizers import OptimizerCallback, optimizers_map
from torch.optim import Optimizer
from transformers.training_args import OptimizerNames

from ..registry import list_optimizers
from .trainer import attach_if_ours, register


def _callback_of(name: str) -> type[OptimizerCallback]:
    class Callback(OptimizerCallback):  # type: ignore[misc]
        def __init__(self, args: Any, trainer: Any) -> None:
            args.optim = OptimizerNames(name)
            super().__init__(args, trainer)

        def create_optimizer(self, *args: Any, **kwargs: Any) -> Optimizer:
            attach_if_ours(self.trainer)
            optimizer: Optimizer = super().create_optimizer(*args, **kwargs)
            return optimizer

    return Callback


register()
optimizers_map.update({name: _callback_of(name) for name in list_optimizers()})
