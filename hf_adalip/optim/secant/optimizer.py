"""`Secant`: any optimizer, at a learning rate that it finds itself."""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import ASGD, LBFGS, Optimizer, Rprop

from ..estimator import is_number
from ..groups import refuse_options
from ..loading import check_form, check_tensor, refuse_unless_dict, unchanged_if_refused
from ..names import by_name
from ..sharding import is_dtensor
from ..state import check_shape
from ..step import LayerwiseOptimizer
from .law import Law, Rate, next_probe
from .probe import Probe, measured
from .ranks import any_rank, average_gradients, refuse_engines, slope

_KEY = "secant_"
"""Marks what is ours in a state_dict."""

_PREVIOUS = _KEY + "previous"

_PROBES = _KEY + "probes"

NUMBERS = tuple(_KEY + name for name in (*Rate._fields, "taken", "measured", "schedule"))
"""What is ours in a parameter group, besides reference_lr and effective_lr: no hyperparameters."""

RECORDED = 1000
"""Measurements that are kept at most; then every second of them goes."""

_STARTING_STEP = 1e-3
"""The first trial step, as a part of the norm of the parameters."""

_SETTLING = 20
"""Steps of the base with the first gradient; then a momentum of 0.9 has 0.88 of its full size."""

_TRIALS = 20
"""Trial steps at most: from 1e-3 of the parameters' norm ten orders down, and back by half."""

_SETTLED = math.log(1.3)
"""A trial that moves the bound by less is the last."""


_AVERAGING = {"AdafactorBigVision", "Kron", "MADGRAD", "Muon"}
"""Optimizers whose momentum is an average, of full size from the first step on."""

_OF_ALL_GROUPS = ("every", "model", "law")
"""Arguments that no parameter group has its own value of."""


class Secant(Optimizer):
    """Any torch.optim.Optimizer at a learning rate that it finds itself. Experimental.

    The base optimizer says where to go and this one how far: once every `every` steps the slope
    of one batch's loss is measured at both ends of the step before, which was made from another
    batch, and the rate follows (see `Law`).

        optimizer = Secant(torch.optim.AdamW(model.parameters()), model=model)

        def closure():
            optimizer.zero_grad()
            loss = loss_function(model(inputs), targets)
            loss.backward()
            return loss

        optimizer.step(closure)

    The closure is called once in a step, and once more where the step before is measured; in the
    first step, which finds a rate to start from, some ten times. All calls of a step see the same
    random numbers, and every call but the last leaves no trace in parameters, in the model's
    buffers, in the base's state or in the generators.

    `group["lr"]` is only what a schedule multiplies: a step is taken with `rate`·s, s being `lr`
    over what it was when this optimizer was made. With several groups, the learning rates that
    they were made with give the proportions between them; where their schedules differ, the
    largest s is taken for that of the step. `group["effective_lr"]` is what the last step was
    taken with.

    Where something comes between gradients and step (clipping, gradient accumulation), see
    `compute_gradients`. For transformers' Trainer there is `hf_adalip.attach`.

    It is a torch.optim.Optimizer itself, with the base's param_groups and state. Between a step
    that is to be measured and the next it keeps one copy of the parameters, else nothing. There is
    one rate for all layers, so it has no `layer_learning_rates()`. `probes` has the measurements,
    in order; of more than a thousand, every second one is dropped.

    Under DDP and FSDP2 all ranks measure in the same steps and find the same rate, bit for bit.
    GradScaler, DeepSpeed and FSDP1 are refused, by the first step.

    Args:
        optimizer: the base optimizer; step it only through this one.
        every: steps between two measurements. Early in training the gaps are a quarter of the
            steps that were taken, if that is less.
        model: the module that is trained, whose buffers (the running statistics of BatchNorm)
            are put back after a measurement. Without it they take part in it.
        law: how the rate follows the measurements.

    Raises:
        TypeError: if `optimizer` is not a torch.optim.Optimizer, `model` not a module or `law`
            not a `Law`.
        ValueError: for a bad `every`; for an optimizer that sets its own rate (those with an S
            per layer, Rprop), for LBFGS, for one that averages iterates (ASGD, schedule-free
            ones, which have train() and eval()), and for a group without a positive lr.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        every: int = 20,
        *,
        model: nn.Module | None = None,
        law: Law | None = None,
    ) -> None:
        if not isinstance(optimizer, Optimizer):
            raise TypeError(
                f"optimizer must be a torch.optim.Optimizer instance, got {optimizer!r}"
            )
        name = type(optimizer).__name__
        if isinstance(optimizer, (LayerwiseOptimizer, Secant, Rprop)):
            raise ValueError(f"{name} has rates of its own; choose another base")
        if isinstance(optimizer, LBFGS):
            raise ValueError(
                "LBFGS evaluates several gradients in a step, while Secant measures steps that "
                "are made from one; choose another base"
            )
        if isinstance(optimizer, ASGD) or all(hasattr(optimizer, x) for x in ("train", "eval")):
            raise ValueError(
                f"{name} keeps iterates of its own beside the parameters, which the rate would "
                "not reach; choose another base"
            )
        if isinstance(every, bool) or not isinstance(every, int) or every < 1:
            raise ValueError(f"every must be an integer of at least 1, got {every!r}")
        if model is not None and not isinstance(model, nn.Module):
            raise TypeError(f"model must be a torch.nn.Module or None, got {model!r}")
        if law is not None and not isinstance(law, Law):
            raise TypeError(f"law must be a Law or None, got {law!r}")
        for group in optimizer.param_groups:
            refuse_options(group, _OF_ALL_GROUPS, "Secant", optimizer)
            _check_lr(group.get("lr"), name)
        self.optimizer = optimizer
        self.every = every
        self.law = Law() if law is None else law
        self.probes: list[Probe] = []
        self.model = model
        self._now = Rate()
        self._step = 0  # steps taken
        self._measured = 0  # the step that is measured next, or was just taken to be measured
        self._schedule = 0.0  # s of the last step
        self._previous: dict[Tensor, Tensor] = {}
        for group in optimizer.param_groups:
            self._refer(group)
        # What torch does to make an optimizer of a dict: hooks, and the profiled step.
        self.__setstate__({})

    # As the base's

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        return self.optimizer.param_groups

    @param_groups.setter
    def param_groups(self, value: list[dict[str, Any]]) -> None:
        self.optimizer.param_groups = value  # as ms-swift and DeepSpeed do

    @property
    def state(self) -> Any:
        return self.optimizer.state

    @state.setter
    def state(self, value: Any) -> None:
        self.optimizer.state = value

    @property
    def defaults(self) -> dict[str, Any]:  # type: ignore[override]
        return self.optimizer.defaults

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in self.__dict__.items() if key in _OWN}

    def __repr__(self) -> str:
        return f"Secant(every={self.every}, rate={self.rate:.3g}, {self.optimizer!r})"

    def zero_grad(self, set_to_none: bool = True) -> None:
        """As the base's."""
        self.optimizer.zero_grad(set_to_none=set_to_none)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As the base's. Its rate is to that of the first group as their learning rates are."""
        refuse_options(param_group, _OF_ALL_GROUPS, "Secant", self.optimizer)
        first = self.param_groups[0]
        lr = param_group.get("lr", first["reference_lr"])
        _check_lr(lr, type(self.optimizer).__name__)
        self.optimizer.add_param_group({**param_group, "lr": lr})
        self._refer(self.param_groups[-1])

    def _refer(self, group: dict[str, Any]) -> None:
        group["reference_lr"] = float(group["lr"])
        group["effective_lr"] = 0.0
        # torch.distributed.checkpoint loads what groups have; up to date in `state_dict` only
        group.update(self._numbers())

    def _numbers(self) -> dict[str, Any]:
        numbers = (*self._now, self._step, self._measured, self._schedule)
        return dict(zip(NUMBERS, numbers, strict=True))

    # What it says

    @property
    def rate(self) -> float:
        """The rate that was found, which the schedule multiplies; 0 before the first step."""
        return self._now.rate

    @property
    def hyperparameters(self) -> dict[str, Any]:
        """Its own, and the rate to three digits once there is one; groups have the base's."""
        found = {"rate": float(f"{self.rate:.3g}")} if self.rate else {}
        return {"every": self.every, **found}

    @property
    def due(self) -> bool:
        """Whether the coming step needs a closure: it is the first, or measures the one before."""
        return not self.rate or bool(self._previous)

    @property
    def _step_supports_amp_scaling(self) -> bool:
        """What GradScaler.step asks for first."""
        raise RuntimeError(
            "Secant cannot be stepped by a GradScaler: gradients times a scale that changes say "
            "nothing of how far to go; train in bf16, which needs no GradScaler"
        )

    # Its state

    def state_dict(self) -> dict[str, Any]:
        """The base's state_dict; beside it the rate, what it follows from, the parameters before a
        step that is to be measured, and the measurements (which torch.distributed.checkpoint
        leaves out: they are for the record)."""
        for hook in self._optimizer_state_dict_pre_hooks.values():
            hook(self)
        for group in self.param_groups:
            group.update(self._numbers())
        packed = self.optimizer.state_dict()
        packed["state"] = dict(packed["state"])
        # always there, since torch.distributed.checkpoint reads what a fresh optimizer would save
        always = any(map(is_dtensor, self._parameters()))
        for key, param in zip(_ids(packed), self._parameters(), strict=True):
            if param in self._previous or (always and param.requires_grad):
                before = self._previous.get(param)
                kept = {_PREVIOUS: param.detach().clone() if before is None else before}
                packed["state"][key] = {**packed["state"].get(key, {}), **kept}
        packed[_PROBES] = [list(probe) for probe in self.probes]
        for after in self._optimizer_state_dict_post_hooks.values():
            packed = after(self, packed) or packed
        return packed

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads what `state_dict` gave; training goes on bit for bit.

        Raises:
            TypeError: for what is no dict.
            ValueError: for a state_dict of another optimizer or of other parameters. Nothing has
                been changed then.
        """
        refuse_unless_dict(state_dict)
        state_dict = dict(state_dict)
        for before in self._optimizer_load_state_dict_pre_hooks.values():
            state_dict = before(self, state_dict) or state_dict
        check_form(state_dict)
        state_dict = by_name(state_dict, self.param_groups)
        groups = state_dict["param_groups"]
        for group in groups:
            if missing := [key for key in (*NUMBERS, "reference_lr") if key not in group]:
                raise ValueError(f"state_dict is not of Secant: a group has no {missing[0]!r}")
        probes = _read_probes(state_dict.get(_PROBES, ()))
        state, previous = {}, {}
        for key, saved in state_dict["state"].items():
            if isinstance(saved, dict) and _PREVIOUS in saved:
                saved = dict(saved)
                previous[key] = saved.pop(_PREVIOUS)
                if not saved:
                    continue
            state[key] = saved
        for key, param in zip(_ids(state_dict), self._parameters(), strict=False):
            check_tensor(key, _PREVIOUS, previous.get(key))
            if key in previous:
                check_shape(_PREVIOUS, previous[key], param.shape)
        with unchanged_if_refused(self.optimizer):
            self.optimizer.load_state_dict({**state_dict, "state": state})
        *rate, self._step, self._measured, self._schedule = (groups[0][key] for key in NUMBERS)
        self._now = Rate(*rate)
        self.probes = probes
        self._previous = {
            param: previous[key].to(param.device, param.dtype, copy=True)
            for key, param in zip(_ids(state_dict), self._parameters(), strict=True)
            if key in previous and self._step == self._measured
        }
        if self._step == self._measured and self._step and not self._previous:
            # what saved it left the copy out, as torch's flattened states do
            self._measured = next_probe(self._step, self.every)
        for after in self._optimizer_load_state_dict_post_hooks.values():
            after(self)

    # A step

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Takes a step of the base optimizer at the rate found.

        Args:
            closure: zeroes the gradients, computes loss and gradients of this step's batch, and
                returns the loss. It must do the same when it is called again. Needed in the first
                step and in those that follow a step that is to be measured.

        Returns:
            the closure's loss, or None.

        Raises:
            RuntimeError: without a closure where one is needed; in the first step, if the
                closure's loss or gradient is another when it is called again at the same
                parameters, or no rate can be found from it; for sparse gradients. Parameters and
                the base's state are as before then.
        """
        loss = None
        if closure is not None:
            loss = self._evaluate(closure)
        elif self._is_silent():
            return self.optimizer.step()
        elif self.due:
            raise RuntimeError(
                f"step {self._step + 1} measures how far to go and needs a closure; call "
                "optimizer.step(closure), or optimizer.compute_gradients(closure) before step(); "
                "for transformers' Trainer, call hf_adalip.attach(trainer) before train(), or run "
                "the script as python -m hf_adalip.run SCRIPT. "
                "DeepSpeed's engine and timm's train.py have no closure: choose others"
            )
        if not self._measured:
            self._measured = self._step + 1
        if self._step + 1 == self._measured:
            self._previous = {p: p.clone() for p in self._parameters() if p.requires_grad}
        try:
            self._base_step(self.rate)
        except BaseException:
            self._previous = {}
            raise
        self._step += 1
        return loss

    @torch.no_grad()
    def compute_gradients(self, closure: Callable[[], Any], accumulated: int = 1) -> Any:
        """What `step(closure)` does before it steps, for loops with something in between.

            loss = optimizer.compute_gradients(closure)
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()

        What is measured are the closure's gradients, before clipping. With gradient accumulation,
        call it for every micro-batch: the first of a step is the one that is measured with, at both
        points. (Not under FSDP2's `set_requires_gradient_sync(False)`, which keeps gradients back.)

        Args:
            closure: computes loss and gradients of a batch, and returns the loss. It need not zero
                the gradients; where something is measured that is done before each call.
            accumulated: how many micro-batches the step sums up.

        Returns:
            the closure's loss; the gradients are where they would be without a measurement.

        Raises:
            RuntimeError: as `step`.
        """
        if not self.due:
            return _call(closure)

        def zeroed() -> Any:
            self.zero_grad()
            return closure()

        return self._evaluate(zeroed, accumulated)

    def _evaluate(self, closure: Callable[[], Any], accumulated: int = 1) -> Any:
        if not self.due:
            return _call(closure)
        models = [] if self.model is None else self.model.parameters()
        refuse_engines(itertools.chain(self._parameters(), models))
        return self._probe(closure) if self._previous else self._start(closure, accumulated)

    def _is_silent(self) -> bool:
        """Whether it is that by which torch.distributed.checkpoint makes an optimizer's state."""
        return not self.rate and not any(float(group["lr"]) for group in self.param_groups)

    def _base_step(self, rate: float, scheduled: bool = True) -> None:
        """Steps the base with a rate; the groups' lr are as before then."""
        first = self.param_groups[0]["reference_lr"]
        given = [group["lr"] for group in self.param_groups]
        values = [lr.clone() if isinstance(lr, Tensor) else lr for lr in given]
        for group, lr, value in zip(self.param_groups, given, values, strict=True):
            own = group["reference_lr"]
            here = rate * (own / first)
            if isinstance(lr, Tensor):
                # in place, for those who have compiled or captured it; groups may share one
                lr.copy_(value / own * here) if scheduled else lr.fill_(here)
                group["effective_lr"] = lr.clone()
            else:
                group["lr"] = group["effective_lr"] = here * (lr / own if scheduled else 1.0)
        try:
            self.optimizer.step()
        finally:
            for group, lr, value in zip(self.param_groups, given, values, strict=True):
                group["lr"] = lr.copy_(value) if isinstance(lr, Tensor) else value
        if scheduled:
            self._schedule = self._scheduled() if self._previous else 0.0

    def _scheduled(self) -> float:
        """s of the coming step: the largest of the groups', by which most of it is taken."""
        return max(float(group["lr"]) / float(group["reference_lr"]) for group in self.param_groups)

    def _probe(self, closure: Callable[[], Any]) -> Any:
        """Measures the last step on this step's batch, and lets the rate follow.

        Returns:
            the loss where the parameters are; the gradients are of there, too.
        """
        params = list(self._previous)
        olds = list(self._previous.values())
        with self._unseen():
            _swap(params, olds)
            try:
                _call(closure)
                before = slope(params, [p - q for p, q in zip(params, olds, strict=True)])
            finally:
                _swap(params, olds)
        loss = _call(closure)
        after = slope(params, [q - p for p, q in zip(params, olds, strict=True)])
        self._previous = {}
        rate = self.rate * self._schedule
        if rate > 0.0:  # else no step was taken
            self._follow(measured(self._step, rate, before, after, self._sign))
        self._measured = next_probe(self._step, self.every)
        return loss

    def _follow(self, probe: Probe) -> None:
        """Lets the rate follow a measurement, and keeps it for `probes`."""
        self._now = self.law.follow(self._now, probe, self._schedule, self._built)
        self.probes.append(probe)
        if len(self.probes) > RECORDED:
            del self.probes[1::2]

    def _start(self, closure: Callable[[], Any], accumulated: int) -> Any:
        """Finds a rate to start with: where the slope of this batch vanishes along its own step.

        Returns:
            the loss; the gradients are of this batch.
        """
        params = [p for p in self._parameters() if p.requires_grad]
        before = [p.clone() for p in params]
        with self._unseen():
            try:
                expected = _loss(closure)
                if any_rank(params, all(p.grad is None for p in params)):
                    raise RuntimeError(
                        "the closure left no gradients: it must call loss.backward(), and nothing "
                        "may step or free them within it (an optimizer in backward hooks, FSDP2's "
                        "gradients that are kept back while accumulating)"
                    )
                norm = slope(params, params)[1].sqrt()
                average_gradients(params)
                torch._foreach_mul_([p.grad for p in params if p.grad is not None], accumulated)
                # The step that this gradient leads to once momentum has built up. At rate 1, and
                # not at a small one: in p - a·u little would be left of a small a·u.
                with self._base_unchanged():
                    for _ in range(_SETTLING):
                        _restore(params, before)
                        self._base_step(1.0, scheduled=False)
                steps = [q - p for p, q in zip(params, before, strict=True)]
                _restore(params, before)
                bound = self._bound(closure, params, before, steps, accumulated)
            finally:
                _restore(params, before)
        loss = _call(closure)
        _check_same(params, "loss", expected, float(loss))
        _check_same(params, "gradient norm", float(norm), float(slope(params, params)[1].sqrt()))
        self._now = self.law.start(bound, self._scheduled())
        return loss

    def _bound(
        self, closure: Callable[[], Any], params: list[Tensor], before: list[Tensor],
        steps: list[Tensor], accumulated: int,
    ) -> float:  # fmt: skip
        """The rate a at which <g(p - a·u), u> vanishes."""
        sizes = [math.sqrt(float(slope(params, x, False)[2])) for x in (before, steps)]
        start = slope(params, steps)
        start[0] /= accumulated  # the closure's own gradient again
        if not sizes[1] or not torch.isfinite(start).all() or not start[0] * self._sign > 0:
            raise RuntimeError(
                "no rate can be found from the first batch: its gradient is zero or not finite, "
                "or the base optimizer does not go down along it"
            )
        a = _STARTING_STEP * (sizes[0] or 1.0) / sizes[1]
        for _ in range(_TRIALS):
            for param, step in zip(params, steps, strict=True):
                param.sub_(step, alpha=a)
            with self._unseen():
                _call(closure)
            end = slope(params, steps)
            _restore(params, before)
            probe = measured(0, 1.0, start, end, self._sign)
            factor = 0.1
            if probe.finite:
                factor = 10.0 if probe.r >= 0.9 else max(0.1, 1.0 / (1.0 - probe.r))
            a *= factor
            if abs(math.log(factor)) < _SETTLED:
                return a
        if factor == 10.0:
            raise RuntimeError(
                "no rate can be found from the first batch: along its step the slope of the loss "
                f"is the same as far as {a:.1g} times a step of lr = 1; the loss must be one of "
                "the parameters as they are at each call of the closure, and not linear in them"
            )
        return a

    @property
    def _built(self) -> float:
        """The part of its full size that the last step had: momentum which sums up gradients, as
        that of SGD and RMSprop, begins with one (and nesterov's with two)."""
        group = self.param_groups[0]
        averages = any(kind.__name__ in _AVERAGING for kind in type(self.optimizer).__mro__)
        sums = not averages and not group.get("dampening")
        summed = float(group.get("momentum", 0.0)) if sums else 0.0
        return 1.0 - summed ** (self._step + bool(group.get("nesterov")))

    @property
    def _sign(self) -> float:
        return -1.0 if self.param_groups[0].get("maximize") else 1.0

    def _parameters(self) -> Iterator[Tensor]:
        return itertools.chain.from_iterable(group["params"] for group in self.param_groups)

    @contextmanager
    def _unseen(self) -> Iterator[None]:
        """Puts the model's buffers and the generators back in the end."""
        buffers = [] if self.model is None else list(self.model.buffers())
        # what is expanded has fewer numbers than elements, and nothing can write to it
        buffers = [x for x in buffers if not _is_expanded(x)]
        copies = [x.clone() for x in buffers]
        devices = {p.device for p in self._parameters()} - {torch.device("cpu")}
        modules = [(torch.get_device_module(device), device) for device in devices]
        states = [(m, device, m.get_rng_state(device)) for m, device in modules]
        cpu = torch.get_rng_state()
        try:
            yield
        finally:
            torch.set_rng_state(cpu)
            for module, device, state in states:
                module.set_rng_state(state, device)
            _restore(buffers, copies)

    @contextmanager
    def _base_unchanged(self) -> Iterator[None]:
        """Puts the base's state back in the end, and what it keeps in its groups."""
        base = self.optimizer
        state = {p: copy.deepcopy(own) for p, own in base.state.items()}
        groups = [{k: copy.deepcopy(v) for k, v in g.items() if k not in ("params", "lr")}
                  for g in base.param_groups]  # fmt: skip
        try:
            yield
        finally:
            base.state.clear()
            base.state.update(state)
            for group, own in zip(base.param_groups, groups, strict=True):
                for key in set(group) - set(own) - {"params", "lr"}:
                    del group[key]
                group.update(own)


_OWN = (
    "optimizer",
    "every",
    "law",
    "probes",
    "model",
    "_now",
    "_step",
    "_measured",
    "_schedule",
    "_previous",
)


def _check_lr(lr: Any, name: str) -> None:
    if not isinstance(lr, Tensor) and not is_number(lr):
        raise ValueError(
            f"{name} has a group with lr={lr!r}, and Secant finds a learning rate: give it a number"
        )
    if not float(lr) > 0.0 or not math.isfinite(lr):
        raise ValueError(
            f"{name} has a group with lr={lr!r}, and a schedule is measured against it: give it "
            "any positive number"
        )


def _call(closure: Callable[[], Any]) -> Any:
    torch.clear_autocast_cache()  # of the weights as they were, where autocast is around the step
    with torch.enable_grad():
        return closure()


def _is_expanded(x: Tensor) -> bool:
    return any(size > 1 and not step for size, step in zip(x.shape, x.stride(), strict=True))


def _read_probes(saved: Any) -> list[Probe]:
    try:
        return [Probe(*numbers) for numbers in saved]
    except TypeError as error:
        raise ValueError(f"{_PROBES} of the state_dict must be a list of measurements") from error


def _loss(closure: Callable[[], Any]) -> float:
    loss = _call(closure)
    if loss is None:
        raise RuntimeError("the closure must return the loss, got None")
    return float(loss)


def _check_same(params: list[Tensor], what: str, expected: float, got: float) -> None:
    """Whether the closure is a function of the parameters; up to what kernels do in any order."""
    if any_rank(params, abs(got - expected) > 1e-2 * abs(expected)):
        raise RuntimeError(
            f"the closure's {what} is {expected:.6g} and, called again at the same parameters, "
            f"{got:.6g}: in every call of a step it must zero the gradients and see the same batch "
            "and the same random numbers (take the batch before step(closure), draw with torch's "
            "generators)"
        )


def _swap(params: list[Tensor], others: list[Tensor]) -> None:
    for param, other in zip(params, others, strict=True):
        kept = param.clone()
        param.copy_(other)
        other.copy_(kept)


def _restore(tensors: list[Tensor], copies: list[Tensor]) -> None:
    for tensor, copied in zip(tensors, copies, strict=True):
        tensor.copy_(copied)


def _ids(state_dict: dict[str, Any]) -> Iterator[Any]:
    """What a state_dict calls the parameters, in the order of the groups."""
    return itertools.chain.from_iterable(group["params"] for group in state_dict["param_groups"])
