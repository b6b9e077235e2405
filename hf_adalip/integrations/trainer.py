"""transformers.Trainer: any engine, `--optim` in unmodified scripts, logs and model cards."""

from __future__ import annotations

import inspect
import math
import warnings
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from torch import nn
from torch.optim import Optimizer

from ..doctor import (
    INSTEAD,
    Finding,
    Watch,
    WrongOptimizerError,
    dropped_optimizer,
    examine_run,
    flat_shards,
    nothing_to_train,
    replaced_options,
)
from ..monitor import layerwise, summary
from ..registry import create_optimizer, describe_optimizer, get_optimizer_info, list_optimizers
from .arguments import convert_arguments

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from transformers import Trainer

_NEEDS = (
    "hf_adalip knows transformers 5.2 to 5.24 here; install one of these (pip install "
    "'hf-adalip[trainer]'), or pass `optimizers=(optimizer, None)` to Trainer"
)


class ModelOptimizer:
    """What Trainer takes for an optimizer factory: it is given the model, so names are known."""

    def __call__(
        self,
        model: nn.Module,
        *,
        name: str,
        optimizer_dict: Sequence[Mapping[str, Any]] | None = None,
        **arguments: Any,
    ) -> Optimizer:
        """
        Args:
            model: what is trained.
            name: of the optimizer.
            optimizer_dict: parameter groups instead of the model's own, of a Trainer that trains
                more than the model (that of sentence-transformers: its loss, too). What is in a
                group and not in the model is a layer for each tensor.
            **arguments: of the optimizer.
        """
        if optimizer_dict is None:
            return create_optimizer(model, name, **arguments)
        names = {id(param): name for name, param in model.named_parameters()}
        groups = []
        for number, group in enumerate(optimizer_dict):
            params = [
                (names.get(id(param), f"optimizer_dict.{number}.{i}.weight"), param)
                for i, param in enumerate(group["params"])
            ]
            groups += [{**group, "params": params}] if params else []
        if get_optimizer_info(name).takes_layers:
            arguments.setdefault("layers", "module")
        return create_optimizer(groups, name, **arguments)


def trainer_kwargs(name: str, **hyperparameters: Any) -> dict[str, Any]:
    """Keyword arguments for Trainer that train with an optimizer by name, under any engine.

        Trainer(model=model, args=args, ..., **trainer_kwargs("adamlip", lr=1e-3))

    Trainer makes the optimizer itself, as FSDP and DeepSpeed need it, and from the model: layers
    are modules unless `layers` says otherwise, and biases and norms get no weight decay.

    Args:
        name: a name of the registry.
        **hyperparameters: the optimizer's. They count as given: Trainer does not put in
            `learning_rate`, `weight_decay` or `adam_beta1` of TrainingArguments, so `lr` has
            to be here.

    Raises:
        ValueError, TypeError: for an unknown name, a bad value or an argument that the optimizer
            does not take, now rather than when training starts.
    """
    get_optimizer_info(name)
    if hyperparameters.get("lr") is None:
        raise ValueError(
            "trainer_kwargs needs lr: Trainer does not pass TrainingArguments.learning_rate on; "
            f'write trainer_kwargs("{name}", lr=args.learning_rate)'
        )
    checked = dict(hyperparameters)
    if callable(checked.get("layers")):  # which knows the names of another model
        checked["layers"] = lambda name: name
    create_optimizer(nn.Linear(1, 1, bias=False), name, **checked)
    return {"optimizer_cls_and_kwargs": (ModelOptimizer, {"name": name, **hyperparameters})}


def register() -> None:
    """Makes every name of the registry a value of `TrainingArguments(optim=...)` and `--optim`.

    Learning rate, weight decay and, for Adam's kin, betas and epsilon come from the training
    arguments; `--optim_args gamma=0.9,layers=tensor` adds the rest. A `training_args.bin` saved
    with such a value can be read only after this call. May be called more than once.

    Raises:
        ImportError: if transformers is not there, or is a version whose tables are unknown here.
        ValueError: if Trainer has an optimizer of its own by a name of the registry.
    """
    try:
        from transformers.trainer_optimizer import _OPTIMIZER_HANDLERS
        from transformers.training_args import OptimizerNames
    except ImportError as error:
        raise ImportError(f"cannot register with transformers: {error}. {_NEEDS}") from error
    names = list_optimizers()
    for name in names:
        if name in OptimizerNames._value2member_map_:
            handler = _OPTIMIZER_HANDLERS.get(OptimizerNames(name))
            if getattr(handler, "__module__", None) != __name__:  # it is none of an earlier call
                raise ValueError(
                    f"cannot register {name!r} with transformers, where Trainer has an optimizer "
                    "of that name; give it another in OptimizerInfo"
                )
    for name in names:
        if name not in OptimizerNames._value2member_map_:
            _add_member(OptimizerNames, name)
        _OPTIMIZER_HANDLERS[OptimizerNames(name)] = _handler(name)


def _add_member(names: Any, value: str) -> None:
    """Enum has no public way to add a member; argparse takes its choices from the members."""
    member = str.__new__(names, value)
    member._name_ = value.upper().replace("-", "_")
    member._value_ = value
    names._member_map_[member._name_] = member
    names._member_names_.append(member._name_)
    names._value2member_map_[value] = member


def _handler(name: str) -> Callable[[Any], tuple[Any, dict[str, Any]]]:
    def handler(context: Any) -> tuple[Any, dict[str, Any]]:
        info = get_optimizer_info(name)
        arguments = {"lr": context.args.learning_rate, "weight_decay": context.args.weight_decay}
        takes = inspect.signature(info.arguments_of).parameters
        if "betas" in takes:
            arguments |= {k: v for k, v in context.adam_kwargs.items() if k in takes}
        given = convert_arguments(context.optim_args)
        info.check_names(given)  # `name` would be another optimizer's
        return ModelOptimizer, {"name": name, **arguments, **given}

    return handler


def attach(trainer: Trainer, log_layers: bool = False) -> None:
    """Shows what the optimizer does: learning rates per layer in the logs, and a true model card.

    Every training log, and with it every tracker, gets min, median and max over the layers of S
    (`lipschitz_scale/...`) and of the learning rate (`layer_lr/...`). The card that
    `create_model_card` and `push_to_hub` of transformers' own Trainer write names the optimizer
    that ran, its arguments and its learning rate, where Trainer would print the unused
    `args.optim`. (TRL's and sentence-transformers' Trainers write cards of their own.)

    It warns, once each, of what `hf-adalip doctor` finds too: an optimizer of frozen parameters
    alone, a learning rate or weight decay that is set and not used, a schedule that ends too
    early, and, by the last ten logs, a clipping of gradients that changes and layers that no
    gradient reaches; and, in a resumed training, of options that the checkpoint has replaced.

    Args:
        trainer: before `train()`. Called again with the same one, it changes `log_layers`.
        log_layers: log every layer's values too.

    Raises:
        TypeError: for anything but a Trainer.
        RuntimeError: if DeepSpeed is on and Trainer was given `optimizers=`, which it would drop;
            if an engine's flat tensors do not tell layers apart; or, when training starts, if the
            optimizer has no S.
    """
    from transformers import Trainer, TrainerCallback

    if not isinstance(trainer, Trainer):
        raise TypeError(
            "attach needs a transformers.Trainer, got "
            f"{type(trainer).__module__}.{type(trainer).__qualname__}"
        )
    attached = getattr(trainer, "_hf_adalip", None)
    if attached is not None:
        attached["log_layers"] = log_layers
        return
    if wrong := dropped_optimizer(trainer) or flat_shards(trainer):
        raise WrongOptimizerError(wrong)
    trainer._hf_adalip = attached = {"log_layers": log_layers}
    watch, told = Watch(), set()
    made = [dict(group) for group in trainer.optimizer.param_groups] if trainer.optimizer else None

    def warn_once(findings: list[Finding]) -> None:
        for finding in findings:
            if finding.why not in told and trainer.is_world_process_zero():
                told.add(finding.why)  # the rest has numbers, which change
                warnings.warn(str(finding), stacklevel=2)

    class Check(TrainerCallback):  # type: ignore[misc]
        def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            optimizer = kwargs.get("optimizer")
            found = layerwise(optimizer)
            if found is None:
                name = type(getattr(optimizer, "optimizer", optimizer)).__name__
                raise RuntimeError(
                    f"Trainer trains with {name}, which has no learning rate per layer: {INSTEAD}"
                )
            resumed = state.global_step and not nothing_to_train(found)
            if resumed and not any(
                isinstance(s, dict) and "lipschitz_scale" in s for s in found.state.values()
            ):
                warnings.warn(
                    f"Trainer goes on from step {state.global_step}, but found no S of any layer "
                    "in the checkpoint (another engine's, or save_only_model): S starts at 1",
                    stacklevel=2,
                )
            scheduler = kwargs.get("lr_scheduler")
            warn_once(examine_run(trainer, found, scheduler, state.max_steps))
            if state.global_step and (other := replaced_options(found, made or [found.defaults])):
                warn_once([other])

    log, create_model_card = trainer.log, trainer.create_model_card

    def log_with_rates(logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        found = layerwise(trainer.optimizer)
        if found is not None and "loss" in logs:
            rates = found.layer_learning_rates()
            watch.layers(found, rates)
            if "grad_norm" in logs:
                watch.clip(logs["grad_norm"], trainer.args.max_grad_norm or math.inf)
            warn_once(watch.findings())
            logs.update(summary(rates))
            for name, rate in rates.items() if attached["log_layers"] else ():
                logs[f"lipschitz_scale/{name}"] = rate.scale
                logs[f"layer_lr/{name}"] = rate.lr
        log(logs, *args, **kwargs)

    def card_with_optimizer(*args: Any, **kwargs: Any) -> None:
        with _true_hyperparameters(trainer):
            create_model_card(*args, **kwargs)

    trainer.add_callback(Check())
    trainer.log = log_with_rates
    trainer.create_model_card = card_with_optimizer


@contextmanager
def _true_hyperparameters(trainer: Trainer) -> Iterator[None]:
    """Within it, a model card's hyperparameters are those of the optimizer that ran."""
    from transformers import modelcard

    if not hasattr(modelcard, "extract_hyperparameters_from_trainer"):
        raise ImportError(f"transformers.modelcard has changed. {_NEEDS}")
    extract = modelcard.extract_hyperparameters_from_trainer

    def extract_true(of: Trainer) -> dict[str, Any]:
        found: dict[str, Any] = extract(of)
        optimizer = layerwise(trainer.optimizer)
        if of is trainer and optimizer is not None:
            group = optimizer.param_groups[0]
            found["learning_rate"] = float(group.get("initial_lr", group["lr"]))
            found["optimizer"] = describe_optimizer(optimizer)
        return found

    modelcard.extract_hyperparameters_from_trainer = extract_true
    try:
        yield
    finally:
        modelcard.extract_hyperparameters_from_trainer = extract
