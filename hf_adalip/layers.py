"""Parameter groups of a model: names for its layers, and the weight-decay split."""

from __future__ import annotations

from fnmatch import fnmatchcase
from typing import Any

from torch import nn

from .optim.shards import whole_shape


def parameter_groups(model: nn.Module, weight_decay: float = 0.0) -> list[dict[str, Any]]:
    """The trainable parameters of a model, named, split by whether weight decay is for them.

    Biases, norms and everything else of at most one dimension are not decayed, nor is what the
    model lists, by name or wildcard, in `no_weight_decay()` (timm's convention).

    Args:
        model: its frozen parameters are left out.
        weight_decay: λ of the decayed group. With 0 there is one group.

    Returns:
        groups for any torch optimizer, with (name, parameter) pairs as "params".

    Raises:
        ValueError: if no parameter is trainable.
    """
    named = [(name, param) for name, param in model.named_parameters() if param.requires_grad]
    if not named:
        raise ValueError(f"model {type(model).__name__} has no parameter with requires_grad=True")
    if not weight_decay:
        return [{"params": named, "weight_decay": 0.0}]
    spared = set(getattr(model, "no_weight_decay", set)())
    groups: dict[bool, list[tuple[str, nn.Parameter]]] = {True: [], False: []}
    for name, param in named:
        decays = len(whole_shape(param)) > 1 and not name.endswith(".bias")
        decays = decays and not any(fnmatchcase(name, pattern) for pattern in spared)
        groups[decays].append((name, param))
    return [
        {"params": members, "weight_decay": weight_decay if decays else 0.0}
        for decays, members in groups.items()
        if members
    ]
