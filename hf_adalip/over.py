"""`Lipschitz` and `Secant` for programs that call an optimizer's class with the parameters."""

from __future__ import annotations

from typing import Any, Literal

from torch import Tensor, nn
from torch.optim.optimizer import ParamsT

from .optim import Lipschitz, Secant
from .optim.groups import Layers
from .optim.secant import Law
from .registry import get_wrapper_info


class LipschitzOver(Lipschitz):
    """`Lipschitz`, given parameters and the name of its base optimizer.

        LipschitzOver(model.parameters(), base="nadam", lr=1e-3, gamma=0.9)

    is `Lipschitz(torch.optim.NAdam(model.parameters(), lr=1e-3), gamma=0.9)`. It is for programs
    that are given a class by its import path, `hf_adalip.LipschitzOver`.

    Args:
        params: tensors, pairs of a name and a tensor, or groups of one of the two.
        base: the name of an optimizer of torch or timm, as after `lip-` in `create_optimizer`, or
            the path of a class ("package.module.Class").
        lr: α; None for the base's default.
        weight_decay: the base's λ; None for its default (0.01 for AdamW).
        gamma: γ, as in `Lipschitz`.
        c: as in `Lipschitz`.
        layers: as in `Lipschitz`.
        signal: as in `Lipschitz`.
        previous: as in `Lipschitz`.
        scale_bounds: as in `Lipschitz`.
        nonfinite: as in `Lipschitz`.
        fused: as in `Lipschitz`, and passed to the base if it has that.
        **base_arguments: the base's, such as `betas` or `momentum`.

    Raises:
        ValueError: for an unknown base, and for a value that `Lipschitz` or the base refuses.
        TypeError: for an argument that neither of the two takes.

    Examples:
        >>> layer = nn.Linear(4, 2)
        >>> optimizer = LipschitzOver(layer.named_parameters(), "sgd", lr=0.1, momentum=0.9)
        >>> type(optimizer.optimizer).__name__, optimizer.param_groups[0]["momentum"]
        ('SGD', 0.9)
    """

    def __init__(
        self,
        params: ParamsT,
        base: str = "adamw",
        lr: float | Tensor | None = None,
        weight_decay: float | None = None,
        gamma: float = 0.8,
        c: float | Literal["theoretical"] = 1e-8,
        layers: Layers = "tensor",
        *,
        signal: Literal["gradient", "update"] = "gradient",
        previous: Literal["applied", "proposed"] | None = None,
        scale_bounds: tuple[float, float] | None = (0.1, 10.0),
        nonfinite: Literal["skip", "raise", "propagate"] = "skip",
        fused: bool | None = None,
        **base_arguments: Any,
    ) -> None:
        own: dict[str, Any] = {
            "gamma": gamma,
            "c": c,
            "layers": layers,
            "signal": signal,
            "previous": previous,
            "scale_bounds": scale_bounds,
            "nonfinite": nonfinite,
            "fused": fused,
        }
        of_base = _without_none(lr=lr, weight_decay=weight_decay) | base_arguments
        info = get_wrapper_info(Lipschitz, base)
        optimizer, own = info.create_base(params, of_base | own)
        super().__init__(optimizer, **own)


class SecantOver(Secant):
    """`Secant`, given parameters and the name of its base optimizer. Experimental.

        SecantOver(model.parameters(), base="adamw", weight_decay=0.1, model=model)

    is `Secant(torch.optim.AdamW(model.parameters(), lr=1.0, weight_decay=0.1), model=model)`. It is
    for programs that are given a class by its import path, `hf_adalip.SecantOver`, and step with a
    closure, as Lightning does.

    Args:
        params: tensors, pairs of a name and a tensor, or groups of one of the two.
        base: the name of an optimizer of torch or timm, as after `secant-` in `create_optimizer`,
            or the path of a class ("package.module.Class").
        lr: what a schedule multiplies; None for 1.
        weight_decay: the base's λ; None for its default (0.01 for AdamW).
        every: as in `Secant`.
        model: as in `Secant`.
        law: as in `Secant`.
        **base_arguments: the base's, such as `betas` or `momentum`.

    Raises:
        ValueError: for an unknown base, and for a value that `Secant` or the base refuses.
        TypeError: for an argument that neither of the two takes.

    Examples:
        >>> optimizer = SecantOver(nn.Linear(4, 2).parameters(), "adamw", betas=(0.9, 0.95))
        >>> type(optimizer.optimizer).__name__, optimizer.param_groups[0]["betas"]
        ('AdamW', (0.9, 0.95))
    """

    def __init__(
        self,
        params: ParamsT,
        base: str = "adamw",
        lr: float | Tensor | None = None,
        weight_decay: float | None = None,
        every: int = 20,
        *,
        model: nn.Module | None = None,
        law: Law | None = None,
        **base_arguments: Any,
    ) -> None:
        own: dict[str, Any] = {"every": every, "model": model, "law": law}
        of_base = _without_none(lr=lr, weight_decay=weight_decay) | base_arguments
        optimizer, own = get_wrapper_info(Secant, base).create_base(params, of_base | own)
        super().__init__(optimizer, **own)


def _without_none(**arguments: Any) -> dict[str, Any]:
    return {name: value for name, value in arguments.items() if value is not None}
