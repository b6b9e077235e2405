"""timm: every name of the registry as an `--opt` of timm's scripts and factory."""

from __future__ import annotations

import inspect
import warnings

from ..registry import LIP_PREFIX, OptimizerInfo, get_optimizer_info, list_optimizers


def register() -> None:
    """Registers the names with timm: `create_optimizer_v2(model, "adamlip")`.

    timm's own conventions hold: where an optimizer has a momentum, timm passes 0.9 unless told
    otherwise (pass momentum=0 for the paper's AdaLip); arguments of `--opt-kwargs` go through.
    timm gives no parameter names, so layers are tensors; for layers="module" pass
    `param_group_fn=lambda model: parameter_groups(model, weight_decay)`, of `hf_adalip.layers`.

    An optimizer without weight decay, which timm always passes, is left out; it warns of those
    that were registered here.

    Raises:
        ImportError: if timm is not there, or is a version without an optimizer registry.
        ValueError: if timm has an optimizer of its own by a name of the registry.
    """
    try:
        from timm.optim import OptimInfo
        from timm.optim._optim_factory import default_registry
    except ImportError as error:
        raise ImportError(
            f"cannot register with timm: {error}. pip install 'hf-adalip[timm]' has one that works"
        ) from error
    known = set(default_registry.list_optimizers())
    new = []
    for name in list_optimizers():
        made = default_registry.get_optimizer_info(name).opt_class if name in known else None
        if made is None:
            new.append(name)
        elif getattr(made, "__func__", None) is not OptimizerInfo.create:  # none of ours
            raise ValueError(
                f"cannot register {name!r} with timm, which has an optimizer of that name; "
                "give it another in OptimizerInfo"
            )
    for name in new:
        info = get_optimizer_info(name)
        takes = inspect.signature(info.arguments_of).parameters
        if "weight_decay" not in takes:
            if not name.startswith(LIP_PREFIX):
                cls = info.arguments_of.__name__
                warnings.warn(
                    f"{name} is not registered with timm, which always passes weight_decay: "
                    f"{cls} takes none",
                    stacklevel=2,
                )
            continue
        default_registry.register(
            OptimInfo(
                name=name,
                opt_class=info.create,
                description=info.description,
                has_eps="eps" in takes,
                has_momentum="momentum" in takes,
                has_betas="betas" in takes,
            )
        )
