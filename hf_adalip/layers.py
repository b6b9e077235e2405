"""Parameter groups of a model: names for its layers, and the weight-decay split."""

from __future__ import annotations

from fnmatch import fnmatchcase
from typing import Any

from torch import nn
from torch.nn.parallel import DistributedDataParallel

from .optim.names import plain_names
from .optim.sharding import whole_shape


def parameter_groups(
    model: nn.Module, weight_decay: float = 0.0, split: bool = True
) -> list[dict[str, Any]]:
    """The trainable parameters of a model, named, split by whether weight decay is for them.

    Biases, norms and everything else of at most one dimension are not decayed, nor is what the
    model lists, by name or wildcard, in `no_weight_decay()` (timm's convention).

    Args:
        model: its frozen parameters are left out.
        weight_decay: λ of what is decayed. With 0 there is one group.
        split: False for one group that says which parameters are spared in "no_weight_decay".
            Our six optimizers read it. It keeps weight and bias of a layer together, which
            DeepSpeed's ZeRO steps group by group.

    Returns:
        groups for any torch optimizer, with (name, parameter) pairs as "params".

    Raises:
        ValueError: if no parameter is trainable.

    Examples:
        >>> groups = parameter_groups(nn.Linear(4, 2), weight_decay=0.1)
        >>> [([name for name, _ in g["params"]], g["weight_decay"]) for g in groups]
        [(['weight'], 0.1), (['bias'], 0.0)]
    """
    named = [(name, param) for name, param in model.named_parameters() if param.requires_grad]
    if not named:
        raise ValueError(f"model {type(model).__name__} has no parameter with requires_grad=True")
    if not weight_decay:
        return [{"params": named, "weight_decay": 0.0}]
    listed = model.module if isinstance(model, DistributedDataParallel) else model
    patterns = set(getattr(listed, "no_weight_decay", set)())
    plain = plain_names([name for name, _ in named])  # as the model itself has them
    spared = {
        name
        for (name, param), own in zip(named, plain, strict=True)
        if len(whole_shape(param)) <= 1
        or name.endswith(".bias")
        or any(fnmatchcase(own, pattern) for pattern in patterns)
    }
    if not split:
        return [{"params": named, "weight_decay": weight_decay, "no_weight_decay": sorted(spared)}]
    groups = [
        {"params": [x for x in named if x[0] not in spared], "weight_decay": weight_decay},
        {"params": [x for x in named if x[0] in spared], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]
