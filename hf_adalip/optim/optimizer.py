"""A rule × a signal: the class that all six optimizers are, and the order of its step."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import lru_cache
from types import ModuleType
from typing import TYPE_CHECKING, Any, ClassVar, Literal, cast

import torch
from torch import Tensor
from torch.nn.functional import pad
from torch.optim.optimizer import (
    ParamsT,
    _default_to_fused_or_foreach,
    _use_grad_for_differentiable,
)

from . import foreach, fused, rules
from .census import Census, Member, Options, as_scalar, real, store
from .groups import Layers, checked_params, number_of
from .history import DEFAULT_SKETCH_SIZE, DTYPES, SKETCH
from .kernels import KernelError
from .layerwise import Keys, LayerwiseOptimizer, apart
from .lipschitz import Estimator, is_number
from .norms import wide_dtype
from .rules import Batch, Rule
from .shards import is_dtensor, local, local_grad, start_in_whole
from .signals import Signal, Updates, remembered_rates

if TYPE_CHECKING:
    from .release import GradientRelease

FORMS = {"loop": rules, "foreach": foreach, "fused": fused}

_FLAGS = (
    *("nesterov", "eps_in_sqrt", "decoupled_weight_decay"),
    *("maximize", "capturable", "differentiable"),
)


_FOREIGN = {"amsgrad", "centered", "dampening", "momentum", "nesterov"}
"""Options of torch's SGD, RMSprop and Adam that not all of ours have: false or zero for none."""


@dataclass
class Run:
    """Members of one group, device and dtype, which are stepped together."""

    form: ModuleType | None  # None for those without a gradient in a layer that has one
    sketch: int  # how many numbers they keep of x_{t-1}; 0 for tensors
    members: list[Member]
    here: slice  # of the census' members
    rows: slice  # of those that have a sketch
    plain: bool  # whether their tensors can be stepped as they are
    kept: Tensor | None = field(default=None, init=False)  # their sketches of x_{t-1}, if packed
    memo: dict[Any, Any] = field(default_factory=dict, init=False)  # of `form`, see Batch

    def kept_sketches(self) -> Tensor:
        """The members' sketches of x_{t-1}, shape [members, k]."""
        if self.kept is not None:
            return self.kept
        return torch.stack([_sketch_of(member.state) for member in self.members])

    def keep_sketches(self, sketches: Tensor, go: Tensor) -> None:
        """Makes them the members', and zero where the members take no step."""
        kept = self.kept_sketches()
        kept.copy_(torch.where(go[:, None], sketches, 0.0))
        if self.kept is None:
            store([_sketch_of(member.state) for member in self.members], kept)

    def pack(self) -> list[Tensor]:
        """Makes the members' sketches the rows of one matrix, which it returns."""
        if not self.sketch:
            return []
        self.kept = self.kept_sketches()
        rows = list(self.kept)
        for member, row in zip(self.members, rows, strict=True):
            key = next(key for key in member.stored if key.endswith(SKETCH))
            member.stored[key] = row
        return rows


class LipOptimizer(LayerwiseOptimizer):
    """The common part of AdaLip, RMSLip, AdamLip and their -U forms.

    Args:
        params: parameters, named parameters, or groups of either.
        defaults: the rule's hyperparameters and their values (lr, weight_decay, betas, ...).
        gamma: γ of the moving average, in (0, 1) (Eq. 8, §4.2).
        c: positive constant in the denominator of Eq. 7, or "theoretical" for Eq. A.3's c_t,
            which with lr following α_0/√t carries Theorem 1's guarantee.
        layers: what shares one S: "tensor" (each parameter tensor), "module" (the parameters of
            one module; needs names), or a function from a parameter's name to its layer's name.
        scale_bounds: (low, high) that S is kept in; None for the paper's unbounded S.
        nonfinite: what a layer does whose gradient norm is not finite. "skip" leaves parameter,
            S and moments as they were, counts the step in `nonfinite_steps` and forgets the
            gradient before, so that S keeps its value at the layer's next step, too; "raise"
            stops before anything has changed, at the price of one device synchronisation a
            step; "propagate" computes with it.
        decoupled_weight_decay: True for AdamW's form, p -= α_t·λ·p, not scaled by S; False
            adds λp to the gradient, and so to what S is estimated from.
        history: how x_{t-1} is remembered. "exact": as a tensor of the parameter's shape and
            dtype; a floating-point dtype (or its name): as one of that dtype; "sketch": as
            `sketch_size` numbers for each parameter that takes more memory than they, from which
            ‖x_t - x_{t-1}‖ is estimated with a relative standard deviation of √(1/2k) at most
            (see `hf_adalip.optim.history`). Changing it later converts the history from dtype to
            dtype, and else starts it anew: S keeps its value at the next step.
        sketch_size: k, how many numbers a sketch has; a power of two, at least 32.
        foreach: use the multi-tensor form.
        fused: use the compiled form, two passes over memory; tensors that it cannot take (complex
            ones, views with gaps) are stepped in the multi-tensor form. With foreach and fused
            both None, it is taken on a CPU with a C++ compiler from a million elements in all on,
            and otherwise the multi-tensor form where torch's own optimizers do, and on a CPU.
            False for both is the loop.
        maximize: ascend instead of descend.
        capturable: safe to capture in a CUDA graph: excludes nonfinite="raise" and, for a lr
            that changes, needs a lr tensor on the parameters' device. State is always there.
        differentiable: autograd runs through the step; uses the loop form.
        previous: of the -U forms: u_{t-1} as "applied" (the default) or as "proposed".

    Raises:
        ValueError: for a bad value, naming the argument and the value.
    """

    rule: ClassVar[Rule]
    signal: ClassVar[Signal]
    _release: GradientRelease | None = None  # steps parameters within backward

    def __init__(
        self,
        params: ParamsT,
        defaults: dict[str, Any],
        *,
        gamma: float = 0.8,
        c: float | Literal["theoretical"] = 1e-8,
        layers: Layers = "tensor",
        scale_bounds: tuple[float, float] | None = (0.1, 10.0),
        nonfinite: Literal["skip", "raise", "propagate"] = "skip",
        decoupled_weight_decay: bool = True,
        history: str | torch.dtype = "exact",
        sketch_size: int = DEFAULT_SKETCH_SIZE,
        foreach: bool | None = None,
        fused: bool | None = None,
        maximize: bool = False,
        capturable: bool = False,
        differentiable: bool = False,
        previous: Literal["applied", "proposed"] | None = None,
    ) -> None:
        if isinstance(self.signal, Updates):
            defaults = defaults | {"previous": previous or "applied"}
        elif previous is not None:
            defaults = defaults | {"previous": previous}  # which is refused
        defaults = defaults | {
            "gamma": gamma,
            "c": c,
            "scale_bounds": scale_bounds,
            "nonfinite": nonfinite,
            "decoupled_weight_decay": decoupled_weight_decay,
            "history": history,
            "sketch_size": sketch_size,
            "foreach": foreach,
            "fused": fused,
            "maximize": maximize,
            "capturable": capturable,
            "differentiable": differentiable,
        }
        defaults = {key: _plain(value) for key, value in defaults.items()}
        self._validate(defaults)
        self._layers = layers
        super().__init__(params, defaults)

    @property
    def _signal(self) -> Signal:  # type: ignore[override]
        return self.signal

    @property
    def releases_gradients(self) -> bool:
        return self._release is not None

    def _options(self, group: dict[str, Any]) -> Options:
        bounds = group["scale_bounds"]
        bounds = bounds and tuple(bounds)  # some checkpoint formats make a list of it
        law = _estimator(group["gamma"], group["c"], bounds, group["nonfinite"])
        return law, group.get("previous")

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As torch's; a group may have its own value of every option, `layers` included, and
        "no_weight_decay", the names of parameters that its weight decay is not for.

        Raises:
            ValueError: for a bad option, or a parameter given twice; nothing is added then.
        """
        if not isinstance(param_group, dict):
            raise TypeError(f"param_group must be a dict, got {type(param_group).__name__}")
        group = {key: _plain(value) for key, value in param_group.items() if key != "layers"}
        self._validate(self.defaults | group)
        if not isinstance(group["params"], (Tensor, set)):
            group["params"] = checked_params(group["params"])
            given = [p[1] if isinstance(p, tuple) else p for p in group["params"]]
            if len({id(p) for p in given}) != len(given):
                raise ValueError("some parameters appear more than once in a parameter group")
        named = [p[0] for p in group["params"] if isinstance(p, tuple)]
        if unknown := set(group.get("no_weight_decay", ())) - set(named):
            raise ValueError(
                f"no_weight_decay names {min(unknown)!r}, which is not a parameter of the group "
                "(pass named parameters: model.named_parameters())"
            )
        differentiable = self.defaults["differentiable"]
        if group.get("differentiable", differentiable) != differentiable:
            raise ValueError(
                f"differentiable={group['differentiable']!r} cannot be for one group: autograd "
                "runs through the whole step or not at all; give it to the optimizer"
            )
        if (self.defaults | group)["fused"]:
            fused.refuse_unless_possible(group["params"])
        super().add_param_group(group)
        self._name_last_group(param_group.get("layers", self._layers))

    def _validate(self, group: dict[str, Any]) -> None:
        """Refuses a bad option of a group (or of the defaults) before anything is changed."""
        if "previous" in group and not isinstance(self.signal, Updates):
            raise ValueError(
                f"previous={group['previous']!r} is for the -U forms; {type(self).__name__} "
                "estimates S from gradients"
            )
        _validate(group)
        self._state_keys(group)

    def __getstate__(self) -> dict[str, Any]:
        return super().__getstate__() | {"state": self._state_apart(), "_layers": self._layers}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        for group in self.param_groups:  # saved before an option existed
            for name, value in self.defaults.items():
                group.setdefault(name, value)

    def state_dict(self) -> dict[str, Any]:
        """As torch's; numbers and sketches may be copies."""
        packed: dict[str, Any] = super().state_dict()
        packed["state"] = {key: apart(kept) for key, kept in packed["state"].items()}
        return packed

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads a state_dict; S, norms and step come back bit for bit, also for bf16 parameters.

        Options that an older state_dict lacks take this optimizer's values, and state that it
        lacks starts as before a first step. Layers stay as this optimizer has them. That of the
        base optimizer of torch will do, too; options come with it (in Adam's,
        `decoupled_weight_decay` is False, in AdamW's True).

        Raises:
            ValueError: for the state of other parameters, and for an option of torch's that this
                optimizer does not have (amsgrad, centered, ...). Nothing has been changed then.
        """
        with self._loading():
            super().load_state_dict(state_dict)
        self._complete_loaded()

    def _check_loaded(self, state_dict: dict[str, Any]) -> None:
        own = {key for group in self.param_groups for key in group}
        for name in sorted(_FOREIGN - own):
            for group in state_dict["param_groups"]:
                if group.get(name):
                    raise ValueError(
                        f"the state_dict was saved with {name}={group[name]!r}, which "
                        f"{type(self).__name__} does not have; to go on without it, set it to "
                        f"{type(group[name])()!r} in the state_dict's param_groups"
                    )
        super()._check_loaded(state_dict)

    def _manner(self, group: dict[str, Any]) -> object:
        options = ("history", "sketch_size", "foreach", "fused", "differentiable")
        return super()._manner(group), [group[option] for option in options]

    def _state_keys(self, group: dict[str, Any]) -> Keys:
        own = ("prev_lr",) if self.signal.retraces(self.rule, group) else ()
        histories = self.signal.history(self.rule, group)
        if group["history"] != "exact" and not histories:
            raise ValueError(
                f"history={group['history']!r} has nothing to act on: {type(self).__name__} "
                "computes its last update again from the moments that it keeps anyway; leave "
                'history="exact"'
            )
        return Keys(self.rule.kept(group), histories, ("step", *own))

    @_use_grad_for_differentiable
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Takes one step (Algorithms 2-5).

        Args:
            closure: evaluates the model again and returns the loss.

        Returns:
            the closure's loss, or None.

        Raises:
            RuntimeError: for sparse gradients, and with nonfinite="raise" for a gradient norm
                that is not finite; nothing has been changed then.
        """
        self._capture_check()
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        released = self._release.finish() if self._release else []
        census = self._survey()
        self._count_step(torch.cat([self._step(census), *released]))
        self._remember(census)
        return loss

    def _step(self, census: Census) -> Tensor:
        """Returns which layers live."""
        layers, home = census.layers, self._home()
        if not census.runs:
            census.runs = self._runs(census)
        runs = census.runs
        batches = [self._batch(run, census) for run in runs]
        for run, batch in zip(runs, batches, strict=True):
            _prepare(run, batch)

        # Measure. Nothing is changed here but histories, by the fused form, which comes last: what
        # may fail has been done then.
        rows = [_measure(run, batch).to(home) for run, batch in zip(runs, batches, strict=True)]
        rows = rows or [torch.zeros(0, 3, device=home)]  # other ranks may have gradients
        norms = torch.cat([x[:, :3] for x in rows])
        sketches, changes = self._sketches(census, rows) if census.width else (None, None)
        norms, live = self._layer_norms(norms, census, changes)
        if not layers:
            return live
        finite = self._finite(census, norms[:, :2])

        # Follow: S of every layer, and what it makes of every tensor's learning rate.
        self._keep(census)
        followed = self._follow(census, norms[:, 1:], finite, live)
        factor, may_change = map(census.spread, followed)

        # Step.
        for run, batch in zip(runs, batches, strict=True):
            device, here = batch.steps.device, run.here
            go = may_change[here].to(device)
            numbers: dict[str, Tensor] = {}
            retraces = self.signal.retraces(self.rule, batch.group)
            previous = batch.group.get("previous", "applied")
            if run.form is None:
                rules.forget(batch, go)
                if retraces:
                    numbers["prev_lr"] = torch.zeros_like(batch.steps)
            else:
                rates = batch.lr * factor[here].to(device, wide_dtype(batch.params[0].dtype))
                remembered = remembered_rates(rates, batch.lr, previous)
                run.form.advance(batch, rates, remembered, go)
                numbers = {"step": batch.steps, "layer_lr": rates}
                if retraces:
                    numbers["prev_lr"] = remembered * self.rule.gain(batch.steps, batch.group)
            if sketches is not None and run.sketch:
                x = sketches[run.rows, : run.sketch].to(device)
                x = self.signal.remembered(x, factor[here, None].to(x), previous)
                run.keep_sketches(x, go)
            for name, values in numbers.items():
                before = census.read(name, here, device)
                census.write(name, torch.where(go, values, before), here)
        return live

    def _sketches(self, census: Census, rows: list[Tensor]) -> tuple[Tensor, Tensor]:
        """Of the members that have one, in their order.

        Args:
            census: of this step, its runs included.
            rows: what each run's `measure` gave.

        Returns:
            the sketches of x_t of whole parameters, shape [sketched, width]; and
            ‖x_t - x_{t-1}‖ estimated from them, shape [sketched].
        """
        home, width = self._home(), census.width
        now, before = [], []
        for run, row in zip(census.runs, rows, strict=False):
            if run.sketch:
                now.append(_wide_enough(row[:, 3:], width))
                before.append(_wide_enough(run.kept_sketches().to(home), width))
        if not now:
            now = before = [torch.zeros(0, width, device=home)]
        sketches = self._whole_sketches(_joined(now), census)
        return sketches, torch.linalg.vector_norm(sketches - _joined(before), dim=1)

    def _runs(self, census: Census) -> list[Run]:
        """Puts the members in the order in which they are worked through.

        Tensors of one group, device and dtype go together, those of the fused form last.
        """
        alike: dict[Any, list[tuple[int, Member]]] = {}
        for group in self.param_groups:
            if group["fused"] and group["params"]:  # set by hand, loaded, or moved since
                fused.refuse_unless_possible(group["params"])
        size = sum(local(p).numel() for group in self.param_groups for p in group["params"])
        chosen = {number_of(group): _form(group, size) for group in self.param_groups}
        for i, layer in enumerate(census.layers):
            for member, absent in [
                *((m, False) for m in layer.members),
                *((m, True) for m in layer.absent),
            ]:
                param = member.param
                number = number_of(member.group)
                form = chosen[number]
                if form == "fused" and not _fits(member):
                    form = "foreach"
                kind = (member.decays, member.sketch, param.device, param.dtype)
                key = (absent, form, number, *kind)
                alike.setdefault(key, []).append((i, member))
        kinds = sorted(alike, key=lambda kind: (kind[1] == "fused", kind[0]))
        census.arrange([entry for kind in kinds for entry in alike[kind]])
        runs, start, sketched = [], 0, 0
        for absent, form, *kind in kinds:
            members = [member for _, member in alike[(absent, form, *kind)]]
            here = slice(start, start := start + len(members))
            size = members[0].sketch
            rows = slice(sketched, sketched := sketched + (len(members) if size else 0))
            plain = all(_is_plain(m) for m in members)
            taken = None if absent else FORMS[form]
            runs.append(Run(taken, size, members, here, rows, plain))
        return runs

    def _batch(self, run: Run, census: Census) -> Batch:
        members = run.members
        group = members[0].group
        device = members[0].param.device
        lr = group["lr"]
        steps = census.read("step", run.here, device)
        params, states = [m.param for m in members], [m.state for m in members]
        given = [x.grad for x in (params if run.plain else members)] if run.form else []
        grads = [grad for grad in given if grad is not None]
        if not run.plain:
            grads = [real(local_grad(p, g)) for p, g in zip(params, grads, strict=bool(run.form))]
            params = [real(local(p)) for p in params]
            states = [{name: real(local(x)) for name, x in state.items()} for state in states]
        return Batch(
            rule=self.rule,
            signal=self.signal,
            group=group if members[0].decays else group | {"weight_decay": 0.0},
            members=members,
            params=params,
            grads=grads,
            states=states,
            steps=steps + 1 if run.form else steps,
            lr=as_scalar(lr, device) if isinstance(lr, Tensor) else lr,
            sketch=run.sketch,
            stoppable=census.raises or bool(census.over),  # whose collective may fail
            memo=run.memo if run.plain else {},  # an engine may give a shard other memory
        )

    def _capture_check(self) -> None:
        """torch's check of `capturable`, and that a captured step would follow a changing lr."""
        check = "_accelerator_graph_capture_health_check"  # of newer torch
        getattr(self, check if hasattr(self, check) else "_cuda_graph_capture_health_check")()
        if not _is_capturing():
            return  # torch.distributed.checkpoint's trial step has a lr tensor on the CPU
        for group in self.param_groups:
            lr = group["lr"]
            if (
                group["capturable"]
                and isinstance(lr, Tensor)
                and any(lr.device != p.device for p in group["params"])
            ):
                raise ValueError(
                    f"capturable=True needs lr on the parameters' device, got it on {lr.device}"
                )


def _prepare(run: Run, batch: Batch) -> None:
    """Makes the fused form ready; where nobody asked for it and it does not compile, foreach."""
    if run.form is not fused:
        return
    try:
        fused.prepare(batch)
    except KernelError:
        if batch.group["fused"]:
            raise
        run.form, batch.prepared = foreach, None


def _measure(run: Run, batch: Batch) -> Tensor:
    if run.form is None:
        return rules.measure_absent(batch)
    rows: Tensor = run.form.measure(batch)
    return rows


def _is_capturing() -> bool:
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()


@lru_cache(maxsize=64)
def _estimator(gamma: Any, c: Any, bounds: Any, nonfinite: Any) -> Estimator:
    return Estimator(gamma, c, bounds, nonfinite)


def _form(group: dict[str, Any], size: int) -> Literal["loop", "foreach", "fused"]:
    """The form in which a group is stepped, of an optimizer with `size` elements in all."""
    compiling = torch.compiler.is_compiling()  # which makes kernels of the loop itself
    if group["differentiable"]:
        return "loop"
    if group["fused"]:
        return "foreach" if compiling else "fused"
    if group["foreach"] is not None:
        return "foreach" if group["foreach"] else "loop"
    params = [local(p) for p in group["params"]]
    if any(p.device.type != "cpu" for p in params):
        return "foreach" if _default_to_fused_or_foreach(params, False)[1] else "loop"
    if group["fused"] is None and not compiling and fused.pays(size):
        return "fused"
    return "foreach"


def _is_plain(member: Member) -> bool:
    return (
        member.seen  # else `Member.grad` stands in for a gradient that is not there
        and member.part is None
        and not is_dtensor(member.param)
        and not member.param.is_complex()
    )


def _fits(member: Member) -> bool:
    """Whether a member can be stepped in the fused form."""
    grad = None if member.grad is None else local(member.grad)
    can_be_sketched = not member.sketch or start_in_whole(member.param) is not None
    return fused.fits(local(member.param), grad) and can_be_sketched


def _joined(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _wide_enough(rows: Tensor, width: int) -> Tensor:
    more = width - rows.shape[1]
    return pad(rows, (0, more)) if more else rows


def _sketch_of(state: dict[str, Tensor]) -> Tensor:
    return next(x for key, x in state.items() if key.endswith(SKETCH))


def _validate(group: dict[str, Any]) -> None:
    """Refuses the value of an option of a group (or of the defaults) before it is used."""
    Estimator(group["gamma"], group["c"], group["scale_bounds"], group["nonfinite"])
    lr = group["lr"]
    if isinstance(lr, Tensor):
        if lr.numel() != 1:
            raise ValueError(f"lr must have one element when it is a tensor, got {lr.numel()}")
        lr = lr.item()
    if not _in(lr, 0.0, math.inf):
        raise ValueError(f"lr must be a finite number >= 0, got {lr!r}")
    for name in ("weight_decay", "eps"):
        if name in group and not _in(group[name], 0.0, math.inf):
            raise ValueError(f"{name} must be a finite number >= 0, got {group[name]!r}")
    for name in ("momentum", "alpha"):
        if name in group and not _in(group[name], 0.0, 1.0):
            raise ValueError(f"{name} must be a number in [0, 1), got {group[name]!r}")
    if "betas" in group:
        betas = group["betas"]
        if (
            not isinstance(betas, (tuple, list))
            or len(betas) != 2
            or not all(_in(b, 0.0, 1.0) for b in betas)
        ):
            raise ValueError(f"betas must be two numbers in [0, 1), got {betas!r}")
    if group.get("nesterov") and not group["momentum"]:
        raise ValueError(f"nesterov=True needs a momentum > 0, got momentum={group['momentum']!r}")
    if group.get("previous", "applied") not in ("applied", "proposed"):
        raise ValueError(f'previous must be "applied" or "proposed", got {group["previous"]!r}')
    if group["history"] not in ("exact", "sketch", *DTYPES):
        raise ValueError(
            'history must be "exact", "sketch" or a floating-point dtype '
            f"({', '.join(DTYPES)}), got {group['history']!r}"
        )
    size = group["sketch_size"]
    if isinstance(size, bool) or not isinstance(size, int) or size < 32 or size & (size - 1):
        raise ValueError(f"sketch_size must be a power of two >= 32, got {size!r}")
    for name in _FLAGS:
        if name in group and not isinstance(group[name], bool):
            raise ValueError(f"{name} must be True or False, got {group[name]!r}")
    if group["foreach"] not in (None, True, False):
        raise ValueError(f"foreach must be None, True or False, got {group['foreach']!r}")
    if group["fused"] not in (None, True, False):
        raise ValueError(f"fused must be None, True or False, got {group['fused']!r}")
    for one, other in (
        ("foreach", "differentiable"),
        ("fused", "differentiable"),
        ("foreach", "fused"),
    ):
        if group[one] and group[other]:
            raise ValueError(f"{one}=True and {other}=True exclude each other")
    if group["capturable"] and group["nonfinite"] == "raise":
        raise ValueError(
            'nonfinite="raise" looks at the gradients on the host, which capturable=True excludes; '
            'choose "skip" or "propagate"'
        )


def _plain(value: Any) -> Any:
    """NumPy's numbers as Python's, which torch.load(weights_only=True) reads, and dtypes as text,
    which every checkpoint format keeps."""
    if isinstance(value, torch.dtype):
        return str(value).removeprefix("torch.")
    if isinstance(value, (tuple, list)):
        return type(value)(_plain(item) for item in value)
    return float(value) if is_number(value) and type(value) not in (int, float) else value


def _in(value: object, low: float, high: float) -> bool:
    return is_number(value) and low <= float(cast("float", value)) < high
