"""S: how the scale of a layer's learning rate follows from what is measured of the layer.

Notation, per layer l and step t (Ioannou, Tagaris, Stafylopatis 2023):

    x_t   the signal: the layer's gradient g_t, or its update u_t in the -U forms
    S_t   the scale of the layer's learning rate, S_0 = 1               `lipschitz_scale`
    α_t   the learning rate of the parameter group (the scheduler's)    `lr`
    A_t   = α_t·S_t, the layer's learning rate (Eq. 9)                  `layer_lr`

    r_t = ‖x_{t-1}‖ / (‖x_t - x_{t-1}‖ + c_t)                           Eq. 7
    S_t = γ·S_{t-1} + (1-γ)·r_t                                         Eq. 8

Everything here works on vectors with one element per layer, on the device, and knows neither
parameters nor optimizers.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from numbers import Real
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

NO_PREDECESSOR = -1.0
"""`prev_norm` of a layer that has not yet had a non-zero signal (a norm is never negative)."""

FORGOTTEN = -2.0
"""`prev_norm` of a layer whose last signal is lost, such as one that was not finite."""

FIRST_C = 1e-8
"""c_1 = c_0 of `c="theoretical"`, the constant that the paper's experiments used (§4.2)."""

NONFINITE = ("skip", "raise", "propagate")


class LayerState(NamedTuple):
    """The state of S between two steps; vectors of shape [layers]."""

    scale: Tensor  # S_{t-1}
    prev_norm: Tensor  # ‖x_{t-1}‖, or NO_PREDECESSOR or FORGOTTEN
    c: Tensor | None = None  # c_{t-1}, with c="theoretical"


def moving_average(scale: Tensor, observed: Tensor, gamma: float) -> Tensor:
    """Eq. 8: the law by which S follows the observed ratios."""
    return gamma * scale + (1.0 - gamma) * observed


def theoretical_c(
    scale: Tensor, prev_norm: Tensor, change: Tensor, c: Tensor, step: Tensor, gamma: float
) -> Tensor:
    """Eq. A.3: the smallest non-decreasing c_t with A_t ≤ A_{t-1} when α_t = α_0/√t (Lemma 5).

    At t = 1 the root is infinite and c stays at c_0.
    """
    growth = torch.sqrt(step / (step - 1.0))
    needed = (1.0 - gamma) * prev_norm / ((growth - gamma) * scale) - change
    return torch.maximum(needed, c)


@dataclass(frozen=True)
class Estimator:
    """The recurrence of S, and its special cases.

        x_t                 x_{t-1}                  S_t               A_t/α_t   prev_norm
        ------------------  -----------------------  ----------------  --------  -------------------
        layer not active    any                      S_{t-1}, no step            as it was
        not finite, "skip"  none yet                 S_{t-1}, no step            `NO_PREDECESSOR`
        not finite, "skip"  any other                S_{t-1}, no step            `FORGOTTEN`
        finite              lost (`FORGOTTEN`), or   S_{t-1}           S_t       ‖x_t‖
                            its change not finite
        zero                zero, or none yet        S_{t-1}           S_t       as it was
        non-zero            none yet                 γ·S_{t-1}         1         ‖x_t‖
        finite              finite                   Eq. 8             S_t       ‖x_t‖

    The first row that fits holds. Where S_t is new it is kept in `scale_bounds`. A layer is active
    in a step if one of its parameters has a gradient; x_t of the others is zero then. With
    nonfinite="propagate" a signal that is not finite is computed with as any other.

    Args:
        gamma: coefficient of the moving average, in (0, 1) (§4.2).
        c: positive constant of Eq. 7, or "theoretical" for Eq. A.3.
        scale_bounds: (low, high) with 0 < low ≤ high that S is kept in, or None for
            the paper's unbounded S.
        nonfinite: "skip", "raise" or "propagate".

    Raises:
        ValueError: for a value outside these ranges, naming argument and value.
    """

    gamma: float = 0.8
    c: float | Literal["theoretical"] = 1e-8
    scale_bounds: tuple[float, float] | None = (0.1, 10.0)
    nonfinite: Literal["skip", "raise", "propagate"] = "skip"
    theoretical: bool = field(init=False, repr=False, compare=False)  # whether c is Eq. A.3's

    def __post_init__(self) -> None:
        if not is_number(self.gamma) or not 0.0 < self.gamma < 1.0:
            raise ValueError(
                f"gamma must be a number between 0 and 1, both excluded, got {self.gamma!r}"
            )
        if self.c != "theoretical" and not (is_number(self.c) and 0.0 < float(self.c) < math.inf):
            raise ValueError(f'c must be a positive number or "theoretical", got {self.c!r}')
        if self.scale_bounds is not None:
            bounds = self.scale_bounds
            if (
                not isinstance(bounds, Sequence)
                or len(bounds) != 2
                or not all(is_number(b) for b in bounds)
                or not 0.0 < bounds[0] <= bounds[1]
            ):
                raise ValueError(
                    "scale_bounds must be None or (low, high) with 0 < low <= high, "
                    f"got {self.scale_bounds!r}"
                )
            object.__setattr__(self, "scale_bounds", tuple(bounds))
        if self.nonfinite not in NONFINITE:
            raise ValueError(
                f'nonfinite must be "skip", "raise" or "propagate", got {self.nonfinite!r}'
            )
        object.__setattr__(self, "theoretical", self.c == "theoretical")

    @property
    def hyperparameters(self) -> dict[str, Any]:
        """The values of the constructor's arguments."""
        return {x.name: getattr(self, x.name) for x in fields(self) if x.init}

    @property
    def initial(self) -> dict[str, float]:
        """The state of a layer before its first step, under the names of the optimizer's state."""
        first = {"lipschitz_scale": 1.0, "prev_norm": NO_PREDECESSOR}
        return first | ({"lipschitz_c": FIRST_C} if self.theoretical else {})

    def update(
        self,
        layer: LayerState,
        norm: Tensor,
        change: Tensor,
        step: Tensor | None = None,
        *,
        finite: Tensor | None = None,
        active: Tensor | None = None,
        applied: bool = False,
    ) -> tuple[LayerState, Tensor, Tensor]:
        """One step of S for all layers.

        Args:
            layer: the state after step t-1.
            norm: ‖x_t‖.
            change: ‖x_t - x_{t-1}‖; where there is no predecessor, x_{t-1} = 0. Where it is not
                finite and ‖x_t‖ is, x_{t-1} was not.
            step: t, the scheduler's, of which α_t is a function; for c="theoretical".
            finite: which layers have a finite signal; by default all.
            active: which layers take part in the step; by default all.
            applied: whether the signal to compare the next one with is S_t·x_t, an update as it
                was applied.

        Returns:
            the state after step t; the factor A_t/α_t; and which layers take the step.
        """
        before = layer.prev_norm.clamp(min=0.0)
        # A norm is never negative: less than infinity, it is finite.
        lost = (norm < math.inf) & (~(change < math.inf) | (layer.prev_norm == FORGOTTEN))
        # Both signals zero: 0/0 says nothing, and S keeps its value. (NaN != 0 is True.)
        informative = ((norm != 0) | (before > 0)) & ~lost
        first = informative & (layer.prev_norm == NO_PREDECESSOR)

        c: Any = self.c
        if layer.c is not None and step is not None:
            needed = theoretical_c(layer.scale, before, change, layer.c, step, self.gamma)
            c = torch.where(informative, needed, layer.c)
        observed = before / (change + c)  # Eq. 7
        scale = moving_average(layer.scale, observed, self.gamma)
        if self.scale_bounds is not None:
            scale = scale.clamp(*self.scale_bounds)
        scale = torch.where(informative, scale, layer.scale)
        factor = scale.masked_fill(first, 1.0)
        kept = norm * factor if applied else norm
        prev_norm = torch.where(informative | lost, kept, layer.prev_norm)

        # The first rows of the table: layers that take no step keep S.
        stepped = torch.ones_like(informative) if active is None else active
        old = layer.prev_norm
        if self.nonfinite == "skip" and finite is not None:
            stepped = stepped & finite
            # An optimizer may overwrite x_{t-1} before it knows all of x_t.
            old = old.masked_fill((old != NO_PREDECESSOR) & ~finite, FORGOTTEN)
        state = LayerState(
            torch.where(stepped, scale, layer.scale),
            torch.where(stepped, prev_norm, old),
            None if layer.c is None else torch.where(stepped, c, layer.c),
        )
        return state, factor, stepped


def is_number(value: object) -> bool:
    """A real number, NumPy's included, and not a bool."""
    return isinstance(value, Real) and not isinstance(value, bool)
