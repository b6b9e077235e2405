"""What is wrong with a training, before and while it runs: what, why, and the line to change."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..monitor import layerwise, secant
from ..optim import LayerRate, LayerwiseOptimizer, Secant
from ..registry import NOT_DESCRIBED, initial_lr, list_optimizers
from .watched import Clipping, Losses

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import Trainer

INSTEAD = (
    'pass Trainer(..., **trainer_kwargs("adamlip", lr=...)), which is right under any engine '
    "(a Trainer that takes no optimizer_cls_and_kwargs, as some of TRL's: call register(), and set "
    'optim="adamlip")'
)

LOOKS = 10
"""Layers are judged by the last so many looks at them (of steps in the doctor, of logs in
`attach`), and clipping, of which both see every step, by so many steps at least."""


TRIAL = "HF_ADALIP_TRIAL"
"""Environment variable with the folder that the doctor has a recipe write to, instead of its own:
nothing is left behind, replaced or resumed."""


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
    checks = (configured_optimizer, dropped_optimizer, other_optimizer, flat_shards)
    return [found for check in checks if (found := check(trainer)) is not None]


def examine_run(
    trainer: Trainer, optimizer: LayerwiseOptimizer, scheduler: Any, steps: int
) -> list[Finding]:
    """What is wrong with the optimizer and the schedule of a Trainer, once they have been made.

    Args:
        trainer: as it is when training begins.
        optimizer: of it, without what accelerate wraps around it.
        scheduler: of its learning rate.
        steps: of the whole training.
    """
    found = (
        nothing_to_train(optimizer),
        unused_learning_rate(trainer, optimizer),
        decay_set_twice(trainer, optimizer),
        clip_of_nothing(trainer, optimizer),
        early_end(optimizer, scheduler, steps),
    )
    return [finding for finding in found if finding is not None]


def examine_secant(
    trainer: Trainer, optimizer: Secant, scheduler: Any, steps: int
) -> list[Finding]:
    """As `examine_run`, of a `Secant`, for which a learning rate that is not used is none."""
    found = (
        unseen_statistics(trainer, optimizer),
        decay_set_twice(trainer, optimizer),
        early_end(optimizer, scheduler, steps),
    )
    return [finding for finding in found if finding is not None]


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
    if not trainer.is_deepspeed_enabled or given is None:
        return None
    if layerwise(given) is not given and secant(given) is not given:
        return None
    name = type(given).__name__
    return Finding(
        f"Trainer drops the {name} of optimizers=({name}(...), None)",
        f"under DeepSpeed it makes its own, and would train with optim={trainer.args.optim.value}",
        INSTEAD,
    )


def refused_by_fsdp(error: Exception) -> Finding | None:
    """`optimizers=` under FSDP, which Trainer refuses when it is made."""
    if "`optimizers` is not allowed if PyTorch FSDP" not in str(error):
        return None
    return Finding(
        "Trainer refuses optimizers=(...) under FSDP",
        "such an optimizer has the parameters as they were before they were sharded",
        INSTEAD,
    )


def other_optimizer(trainer: Trainer) -> Finding | None:
    """None of ours, whether in `optimizers=`, as a class or factory, or by name as `--optim`."""
    optim, given = trainer.args.optim.value, trainer.optimizer
    from transformers import Trainer

    if given is not None:
        name = type(getattr(given, "optimizer", given)).__name__  # accelerate's wrapper
        what = f"the {name} of optimizers=(...)"
        ours = layerwise(given) is not None or secant(given) is not None
    else:
        made = trainer.optimizer_cls_and_kwargs is None
        own = type(trainer).create_optimizer is not Trainer.create_optimizer
        what, ours = f"optim={optim}", not made or own or optim in list_optimizers()
    if ours:
        return None
    return Finding(
        f"Trainer trains with {what}",
        "that has no learning rate per layer",
        f"{INSTEAD}, or leave the script as it is"
        + (", without optimizers=(...)," if given is not None else "")
        + " and run it as python -m hf_adalip.run SCRIPT --optim adamlip",
    )


def flat_shards(trainer: Trainer) -> Finding | None:
    """Engines whose flat tensors do not say where a layer begins and ends."""
    state = trainer.accelerator.state
    fsdp = getattr(state, "fsdp_plugin", None)
    if fsdp is not None and fsdp.fsdp_version == 1 and not fsdp.use_orig_params:
        return Finding(
            "FSDP1 with use_orig_params=False",
            "it makes one flat parameter of a module's, in which the layers are lost",
            "set fsdp_use_orig_params: true, or fsdp_version: 2, in accelerate's configuration",
        )
    plugin = getattr(state, "deepspeed_plugin", None) if trainer.is_deepspeed_enabled else None
    config: dict[str, Any] = {} if plugin is None else plugin.deepspeed_config
    zero = config.get("zero_optimization", {})
    if zero.get("round_robin_gradients") and zero.get("stage") in (1, 2):
        return Finding(
            "DeepSpeed with round_robin_gradients",
            "it shuffles what lies where in its flat tensors, and the layers are lost",
            'remove "round_robin_gradients" from "zero_optimization" in DeepSpeed\'s configuration',
        )
    return None


FROZEN = Finding(
    "none of the optimizer's parameters requires a gradient",
    "they are frozen, maybe since after the optimizer was made, as PEFT freezes a model's own",
    "make the optimizer of the model that is trained, once it is as it will be; with "
    'Trainer(..., **trainer_kwargs("adamlip", lr=...)) it is made then',
)


def nothing_to_train(optimizer: LayerwiseOptimizer) -> Finding | None:
    """An optimizer that was made of what was frozen then, or of another model's parameters."""
    return None if _trained_layers(optimizer) else FROZEN


def unused_learning_rate(trainer: Trainer, optimizer: LayerwiseOptimizer) -> Finding | None:
    """A learning rate in TrainingArguments, and another one in the optimizer's own arguments."""
    asked = float(trainer.args.learning_rate)
    default = type(trainer.args).__dataclass_fields__["learning_rate"].default
    used = {float(initial_lr(group)) for group in optimizer.param_groups}
    used.add(float(optimizer.defaults["lr"]))
    if asked == default or any(math.isclose(asked, lr, rel_tol=1e-6) for lr in used):
        return None
    return Finding(
        f"TrainingArguments(learning_rate={asked:g}) is not used",
        "the optimizer was made with arguments of its own, and lr="
        + " and ".join(f"{lr:g}" for lr in sorted(used)),
        "give the optimizer that one, as in "
        'trainer_kwargs("adamlip", lr=args.learning_rate), or leave it out of TrainingArguments',
    )


def replaced_options(
    optimizer: LayerwiseOptimizer, made: Sequence[Mapping[str, Any]]
) -> Finding | None:
    """Options that an optimizer, of groups that were made with others, has from a checkpoint."""

    def values(groups: Sequence[Mapping[str, Any]], key: str) -> list[Any]:
        found = [group[key] for group in groups if key in group]
        return [tuple(x) if isinstance(x, list) else x for x in found]  # JSON knows lists only

    changed = []
    now, asked = (
        [float(initial_lr(group)) for group in groups] for groups in (optimizer.param_groups, made)
    )
    if other := [lr for lr in asked if not any(math.isclose(lr, x, rel_tol=1e-6) for x in now)]:
        changed.append(f"lr={now[0]:g} for {other[0]:g}")
    for key in made[0].keys() - NOT_DESCRIBED:
        loaded = values(optimizer.param_groups, key)
        if loaded and (given := [value for value in values(made, key) if value not in loaded]):
            changed.append(f"{key}={loaded[0]} for {given[0]}")
    if not changed:
        return None
    return Finding(
        f"the checkpoint has other options than the optimizer: {', '.join(sorted(changed))}",
        "to load a state replaces the options that an optimizer was made with",
        "make it with those of the checkpoint, or set them in its param_groups after loading",
    )


def unseen_statistics(trainer: Trainer, optimizer: Secant) -> Finding | None:
    """Running statistics that measurements change, because `Secant` was not given the model."""
    from torch.nn.modules.batchnorm import _NormBase

    norms = (module for module in trainer.model.modules() if isinstance(module, _NormBase))
    if optimizer.model is not None or not any(norm.track_running_stats for norm in norms):
        return None
    return Finding(
        "Secant was made without its model, which has running statistics",
        "they take in the batches of measurements, which are computed twice",
        "make it with Secant(..., model=model), or pass "
        'Trainer(..., **trainer_kwargs("secant-adamw"))',
    )


def unmeasured(optimizer: Secant) -> Finding | None:
    """Measurements none of which came to a number."""
    probes = optimizer.probes
    if not probes or any(probe.finite for probe in probes):
        return None
    return Finding(
        f"none of {len(probes)} measurements of Secant is finite",
        "the loss or its gradients are inf or NaN, and the rate only falls",
        "look for what overflows, or give the schedule a warm-up",
    )


def decay_set_twice(trainer: Trainer, optimizer: LayerwiseOptimizer | Secant) -> Finding | None:
    """Weight decay in TrainingArguments and, another one, in the optimizer's own arguments."""
    used = {float(group.get("weight_decay", 0.0)) for group in optimizer.param_groups} - {0.0}
    here = " and ".join(f"{decay:g}" for decay in sorted(used)) or "none"
    asked = float(trainer.args.weight_decay)
    if asked and asked not in used:
        return Finding(
            f"TrainingArguments(weight_decay={asked:g}) is not used",
            f"the optimizer was made with arguments of its own, and decays with {here}",
            f"give the optimizer weight_decay={asked:g}, as in "
            f'trainer_kwargs("adamlip", lr=..., weight_decay={asked:g}), or leave it out of both',
        )
    _, own_arguments = trainer.optimizer_cls_and_kwargs or (None, {"weight_decay": 0.0})
    own = float(own_arguments.get("weight_decay") or 0.0)
    if own and own not in used:
        return Finding(
            f"weight_decay={own:g} of optimizer_cls_and_kwargs is not used",
            f"for a class, Trainer makes parameter groups with its own, and decays with {here}",
            f"set TrainingArguments(weight_decay={own:g}), or use trainer_kwargs(...)",
        )
    return None


def clip_of_nothing(trainer: Trainer, optimizer: LayerwiseOptimizer) -> Finding | None:
    """Trainer's clipping beside `release_gradients`, whose gradients end within backward."""
    if not optimizer.releases_gradients or not trainer.args.max_grad_norm:
        return None
    return Finding(
        f"TrainingArguments(max_grad_norm={trainer.args.max_grad_norm:g}) clips nothing",
        "with release_gradients, parameters are stepped and gradients are gone before it",
        "set max_grad_norm=0, or take ordinary steps (release.remove())",
    )


NOT_TRAINED = "nothing is trained after that, whatever the optimizer does"


def early_end(optimizer: LayerwiseOptimizer | Secant, scheduler: Any, steps: int) -> Finding | None:
    """A schedule at 0 before the training ends, or before S, an average over steps, has moved.

    Looked ahead is in LambdaLRs, which are functions of the step: all of transformers' schedules.
    Of others, `Watch` sees what they come to.
    """
    from torch.optim.lr_scheduler import LambdaLR

    scheduler = getattr(scheduler, "scheduler", scheduler)  # accelerate's wrapper
    if steps < 2:
        return None
    ends = [steps]  # of each group
    if isinstance(scheduler, LambdaLR):
        looked = sorted({round(i * (steps - 1) / 999) for i in range(1000)})
        ends = [
            max((step for step in looked if factor(step) > 0.0), default=-1) + 1
            for factor in scheduler.lr_lambdas
        ]
    used = {end for end in ends if end} or {0}  # a group at 0 throughout is left out on purpose
    trained = min(used)
    if steps - trained > 0.1 * steps:
        which = f" of group {ends.index(trained)}" if len(used) > 1 else ""
        return Finding(
            f"the learning rate{which} is 0 from step {trained} of {steps} on",
            NOT_TRAINED,
            f"give the scheduler num_training_steps={steps}",
        )
    gamma = max(float(group.get("gamma", 0.0)) for group in optimizer.param_groups)
    first = gamma**trained  # the weight in S, at the end, of the 1 that it starts at
    if trained >= 5 and first > 0.25:  # less than 5 is a trial of the script
        return Finding(
            f"the training ends after {trained} steps",
            f"S is an average over the last 1/(1-γ) = {1.0 / (1.0 - gamma):.3g} steps, and "
            f"{first:.0%} of it is still the 1 that it starts at",
            f"train for longer, or set gamma={1.0 - 4.0 / trained:.2g}",
        )
    return None


class Watch:
    """What is seen of a training while it runs.

    Call `clip` with the norm of each gradient that may be clipped and `losses.add` with each loss,
    which wait for no device; and `layers`, now and then, with the learning rates of the layers, or
    for a `Secant`, which has none, `measured`. `findings` says what is wrong so far.
    """

    def __init__(self) -> None:
        self.clipping, self.losses = Clipping(), Losses()
        self.clipped_to = ""  # in words
        self.changing_clip: Finding | None = None
        self.silent: Counter[str] = Counter()  # looks at a layer without a gradient, in a row
        self.left_out: Counter[str] = Counter()  # steps of a layer whose gradient was not finite
        self.ended: dict[int, int] = {}  # looks at a group's lr at 0, in a row, after it was not
        self.rates: Mapping[str, LayerRate] = {}  # at the last look
        self.frozen = False  # whether all layers were, at the last look
        self.secant: Secant | None = None

    def clip(self, norm: Tensor | float, max_norm: Tensor | float, words: str = "") -> None:
        """A gradient of this norm was clipped to `max_norm`, if that is less."""
        self.clipping.add(norm, max_norm)
        self.clipped_to = words or f"a norm of {max_norm:g}"

    def layers(self, optimizer: LayerwiseOptimizer, rates: Mapping[str, LayerRate]) -> None:
        trained = _trained_layers(optimizer)
        self.frozen = not trained
        for name in trained:
            rate = rates.get(name)
            # without a gradient, a layer keeps the numbers of its last step
            heard = rate is not None and rate != self.rates.get(name)
            if rate is not None:
                # at lr = 0, the updates of the -U forms are 0; what is not finite is told elsewhere
                heard = not rate.lr or (heard and bool(rate.norm or rate.nonfinite_steps))
            self.silent[name] = 0 if heard else self.silent[name] + 1
            if rate is not None and rate.nonfinite_steps:
                self.left_out[name] = rate.nonfinite_steps
        self.rates = rates
        self._groups(optimizer)

    def measured(self, optimizer: Secant) -> None:
        self.secant = optimizer
        self._groups(optimizer)

    def _groups(self, optimizer: LayerwiseOptimizer | Secant) -> None:
        for i, group in enumerate(optimizer.param_groups):
            if float(group["lr"]):
                self.ended[i] = 0
            elif i in self.ended:
                self.ended[i] += 1

    def findings(self) -> list[Finding]:
        frozen = FROZEN if self.frozen else None
        without = unmeasured(self.secant) if self.secant else None
        looked = (frozen, self._clip(), self._dead(), self._ended(), self._nonfinite(), without)
        return [found for found in looked if found is not None]

    def _clip(self) -> Finding | None:
        if self.clipping.away:
            return Finding(
                f"gradients are clipped to {self.clipped_to}",
                "they are 0 then, and nothing is trained",
                "leave the clipping out, or clip to more",
            )
        if self.secant:  # which measures gradients before they are clipped
            return None
        if (seen := self.clipping.changes(least=LOOKS)) is None:
            return self.changing_clip
        self.changing_clip = None
        if seen.changes > seen.pairs / 4:
            self.changing_clip = Finding(
                f"gradients are clipped to {self.clipped_to} by a factor that changes, from "
                f"{seen.least:.2g} to {seen.most:.2g}",
                "S compares each gradient with the one before, and so sees the clip change as well",
                "switch clipping off (Trainer: max_grad_norm=0), or clip the norm at several times "
                f"{seen.usual:.2g}, the usual one, to catch spikes only",
            )
        return self.changing_clip

    def _ended(self) -> Finding | None:
        ended = [group for group, looks in self.ended.items() if looks >= LOOKS]
        if not ended:
            return None
        which = f" of group {ended[0]}" if len(ended) < len(self.ended) else ""
        return Finding(
            f"the learning rate{which} has become 0, and the training goes on",
            NOT_TRAINED,
            "give the scheduler the number of steps of the whole training",
        )

    def _dead(self) -> Finding | None:
        dead = [name for name, looks in self.silent.items() if looks >= LOOKS]
        if not dead or self.clipping.away:
            return None
        shown = ", ".join(dead[:3]) + (f" and {len(dead) - 3} more" if len(dead) > 3 else "")
        all_of_them = len(dead) == len(self.silent)
        return Finding(
            f"no gradient reaches {shown}",
            "the loss does not depend on it, or what follows it has died (a ReLU that is 0 for all "
            "inputs): S has nothing to go by",
            "give the optimizer the parameters of the model that is trained, and look for what "
            "cuts the loss off from them (detach, no_grad)"
            if all_of_them
            else "freeze it before the optimizer is made (requires_grad_(False)), take it out of "
            "the model, or, if it did learn before, start again with a lower learning rate",
        )

    def _nonfinite(self) -> Finding | None:
        if not self.left_out:
            return None
        ((name, steps),) = self.left_out.most_common(1)
        return Finding(
            f"the gradient of {name} was inf or NaN in {steps} steps",
            "a layer is not trained in such a step",
            "lower the learning rate, or look for what overflows (fp16 without a GradScaler)",
        )


WITHOUT_LR = "give the schedule a warm-up, or train with AdamW and a learning rate of your choice"
"""What to change of a training with `Secant` that has diverged."""


def diverged(loss: float, of: str, chance: float | None, first: float = 0.0) -> Finding | None:
    """A training that ended with a loss that is not finite, or no better than guessing.

    Args:
        loss: at the end.
        of: what it is the loss of, in words.
        chance: the loss of guessing; None where it is not known.
        first: the loss at the beginning; what is not known, and far above it, has diverged too.
    """
    change = "begin again with a learning rate that is lower by a factor of ten or more"
    if not math.isfinite(loss):
        return Finding(f"the {of} is {loss:g}", "the training has diverged", change)
    if chance is not None and loss >= 0.98 * chance:
        return Finding(
            f"the {of} is {loss:.4g}, and that of guessing {chance:.4g}",
            "nothing has been learnt: the training has diverged, or its learning rate is far too "
            "low",
            change + ", or raise it if the loss never moved",
        )
    if chance is None and first > 0.1 and loss > 10 * first:
        return Finding(
            f"the {of} is {loss:.4g}, and was {first:.4g} at the beginning",
            "the training has diverged",
            change,
        )
    return None


def _trained_layers(optimizer: LayerwiseOptimizer) -> dict[str, None]:
    names: dict[str, None] = {}
    for group in optimizer.param_groups:
        layers, params = group["layer_names"], group["params"]
        if len(layers) != len(params):  # DeepSpeed's flat tensors
            names |= dict.fromkeys(layers)
        else:
            pairs = zip(layers, params, strict=True)
            names |= dict.fromkeys(name for name, param in pairs if param.requires_grad)
    return names
