"""`Lipschitz`: the same S on top of any optimizer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from typing import Any, Literal

import torch
from torch import Tensor
from torch.optim import LBFGS, Optimizer

from .layerwise import (
    Layer,
    Layers,
    LayerwiseOptimizer,
    Member,
    Options,
    State,
    layer_names,
    real,
    store,
)
from .lipschitz import Estimator
from .norms import index_tensor, layer_norms, mixed_norms
from .rules import wide
from .shards import local, local_grad
from .signals import Gradients, Signal, Updates


class Lipschitz(LayerwiseOptimizer):
    """A Lipschitz-adaptive learning rate per layer on top of any torch.optim.Optimizer.

        base proposes û_t = p_new - p_old at its own learning rate;   p = p_old + S_t·û_t

    S_t follows the gradients (`signal="gradient"`, Eqs. 6-9) or the updates ("update",
    Appendix C). It scales the whole step that the base optimizer takes, its own weight decay
    included. `Lipschitz(torch.optim.Adam(...))` agrees with AdamLip to rounding, at the price
    of a copy of the parameters during the step.

    It is a torch.optim.Optimizer itself and has the base's param_groups and state, to which it
    adds its own keys; schedulers, GradScaler, accelerate and Trainer take it.

    Args:
        optimizer: the base optimizer; step it only through this one.
        gamma: γ, coefficient of the moving average, in (0, 1).
        c: positive constant of Eq. 7, or "theoretical" for Eq. A.3.
        layers: "tensor", "module" (needs a base made with named parameters), or a function
            from a parameter's name to its layer's name.
        signal: "gradient" or "update".
        previous: with signal="update", the predecessor as "applied" (S included; the default)
            or as "proposed".
        scale_bounds: (low, high) that S is kept in; None for no bounds.
        nonfinite: what a layer does whose gradient norm is not finite. "skip" hides the layer's
            gradients from the base for the step, "raise" stops before anything has changed:
            both look at one flag per layer on the host. "propagate" looks at nothing.

    Raises:
        TypeError: if `optimizer` is not a torch.optim.Optimizer.
        ValueError: for a bad value, for LBFGS, and for an optimizer that has an S already.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        gamma: float = 0.8,
        c: float | Literal["theoretical"] = 1e-8,
        layers: Layers = "tensor",
        *,
        signal: Literal["gradient", "update"] = "gradient",
        previous: Literal["applied", "proposed"] | None = None,
        scale_bounds: tuple[float, float] | None = (0.1, 10.0),
        nonfinite: Literal["skip", "raise", "propagate"] = "skip",
    ) -> None:
        if not isinstance(optimizer, Optimizer):
            raise TypeError(
                f"optimizer must be a torch.optim.Optimizer instance, got {optimizer!r}"
            )
        if isinstance(optimizer, LayerwiseOptimizer):
            raise ValueError(
                f"{type(optimizer).__name__} has an S per layer already; wrap a base optimizer"
            )
        if isinstance(optimizer, LBFGS):
            raise ValueError(
                "LBFGS evaluates several gradients in a step, while S needs one gradient a step"
            )
        if signal not in ("gradient", "update"):
            raise ValueError(f'signal must be "gradient" or "update", got {signal!r}')
        if previous not in (None, "applied", "proposed"):
            raise ValueError(f'previous must be "applied" or "proposed", got {previous!r}')
        if previous is not None and signal == "gradient":
            raise ValueError(f'previous={previous!r} needs signal="update"')
        self._law = Estimator(gamma, c, scale_bounds, nonfinite)
        self._signal: Signal = Gradients() if signal == "gradient" else Updates()
        self._previous = previous or ("applied" if signal == "update" else None)
        self._layers = layers
        self.optimizer = optimizer
        for index, group in enumerate(optimizer.param_groups):
            self._name_layers(group, index)
        # What torch does to make an optimizer of a dict: hooks, and the profiled step.
        super().__setstate__({})

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        return self.optimizer.param_groups

    @param_groups.setter
    def param_groups(self, value: list[dict[str, Any]]) -> None:
        self.optimizer.param_groups = value

    @property
    def state(self) -> Any:
        return self.optimizer.state

    @state.setter
    def state(self, value: Any) -> None:
        self.optimizer.state = value

    @property
    def defaults(self) -> dict[str, Any]:
        return self.optimizer.defaults

    @defaults.setter
    def defaults(self, value: dict[str, Any]) -> None:
        self.optimizer.defaults = value

    def __getstate__(self) -> dict[str, Any]:
        names = ("optimizer", "_law", "_signal", "_previous", "_layers")
        return {name: self.__dict__[name] for name in names}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        for what in ("state_dict", "load_state_dict"):  # which the base does
            for when in ("pre", "post"):
                name = f"_optimizer_{what}_{when}_hooks"
                setattr(self, name, getattr(self.optimizer, name))

    @property
    def hyperparameters(self) -> dict[str, Any]:
        """The values of the constructor's arguments, without optimizer and layers."""
        signal = "gradient" if isinstance(self._signal, Gradients) else "update"
        return {**asdict(self._law), "signal": signal, "previous": self._previous}

    def __repr__(self) -> str:
        shown = ", ".join(f"{key}={value!r}" for key, value in self.hyperparameters.items())
        return f"Lipschitz({shown}, {self.optimizer!r})"

    def _name_layers(self, group: dict[str, Any], index: int) -> None:
        group["layer_names"] = layer_names(
            group.get("param_names"), len(group["params"]), self._layers, index
        )

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As the base's."""
        self.optimizer.add_param_group(param_group)
        self._name_layers(self.param_groups[-1], len(self.param_groups) - 1)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """As the base's."""
        self.optimizer.zero_grad(set_to_none=set_to_none)

    def state_dict(self) -> dict[str, Any]:
        """The base's state_dict, with S, norms and history in each parameter's state."""
        return self.optimizer.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads what `state_dict` gave; S and norms come back bit for bit."""
        with self._loading():
            self.optimizer.load_state_dict(state_dict)

    def _options(self, group: dict[str, Any]) -> Options:
        return self._law, self._previous

    def _new_state(self, param: Tensor, group: dict[str, Any]) -> State:
        key = "prev_grad" if isinstance(self._signal, Gradients) else "prev_update"
        return {key: torch.zeros_like(param)} | self._layer_state(param, group)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Takes a step of the base optimizer, scaled by S.

        Args:
            closure: evaluates the model again and returns the loss; called once.

        Returns:
            the closure's loss, or None.

        Raises:
            RuntimeError: for sparse gradients, and with nonfinite="raise" for a gradient norm
                that is not finite; nothing has been changed then.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._step(self._collect())
        return loss

    def _step(self, layers: list[Layer]) -> None:
        by_gradient = isinstance(self._signal, Gradients)
        history = "prev_grad" if by_gradient else "prev_update"
        members = [m for layer in layers for m in layer.members]
        silent = [m for layer in layers for m in layer.absent]
        owned = [m.param for m in members + silent]
        owner = tuple(i for i, layer in enumerate(layers) for _ in layer.members)
        everyone = owner + tuple(i for i, layer in enumerate(layers) for _ in layer.absent)
        home = self._home()
        params = [real(local(m.param)) for m in members]
        grads = [real(local_grad(m.param)) for m in members]
        before = [_previous(m, history) for m in members]
        silence = [_previous(m, history) for m in silent]

        def signal_norms(now: list[Tensor]) -> Tensor:
            """‖x_t‖ and ‖x_t - x_{t-1}‖ of the layers."""
            size = mixed_norms(now, home)
            change = mixed_norms([x - y for x, y in zip(now, before, strict=True)] + silence, home)
            size = torch.cat([size, size.new_zeros(len(silent))])
            norms = self._whole_norms(torch.stack([size, change], dim=1), owned)
            return layer_norms(norms, everyone, len(layers)) if layers else norms

        if by_gradient:
            norms = grad_norms = signal_norms([wide(g) for g in grads])
        elif self._law.nonfinite == "propagate":
            grad_norms = torch.zeros(len(layers), 1, device=home)
        else:
            grad_norms = self._whole_norms(mixed_norms(grads, home)[:, None], owned[: len(members)])
            grad_norms = layer_norms(grad_norms, owner, len(layers)) if layers else grad_norms
        finite = self._finite(layers, grad_norms)

        old = [p.clone() for p in params]
        moved = self._base_step(layers, finite)
        updates = [wide(p) - wide(q) for p, q in zip(params, old, strict=True)]
        if not by_gradient:
            norms = signal_norms(updates)
            finite = finite & norms.isfinite().all(dim=1)
        if not layers:  # other ranks may have gradients; this one took part in the norms
            return
        self._keep(layers)
        factor = self._follow(layers, norms, finite)

        skip = self._law.nonfinite == "skip"
        rows = (x[index_tensor(owner, home)].unbind() for x in (factor, finite))
        for m, p, q, u, g, scale, ok, went in zip(
            members, params, old, updates, grads, *rows, moved, strict=True
        ):
            if not went:
                continue
            scale = scale.to(p.device, wide(p).dtype)
            applied = torch.lerp(wide(q), wide(p), scale)
            remembered = g if by_gradient else u * scale if self._previous == "applied" else u
            if skip and not by_gradient:  # a finite gradient may still give a non-finite update
                ok = ok.to(p.device)
                applied = torch.where(ok, applied, wide(q))
                remembered = torch.where(ok, remembered, _previous(m, history))
            p.copy_(applied)
            real(local(m.state[history])).copy_(remembered)
        for m in silent:
            m.state[history].zero_()
        self._keep_rates(members, factor[index_tensor(owner, home)], moved)

    def _base_step(self, layers: list[Layer], finite: Tensor) -> list[bool]:
        """Steps the base; which members it stepped, the others' gradients being not finite."""
        if self._law.nonfinite != "skip":
            self.optimizer.step()
            return [True for layer in layers for _ in layer.members]
        moved = [ok for x, ok in zip(layers, finite.tolist(), strict=True) for _ in x.members]
        members = [m for layer in layers for m in layer.members]
        hidden = [(m.param, m.param.grad) for m, ok in zip(members, moved, strict=True) if not ok]
        for param, _ in hidden:
            param.grad = None
        try:
            self.optimizer.step()
        finally:
            for param, grad in hidden:
                param.grad = grad
        return moved

    def _keep_rates(self, members: list[Member], factor: Tensor, moved: list[bool]) -> None:
        for group in self.param_groups:
            here = tuple(i for i, m in enumerate(members) if m.group is group and moved[i])
            if here:
                lr = group["lr"]
                lr = lr.to(factor.device) if isinstance(lr, Tensor) else lr
                rates = factor[index_tensor(here, factor.device)] * lr
                store([members[i].state["layer_lr"] for i in here], rates)


def _previous(member: Member, history: str) -> Tensor:
    """x_{t-1} of this rank's shard."""
    return wide(real(local(member.state[history])))
