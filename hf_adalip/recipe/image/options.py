"""The options of the recipes: names, values, and what is checked before a run starts."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import nn
from torch.optim import Optimizer
from torch.optim.optimizer import ParamsT

from ...errors import UsageError
from ...integrations.arguments import convert_arguments
from ...registry import get_optimizer_info
from ..options import (
    AT_LEAST,
    HIGHEST,
    RecipeParser,
    check_bounds,
    check_optimizer,
    check_run_options,
    in_optim_args,
    parse_optim_args,
)
from .augment import Augmentation

try:
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers
except ImportError as error:
    raise ImportError(
        "hf_adalip.recipe.image.options needs accelerate: pip install 'hf-adalip[recipes]'"
    ) from error

SCHEDULERS = (
    "constant",
    "constant_with_warmup",
    "linear",
    "cosine",
    "cosine_with_restarts",
    "polynomial",
    "inverse_sqrt",
)
"""Of transformers' names, those that need no further arguments."""

PAPERS = {"layers": "tensor", "scale_bounds": "none"}
"""Of an optimizer with S, unless the recipe or the user says otherwise."""


def option(default: Any, help: str, type: Callable[[str], Any] = str) -> Any:
    """A field of a dataclass that is an option of the command line."""
    return field(default=default, metadata={"help": help, "type": type})


@dataclass
class TrainingArguments:
    """The options of a recipe; the names are those of the transformers and accelerate examples."""

    dataset_name: str = option("digits", "Hub id, folder, or digits (of scikit-learn, no download)")
    image_column_name: str | None = option(None, "default: the only column of images")
    label_column_name: str | None = option(None, "default: the only column of class labels")
    image_size: int | None = option(
        None, "crop images to squares and resize them to it; default: they have one size", int
    )
    max_train_samples: int | None = option(None, "train on so many images only", int)
    max_eval_samples: int | None = option(None, "evaluate on so many images only", int)
    per_device_train_batch_size: int = option(128, "images a process takes at a time", int)
    per_device_eval_batch_size: int = option(500, "the same in evaluation", int)
    optim: str = option(
        "adamlip",
        "adalip, rmslip, adamlip, adalipu, rmslipu, adamlipu or lionlip; lip-NAME, secant-NAME or "
        "NAME for an optimizer NAME of torch.optim (sgd, rmsprop, adam, ...); or another that is "
        "registered",
    )
    optim_args: str = option("", "further arguments of the optimizer: key=value,key=value")
    layers: str | None = option(
        None, "tensor or module: which parameters share a learning rate, for an S"
    )
    scale_bounds: str | None = option(None, "LOW:HIGH to keep S between, or none")
    learning_rate: float | None = option(None, "", float)  # the help is the recipe's
    weight_decay: float = option(0.0, "decoupled where the optimizer's is", float)
    max_grad_norm: float | None = option(
        None,
        "clip the norm of all gradients to it, before S sees them; default: no clipping",
        float,
    )
    num_train_epochs: int = option(15, "times to go through the training set", int)
    max_train_steps: int | None = option(None, "optimizer steps; overrides the epochs", int)
    gradient_accumulation_steps: int = option(1, "batches to an optimizer step", int)
    lr_scheduler_type: str = option("constant", ", ".join(SCHEDULERS))
    num_warmup_steps: int = option(0, "optimizer steps of warm-up, for a schedule with one", int)
    seed: int = option(0, "of the initial weights and the order of the images", int)
    output_dir: str | None = option(
        None, "default: a fresh folder, outputs/RECIPE-OPTIM-DATE-TIME; for latest the newest one"
    )
    overwrite_output_dir: bool = option(False, "replace the results that are there", bool)
    checkpointing_steps: str | None = option(
        None, "N to save step_N every N optimizer steps, or epoch to save epoch_N after each"
    )
    resume_from_checkpoint: str | None = option(
        None,
        "folder of a checkpoint, or latest for the last whole one in the output_dir "
        "(from the beginning if there is none yet)",
    )
    record: str | None = option(
        None,
        "norms: how large each layer's weights, gradient and update are at up to 60 steps, in "
        "records.json",
    )
    with_tracking: bool = option(False, "log to trackers", bool)
    report_to: str | None = option(
        None, "tensorboard (default), trackio, wandb, ...; several with commas, or all"
    )
    push_to_hub: bool = option(False, "publish the finished run, with HF_TOKEN's token", bool)
    hub_model_id: str | None = option(None, "USER/NAME, for --push_to_hub")
    hub_private_repo: bool = option(False, "for those with access only, for --push_to_hub", bool)
    mixed_precision: str | None = option(None, "no, fp16 or bf16; default: accelerate's setting")
    cpu: bool = option(False, "stay on the CPU", bool)

    def check(self) -> None:
        """What a subclass has to say about options of its own; raises UsageError."""


@dataclass(frozen=True)
class Recipe:
    """What is trained, and how.

    Args:
        name: of the recipe, in outputs and trackers.
        description: the text of --help.
        build_model: from (channels, height, width) of the images and the number of classes.
        defaults: of the fields of its arguments that differ from theirs. Without "layers" and
            "scale_bounds" an optimizer with S has the paper's, `PAPERS`.
        optimizer_defaults: arguments of an optimizer, "lr" included, by the class that is, or
            that S is on top of: those of `torch.optim.Adam` are for adam, adamlip and adamlipu.
        augment: what is done to a batch of training images on the device; None for nothing.
        libraries: what else the results need the version of.
        arguments: `TrainingArguments`, or a subclass with options of the recipe's own.
        configure: from (the recipe, its arguments, the number of classes) the recipe with the
            fields that depend on them; None where none does. ValueError becomes a UsageError.
        parameter_groups: from (model, arguments of the optimizer) what the optimizer gets; None
            for the model itself, which gives names, and the weight-decay split.
        average: from a model on its device a moving average of it, such as timm's ModelEmaV3:
            `update(model, step)` after every step, and in `module` the model that is evaluated
            and whose weights are the result. None for none.
    """

    name: str
    description: str
    build_model: Callable[[tuple[int, int, int], int], nn.Module]
    defaults: Mapping[str, Any] = field(default_factory=dict)
    optimizer_defaults: Mapping[type[Optimizer], Mapping[str, Any]] = field(default_factory=dict)
    augment: Augmentation | None = None
    libraries: Sequence[str] = ()
    arguments: type[TrainingArguments] = TrainingArguments
    configure: Callable[[Recipe, Any, int], Recipe] | None = None
    parameter_groups: Callable[[nn.Module, Mapping[str, Any]], ParamsT] | None = None
    average: Callable[[nn.Module], Any] | None = None


_AT_LEAST = AT_LEAST | {
    "image_size": 1,
    "num_train_epochs": 1,
    "max_train_steps": 1,
    "num_warmup_steps": 0,
}

OWN_OPTION = {"lr": "learning_rate"} | {
    name: name for name in ("weight_decay", "layers", "scale_bounds")
}
"""Arguments of optimizers that have an option of their own."""


def parse(recipe: Recipe, argv: Sequence[str]) -> TrainingArguments:
    """The arguments of a command line, over those of its --config file, over the recipe's.

    Raises:
        UsageError: for an unknown option or a bad value. Optimizer and folders are not looked at.
    """
    parser = make_parser(recipe)
    given = vars(parser.parse_args(parser.expand(argv)))
    del given["config"]
    args = recipe.arguments(**given)
    _check_values(args)
    args.check()
    return args


def make_parser(recipe: Recipe) -> RecipeParser:
    """A parser of the recipe's options, with its defaults.

    Not transformers' HfArgumentParser, which the recipes of images do without.
    """
    parser = RecipeParser(
        description=recipe.description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for entry in dataclasses.fields(recipe.arguments):
        text, kind = entry.metadata["help"], entry.metadata["type"]
        default = recipe.defaults.get(entry.name, entry.default)
        if entry.name == "learning_rate":
            rates = recipe.optimizer_defaults.items()
            known = ", ".join(f"{a['lr']:g} on top of {c.__name__}" for c, a in rates if "lr" in a)
            text = f"α; default: {known}, else the optimizer's own"
        elif entry.name in PAPERS:  # None says that nobody asked for it
            default, text = None, f"{text} (default: {default or PAPERS[entry.name]})"
        elif kind is not bool and default not in (None, ""):
            text += f" (default: {default})"
        how = {"action": argparse.BooleanOptionalAction} if kind is bool else {"type": kind}
        parser.add_argument(f"--{entry.name}", default=default, help=text, **how)
    return parser


def _check_values(args: TrainingArguments) -> None:
    check_bounds(args, _AT_LEAST, positive=("learning_rate", "max_grad_norm"))
    choices = {
        "mixed_precision": (None, "no", "fp16", "bf16"),
        "layers": (None, "tensor", "module"),
        "lr_scheduler_type": SCHEDULERS,
        "record": (None, "norms"),
    }
    for name, allowed in choices.items():
        if (value := getattr(args, name)) not in allowed:
            words = ", ".join(word for word in allowed if word)
            raise UsageError(f"--{name} must be one of {words}, got {value!r}")
    if args.lr_scheduler_type == "constant" and args.num_warmup_steps:
        raise UsageError("--num_warmup_steps needs an --lr_scheduler_type with a warm-up")
    every = args.checkpointing_steps
    if every not in (None, "epoch") and not (every.isdecimal() and 0 < int(every[:11]) <= HIGHEST):
        raise UsageError(f"--checkpointing_steps must be a number of steps or epoch, got {every!r}")
    if args.record and args.resume_from_checkpoint:
        raise UsageError("--record and --resume_from_checkpoint exclude each other")
    if args.report_to is not None and not args.with_tracking:
        raise UsageError("--report_to needs --with_tracking")
    check_run_options(args, args.hub_private_repo)


def trackers(args: TrainingArguments) -> list[str]:
    """The names of the trackers to log to.

    Raises:
        UsageError: for an unknown name, or one that is not installed.
    """
    if not args.with_tracking:
        return []
    names = [name.strip() for name in (args.report_to or "tensorboard").split(",")]
    available = [str(name) for name in get_available_trackers()]
    if names == ["all"]:
        return available
    for name in names:
        if name not in LOGGER_TYPE_TO_CLASS:
            known = ", ".join(sorted(LOGGER_TYPE_TO_CLASS))
            raise UsageError(f"--report_to: unknown tracker {name!r}; there are {known}")
        if name not in available:
            raise UsageError(f"--report_to: {name} is not installed; pip install {name}")
    return names


def optimizer_arguments(args: TrainingArguments, recipe: Recipe) -> dict[str, Any]:
    """What `create_optimizer` is to be called with, besides model and name; all of it is checked.

    Raises:
        UsageError: for an unknown optimizer, or an argument that it does not take.
    """
    try:
        info = get_optimizer_info(args.optim)
        given = parse_optim_args(args.optim_args, OWN_OPTION)
        info.check_names(given)
        arguments = {**recipe.optimizer_defaults.get(info.base or info.optimizer_class, {})}
        arguments |= {**given, "weight_decay": args.weight_decay}
        if args.learning_rate is not None:
            arguments["lr"] = args.learning_rate
        own = {"layers": args.layers, "scale_bounds": args.scale_bounds}
        if info.takes_layers:
            usual = {name: recipe.defaults.get(name, value) for name, value in PAPERS.items()}
            bounds = usual["scale_bounds"] if args.scale_bounds is None else args.scale_bounds
            arguments |= {"layers": args.layers or usual["layers"]}
            arguments |= convert_arguments({"scale_bounds": bounds})
        elif unused := [f"--{key}" for key, value in own.items() if value is not None]:
            raise UsageError(
                f"{' and '.join(unused)} cannot be used: "
                f"{args.optim} has no learning rate per layer"
            )
    except (ValueError, TypeError) as error:
        raise UsageError(f"{error}") from error
    written = in_optim_args(given)
    if args.scale_bounds is not None:
        written["scale_bounds"] = f"--scale_bounds {args.scale_bounds}"
    check_optimizer(args.optim, arguments, written)
    return arguments


def scheduler_factory() -> Any:
    """transformers' get_scheduler."""
    try:
        from transformers import get_scheduler
    except ImportError as error:
        raise UsageError(
            "--lr_scheduler_type other than constant needs transformers: "
            "pip install 'hf-adalip[trainer]'"
        ) from error
    return get_scheduler
