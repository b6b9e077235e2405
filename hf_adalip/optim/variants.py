"""The paper's six optimizers and LionLip: a signature, a rule and a signal each.

Each constructor hands its arguments to `LipOptimizer`, which documents in full what they share.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from .groups import Layers
from .history import DEFAULT_SKETCH_SIZE
from .optimizer import LipOptimizer
from .rules import SGD, Adam, Lion, RMSprop, Rule
from .signals import Gradients, Signal, Updates


class AdaLip(LipOptimizer):
    """AdaLip: SGD with a Lipschitz-adaptive learning rate per layer (Algorithm 2).

        S_t = γ·S_{t-1} + (1-γ)·‖g_{t-1}‖/(‖g_t - g_{t-1}‖ + c)
        p_t = p_{t-1} - α_t·S_t·g_t

    for each layer, with S_0 = 1 (Eqs. 6-9). The layer's first step is taken with α_t alone.

    Args:
        params: parameters, named parameters, or groups of either.
        lr: α_t, the learning rate before S, >= 0; a float or a one-element tensor.
        momentum: μ, torch.optim.SGD's, without dampening, in [0, 1); 0 for none.
        weight_decay: λ >= 0, decoupled unless `decoupled_weight_decay=False`.
        nesterov: Nesterov momentum; needs a momentum.
        gamma: γ, coefficient of the moving average, in (0, 1).
        c: positive constant in the denominator, or "theoretical" (Eq. A.3).
        layers: what shares one S: "tensor", "module" (needs named parameters), or a function from
            a parameter's name to its layer's name.
        scale_bounds: (low, high) that S is kept in, 0 < low <= high; None for the paper's unbounded
            S.
        nonfinite: what a layer does whose gradient is not finite: "skip" the step, "raise" before
            anything has changed, or "propagate".
        decoupled_weight_decay: True for AdamW's form, p -= α_t·λ·p; False adds λp to g_t.
        history: how g_{t-1} is kept: "exact", a floating-point dtype, or "sketch".
        sketch_size: how many numbers a sketch has; a power of two, at least 32.
        stochastic_rounding: round bfloat16 parameters up or down at random, right on average, so
            that small steps are not lost.
        foreach: use the multi-tensor form; None chooses.
        fused: use the compiled form; None chooses.
        maximize: ascend instead of descend.
        capturable: safe to capture in a CUDA graph.
        differentiable: autograd runs through the step.

    State:
        momentum_buffer: with momentum; the parameter's shape and dtype.
        prev_grad: g_{t-1}, the parameter's shape and dtype (see `history`).
        step: t, a number.
        lipschitz_scale, prev_norm, layer_lr, nonfinite_steps: of its layer, S_t, ‖g_t‖, A_t and the
            count of non-finite gradients; numbers.
        lipschitz_c: with c="theoretical", c_t of its layer; a number.

    Raises:
        ValueError: for a bad value, naming the argument and the value.

    Reference:
        Ioannou, Tagaris, Stafylopatis: AdaLip: An Adaptive Learning Rate Method per Layer for
        Stochastic Optimization. Neural Processing Letters, 2023. doi:10.1007/s11063-022-11140-w

    Examples:
        >>> model = torch.nn.Linear(2, 1, bias=False)
        >>> _ = torch.nn.init.ones_(model.weight)
        >>> optimizer = AdaLip(model.named_parameters(), lr=0.05)
        >>> for x in ([1.0, 2.0], [2.0, 1.0]):
        ...     loss = model(torch.tensor(x)).square().sum()
        ...     loss.backward()
        ...     optimizer.step()
        ...     optimizer.zero_grad()
        >>> round(optimizer.layer_learning_rates()["weight"].scale, 3)
        0.956
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
        c: float | Literal["theoretical"] = 1e-8,
        layers: Layers = "tensor",
        *,
        scale_bounds: tuple[float, float] | None = (0.1, 10.0),
        nonfinite: Literal["skip", "raise", "propagate"] = "skip",
        decoupled_weight_decay: bool = True,
        history: str | torch.dtype = "exact",
        sketch_size: int = DEFAULT_SKETCH_SIZE,
        stochastic_rounding: bool = False,
        foreach: bool | None = None,
        fused: bool | None = None,
        maximize: bool = False,
        capturable: bool = False,
        differentiable: bool = False,
    ) -> None:
        LipOptimizer.__init__(self, locals())


class RMSLip(LipOptimizer):
    """RMSLip: RMSProp with a Lipschitz-adaptive learning rate per layer (Algorithm 3).

        v_t = β·v_{t-1} + (1-β)·g_t²
        S_t = γ·S_{t-1} + (1-γ)·‖g_{t-1}‖/(‖g_t - g_{t-1}‖ + c)
        p_t = p_{t-1} - α_t·S_t·g_t/(√v_t + ε)

    for each layer, with S_0 = 1 (Eqs. 6-9). The layer's first step is taken with α_t alone.

    Args:
        params: parameters, named parameters, or groups of either.
        lr: α_t, the learning rate before S, >= 0; a float or a one-element tensor.
        alpha: β, smoothing constant of v, in [0, 1) (the paper's β_2; its experiments ran at
            0.999).
        eps: ε >= 0; with `eps_in_sqrt=True`, √(v_t + ε) instead of √v_t + ε.
        weight_decay: λ >= 0, decoupled unless `decoupled_weight_decay=False`.
        gamma: γ, coefficient of the moving average, in (0, 1).
        c: positive constant in the denominator, or "theoretical" (Eq. A.3).
        layers: what shares one S: "tensor", "module" (needs named parameters), or a function from
            a parameter's name to its layer's name.
        eps_in_sqrt: True to add ε under the root; False to add it after.
        scale_bounds: (low, high) that S is kept in, 0 < low <= high; None for the paper's unbounded
            S.
        nonfinite: what a layer does whose gradient is not finite: "skip" the step, "raise" before
            anything has changed, or "propagate".
        decoupled_weight_decay: True for AdamW's form, p -= α_t·λ·p; False adds λp to g_t.
        history: how g_{t-1} is kept: "exact", a floating-point dtype, or "sketch".
        sketch_size: how many numbers a sketch has; a power of two, at least 32.
        stochastic_rounding: round bfloat16 parameters up or down at random, right on average, so
            that small steps are not lost.
        foreach: use the multi-tensor form; None chooses.
        fused: use the compiled form; None chooses.
        maximize: ascend instead of descend.
        capturable: safe to capture in a CUDA graph.
        differentiable: autograd runs through the step.

    State:
        square_avg: v_t, the parameter's shape and dtype.
        prev_grad: g_{t-1}, the parameter's shape and dtype (see `history`).
        step: t, a number.
        lipschitz_scale, prev_norm, layer_lr, nonfinite_steps: of its layer, S_t, ‖g_t‖, A_t and the
            count of non-finite gradients; numbers.
        lipschitz_c: with c="theoretical", c_t of its layer; a number.

    Raises:
        ValueError: for a bad value, naming the argument and the value.

    Reference:
        Ioannou, Tagaris, Stafylopatis: AdaLip: An Adaptive Learning Rate Method per Layer for
        Stochastic Optimization. Neural Processing Letters, 2023. doi:10.1007/s11063-022-11140-w

    Examples:
        >>> model = torch.nn.Linear(2, 1, bias=False)
        >>> _ = torch.nn.init.ones_(model.weight)
        >>> optimizer = RMSLip(model.named_parameters(), lr=0.05)
        >>> for x in ([1.0, 2.0], [2.0, 1.0]):
        ...     loss = model(torch.tensor(x)).square().sum()
        ...     loss.backward()
        ...     optimizer.step()
        ...     optimizer.zero_grad()
        >>> round(optimizer.layer_learning_rates()["weight"].scale, 3)
        0.938
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
        c: float | Literal["theoretical"] = 1e-8,
        layers: Layers = "tensor",
        *,
        eps_in_sqrt: bool = False,
        scale_bounds: tuple[float, float] | None = (0.1, 10.0),
        nonfinite: Literal["skip", "raise", "propagate"] = "skip",
        decoupled_weight_decay: bool = True,
        history: str | torch.dtype = "exact",
        sketch_size: int = DEFAULT_SKETCH_SIZE,
        stochastic_rounding: bool = False,
        foreach: bool | None = None,
        fused: bool | None = None,
        maximize: bool = False,
        capturable: bool = False,
        differentiable: bool = False,
    ) -> None:
        LipOptimizer.__init__(self, locals())


class AdamLip(LipOptimizer):
    """AdamLip: Adam with a Lipschitz-adaptive learning rate per layer (Algorithm 4).

        m_t = β_1·m_{t-1} + (1-β_1)·g_t,   m̂_t = m_t/(1-β_1^t)
        v_t = β_2·v_{t-1} + (1-β_2)·g_t²,  v̂_t = v_t/(1-β_2^t)
        S_t = γ·S_{t-1} + (1-γ)·‖g_{t-1}‖/(‖g_t - g_{t-1}‖ + c)
        p_t = p_{t-1} - α_t·S_t·m̂_t/(√v̂_t + ε)

    for each layer, with S_0 = 1 (Eqs. 6-9). The layer's first step is taken with α_t alone.

    Args:
        params: parameters, named parameters, or groups of either.
        lr: α_t, the learning rate before S, >= 0; a float or a one-element tensor.
        betas: β_1, β_2 of the running averages of the gradient and of its square, in [0, 1).
        eps: ε >= 0; with `eps_in_sqrt=True`, √(v̂_t + ε) instead of √v̂_t + ε.
        weight_decay: λ >= 0, decoupled unless `decoupled_weight_decay=False`.
        gamma: γ, coefficient of the moving average, in (0, 1).
        c: positive constant in the denominator, or "theoretical" (Eq. A.3).
        layers: what shares one S: "tensor", "module" (needs named parameters), or a function from
            a parameter's name to its layer's name.
        eps_in_sqrt: True to add ε under the root; False to add it after.
        scale_bounds: (low, high) that S is kept in, 0 < low <= high; None for the paper's unbounded
            S.
        nonfinite: what a layer does whose gradient is not finite: "skip" the step, "raise" before
            anything has changed, or "propagate".
        decoupled_weight_decay: True for AdamW's form, p -= α_t·λ·p; False adds λp to g_t.
        history: how g_{t-1} is kept: "exact", a floating-point dtype, or "sketch".
        sketch_size: how many numbers a sketch has; a power of two, at least 32.
        stochastic_rounding: round bfloat16 parameters up or down at random, right on average, so
            that small steps are not lost.
        foreach: use the multi-tensor form; None chooses.
        fused: use the compiled form; None chooses.
        maximize: ascend instead of descend.
        capturable: safe to capture in a CUDA graph.
        differentiable: autograd runs through the step.

    State:
        exp_avg: m_t, the parameter's shape and dtype.
        exp_avg_sq: v_t, the parameter's shape and dtype.
        prev_grad: g_{t-1}, the parameter's shape and dtype (see `history`).
        step: t, a number.
        lipschitz_scale, prev_norm, layer_lr, nonfinite_steps: of its layer, S_t, ‖g_t‖, A_t and the
            count of non-finite gradients; numbers.
        lipschitz_c: with c="theoretical", c_t of its layer; a number.

    Raises:
        ValueError: for a bad value, naming the argument and the value.

    Reference:
        Ioannou, Tagaris, Stafylopatis: AdaLip: An Adaptive Learning Rate Method per Layer for
        Stochastic Optimization. Neural Processing Letters, 2023. doi:10.1007/s11063-022-11140-w

    Examples:
        >>> model = torch.nn.Linear(2, 1, bias=False)
        >>> _ = torch.nn.init.ones_(model.weight)
        >>> optimizer = AdamLip(model.named_parameters(), lr=0.05)
        >>> for x in ([1.0, 2.0], [2.0, 1.0]):
        ...     loss = model(torch.tensor(x)).square().sum()
        ...     loss.backward()
        ...     optimizer.step()
        ...     optimizer.zero_grad()
        >>> round(optimizer.layer_learning_rates()["weight"].scale, 3)
        0.963
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
        c: float | Literal["theoretical"] = 1e-8,
        layers: Layers = "tensor",
        *,
        eps_in_sqrt: bool = False,
        scale_bounds: tuple[float, float] | None = (0.1, 10.0),
        nonfinite: Literal["skip", "raise", "propagate"] = "skip",
        decoupled_weight_decay: bool = True,
        history: str | torch.dtype = "exact",
        sketch_size: int = DEFAULT_SKETCH_SIZE,
        stochastic_rounding: bool = False,
        foreach: bool | None = None,
        fused: bool | None = None,
        maximize: bool = False,
        capturable: bool = False,
        differentiable: bool = False,
    ) -> None:
        LipOptimizer.__init__(self, locals())


class AdaLipU(AdaLip):
    """AdaLip-U: AdaLip with S estimated from the updates (Algorithm 5).

        û_t = -α_t·g_t
        S_t = γ·S_{t-1} + (1-γ)·‖u_{t-1}‖/(‖û_t - u_{t-1}‖ + c)
        u_t = S_t·û_t,   p_t = p_{t-1} + u_t

    for each layer, with S_0 = 1. The layer's first step is taken with α_t alone. Decoupled weight
    decay is no part of u.

    Args:
        params: parameters, named parameters, or groups of either.
        lr: α_t, the learning rate before S, >= 0; a float or a one-element tensor.
        momentum: μ, torch.optim.SGD's, without dampening, in [0, 1); 0 for none.
        weight_decay: λ >= 0, decoupled unless `decoupled_weight_decay=False`.
        nesterov: Nesterov momentum; needs a momentum.
        gamma: γ, coefficient of the moving average, in (0, 1).
        c: positive constant in the denominator, or "theoretical" (Eq. A.3).
        layers: what shares one S: "tensor", "module" (needs named parameters), or a function from
            a parameter's name to its layer's name.
        scale_bounds: (low, high) that S is kept in, 0 < low <= high; None for the paper's unbounded
            S.
        nonfinite: what a layer does whose gradient is not finite: "skip" the step, "raise" before
            anything has changed, or "propagate".
        decoupled_weight_decay: True for AdamW's form, p -= α_t·λ·p; False adds λp to g_t.
        history: how u_{t-1} is kept: "exact", a floating-point dtype, or "sketch".
            Only "exact" with a momentum that is not Nesterov's, where u_{t-1} is not kept.
        sketch_size: how many numbers a sketch has; a power of two, at least 32.
        stochastic_rounding: round bfloat16 parameters up or down at random, right on average, so
            that small steps are not lost.
        foreach: use the multi-tensor form; None chooses.
        fused: use the compiled form; None chooses.
        maximize: ascend instead of descend.
        capturable: safe to capture in a CUDA graph.
        differentiable: autograd runs through the step.
        previous: u_{t-1} as "applied", S included, or as "proposed", û_{t-1} (Eqs. C4-C5), which
            has no singularity at S = 1 under constant gradients.

    State:
        momentum_buffer: with momentum; the parameter's shape and dtype. Unless it is Nesterov's,
            u_{t-1} is computed again from it.
        prev_update: u_{t-1}, without momentum or with Nesterov's; the parameter's shape and dtype
            (see `history`).
        step: t, a number.
        prev_lr: the factor of u_{t-1}, where it is computed again; a number.
        lipschitz_scale, prev_norm, layer_lr, nonfinite_steps: of its layer, S_t, ‖u_t‖, A_t and the
            count of non-finite gradients; numbers.
        lipschitz_c: with c="theoretical", c_t of its layer; a number.

    Raises:
        ValueError: for a bad value, naming the argument and the value.

    Reference:
        Ioannou, Tagaris, Stafylopatis: AdaLip: An Adaptive Learning Rate Method per Layer for
        Stochastic Optimization. Neural Processing Letters, 2023. doi:10.1007/s11063-022-11140-w

    Examples:
        >>> model = torch.nn.Linear(2, 1, bias=False)
        >>> _ = torch.nn.init.ones_(model.weight)
        >>> optimizer = AdaLipU(model.named_parameters(), lr=0.05)
        >>> for x in ([1.0, 2.0], [2.0, 1.0]):
        ...     loss = model(torch.tensor(x)).square().sum()
        ...     loss.backward()
        ...     optimizer.step()
        ...     optimizer.zero_grad()
        >>> round(optimizer.layer_learning_rates()["weight"].scale, 3)
        0.956
    """

    signal = Updates()

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        momentum: float = 0.0,
        weight_decay: float = 0.0,
        nesterov: bool = False,
        gamma: float = 0.8,
        c: float | Literal["theoretical"] = 1e-8,
        layers: Layers = "tensor",
        *,
        scale_bounds: tuple[float, float] | None = (0.1, 10.0),
        nonfinite: Literal["skip", "raise", "propagate"] = "skip",
        decoupled_weight_decay: bool = True,
        history: str | torch.dtype = "exact",
        sketch_size: int = DEFAULT_SKETCH_SIZE,
        stochastic_rounding: bool = False,
        foreach: bool | None = None,
        fused: bool | None = None,
        maximize: bool = False,
        capturable: bool = False,
        differentiable: bool = False,
        previous: Literal["applied", "proposed"] = "applied",
    ) -> None:
        LipOptimizer.__init__(self, locals())


class RMSLipU(RMSLip):
    """RMSLip-U: RMSLip with S estimated from the updates (Appendix C).

        v_t = β·v_{t-1} + (1-β)·g_t²,   û_t = -α_t·g_t/(√v_t + ε)
        S_t = γ·S_{t-1} + (1-γ)·‖u_{t-1}‖/(‖û_t - u_{t-1}‖ + c)
        u_t = S_t·û_t,   p_t = p_{t-1} + u_t

    for each layer, with S_0 = 1. The layer's first step is taken with α_t alone. Decoupled weight
    decay is no part of u.

    Args:
        params: parameters, named parameters, or groups of either.
        lr: α_t, the learning rate before S, >= 0; a float or a one-element tensor.
        alpha: β, smoothing constant of v, in [0, 1) (the paper's β_2; its experiments ran at
            0.999).
        eps: ε >= 0; with `eps_in_sqrt=True`, √(v_t + ε) instead of √v_t + ε.
        weight_decay: λ >= 0, decoupled unless `decoupled_weight_decay=False`.
        gamma: γ, coefficient of the moving average, in (0, 1).
        c: positive constant in the denominator, or "theoretical" (Eq. A.3).
        layers: what shares one S: "tensor", "module" (needs named parameters), or a function from
            a parameter's name to its layer's name.
        eps_in_sqrt: True to add ε under the root; False to add it after.
        scale_bounds: (low, high) that S is kept in, 0 < low <= high; None for the paper's unbounded
            S.
        nonfinite: what a layer does whose gradient is not finite: "skip" the step, "raise" before
            anything has changed, or "propagate".
        decoupled_weight_decay: True for AdamW's form, p -= α_t·λ·p; False adds λp to g_t.
        history: how u_{t-1} is kept: "exact", a floating-point dtype, or "sketch".
        sketch_size: how many numbers a sketch has; a power of two, at least 32.
        stochastic_rounding: round bfloat16 parameters up or down at random, right on average, so
            that small steps are not lost.
        foreach: use the multi-tensor form; None chooses.
        fused: use the compiled form; None chooses.
        maximize: ascend instead of descend.
        capturable: safe to capture in a CUDA graph.
        differentiable: autograd runs through the step.
        previous: u_{t-1} as "applied", S included, or as "proposed", û_{t-1} (Eqs. C4-C5), which
            has no singularity at S = 1 under constant gradients.

    State:
        square_avg: v_t, the parameter's shape and dtype.
        prev_update: u_{t-1}, the parameter's shape and dtype (see `history`).
        step: t, a number.
        lipschitz_scale, prev_norm, layer_lr, nonfinite_steps: of its layer, S_t, ‖u_t‖, A_t and the
            count of non-finite gradients; numbers.
        lipschitz_c: with c="theoretical", c_t of its layer; a number.

    Raises:
        ValueError: for a bad value, naming the argument and the value.

    Reference:
        Ioannou, Tagaris, Stafylopatis: AdaLip: An Adaptive Learning Rate Method per Layer for
        Stochastic Optimization. Neural Processing Letters, 2023. doi:10.1007/s11063-022-11140-w

    Examples:
        >>> model = torch.nn.Linear(2, 1, bias=False)
        >>> _ = torch.nn.init.ones_(model.weight)
        >>> optimizer = RMSLipU(model.named_parameters(), lr=0.05)
        >>> for x in ([1.0, 2.0], [2.0, 1.0]):
        ...     loss = model(torch.tensor(x)).square().sum()
        ...     loss.backward()
        ...     optimizer.step()
        ...     optimizer.zero_grad()
        >>> round(optimizer.layer_learning_rates()["weight"].scale, 3)
        0.989
    """

    signal = Updates()

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-2,
        alpha: float = 0.99,
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        gamma: float = 0.8,
        c: float | Literal["theoretical"] = 1e-8,
        layers: Layers = "tensor",
        *,
        eps_in_sqrt: bool = False,
        scale_bounds: tuple[float, float] | None = (0.1, 10.0),
        nonfinite: Literal["skip", "raise", "propagate"] = "skip",
        decoupled_weight_decay: bool = True,
        history: str | torch.dtype = "exact",
        sketch_size: int = DEFAULT_SKETCH_SIZE,
        stochastic_rounding: bool = False,
        foreach: bool | None = None,
        fused: bool | None = None,
        maximize: bool = False,
        capturable: bool = False,
        differentiable: bool = False,
        previous: Literal["applied", "proposed"] = "applied",
    ) -> None:
        LipOptimizer.__init__(self, locals())


class AdamLipU(AdamLip):
    """AdamLip-U: AdamLip with S estimated from the updates (Appendix C).

        m̂_t, v̂_t as Adam's,   û_t = -α_t·m̂_t/(√v̂_t + ε)
        S_t = γ·S_{t-1} + (1-γ)·‖u_{t-1}‖/(‖û_t - u_{t-1}‖ + c)
        u_t = S_t·û_t,   p_t = p_{t-1} + u_t

    for each layer, with S_0 = 1. The layer's first step is taken with α_t alone. Decoupled weight
    decay is no part of u, and u_{t-1} is computed again from the moments: β_1 and lr may follow a
    schedule; if β_2 or eps changes, u_{t-1} is computed with the new value.

    Args:
        params: parameters, named parameters, or groups of either.
        lr: α_t, the learning rate before S, >= 0; a float or a one-element tensor.
        betas: β_1, β_2 of the running averages of the gradient and of its square, in [0, 1).
        eps: ε >= 0; with `eps_in_sqrt=True`, √(v̂_t + ε) instead of √v̂_t + ε.
        weight_decay: λ >= 0, decoupled unless `decoupled_weight_decay=False`.
        gamma: γ, coefficient of the moving average, in (0, 1).
        c: positive constant in the denominator, or "theoretical" (Eq. A.3).
        layers: what shares one S: "tensor", "module" (needs named parameters), or a function from
            a parameter's name to its layer's name.
        eps_in_sqrt: True to add ε under the root; False to add it after.
        scale_bounds: (low, high) that S is kept in, 0 < low <= high; None for the paper's unbounded
            S.
        nonfinite: what a layer does whose gradient is not finite: "skip" the step, "raise" before
            anything has changed, or "propagate".
        decoupled_weight_decay: True for AdamW's form, p -= α_t·λ·p; False adds λp to g_t.
        history: only "exact", as u_{t-1} is not kept.
        sketch_size: how many numbers a sketch has; a power of two, at least 32.
        stochastic_rounding: round bfloat16 parameters up or down at random, right on average, so
            that small steps are not lost.
        foreach: use the multi-tensor form; None chooses.
        fused: use the compiled form; None chooses.
        maximize: ascend instead of descend.
        capturable: safe to capture in a CUDA graph.
        differentiable: autograd runs through the step.
        previous: u_{t-1} as "applied", S included, or as "proposed", û_{t-1} (Eqs. C4-C5), which
            has no singularity at S = 1 under constant gradients.

    State:
        exp_avg: m_t, the parameter's shape and dtype.
        exp_avg_sq: v_t, the parameter's shape and dtype.
        step: t, a number.
        prev_lr: the factor of u_{t-1}, where it is computed again; a number.
        lipschitz_scale, prev_norm, layer_lr, nonfinite_steps: of its layer, S_t, ‖u_t‖, A_t and the
            count of non-finite gradients; numbers.
        lipschitz_c: with c="theoretical", c_t of its layer; a number.

    Raises:
        ValueError: for a bad value, naming the argument and the value.

    Reference:
        Ioannou, Tagaris, Stafylopatis: AdaLip: An Adaptive Learning Rate Method per Layer for
        Stochastic Optimization. Neural Processing Letters, 2023. doi:10.1007/s11063-022-11140-w

    Examples:
        >>> model = torch.nn.Linear(2, 1, bias=False)
        >>> _ = torch.nn.init.ones_(model.weight)
        >>> optimizer = AdamLipU(model.named_parameters(), lr=0.05)
        >>> for x in ([1.0, 2.0], [2.0, 1.0]):
        ...     loss = model(torch.tensor(x)).square().sum()
        ...     loss.backward()
        ...     optimizer.step()
        ...     optimizer.zero_grad()
        >>> round(optimizer.layer_learning_rates()["weight"].scale, 3)
        4.134
    """

    signal = Updates()

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        gamma: float = 0.8,
        c: float | Literal["theoretical"] = 1e-8,
        layers: Layers = "tensor",
        *,
        eps_in_sqrt: bool = False,
        scale_bounds: tuple[float, float] | None = (0.1, 10.0),
        nonfinite: Literal["skip", "raise", "propagate"] = "skip",
        decoupled_weight_decay: bool = True,
        history: str | torch.dtype = "exact",
        sketch_size: int = DEFAULT_SKETCH_SIZE,
        stochastic_rounding: bool = False,
        foreach: bool | None = None,
        fused: bool | None = None,
        maximize: bool = False,
        capturable: bool = False,
        differentiable: bool = False,
        previous: Literal["applied", "proposed"] = "applied",
    ) -> None:
        LipOptimizer.__init__(self, locals())


class LionLip(LipOptimizer):
    """LionLip: Lion with a Lipschitz-adaptive learning rate per layer; not in the paper.

        m_t = β_2·m_{t-1} + (1-β_2)·g_t
        S_t = γ·S_{t-1} + (1-γ)·‖g_{t-1}‖/(‖g_t - g_{t-1}‖ + c)
        p_t = p_{t-1} - α_t·S_t·sign(β_1·m_{t-1} + (1-β_1)·g_t)

    for each layer, with S_0 = 1 (Eqs. 6-9). The layer's first step is taken with α_t alone. Every
    element moves by α_t·S_t: lr is to be a third to a tenth of Adam's, and weight_decay three to
    ten times Adam's.

    Args:
        params: parameters, named parameters, or groups of either.
        lr: α_t, the learning rate before S, >= 0; a float or a one-element tensor.
        betas: β_1 of the update and β_2 of the running average of the gradient, in [0, 1).
        weight_decay: λ >= 0, decoupled unless `decoupled_weight_decay=False`.
        gamma: γ, coefficient of the moving average, in (0, 1).
        c: positive constant in the denominator, or "theoretical" (Eq. A.3).
        layers: what shares one S: "tensor", "module" (needs named parameters), or a function from
            a parameter's name to its layer's name.
        scale_bounds: (low, high) that S is kept in, 0 < low <= high; None for the paper's unbounded
            S.
        nonfinite: what a layer does whose gradient is not finite: "skip" the step, "raise" before
            anything has changed, or "propagate".
        decoupled_weight_decay: True for AdamW's form, p -= α_t·λ·p; False adds λp to g_t.
        history: how g_{t-1} is kept: "exact", a floating-point dtype, or "sketch".
        sketch_size: how many numbers a sketch has; a power of two, at least 32.
        stochastic_rounding: round bfloat16 parameters up or down at random, right on average, so
            that small steps are not lost.
        foreach: use the multi-tensor form; None chooses.
        fused: use the compiled form; None chooses.
        maximize: ascend instead of descend.
        capturable: safe to capture in a CUDA graph.
        differentiable: autograd runs through the step.

    State:
        exp_avg: m_t, the parameter's shape and dtype.
        prev_grad: g_{t-1}, the parameter's shape and dtype (see `history`).
        step: t, a number.
        lipschitz_scale, prev_norm, layer_lr, nonfinite_steps: of its layer, S_t, ‖g_t‖, A_t and the
            count of non-finite gradients; numbers.
        lipschitz_c: with c="theoretical", c_t of its layer; a number.

    Raises:
        ValueError: for a bad value, naming the argument and the value.

    Reference:
        S: doi:10.1007/s11063-022-11140-w. Lion: Chen et al., Symbolic Discovery of Optimization
        Algorithms, 2023. doi:10.48550/arXiv.2302.06675

    Examples:
        >>> model = torch.nn.Linear(2, 1, bias=False)
        >>> _ = torch.nn.init.ones_(model.weight)
        >>> optimizer = LionLip(model.named_parameters(), lr=0.05)
        >>> for x in ([1.0, 2.0], [2.0, 1.0]):
        ...     loss = model(torch.tensor(x)).square().sum()
        ...     loss.backward()
        ...     optimizer.step()
        ...     optimizer.zero_grad()
        >>> round(optimizer.layer_learning_rates()["weight"].scale, 3)
        0.963
    """

    rule: Rule = Lion()
    signal: Signal = Gradients()

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-4,
        betas: tuple[float, float] = (0.9, 0.99),
        weight_decay: float = 0.0,
        gamma: float = 0.8,
        c: float | Literal["theoretical"] = 1e-8,
        layers: Layers = "tensor",
        *,
        scale_bounds: tuple[float, float] | None = (0.1, 10.0),
        nonfinite: Literal["skip", "raise", "propagate"] = "skip",
        decoupled_weight_decay: bool = True,
        history: str | torch.dtype = "exact",
        sketch_size: int = DEFAULT_SKETCH_SIZE,
        stochastic_rounding: bool = False,
        foreach: bool | None = None,
        fused: bool | None = None,
        maximize: bool = False,
        capturable: bool = False,
        differentiable: bool = False,
    ) -> None:
        LipOptimizer.__init__(self, locals())
