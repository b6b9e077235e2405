"""transformers.Trainer: any engine, `--optim` in unmodified scripts, logs and model cards."""

from __future__ import annotations

import inspect
import math
import warnings
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn
from torch.optim import Optimizer
from torch.optim.optimizer import ParamsT

from ..diagnose.checks import (
    INSTEAD,
    WITHOUT_LR,
    Finding,
    Watch,
    WrongOptimizerError,
    diverged,
    dropped_optimizer,
    examine,
    examine_run,
    examine_secant,
    flat_shards,
    nothing_to_train,
    replaced_options,
)
from ..monitor import (
    RATES,
    RECORDS,
    LayerRateHistory,
    layerwise,
    save_probes,
    secant,
    secant_summary,
    summary,
)
from ..optim import Secant
from ..plots import figure_of
from ..registry import (
    PEERS,
    create_optimizer,
    describe_optimizer,
    get_optimizer_info,
    initial_lr,
    list_optimizers,
)
from .arguments import convert_arguments
from .secant import measure_training_steps, refuse_trainer

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from transformers import Trainer, TrainingArguments

_NEEDS = (
    "hf_adalip knows transformers 5.2 to 5.24 here; install one of these (pip install "
    "'hf-adalip[trainer]'), or pass `optimizers=(optimizer, None)` to Trainer"
)


class ModelOptimizer:
    """What Trainer takes for an optimizer factory: it is given the model, so names are known.

    Trainers of other packages take it for the class of an optimizer where they make parameter
    groups themselves, as Unsloth does for the learning rate of embeddings: `ModelOptimizer(groups,
    name="adamlip", lr=1e-3)` is the optimizer.
    """

    def __new__(cls, groups: ParamsT | None = None, **arguments: Any) -> Any:
        """The factory or, of parameters, the optimizer."""
        return super().__new__(cls) if groups is None else create_optimizer(groups, **arguments)

    def __call__(
        self,
        model: nn.Module,
        args: TrainingArguments | None = None,
        *,
        name: str,
        optimizer_dict: Sequence[Mapping[str, Any]] | None = None,
        **arguments: Any,
    ) -> Optimizer:
        """The optimizer of a name.

        Args:
            model: what is trained.
            args: those of the Trainer, which Axolotl passes; not used.
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
        info = get_optimizer_info(name)
        if info.takes_layers:
            arguments.setdefault("layers", "module")
        if info.optimizer_class is Secant:
            arguments.setdefault("model", model)
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
            to be here, but for a `secant-` name, which finds its own; call `attach` then.

    Raises:
        ValueError, TypeError: for an unknown name, a bad value or an argument that the optimizer
            does not take, now rather than when training starts.
    """
    finds_its_own = get_optimizer_info(name).optimizer_class is Secant
    if hyperparameters.get("lr") is None and not finds_its_own:
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

    A Trainer with a `secant-` name has to be given to `attach`, which is done already for scripts
    run by `python -m hf_adalip.run`.

    Raises:
        ImportError: if transformers is not there, or is a version whose tables are unknown here.
        ValueError: if Trainer has an optimizer of its own by a name of the registry.
    """
    try:
        from transformers.trainer_optimizer import _OPTIMIZER_HANDLERS
        from transformers.training_args import OptimizerNames
    except ImportError as error:
        raise ImportError(f"cannot register with transformers: {error}. {_NEEDS}") from error
    names = [*list_optimizers(), *PEERS]
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


def attach(  # noqa: C901 - with the callback inside of it
    trainer: Trainer, log_layers: bool = False, plot: bool = False
) -> None:
    """Shows what the optimizer does: learning rates per layer in the logs, and a true model card.

    Every training log, and with it every tracker, gets min, median and max over the layers of S
    (`lipschitz_scale/...`) and of the learning rate (`layer_lr/...`). The card that
    `create_model_card` and `push_to_hub` of transformers' own Trainer write names the optimizer
    that ran, its arguments and its learning rate, where Trainer would print the unused
    `args.optim`. (TRL's and sentence-transformers' Trainers write cards of their own.)

    It warns, once each, of what `hf-adalip doctor` finds too: an optimizer of frozen parameters
    alone, a learning rate or weight decay that is set and not used, a schedule that ends too
    early, a clipping of gradients that changes (every step is looked at, and the logs have
    `clipped_steps`), by the last ten logs layers that no gradient reaches, and at the end a loss
    that is not finite or no better than guessing; and, in a resumed training, of options that the
    checkpoint has replaced.

    With `Secant` (`--optim secant-adamw`, `trainer_kwargs("secant-adamw")` or
    `optimizers=(Secant(...), None)`) it is what lets it measure: now and then Trainer's
    `training_step` is called once more for the same batch, at the parameters before the last step.
    All that is in it is the same in both calls; it must not count its calls or draw data itself.
    The logs have `secant/rate` and the last `secant/r` then. Of the warnings it gives that of
    weight decay, of a schedule that ends too early and of the end; and that of running statistics
    in a model that it was not made with.

    Args:
        trainer: before `train()`. Called again with the same one, it changes the two options.
        log_layers: log every layer's values too.
        plot: at the end of the training, write S and A of every layer over the steps to
            `layer_learning_rates.png` (and `.json`) in the output_dir; with `Secant`, the rate
            and r of all measurements to `secant.png` (and `.json`). Needs matplotlib.

    Raises:
        TypeError: for anything but a Trainer.
        ImportError: for `plot` without matplotlib.
        RuntimeError: if DeepSpeed is on and Trainer was given `optimizers=`, which it would drop;
            if an engine's flat tensors do not tell layers apart; or, when training starts, if the
            optimizer has no S and is no `Secant`, or is a `Secant` under DeepSpeed or with fp16.
    """
    from transformers import Trainer, TrainerCallback

    if not isinstance(trainer, Trainer):
        raise TypeError(
            "attach needs a transformers.Trainer, got "
            f"{type(trainer).__module__}.{type(trainer).__qualname__}"
        )
    if plot:
        figure_of(1.0, 1.0, "")  # says now if it cannot be drawn
    if (before := getattr(trainer, "_hf_adalip", None)) is not None:
        before |= {"log_layers": log_layers, "plot": plot}
        return
    if wrong := dropped_optimizer(trainer) or flat_shards(trainer):
        raise WrongOptimizerError(wrong)
    attached = trainer._hf_adalip = {
        "log_layers": log_layers,
        "plot": plot,
        "required": True,  # an optimizer with an S
        "logged": Watch(),
    }
    rates_of = LayerRateHistory()
    watch, told = Watch(), set()
    made = [dict(group) for group in trainer.optimizer.param_groups] if trainer.optimizer else None

    def warn_once(findings: list[Finding]) -> None:
        for finding in findings:
            if finding.why not in told and trainer.is_world_process_zero():
                told.add(finding.why)  # the rest has numbers, which change
                warnings.warn(str(finding), stacklevel=2)

    class Check(TrainerCallback):  # type: ignore[misc]
        def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            nonlocal watch, rates_of
            watch, rates_of = Watch(), LayerRateHistory()  # of this training alone
            attached["logged"] = Watch()
            optimizer = kwargs.get("optimizer")
            found = layerwise(optimizer)
            if found is None and (finding := secant(optimizer)) is not None:
                refuse_trainer(trainer, finding)
                scheduler = kwargs.get("lr_scheduler")
                warn_once(examine_secant(trainer, finding, scheduler, state.max_steps))
                return
            if found is None and not attached["required"]:
                return
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
            watch_clipping()
            for group in found.param_groups:  # which reduce_lr_on_plateau does not note
                group.setdefault("initial_lr", float(group["lr"]))
            scheduler = kwargs.get("lr_scheduler")
            warn_once(examine_run(trainer, found, scheduler, state.max_steps))
            if state.global_step and (other := replaced_options(found, made or [found.defaults])):
                warn_once([other])

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if not attached["plot"] or not state.is_world_process_zero:
                return
            step, found = state.global_step, layerwise(kwargs.get("optimizer"))
            if found and (step == 1 or step % math.ceil(state.max_steps / RECORDS) == 0):
                rates_of.record(step, found.layer_learning_rates())

        def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if attached["plot"] and rates_of.steps:
                folder = Path(args.output_dir)
                folder.mkdir(parents=True, exist_ok=True)
                rates_of.save(folder / f"{RATES}.json")
                name = type(layerwise(kwargs.get("optimizer"))).__name__
                rates_of.plot(folder / f"{RATES}.png", f"{name}, {state.global_step} steps")
            finding = secant(kwargs.get("optimizer"))
            if attached["plot"] and finding is not None and state.is_world_process_zero:
                folder = Path(args.output_dir)
                folder.mkdir(parents=True, exist_ok=True)
                title = f"Secant({type(finding.optimizer).__name__}), {state.global_step} steps"
                save_probes(finding, folder, title)
            warn_once(watch.findings())
            whole_epochs = state.epoch is not None and state.epoch >= 1 and state.global_step >= 50
            chance = chance_loss(trainer)
            share = args.gradient_accumulation_steps  # each loss is divided by it
            first, last = share * watch.losses.first, share * watch.losses.last
            if watch.losses.count and (whole_epochs or not math.isfinite(last)):
                ended = diverged(last, "training loss at the end", chance, first)
                if ended and finding is not None:
                    ended = replace(ended, change=WITHOUT_LR)
                warn_once([ended] if ended else [])

    def watch_clipping() -> None:
        clip = trainer.accelerator.clip_grad_norm_
        if getattr(clip, "watched", False):
            return

        def watched(parameters: Any, max_norm: Any, *args: Any, **kwargs: Any) -> Any:
            norm = clip(parameters, max_norm, *args, **kwargs)
            if norm is not None and max_norm != math.inf:  # DeepSpeed has none; a norm to log only
                whole = norm.full_tensor() if hasattr(norm, "full_tensor") else norm
                watch.clip(whole, max_norm)
            return norm

        watched.watched = True  # type: ignore[attr-defined]
        trainer.accelerator.clip_grad_norm_ = watched

    measure_training_steps(trainer)
    log, create_model_card = trainer.log, trainer.create_model_card
    training_step = trainer.training_step

    def step_with_loss(*args: Any, **kwargs: Any) -> Any:
        loss = training_step(*args, **kwargs)
        watch.losses.add(loss)
        return loss

    def log_with_rates(logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        found = layerwise(trainer.optimizer)
        if found is not None and "loss" in logs:
            rates = found.layer_learning_rates()
            watch.layers(found, rates)
            if "grad_norm" in logs and not watch.clipping.steps:  # an engine's own clip
                attached["logged"].clip(logs["grad_norm"], trainer.args.max_grad_norm or math.inf)
            warn_once([*watch.findings(), *attached["logged"].findings()])
            logs.update(summary(rates))
            if watch.clipping.clipped:
                logs["clipped_steps"] = float(watch.clipping.clipped)
            for name, rate in rates.items() if attached["log_layers"] else ():
                logs[f"lipschitz_scale/{name}"] = rate.scale
                logs[f"layer_lr/{name}"] = rate.lr
        if "loss" in logs:
            logs.update(secant_summary(trainer.optimizer))
        log(logs, *args, **kwargs)

    def card_with_optimizer(*args: Any, **kwargs: Any) -> None:
        with _true_hyperparameters(trainer):
            create_model_card(*args, **kwargs)

    trainer.add_callback(Check())
    trainer.log = log_with_rates
    trainer.training_step = step_with_loss
    trainer.create_model_card = card_with_optimizer


def attachable(trainer: Trainer) -> bool:
    """Whether a Trainer will train with an optimizer that has an S, and has not been attached."""
    return getattr(trainer, "_hf_adalip", None) is None and not examine(trainer)


def attach_if_ours(trainer: Trainer) -> None:
    """Calls `attach` for a Trainer that will train with one of our optimizers."""
    if attachable(trainer):
        attach(trainer)
        trainer._hf_adalip["required"] = False  # its create_optimizer may make another


def chance_loss(trainer: Trainer) -> float | None:
    """The cross-entropy of guessing, of a model that is known to be trained with it."""
    from transformers import Trainer

    own = type(trainer).compute_loss is not Trainer.compute_loss
    model = trainer.accelerator.unwrap_model(trainer.model)
    config, kind = getattr(model, "config", None), type(model).__name__
    if own or trainer.compute_loss_func is not None or config is None:
        return None
    choices = None
    if kind.endswith(("ForSequenceClassification", "ForImageClassification")):
        if getattr(config, "problem_type", None) in (None, "single_label_classification"):
            choices = config.num_labels
    elif kind.endswith(("ForCausalLM", "LMHeadModel")):
        choices = config.vocab_size
    return math.log(choices) if choices and choices > 1 else None


@contextmanager
def _true_hyperparameters(trainer: Trainer) -> Iterator[None]:
    """Within it, a model card's hyperparameters are those of the optimizer that ran."""
    from transformers import modelcard

    if not hasattr(modelcard, "extract_hyperparameters_from_trainer"):
        raise ImportError(f"transformers.modelcard has changed. {_NEEDS}")
    extract = modelcard.extract_hyperparameters_from_trainer

    def extract_true(of: Trainer) -> dict[str, Any]:
        found: dict[str, Any] = extract(of)
        finding = secant(trainer.optimizer)
        optimizer = layerwise(trainer.optimizer) or finding
        if of is trainer and optimizer is not None:
            group = optimizer.param_groups[0]
            found["learning_rate"] = float(initial_lr(group))
            if finding is not None:
                found["learning_rate"] = f"{finding.rate:.3g} at the end, found by Secant"
            found["optimizer"] = describe_optimizer(optimizer)
        return found

    modelcard.extract_hyperparameters_from_trainer = extract_true
    try:
        yield
    finally:
        modelcard.extract_hyperparameters_from_trainer = extract
