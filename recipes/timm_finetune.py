# /// script
# requires-python = ">=3.10"
# dependencies = ["hf-adalip[recipes,timm,trainer]"]
#
# [tool.uv.sources]
# hf-adalip = { path = ".." }
# ///
"""Fine-tunes an image model of timm, or trains one from scratch, on a dataset of labelled images.

    accelerate launch recipes/timm_finetune.py --model resnet18 --dataset_name uoft-cs/cifar10
    python recipes/timm_finetune.py --optim adamw          # the optimizer to compare with
    python recipes/timm_finetune.py --head_only            # trains the classifier alone
    python recipes/timm_finetune.py --model vit_tiny_patch16_224 --dataset_name /path/to/images \\
        --image_size 224 --layer_decay 0.7 --mixup 0.2 --model_ema_decay 0.999
    python recipes/timm_finetune.py --no-pretrained --dataset_name uoft-cs/cifar100 \\
        --label_column_name fine_label --output_dir a
    python recipes/timm_finetune.py --checkpoint a         # goes on from what that has trained

Layers are modules and S stays between 0.1 and 10. The model normalises images itself, by the mean
and deviation that timm has for it. The weights in the output folder have timm's names; they are
the moving average's if there is one.
"""

import difflib
import json
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hf_adalip.errors import UsageError
from hf_adalip.recipe.image.options import option
from hf_adalip.recipe.image.training import Recipe, TrainingArguments, main, output_dir
from hf_adalip.recipe.options import check_bounds

try:
    import timm
    from timm.data import Mixup
    from timm.data.mixup import mixup_target
    from timm.models import load_model_config_from_hf, load_state_dict
    from timm.models._hub import save_config_for_hf
    from timm.optim import param_groups_layer_decay
    from timm.utils import ModelEmaV3
except ImportError as error:
    raise ImportError("this recipe needs timm: pip install 'hf-adalip[recipes,timm]'") from error


@dataclass
class Arguments(TrainingArguments):
    """The options of all recipes, and timm's."""

    model: str = option("resnet18", "a name of timm.list_models(), or hf-hub:USER/NAME")
    pretrained: bool = option(True, "start from timm's weights, if there is no --checkpoint", bool)
    checkpoint: str | None = option(
        None, "start from a safetensors or torch file of timm's, or a folder with one of ours"
    )
    head_only: bool = option(False, "train the classifier alone", bool)
    layer_decay: float | None = option(
        None, "α = learning_rate x this, once for every layer between it and the classifier", float
    )
    drop: float | None = option(None, "dropout rate, in front of the classifier", float)
    drop_path: float | None = option(None, "stochastic depth rate, of models that have it", float)
    mixup: float | None = option(None, "mix pairs of images: alpha of the beta distribution", float)
    cutmix: float | None = option(None, "the same for pasting; with both, one or the other", float)
    smoothing: float = option(0.0, "label smoothing, in training", float)
    model_ema_decay: float | None = option(
        None, "evaluate and keep a moving average of the weights, with this decay", float
    )
    model_ema_warmup: bool = option(False, "let that decay rise from 0", bool)

    def check(self) -> None:
        for name in ("layer_decay", "drop", "drop_path", "model_ema_decay"):
            value = getattr(self, name)
            if value is not None and not 0 < value < 1:
                raise UsageError(f"--{name} must be a number between 0 and 1, got {value}")
        check_bounds(self, {}, positive=("mixup", "cutmix"))
        if not 0 <= self.smoothing < 1:
            raise UsageError(f"--smoothing must be from 0 to below 1, got {self.smoothing}")
        if self.layer_decay is not None and self.head_only:
            raise UsageError("--layer_decay has nothing to act on with --head_only")
        if self.model_ema_warmup and self.model_ema_decay is None:
            raise UsageError("--model_ema_warmup needs --model_ema_decay")


def configure(recipe: Recipe, args: Arguments, num_classes: int) -> Recipe:
    """The recipe that these arguments stand for."""
    if args.checkpoint is not None and args.overwrite_output_dir:
        folder = output_dir(args, recipe).resolve()
        if Path(args.checkpoint).resolve().is_relative_to(folder):
            raise UsageError(
                f"--checkpoint {args.checkpoint} is in the --output_dir that "
                "--overwrite_output_dir empties; choose another --output_dir"
            )
    decay, warmup = args.model_ema_decay, args.model_ema_warmup
    return replace(
        recipe,
        build_model=partial(build_model, args),
        parameter_groups=partial(layer_decayed, args.layer_decay) if args.layer_decay else None,
        augment=augmentation(args, num_classes),
        average=partial(ModelEmaV3, decay=decay, use_warmup=warmup) if decay else None,
    )


def build_model(args: Arguments, image_shape: tuple[int, int, int], num_classes: int) -> nn.Module:
    channels, height, width = image_shape
    config = pretrained_config(args.model)
    options = {"num_classes": num_classes, "in_chans": channels}
    options |= {"drop_rate": args.drop, "drop_path_rate": args.drop_path}  # None: the model's own
    if config.get("fixed_input_size"):
        options["img_size"] = (height, width)
    heads = names(config["classifier"])
    state = None if args.checkpoint is None else read_weights(Path(args.checkpoint))
    if state is not None:
        classes = max(len(state.get(f"{head}.weight", ())) for head in heads)
        # what timm compares with to see whether the classifier has to be a new one
        overlay = {"state_dict": state, "source": None, "num_classes": classes}
        options["pretrained_cfg_overlay"] = overlay
    start = "" if state is not None or not args.pretrained else " from timm's weights"
    try:
        model: nn.Module = timm.create_model(
            args.model, pretrained=args.pretrained or state is not None, **options
        )
        model.eval()(torch.zeros(1, *image_shape))
    except (RuntimeError, ValueError, TypeError, AssertionError, OSError) as error:
        advice = "; give --checkpoint, or --no-pretrained to start from scratch" if start else ""
        reason = " ".join(str(error).split())
        if state is not None:
            check_fits(state, heads, image_shape, options, args, reason)
        raise ValueError(
            f"--model: cannot make {args.model} for images of {height}x{width} pixels{start}: "
            f"{reason}{advice}"
        ) from error
    if state is not None:
        del model.pretrained_cfg["state_dict"]
        check_keys(set(state), set(model.state_dict()), heads, args)
    if args.head_only:
        model.requires_grad_(False)
        for head in names(model.get_classifier()):
            head.requires_grad_(True)
    model = normalising(model, channels)
    model.config = hub_config(model, image_shape)
    return model


def pretrained_config(model: str) -> Mapping[str, Any]:
    """What timm knows of a model's weights before it is made."""
    place, _, name = model.partition(":")
    if name and place != "hf-hub":
        raise ValueError(f"--model: {model} is no name of timm's and not hf-hub:USER/NAME")
    try:
        if name:
            return load_model_config_from_hf(name)[0]
        found = timm.get_pretrained_cfg(model)
    except (RuntimeError, OSError) as error:
        raise ValueError(f"--model {model}: {' '.join(str(error).split())}") from error
    if found is None:
        near = difflib.get_close_matches(model, timm.list_models(), n=3)
        raise ValueError(f"--model: timm has no {model}; near are {', '.join(near) or 'none'}")
    return found.to_dict()


def names(found: Any) -> tuple[Any, ...]:
    """timm has one of a thing, several of it, or none."""
    return found if isinstance(found, tuple) else () if found is None else (found,)


def read_weights(path: Path) -> dict[str, Tensor]:
    path = path / "model.safetensors" if path.is_dir() else path
    try:
        return load_state_dict(str(path), weights_only=True)
    except FileNotFoundError as error:
        raise ValueError(f"--checkpoint: there is no file {path}") from error
    except Exception as error:  # of a pickle, anything
        reason = error.strerror if isinstance(error, OSError) else None
        raise ValueError(
            f"--checkpoint: cannot read {path}: "
            f"{reason or 'it is no whole safetensors or torch file of tensors alone'}"
        ) from error


def check_fits(
    state: Mapping[str, Tensor],
    heads: tuple[str, ...],
    image_shape: tuple[int, int, int],
    options: Mapping[str, Any],
    args: Arguments,
    reason: str,
) -> None:
    """Raises ValueError if it is because of its weights that a model cannot be made."""
    plain = {name: value for name, value in options.items() if name != "pretrained_cfg_overlay"}
    try:
        model = timm.create_model(args.model, **plain)
        model.eval()(torch.zeros(1, *image_shape))
    except (RuntimeError, ValueError, TypeError, AssertionError):
        return
    check_keys(set(state), set(model.state_dict()), heads, args)
    raise ValueError(f"--checkpoint {args.checkpoint} does not fit {args.model}: {reason}")


def check_keys(have: set[str], want: set[str], heads: tuple[str, ...], args: Arguments) -> None:
    """With another classifier, timm loads what fits and is silent about the rest."""
    own = tuple(f"{head}." for head in heads)
    lacking, unknown = (
        sorted(key for key in keys if not key.startswith(own))
        for keys in (want - have, have - want)
    )
    lacking = [key for key in lacking if not key.endswith(".num_batches_tracked")]
    if lacking or unknown:
        what = f"lacks {lacking[0]}" if lacking else f"also has {unknown[0]}"
        raise ValueError(
            f"--checkpoint {args.checkpoint} is of another model than {args.model}: it {what} "
            f"({len(lacking)} tensors are missing, {len(unknown)} have no place)"
        )


def normalising(model: nn.Module, channels: int) -> nn.Module:
    """The model, taking images in [0, 1]; its state_dict stays timm's."""
    for name in ("mean", "std"):
        values = torch.tensor(model.pretrained_cfg[name])
        if len(values) != channels:
            values = values.mean().expand(channels)
        model.register_buffer(f"image_{name}", values[:, None, None].clone(), persistent=False)
    model.register_forward_pre_hook(lambda m, images: (images[0] - m.image_mean) / m.image_std)
    return model


def hub_config(model: nn.Module, image_shape: tuple[int, int, int]) -> dict[str, Any]:
    """The config.json with which `timm.create_model("hf-hub:USER/NAME")` makes the model again."""
    images = {"input_size": image_shape, "test_input_size": None, "crop_pct": 1.0}
    images |= {name: getattr(model, f"image_{name}").flatten().tolist() for name in ("mean", "std")}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "config.json")
        save_config_for_hf(model, str(path), {"pretrained_cfg": images})
        found: dict[str, Any] = json.loads(path.read_text())
    return found


def layer_decayed(
    decay: float, model: nn.Module, arguments: Mapping[str, Any]
) -> list[dict[str, Any]]:
    """timm's groups, with α for lr_scale, which only timm's schedulers know, and with names."""
    if "lr" not in arguments:
        raise ValueError("--layer_decay needs a --learning_rate")
    name_of = {param: name for name, param in model.named_parameters()}
    groups = param_groups_layer_decay(
        model,
        weight_decay=arguments["weight_decay"],
        no_weight_decay_list=getattr(model, "no_weight_decay", set)(),
        layer_decay=decay,
    )
    return [
        {
            "params": [(name_of[param], param) for param in group["params"]],
            "lr": arguments["lr"] * group["lr_scale"],
            "weight_decay": group["weight_decay"],
        }
        for group in groups
    ]


@dataclass(frozen=True)
class Mix:
    """timm's mixup and cutmix, and label smoothing.

    timm draws from numpy, whose state is in every checkpoint, and not from the numbers given.
    """

    mixup: float
    cutmix: float
    smoothing: float
    num_classes: int
    draws = 0

    def __call__(self, images: Tensor, labels: Tensor, draws: Tensor) -> tuple[Tensor, Tensor]:
        pairs = len(labels) // 2 * 2 if self.mixup or self.cutmix else 0
        # of an odd number of images, timm takes none: the last one stays as it is
        plain = mixup_target(labels[pairs:], self.num_classes, smoothing=self.smoothing)
        if not pairs:
            return images, plain
        mix = Mixup(
            self.mixup,
            self.cutmix,
            label_smoothing=self.smoothing,
            num_classes=self.num_classes,
        )
        mixed, targets = mix(images[:pairs], labels[:pairs])
        return torch.cat([mixed, images[pairs:]]), torch.cat([targets, plain])


def augmentation(args: Arguments, num_classes: int) -> Mix | None:
    if not (args.mixup or args.cutmix or args.smoothing):
        return None
    return Mix(args.mixup or 0.0, args.cutmix or 0.0, args.smoothing, num_classes)


RECIPE = Recipe(
    name="timm_finetune",
    description=__doc__,
    build_model=build_model,
    libraries=("timm",),
    arguments=Arguments,
    configure=configure,
    defaults={
        "dataset_name": "uoft-cs/cifar10",
        "layers": "module",
        "scale_bounds": "0.1:10",
        "per_device_train_batch_size": 64,
        "num_train_epochs": 3,
        "lr_scheduler_type": "cosine",
    },
    optimizer_defaults={
        torch.optim.SGD: {"lr": 0.01},
        torch.optim.RMSprop: {"lr": 1e-4},
        torch.optim.Adam: {"lr": 1e-4},
        torch.optim.AdamW: {"lr": 1e-4},
    },
)

if __name__ == "__main__":
    sys.exit(main(RECIPE))
