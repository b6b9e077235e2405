"""A rule × a signal: the class that all six optimizers are."""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor
from torch.optim.optimizer import _default_to_fused_or_foreach
from typing_extensions import Self

from . import step as loop
from .batch import Batch, Bucket, LayerOptions, LocalParam
from .estimator import Estimator
from .forms import foreach, fused
from .forms.kernels import KernelError
from .groups import checked_params, each_once, group_index
from .loading import loading, refuse_unless_dict, saved_group
from .options import as_plain, validate
from .plan import StepPlan
from .rounding import refuse_unless_roundable
from .sharding import FlatTensors, shard_of
from .signals import Updates
from .state import StateKeys, unpacked
from .step import Form, LayerwiseOptimizer

if TYPE_CHECKING:
    from .release import ParameterPlans

FORMS: dict[str, Form] = {"loop": loop, "foreach": foreach, "fused": fused}

_FOREIGN = {"amsgrad", "centered", "dampening", "momentum", "nesterov"}
"""Options of torch's SGD, RMSprop and Adam that not all of ours have: false or zero for none."""


_NOT_OPTIONS = {"self", "__class__", "params", "layers"}
"""Of a constructor's arguments, and of what else `locals()` has, what no group keeps."""


class LipOptimizer(LayerwiseOptimizer):
    """The common part of AdaLip, RMSLip, AdamLip and their -U forms.

    A subclass names a `rule` and a `signal`. Its constructor has the arguments of the rule (lr,
    weight_decay, betas, ...) and these, and hands all of them over with
    `LipOptimizer.__init__(self, locals())`.

    Args:
        arguments: those of a subclass's constructor, by name: params, layers, and the options
            that each parameter group may have its own value of.

    Options of all six:
        gamma: γ of the moving average, in (0, 1) (Eq. 8, §4.2).
        c: positive constant in the denominator of Eq. 7, or "theoretical" for Eq. A.3's c_t,
            which with lr following α_0/√t carries Theorem 1's guarantee.
        layers: what shares one S: "tensor" (each parameter tensor), "module" (the parameters of
            one module; needs names), or a function from a parameter's name to its layer's name.
        scale_bounds: (low, high) that S is kept in; None for the paper's unbounded S.
        nonfinite: what a layer does whose gradient norm, or its square, is not finite (from 1.8e19
            on; for float64 parameters, from 3.4e38 on). "skip" leaves parameter, S and moments as
            they were, counts the step in `nonfinite_steps` and forgets the gradient before, so
            that S keeps its value at the layer's next step, too; "raise" stops before anything
            has changed, at the price of one device synchronisation a step; "propagate" computes
            with it.
        decoupled_weight_decay: True for AdamW's form, p -= α_t·λ·p, not scaled by S; False
            adds λp to the gradient, and so to what S is estimated from.
        history: how x_{t-1} is kept. "exact": as a tensor of the parameter's shape and
            dtype; a floating-point dtype (or its name): as one of that dtype; "sketch": as
            `sketch_size` numbers for each parameter that takes more memory than they, from which
            ‖x_t - x_{t-1}‖ is estimated with a relative standard deviation of √(1/2k) at most
            (see `hf_adalip.optim.history`). Changing it later converts the history from dtype to
            dtype, and else starts it anew: S keeps its value at the next step.
        sketch_size: k, how many numbers a sketch has; a power of two, at least 32.
        stochastic_rounding: round new values of bfloat16 parameters up or down at random, so that
            they are right on average and small steps are not lost (see
            `hf_adalip.optim.rounding`): in the same way in every form, run and sharding. Moments,
            and parameters of other dtypes, are as without it; refused at a step where the optimizer
            has no bfloat16 parameter.
        foreach: use the multi-tensor form.
        fused: use the compiled form, two passes over memory; tensors that it cannot take (complex
            ones, views with gaps) are stepped in the multi-tensor form. With foreach and fused
            both None, it is taken on a CPU with a C++ compiler from a million elements in all on,
            and otherwise the multi-tensor form where torch's own optimizers do, and on a CPU.
            foreach=False, without fused=True, is the loop.
        maximize: ascend instead of descend.
        capturable: safe to capture in a CUDA graph: excludes nonfinite="raise" and, for a lr
            that changes, needs a lr tensor on the parameters' device. State is always there.
        differentiable: autograd runs through the step; uses the loop form.
        previous: of the -U forms: u_{t-1} as "applied" (the default) or as "proposed".

    Raises:
        ValueError: for a bad value, naming the argument and the value.
    """

    _plan_options = (
        *("gamma", "c", "scale_bounds", "nonfinite", "previous", "history", "sketch_size"),
        *("foreach", "fused", "differentiable", "nesterov", "eps_in_sqrt", "stochastic_rounding"),
    )

    _parameter_plans: ParameterPlans | None = None  # of `step_parameter`

    def __new__(cls, *_: Any, **options: Any) -> Self:
        """Says what is wrong where Python would only know of an unexpected argument."""
        if not isinstance(cls.signal, Updates) and "previous" in options:
            raise _previous_error(cls, options["previous"])
        return super().__new__(cls)

    def __init__(self, arguments: dict[str, Any]) -> None:
        options = {k: as_plain(x) for k, x in arguments.items() if k not in _NOT_OPTIONS}
        self._validate(options)
        self._layers = arguments["layers"]
        self._flat_tensors = FlatTensors()
        super().__init__(arguments["params"], options)

    def _layer_options(self, group: dict[str, Any]) -> LayerOptions:
        bounds = group["scale_bounds"]
        bounds = bounds and tuple(bounds)  # some checkpoint formats make a list of it
        estimator = _estimator(group["gamma"], group["c"], bounds, group["nonfinite"])
        return LayerOptions(estimator, group.get("previous"))

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As torch's; a group may have its own value of every option, `layers` included, and
        "no_weight_decay", the names of parameters that its weight decay is not for.

        A parameter that a group has twice is stepped once, with a warning, where torch's own
        optimizers step it twice.

        Raises:
            ValueError: for a bad option, a parameter in two groups, or one given twice where
                `layers` is not "tensor"; nothing is added then.
        """
        if not isinstance(param_group, dict):
            raise TypeError(f"param_group must be a dict, got {type(param_group).__name__}")
        group = {key: as_plain(value) for key, value in param_group.items() if key != "layers"}
        self._validate(self.defaults | group)
        layers = param_group.get("layers", self._layers)
        if not isinstance(group["params"], (Tensor, set)):
            group["params"] = each_once(checked_params(group["params"]), layers)
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
        self._name_last_group(layers)

    @torch.no_grad()
    def step_parameter(
        self, parameter: Tensor, group: dict[str, Any] | None = None, index: int | None = None
    ) -> None:
        """Steps one parameter, as soon as its gradient is complete.

        For training loops that call it in a hook of their own and free the gradient then, as
        OneTrainer's fused back pass does. The numbers are those of `step`, bit for bit. Where the
        loop is your own, `release_gradients` does the same in larger parts, which is faster: a
        call takes about a millisecond whatever the parameter's size. No step hooks run, and a
        scheduler may warn that `step` was not called: call it once all gradients are freed.

        Args:
            parameter: with its gradient in `grad`; without one, nothing is done. It has to be
                a layer of its own (layers="tensor"), whole, and on one process.
            group: the one of `param_groups` that it is in; looked up if not given.
            index: its place in the group; looked up if not given.

        Raises:
            TypeError: if `parameter` is no tensor.
            ValueError: if it is not there, and for an option that needs several parameters'
                gradients or the number of steps taken: capturable, differentiable,
                nonfinite="raise", c="theoretical", and layers of several parameters.
            NotImplementedError: for an optimizer of sharded parameters, or of
                DistributedDataParallel's.
            RuntimeError: if gradients are released already (`release_gradients`).

        Examples:
            >>> from hf_adalip import AdamLip
            >>> weight = torch.nn.Parameter(torch.ones(2))
            >>> optimizer = AdamLip([weight], lr=0.1)
            >>> def step_and_free(parameter):
            ...     optimizer.step_parameter(parameter)
            ...     parameter.grad = None
            >>> handle = weight.register_post_accumulate_grad_hook(step_and_free)
            >>> weight.sum().backward()
            >>> weight.detach(), weight.grad
            (tensor([0.9000, 0.9000]), None)
        """
        from .release import step_parameter  # which needs this class

        step_parameter(self, parameter, group, index)

    def _validate(self, group: dict[str, Any]) -> None:
        """Refuses a bad option of a group (or of the defaults) before anything is changed."""
        if "previous" in group and not isinstance(self.signal, Updates):
            raise _previous_error(type(self), group["previous"])
        validate(group)
        self._state_keys(group)

    def __getstate__(self) -> dict[str, Any]:
        return super().__getstate__() | {"state": self._separate_state(), "_layers": self._layers}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        for group in self.param_groups:  # saved before an option existed
            for name, value in self.defaults.items():
                group.setdefault(name, value)

    def state_dict(self) -> dict[str, Any]:
        """As torch's; numbers and sketches may be copies."""

        def separate(_: torch.optim.Optimizer, packed: dict[str, Any]) -> None:
            packed["state"] = {key: unpacked(state) for key, state in packed["state"].items()}

        # The first hook: the user's see, and may change, what is returned.
        handle = self.register_state_dict_post_hook(separate, prepend=True)
        try:
            return super().state_dict()
        finally:
            handle.remove()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads a state_dict; S, norms and step come back bit for bit, also for bf16 parameters.

        Options that an older state_dict lacks take this optimizer's values, and state that it
        lacks starts as before a first step. Layers stay as this optimizer has them. A state_dict
        of torch's base optimizer is taken too, with its options (`decoupled_weight_decay` is False
        in Adam's, True in AdamW's).

        Raises:
            TypeError: for what is no dict.
            ValueError: for the state of other parameters, for a value that no option or state can
                have (a bad beta, an S that is NaN), and for an option of torch's that this
                optimizer does not have (amsgrad, centered, ...). Nothing has been changed then.
        """
        refuse_unless_dict(state_dict)
        with loading(self):
            super().load_state_dict(state_dict)

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
        for group, saved in zip(self.param_groups, state_dict["param_groups"], strict=False):
            options = {key: as_plain(x) for key, x in saved_group(self, group, saved).items()}
            if not isinstance(self.signal, Updates):
                options.pop("previous", None)  # saved by a -U form, whose moments are the same
            self._validate(options)
        super()._check_loaded(state_dict)

    def _state_keys(self, group: dict[str, Any]) -> StateKeys:
        own = ("prev_lr",) if self.signal.is_recomputed(self.rule, group) else ()
        histories = self.signal.history_keys(self.rule, group)
        if group["history"] != "exact" and not histories:
            raise ValueError(
                f"history={group['history']!r} has nothing to act on: {type(self).__name__} "
                "computes its last update again from the moments that it keeps anyway; leave "
                'history="exact"'
            )
        return StateKeys(self.rule.state_keys(group), histories, ("step", *own))

    def _buckets(self, plan: StepPlan) -> list[tuple[Form | None, list[tuple[int, LocalParam]]]]:
        """Tensors of one group, device and dtype are stepped together; the fused form is last."""
        alike: dict[Any, list[tuple[int, LocalParam]]] = {}
        stepped_params = [p for layer in plan.layers for p in layer.params]
        refuse_unless_roundable(self.param_groups, stepped_params)
        for group in self.param_groups:
            if group["fused"]:  # set by hand, loaded, or moved since
                stepped = [p for p in group["params"] if p.grad is not None]
                fused.refuse_unless_possible(stepped, stepped=True)
        params = [p for group in self.param_groups for p in group["params"]]
        size = sum(shard_of(p).local(p).numel() for p in params)
        chosen = {group_index(group): _form(group, size) for group in self.param_groups}
        for i, layer in enumerate(plan.layers):
            for absent, param in (
                *((False, param) for param in layer.params),
                *((True, param) for param in layer.absent),
            ):
                form = chosen[group_index(param.group)]
                if form == "fused" and not fused.takes(param):
                    form = "foreach"
                kind = (param.decays, param.sketch, param.param.device, param.param.dtype)
                key = (absent, form, group_index(param.group), *kind)
                alike.setdefault(key, []).append((i, param))
        keys = sorted(alike, key=lambda key: (key[1] == "fused", key[0]))
        return [(None if key[0] else FORMS[key[1]], alike[key]) for key in keys]

    def _prepare(self, bucket: Bucket, batch: Batch) -> None:
        """Compiles the fused form; where nobody asked for it and it does not compile, foreach."""
        try:
            fused.prepare(batch)
        except KernelError as error:
            if batch.group["fused"]:
                raise
            fused.forgo(error)
            bucket.form, batch.prepared = foreach, None


def _previous_error(kind: type, given: object) -> ValueError:
    return ValueError(
        f"previous={given!r} is for the -U forms; {kind.__name__} estimates S from gradients"
    )


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
    params = [shard_of(p).local(p) for p in group["params"]]
    if any(p.device.type != "cpu" for p in params):
        return "foreach" if _default_to_fused_or_foreach(params, False)[1] else "loop"
    if group["fused"] is None and not compiling and fused.pays(size):
        return "fused"
    return "foreach"
