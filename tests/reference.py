"""Algorithms 2-5 of the AdaLip paper, Eqs. 6-9, A.3 and C4-C5, in plain float64 NumPy.

Written from the paper and the design's conventions alone, with none of the package's structure,
so that an error in one is not repeated in the other. Slow and literal on purpose: to be compared
with the paper line by line. Names are the paper's.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np

Arrays = dict[str, np.ndarray]
PerTensor = float | dict[str, float]


def norm(tensors: Arrays) -> float:
    """The Euclidean norm of a layer: of all its tensors as one vector (§4.1)."""
    return math.sqrt(sum(float(np.sum(np.abs(x) ** 2)) for x in tensors.values()))


class Reference:
    """One of the six optimizers over named float64 arrays.

    Args:
        base: "sgd" (Algorithms 2 and 5), "rmsprop" (3), "adam" (4) or "lion".
        signal: "gradient", or "update" for the -U forms.
        previous: u_{t-1} "applied" (Algorithm 5) or "proposed" (Eqs. C4-C5).
        c: a number, or "theoretical" for Eq. A.3.
        scale_bounds: S is kept inside; None for the paper's S.
        layer_of: from a tensor's name to its layer's name.
        weight_decay: for all tensors, or by name.
    """

    def __init__(
        self,
        base: str = "sgd",
        signal: str = "gradient",
        previous: str = "applied",
        gamma: float = 0.8,
        c: float | str = 1e-8,
        scale_bounds: tuple[float, float] | None = (0.1, 10.0),
        layer_of: Callable[[str], str] = lambda name: name,
        *,
        momentum: float = 0.0,
        nesterov: bool = False,
        alpha: float = 0.99,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        eps_in_sqrt: bool = False,
        weight_decay: PerTensor = 0.0,
        decoupled_weight_decay: bool = True,
        maximize: bool = False,
    ) -> None:
        self.base, self.signal, self.previous = base, signal, previous
        self.gamma, self.c, self.scale_bounds = gamma, c, scale_bounds
        self.layer_of = layer_of
        self.momentum, self.nesterov = momentum, nesterov
        self.alpha, self.betas, self.eps, self.eps_in_sqrt = alpha, betas, eps, eps_in_sqrt
        self.weight_decay = weight_decay
        self.decoupled_weight_decay = decoupled_weight_decay
        self.maximize = maximize

        self.t = 0  # "for t=1 to T": the optimizer's steps, of which α_t is a function
        # Of each layer. "Initialize: S_0 = 1, g_0 = 0, u_0 = 0"
        self.S: dict[str, float] = {}
        self.A: dict[str, dict[str, float]] = {}  # of each of its tensors: groups have their lr
        self.norm: dict[str, float] = {}  # of what the next signal will be compared with
        self.started: dict[str, bool] = {}  # has had a signal that was not zero
        self.c_t: dict[str, float] = {}
        # Of each tensor. "m_0 = 0, v_0 = 0"
        self.x_prev: Arrays = {}  # g_{t-1}, or u_{t-1} in the -U forms
        self.steps: dict[str, int] = {}  # Adam's t
        self.buf: Arrays = {}
        self.m: Arrays = {}
        self.v: Arrays = {}

    def step(self, w: Arrays, grads: dict[str, np.ndarray | None], lr: PerTensor) -> Arrays:
        """w_{t+1} from w_t, the gradients (None or missing: no gradient) and α_t."""
        self.t += 1
        w_next = dict(w)
        for layer in dict.fromkeys(map(self.layer_of, w)):
            tensors = [name for name in w if self.layer_of(name) == layer]
            present = [name for name in tensors if grads.get(name) is not None]
            if present:
                self._step_layer(layer, tensors, present, w, w_next, grads, lr)
        return w_next

    def _step_layer(self, layer, tensors, present, w, w_next, grads, lr) -> None:
        for name in tensors:
            self.x_prev.setdefault(name, np.zeros_like(w[name]))
        S_prev = self.S.setdefault(layer, 1.0)

        # line 2: g_t = ∇f_t(w_t). A tensor without a gradient counts as one of zeros.
        g = {name: np.zeros_like(w[name]) for name in tensors}
        for name in present:
            g[name] = -grads[name] if self.maximize else grads[name]
            if not self.decoupled_weight_decay:
                g[name] = g[name] + _of(self.weight_decay, name) * w[name]
        # line 3: α_t, the scheduler's
        alpha_t = {name: _of(lr, name) for name in present}

        # what the base optimizer would subtract at a learning rate of 1
        direction = {name: self._direction(name, g[name]) for name in present}
        # Algorithm 5, line 4: û_t, the update with the learning rate before S
        u_hat = {name: np.zeros_like(w[name]) for name in tensors}
        for name in present:
            u_hat[name] = -alpha_t[name] * direction[name]

        x_t = g if self.signal == "gradient" else u_hat
        x_prev = {name: self.x_prev[name] for name in tensors}

        # line 4: S_t
        S_t = self._next_scale(
            layer, S_prev, norm(x_prev), norm({n: x_t[n] - x_prev[n] for n in tensors}), norm(x_t)
        )
        # §4.2: "the overall learning rate will start at the initial learning rate"
        first = not self.started.get(layer, False) and norm(x_t) != 0
        if first:
            self.started[layer] = True
        # line 5: A_t = α_t · S_t
        A_t = {name: alpha_t[name] * (1.0 if first else S_t) for name in present}

        # line 6 (10 in Algorithm 4): w_{t+1}
        for name in present:
            decay = _of(self.weight_decay, name) if self.decoupled_weight_decay else 0.0
            w_next[name] = w[name] - alpha_t[name] * decay * w[name] - A_t[name] * direction[name]

        if self.signal == "update" and self.previous == "applied":
            # Algorithm 5, line 7: u_t = -A_t · g_t
            x_t = {name: -A_t[name] * direction[name] for name in present}
        for name in tensors:
            self.x_prev[name] = x_t.get(name, np.zeros_like(w[name]))
        self.norm[layer] = norm({name: self.x_prev[name] for name in tensors})
        self.S[layer] = S_t
        self.A.setdefault(layer, {}).update(A_t)

    def _next_scale(self, layer, S_prev, norm_prev, norm_change, norm_now) -> float:
        if norm_prev == 0 and norm_now == 0:
            return S_prev  # 0/0: no signal
        c_t = self.c
        if self.c == "theoretical":
            c_t = self.c_t[layer] = self._c(layer, S_prev, norm_prev, norm_change)
        # Eq. 8
        S_t = self.gamma * S_prev + (1 - self.gamma) * norm_prev / (norm_change + c_t)
        if self.scale_bounds is not None:
            low, high = self.scale_bounds
            S_t = min(max(S_t, low), high)
        return S_t

    def _c(self, layer, S_prev, norm_prev, norm_change) -> float:
        """Eq. A.3, with c_1 = c_0 = 1e-8."""
        c_prev = self.c_t.get(layer, 1e-8)
        t, gamma = self.t, self.gamma
        if t == 1:
            return c_prev
        bound = (1 - gamma) * norm_prev / ((math.sqrt(t / (t - 1)) - gamma) * S_prev) - norm_change
        return max(bound, c_prev)

    def _direction(self, name: str, g: np.ndarray) -> np.ndarray:
        """m̂_t / (√v̂_t + ε) of Algorithm 4, and what stands in its place in the others."""
        t = self.steps[name] = self.steps.get(name, 0) + 1
        if self.base == "sgd":
            if self.momentum == 0:
                return g
            self.buf[name] = self.momentum * self.buf.get(name, 0) + g
            return g + self.momentum * self.buf[name] if self.nesterov else self.buf[name]
        if self.base == "rmsprop":
            # Algorithm 3, line 6; its β_2 is called alpha here
            self.v[name] = self.alpha * self.v.get(name, 0) + (1 - self.alpha) * g**2
            return g / self._root(self.v[name])
        if self.base == "lion":
            # Chen et al. 2023, Algorithm 2
            beta_1, beta_2 = self.betas
            m = self.m.get(name, 0)
            self.m[name] = beta_2 * m + (1 - beta_2) * g
            return np.sign(beta_1 * m + (1 - beta_1) * g)
        # Algorithm 4, lines 6-9
        beta_1, beta_2 = self.betas
        self.m[name] = beta_1 * self.m.get(name, 0) + (1 - beta_1) * g
        self.v[name] = beta_2 * self.v.get(name, 0) + (1 - beta_2) * g**2
        # In float64, 1 - β^t would lose three digits at β = 0.999, t = 1.
        m_hat = self.m[name] / float(1 - np.longdouble(beta_1) ** t)
        v_hat = self.v[name] / float(1 - np.longdouble(beta_2) ** t)
        return m_hat / self._root(v_hat)

    def _root(self, v: np.ndarray) -> np.ndarray:
        return np.sqrt(v + self.eps) if self.eps_in_sqrt else np.sqrt(v) + self.eps


def _of(value: PerTensor, name: str) -> float:
    return value[name] if isinstance(value, dict) else value
