"""timm: every name of the registry as an `--opt` of timm's scripts and factory."""

from __future__ import annotations

import inspect

from ..registry import get_optimizer_info, list_optimizers


def register() -> None:
    """Registers the names with timm: `create_optimizer_v2(model, "adamlip")`.

    timm's own conventions hold: where an optimizer has a momentum, timm passes 0.9 unless told
    otherwise (pass momentum=0 for the paper's AdaLip); arguments of `--opt-kwargs` go through.
    timm gives no parameter names, so layers are tensors; for layers="module" pass
    `param_group_fn=lambda model: parameter_groups(model, weight_decay)`, of `hf_adalip.layers`.

    Raises:
        ImportError: if timm is not there, or is a version without an optimizer registry.
    """
    try:
        from timm.optim import OptimInfo
        from timm.optim._optim_factory import default_registry
    except ImportError as error:
        raise ImportError(
            f"cannot register with timm: {error}. pip install 'hf-adalip[timm]' has one that works"
        ) from error
    known = set(default_registry.list_optimizers())
    for name in list_optimizers():
        info = get_optimizer_info(name)
        takes = inspect.signature(info.arguments_of).parameters
        if name in known or "weight_decay" not in takes:  # which timm always passes
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
