"""The formulas of all base optimizers for forms/kernels/step_triton.py, on blocks of elements.

RULE is a rule's name; SGD's is "plain", "momentum" or "nesterov".
"""

import triton
import triton.language as tl

# The constants of a group, as forms/kernels/step_triton.py has them.
MOMENTUM = tl.constexpr(0)
BETA1 = tl.constexpr(1)  # RMSprop's alpha too
TAKE1 = tl.constexpr(2)  # 1 - β1, which in float32 would have lost digits
BETA2 = tl.constexpr(3)
TAKE2 = tl.constexpr(4)
EPS_INSIDE = tl.constexpr(5)  # of the root; one of the two is zero
EPS_OUTSIDE = tl.constexpr(6)


@triton.jit
def _divide(x, y):
    if y.dtype == tl.float64:
        return x / y
    else:
        return tl.div_rn(x, y)


@triton.jit
def root(x):
    if x.dtype == tl.float64:
        return tl.sqrt(x)
    else:
        return tl.sqrt_rn(x)


@triton.jit
def moments(grad, first, second, constants, RULE: tl.constexpr):
    """The moments of step t."""
    if RULE == "Adam":
        first = tl.load(constants + BETA1) * first + tl.load(constants + TAKE1) * grad
        second = tl.load(constants + BETA2) * second + tl.load(constants + TAKE2) * grad * grad
    elif RULE == "RMSprop":
        first = tl.load(constants + BETA1) * first + tl.load(constants + TAKE1) * grad * grad
    elif RULE == "Lion":
        second = tl.load(constants + BETA1) * first + tl.load(constants + TAKE1) * grad
        first = tl.load(constants + BETA2) * first + tl.load(constants + TAKE2) * grad
    elif RULE != "plain":
        first = first * tl.load(constants + MOMENTUM) + grad
    return first, second


@triton.jit
def direction(grad, first, second, constants, corrections, RULE: tl.constexpr):
    d = grad
    if RULE == "Adam" or RULE == "RMSprop":
        square = first
        if RULE == "Adam":
            d = first * _divide(1.0, tl.load(corrections))
            square = second * _divide(1.0, tl.load(corrections + 1))
        square = root(square + tl.load(constants + EPS_INSIDE))
        d = _divide(d, square + tl.load(constants + EPS_OUTSIDE))
    elif RULE == "Lion":
        d = (second > 0).to(grad.dtype) - (second < 0).to(grad.dtype)
    elif RULE == "momentum":
        d = first
    elif RULE == "nesterov":
        d = grad + tl.load(constants + MOMENTUM) * first
    return d
