"""What is wrong with a Trainer before it trains: what, why, and the line to change."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from .monitor import layerwise
from .registry import list_optimizers

if TYPE_CHECKING:
    from transformers import Trainer

INSTEAD = 'pass Trainer(..., **trainer_kwargs("adamlip", lr=...)), which is right under any engine'


@dataclass(frozen=True)
class Finding:
    """Something that would not be what its user thinks it is."""

    what: str
    why: str
    change: str

    def __str__(self) -> str:
        return f"{self.what}: {self.why}. {self.change[0].upper()}{self.change[1:]}"


class WrongOptimizerError(RuntimeError):
    """What `attach` raises for a finding."""

    def __init__(self, finding: Finding) -> None:
        super().__init__(str(finding))
        self.finding = finding


def examine(trainer: Trainer) -> list[Finding]:
    """What is wrong with a Trainer; to be called before `train()`."""
    checks = (configured_optimizer, dropped_optimizer, other_optimizer)
    return [found for check in checks if (found := check(trainer)) is not None]


def configured_optimizer(trainer: Trainer) -> Finding | None:
    """DeepSpeed's configuration has an optimizer of its own."""
    if not trainer.is_deepspeed_enabled:
        return None
    plugin = trainer.accelerator.state.deepspeed_plugin
    own = plugin and plugin.deepspeed_config.get("optimizer")
    if not own:
        return None
    return Finding(
        f"DeepSpeed's configuration has an optimizer of its own, {own.get('type')}",
        "Trainer takes that one whatever else it is told",
        'remove the "optimizer" section from DeepSpeed\'s configuration',
    )


def dropped_optimizer(trainer: Trainer) -> Finding | None:
    """`optimizers=` under DeepSpeed, for which Trainer makes another one."""
    given = trainer.optimizer
    if not trainer.is_deepspeed_enabled or given is None or layerwise(given) is not given:
        return None
    name = type(given).__name__
    return Finding(
        f"Trainer drops the {name} of optimizers=({name}(...), None)",
        f"under DeepSpeed it makes its own, and would train with optim={trainer.args.optim.value}",
        INSTEAD,
    )


def other_optimizer(trainer: Trainer) -> Finding | None:
    """Neither `optimizers=`, nor `trainer_kwargs`, nor a name of the registry as `--optim`."""
    optim = trainer.args.optim.value
    from transformers import Trainer

    made = trainer.optimizer is None and trainer.optimizer_cls_and_kwargs is None
    own = type(trainer).create_optimizer is not Trainer.create_optimizer
    if not made or own or optim in list_optimizers():
        return None
    return Finding(
        f"Trainer trains with optim={optim}",
        "that has no learning rate per layer",
        f"{INSTEAD}, or leave the script as it is and run it as "
        "python -m hf_adalip.run SCRIPT --optim adamlip",
    )
