"""The six optimizers: a signature, a rule and a signal each.

What all of them take by keyword (`scale_bounds`, `nonfinite`, `decoupled_weight_decay`, `history`,
`sketch_size`, `foreach`, `fused`, `maximize`, `capturable`, `differentiable`, and `previous` for
the -U forms) is documented in `LipOptimizer`.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT
from typing_extensions import TypedDict, Unpack

from .groups import Layers
from .optimizer import LipOptimizer
from .rules import SGD, Adam, RMSprop, Rule
from .signals import Gradients, Signal, Updates


class Options(TypedDict, total=False):
    """What all six take by keyword; see LipOptimizer."""

    scale_bounds: tuple[float, float] | None
    nonfinite: Literal["skip", "raise", "propagate"]
    decoupled_weight_decay: bool
    history: str | torch.dtype
    sketch_size: int
    foreach: bool | None
    fused: bool | None
    maximize: bool
    capturable: bool
    differentiable: bool
    previous: Literal["applied", "proposed"]  # the -U forms only


C = float | Literal["theoretical"]


class AdaLip(LipOptimizer):
    """AdaLip: SGD with a Lipschitz-adaptive learning rate per layer (Algorithm 2).

        S_t = γ·S_{t-1} + (1-γ)·‖g_{t-1}‖/(‖g_t - g_{t-1}‖ + c),   p -= α_t·S_t·g_t

    Args:
        params: parameters, named parameters, or groups of either.
        lr: α_t, the learning rate before S; a float or a one-element tensor.
        momentum: torch.optim.SGD's (a buffer, no dampening); S scales the step taken.
        weight_decay: λ, decoupled unless `decoupled_weight_decay=False`.
        nesterov: Nesterov momentum; needs a momentum.
        gamma: γ, coefficient of the moving average, in (0, 1).
        c: positive constant in the denominator, or "theoretical" (Eq. A.3).
        layers: "tensor", "module" (needs named parameters), or a function from a name to a key.
        **options: scale_bounds=(0.1, 10.0), nonfinite="skip", decoupled_weight_decay=True,
            history="exact", sketch_size=4096, foreach, fused, maximize, capturable and
            differentiable: see help(hf_adalip.optim.LipOptimizer).

    State: `momentum_buffer` (with momentum) and `prev_grad`, of the parameter's shape and dtype.

    Raises:
        ValueError: for a bad value, naming the argument and the value.
    """

    rule: Rule = SGD()
    signal: Signal = Gradients()

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        momentum: float = 0.0,
        weight_decay: float = 0.0,
        nesterov: bool = False,
        gamma: float = 0.8,
        c: C = 1e-8,
        layers: Layers = "tensor",
        **options: Unpack[Options],
    ) -> None:
        own: dict[str, Any] = {
            "lr": lr,
            "momentum": momentum,
            "weight_decay": weight_decay,
            "nesterov": nesterov,
        }
        super().__init__(params, own, gamma=gamma, c=c, layers=layers, **options)


class RMSLip(LipOptimizer):
    """RMSLip: RMSProp with a Lipschitz-adaptive learning rate per layer (Algorithm 3).

        v_t = α·v_{t-1} + (1-α)·g_t²,   p -= lr·S_t·g_t/(√v_t + ε);   S_t as in AdaLip

    Args:
        params: parameters, named parameters, or groups of either.
        lr: α_t, the learning rate before S; a float or a one-element tensor.
        alpha: smoothing constant of v (the paper's β_2; its experiments ran at 0.999).
        eps: ε; with `eps_in_sqrt=True`, √(v_t + ε) instead of √v_t + ε.
        weight_decay: λ, decoupled unless `decoupled_weight_decay=False`.
        gamma: γ, coefficient of the moving average, in (0, 1).
        c: positive constant in the denominator, or "theoretical" (Eq. A.3).
        layers: "tensor", "module" (needs named parameters), or a function from a name to a key.
        eps_in_sqrt: True to add ε under the root; False (default) after it.
        **options: scale_bounds=(0.1, 10.0), nonfinite="skip", decoupled_weight_decay=True,
            history="exact", sketch_size=4096, foreach, fused, maximize, capturable and
            differentiable: see help(hf_adalip.optim.LipOptimizer).

    State: `square_avg` and `prev_grad`, of the parameter's shape and dtype.

    Raises:
        ValueError: for a bad value, naming the argument and the value.
    """

    rule: Rule = RMSprop()
    signal: Signal = Gradients()

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-2,
        alpha: float = 0.99,
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        gamma: float = 0.8,
        c: C = 1e-8,
        layers: Layers = "tensor",
        *,
        eps_in_sqrt: bool = False,
        **options: Unpack[Options],
    ) -> None:
        own: dict[str, Any] = {"lr": lr, "alpha": alpha, "eps": eps, "weight_decay": weight_decay}
        own |= {"eps_in_sqrt": eps_in_sqrt}
        super().__init__(params, own, gamma=gamma, c=c, layers=layers, **options)


class AdamLip(LipOptimizer):
    """AdamLip: Adam with a Lipschitz-adaptive learning rate per layer (Algorithm 4).

        p -= α_t·S_t·m̂_t/(√v̂_t + ε);   S_t as in AdaLip, from the gradients

    Args:
        params: parameters, named parameters, or groups of either.
        lr: α_t, the learning rate before S; a float or a one-element tensor.
        betas: β_1, β_2 of the running averages of the gradient and its square.
        eps: ε; with `eps_in_sqrt=True`, √(v̂_t + ε) instead of √v̂_t + ε.
        weight_decay: λ, decoupled unless `decoupled_weight_decay=False`.
        gamma: γ, coefficient of the moving average, in (0, 1).
        c: positive constant in the denominator, or "theoretical" (Eq. A.3).
        layers: "tensor", "module" (needs named parameters), or a function from a name to a key.
        eps_in_sqrt: True to add ε under the root; False (default) after it.
        **options: scale_bounds=(0.1, 10.0), nonfinite="skip", decoupled_weight_decay=True,
            history="exact", sketch_size=4096, foreach, fused, maximize, capturable and
            differentiable: see help(hf_adalip.optim.LipOptimizer).

    State: `exp_avg`, `exp_avg_sq` and `prev_grad`, of the parameter's shape and dtype.

    Raises:
        ValueError: for a bad value, naming the argument and the value.
    """

    rule: Rule = Adam()
    signal: Signal = Gradients()

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        gamma: float = 0.8,
        c: C = 1e-8,
        layers: Layers = "tensor",
        *,
        eps_in_sqrt: bool = False,
        **options: Unpack[Options],
    ) -> None:
        own: dict[str, Any] = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        own |= {"eps_in_sqrt": eps_in_sqrt}
        super().__init__(params, own, gamma=gamma, c=c, layers=layers, **options)


class AdaLipU(AdaLip):
    """AdaLip-U: AdaLip with S estimated from the updates (Algorithm 5, Appendix C).

        û_t = -α_t·g_t,   S_t = γ·S_{t-1} + (1-γ)·‖u_{t-1}‖/(‖û_t - u_{t-1}‖ + c),   u_t = S_t·û_t

    Arguments and errors are AdaLip's, and by keyword

        previous: u_{t-1} as "applied" (S included; Algorithm 5; the default), or as "proposed"
            (Eqs. C4-C5), which has no singularity at S = 1 under constant gradients.

    Decoupled weight decay is no part of u.

    State: one tensor of the parameter's shape and dtype: `momentum_buffer`, from which u_{t-1}
    is computed again, or `prev_update` without momentum; both with Nesterov momentum.
    """

    signal = Updates()


class RMSLipU(RMSLip):
    """RMSLip-U: RMSLip with S estimated from the updates (Appendix C).

    Arguments and errors are RMSLip's, and `previous` as in AdaLipU.

    State: `square_avg` and `prev_update`, of the parameter's shape and dtype.
    """

    signal = Updates()


class AdamLipU(AdamLip):
    """AdamLip-U: AdamLip with S estimated from the updates (Appendix C).

    Arguments and errors are AdamLip's, and `previous` as in AdaLipU.

    State: `exp_avg` and `exp_avg_sq`, as Adam's: u_{t-1} is computed again from them. β_1 and lr
    may follow a schedule; if β_2 or eps changes, u_{t-1} is computed with the new value.
    """

    signal = Updates()
