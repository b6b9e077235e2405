"""What torch's own suite asks of every optimizer, asked of the six and of `Lipschitz`.

torch describes an optimizer to its suite by an OptimizerInfo; ours are made from those of the
optimizers that ours extend, without the options that ours do not have. The suite itself is not in
torch's wheels: these are its questions, of which others are in test_torch_contract.py.
"""

from __future__ import annotations

import copy
import inspect
import pickle
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import ReduceLROnPlateau
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)

from hf_adalip import Lipschitz
from hf_adalip.optim import LipOptimizer
from hf_adalip.optim.forms.kernels import cpu
from tests.optim.cases import CLASSES, assert_same

pytestmark = pytest.mark.slow

BASES = {"ada": "SGD", "rms": "RMSprop", "adam": "Adam"}


class LipschitzSGD(Lipschitz):
    base = torch.optim.SGD

    def __init__(self, params: Any, **options: Any) -> None:
        super().__init__(self.base(params, **options), fused=options.get("fused"))


class LipschitzAdam(LipschitzSGD):
    base = torch.optim.Adam


ALL: dict[str, tuple[type[Optimizer], str]] = {
    **{name: (kind, BASES[name.partition("lip")[0]]) for name, kind in CLASSES.items()},
    "Lipschitz SGD": (LipschitzSGD, "SGD"),
    "Lipschitz Adam": (LipschitzAdam, "Adam"),
}
HAS_FUSED = not cpu.missing()


@pytest.fixture(scope="module")
def infos() -> dict[str, Any]:
    """Not at import: it takes seconds, and forbids the whole process to set backend flags."""
    common = pytest.importorskip(
        "torch.testing._internal.common_optimizers",
        reason="torch's test kit is not there (pip install expecttest)",
        exc_type=ImportError,
    )
    torch.backends.__allow_nonbracketed_mutation_flag = True
    of_torch = {info.optim_cls.__name__: info for info in common.optim_db}

    def ours(kind: type[Optimizer], base: str) -> Any:
        info = of_torch[base]
        known = set(inspect.signature(kind).parameters)
        if issubclass(kind, LipschitzSGD):
            known = set(inspect.signature(kind.base).parameters)

        def inputs(device: Any, dtype: Any = None) -> list[Any]:
            own = [x for x in info.optim_inputs_func(device, dtype) if set(x.kwargs) <= known]
            if issubclass(kind, LipOptimizer):
                own += [
                    common.OptimizerInput(None, {"capturable": True}, "capturable"),
                    common.OptimizerInput(
                        None,
                        {"weight_decay": 0.1, "decoupled_weight_decay": False, "gamma": 0.5},
                        "L2",
                    ),
                ]
            return own

        wraps = issubclass(kind, LipschitzSGD)
        return common.OptimizerInfo(
            kind,
            optim_inputs_func=inputs,
            optim_error_inputs_func=common.get_error_inputs_for_all_optims,
            scheduler_inputs=info.scheduler_inputs,
            supported_impls=("foreach", "fused")
            if wraps
            else ("foreach", "fused", "differentiable"),
            not_og_supported_flags=("foreach", "fused", "differentiable", "maximize", "capturable"),
            supports_fused_on=("cpu",) if HAS_FUSED else (),
        )

    made = {name: ours(*of) for name, of in ALL.items()}
    for info in made.values():
        every = common._get_optim_inputs_including_global_cliquey_kwargs
        # One compiled kernel each: the fused form has its own tests.
        info.every_input = [
            (x.desc, x.kwargs)
            for x in every("cpu", torch.float32, info, skip=("differentiable",))
            if not x.kwargs.get("fused") or x.desc.startswith("default")
        ]
        info.forms = [flag for flag in ("foreach", "fused") if flag in info.supported_impls]
        if not HAS_FUSED:
            info.forms.remove("fused")
        info.errors = common.OptimizerErrorEnum
    return made


@pytest.fixture(params=ALL)
def info(request: pytest.FixtureRequest, infos: dict[str, Any]) -> Any:
    return infos[request.param]


def configurations(info: Any) -> Iterator[dict[str, Any]]:
    """Arguments of the constructor, in every form but the differentiable one."""
    for _, kwargs in info.every_input:
        yield copy.deepcopy(kwargs)


def parameters(*shapes: tuple[int, ...], dtype: torch.dtype | None = None) -> list[Tensor]:
    return [nn.Parameter(torch.randn(shape, dtype=dtype)) for shape in shapes]


def problem(params: list[Tensor], optimizer: Optimizer) -> Callable[[], Tensor]:
    """A closure for a weight and a bias."""
    weight, bias = params
    inputs = torch.linspace(0.2, 1.0, weight.shape[1], dtype=weight.dtype)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = (weight.mv(inputs) + bias).pow(2).sum()
        loss.backward()
        return loss

    return closure


def stepped(info: Any, kwargs: dict[str, Any], *, named: bool = False) -> tuple[Any, ...]:
    """An optimizer that has state, its parameters and its closure."""
    params = parameters((4, 3), (4,))
    given = [("weight", params[0]), ("bias", params[1])] if named else params
    optimizer = info.optim_cls(given, **kwargs)
    closure = problem(params, optimizer)
    for _ in range(3):
        optimizer.step(closure)
    return optimizer, params, closure


def without_names(state_dict: dict[str, Any]) -> dict[str, Any]:
    groups = [
        {k: v for k, v in group.items() if k not in ("param_names", "layer_names")}
        for group in state_dict["param_groups"]
    ]
    return {**state_dict, "param_groups": groups}


# Construction


def test_errors(info: Any) -> None:
    """Of the kinds that torch wants. Its words are wanted where they are torch's own or, for
    users who filter warnings, the same."""
    for case in info.optim_error_inputs_func("cpu", torch.float32):
        given = case.optimizer_error_input
        assert case.error_on is info.errors.CONSTRUCTION_ERROR
        params = parameters((1, 1)) if given.params is None else given.params
        words = case.error_regex if "1-element" not in case.error_regex else "(?i)lr"
        if issubclass(case.error_type, Warning):
            if issubclass(info.optim_cls, Lipschitz):
                continue  # refused, as its base steps a duplicate twice
            with pytest.warns(case.error_type, match=words):
                info.optim_cls(params, **given.kwargs)
        else:
            with pytest.raises(case.error_type, match=words):
                info.optim_cls(params, **given.kwargs)


def test_parameters_on_meta(info: Any) -> None:
    """A model is built there, and gets its memory, and its parameters, later."""
    if "fused" not in info.forms:
        pytest.skip(f"needs {cpu.missing()}")
    with torch.device("meta"):
        model = nn.Linear(2, 3)
        optimizer = info.optim_cls(model.parameters(), fused=True)
        for p in model.parameters():
            p.grad = torch.rand_like(p)
    with pytest.raises(RuntimeError, match=r"fused=True.*all the params|fused=True.*to_empty"):
        optimizer.step()
    optimizer.zero_grad()
    model.to_empty(device="cpu")
    optimizer.step()


# Steps


@pytest.mark.parametrize("contiguous", [True, False])
@pytest.mark.parametrize("scheduled", [True, False])
def test_the_loss_goes_in_the_right_direction(info: Any, contiguous: bool, scheduled: bool) -> None:
    for schedulers in info.scheduler_inputs if scheduled else [()]:
        for case in info.optim_inputs_func("cpu")[: 1 if scheduled else None]:
            params = parameters((4, 3), (4,))
            if not contiguous:
                params = [nn.Parameter(torch.stack([p, p], -1)[..., 0].detach()) for p in params]
                assert not params[0].is_contiguous()
            kwargs = {**copy.deepcopy(case.kwargs), "foreach": False}
            optimizer = info.optim_cls(params, **kwargs)
            closure = problem(params, optimizer)
            following = [make(optimizer) for make in schedulers]
            before = closure().item()
            for _ in range(6):
                loss = optimizer.step(closure)
                for scheduler in following:
                    plateau = isinstance(scheduler, ReduceLROnPlateau)
                    scheduler.step(loss.item()) if plateau else scheduler.step()
            after = closure().item()
            assert after > before if case.kwargs.get("maximize") else after < before, case.desc


def test_every_form_takes_the_steps_of_the_loop(info: Any) -> None:
    """With an element of no dimension and a tensor of no element at the end, as torch has them."""
    for form in info.forms:
        cases = [case.kwargs for case in info.optim_inputs_func("cpu")]
        for kwargs in cases[:1] if form == "fused" else cases:
            results = []
            for taken in (False, True):
                torch.manual_seed(1)
                params = parameters((3, 2), (3,), (), (0,))
                options = dict.fromkeys(info.forms, False) | {form: taken}
                optimizer = info.optim_cls(params, **copy.deepcopy(kwargs), **options)
                for _ in range(4):
                    for p in params:
                        p.grad = torch.randn_like(p)
                    optimizer.step()
                results.append(([p.detach() for p in params], optimizer.state_dict()["state"]))
            torch.testing.assert_close(results[1], results[0], rtol=1e-5, atol=1e-6)


def test_parameters_of_several_dtypes(info: Any) -> None:
    results = []
    for taken in (False, True):
        torch.manual_seed(1)
        params = [
            p
            for dtype in (torch.float32, torch.float64, torch.bfloat16)
            for p in parameters((3, 2), (3,), dtype=dtype)
        ]
        optimizer = info.optim_cls(params, lr=0.01, foreach=taken)
        for _ in range(3):
            for p in params:
                p.grad = torch.randn_like(p)
            optimizer.step()
        results.append([p.detach() for p in params])
    for actual, expected in zip(results[1], results[0], strict=True):
        torch.testing.assert_close(actual, expected)


def test_a_step_without_gradients_is_none(info: Any) -> None:
    """Of parameters that take none, too; the closure's loss is returned."""
    params = [torch.randn(2, 3), *parameters((2,))]
    before = [p.detach().clone() for p in params]
    optimizer = info.optim_cls(params, weight_decay=0.1)
    assert optimizer.step(lambda: 7) == 7
    assert_same([p.detach() for p in params], before)


def test_zero_gradients_move_nothing_without_weight_decay(info: Any) -> None:
    for kwargs in configurations(info):
        params = parameters((2, 3), (2,))
        before = [p.detach().clone() for p in params]
        optimizer = info.optim_cls(params, **kwargs | {"weight_decay": 0.0})
        for _ in range(2):
            for p in params:
                p.grad = torch.zeros_like(p)
            optimizer.step()
        assert_same([p.detach() for p in params], before)


def test_state_is_not_empty(info: Any) -> None:
    for kwargs in configurations(info):
        optimizer, params, _ = stepped(info, kwargs)
        assert set(optimizer.state) == set(params)
        assert all(optimizer.state.values())


def test_the_profiler_names_the_step(info: Any) -> None:
    optimizer, _, closure = stepped(info, {})
    with torch.autograd.profiler.profile() as profile:
        optimizer.step(closure)
        optimizer.zero_grad()
    names = {event.name for event in profile.function_events}
    assert f"Optimizer.step#{info.optim_cls.__name__}.step" in names
    assert any(name.startswith("Optimizer.zero_grad#") for name in names)


def test_hooks_of_all_and_of_one_run_in_torchs_order(info: Any) -> None:
    optimizer, _, _ = stepped(info, {})
    calls: list[int] = []

    def note(number: int) -> Callable[..., None]:
        return lambda o, *_: calls.append(number) if o is optimizer else None

    handles = [
        register_optimizer_step_pre_hook(note(0)),
        register_optimizer_step_post_hook(note(3)),
        optimizer.register_step_pre_hook(note(1)),
        optimizer.register_step_post_hook(note(2)),
    ]
    optimizer.step()
    for handle in handles:
        handle.remove()
    optimizer.step()
    assert calls == [0, 1, 2, 3]


# state_dict


def test_a_loaded_state_goes_on_alike(info: Any) -> None:
    for kwargs in configurations(info):
        optimizer, params, closure = stepped(info, kwargs)
        others = [nn.Parameter(p.detach().clone()) for p in params]
        again = info.optim_cls(others, **copy.deepcopy(kwargs))
        saved = copy.deepcopy(optimizer.state_dict())
        kept = copy.deepcopy(saved)
        again.load_state_dict(saved)
        assert_same(saved, kept)
        other_closure = problem(others, again)
        for _ in range(3):
            assert optimizer.step(closure) == again.step(other_closure)
        assert_same(again.state_dict(), optimizer.state_dict())
        # Repeated groups are written alike.
        again.param_groups.extend(again.param_groups)
        last = again.state_dict()["param_groups"][-1]
        assert_same(last, optimizer.state_dict()["param_groups"][-1])


def test_an_older_state_dict_loads(info: Any) -> None:
    """Without the flags that an optimizer of torch did not have at first, and a step that is a
    number."""
    for kwargs in configurations(info):
        optimizer, params, closure = stepped(info, kwargs)
        old = copy.deepcopy(optimizer.state_dict())
        for group in old["param_groups"]:
            for flag in info.not_og_supported_flags:
                group.pop(flag, None)
        for kept in old["state"].values():
            if "step" in kept:
                kept["step"] = kept["step"].item()
        optimizer.load_state_dict(old)
        optimizer.step(closure)
        assert all(p.isfinite().all() for p in params)


@pytest.mark.parametrize("named", [(False, True), (True, False), (True, True)])
def test_names_may_come_and_go(info: Any, named: tuple[bool, bool]) -> None:
    optimizer, _, _ = stepped(info, {}, named=named[0])
    again, _, closure = stepped(info, {}, named=named[1])
    again.load_state_dict(optimizer.state_dict())
    saved, loaded = (without_names(o.state_dict()) for o in (optimizer, again))
    assert_same(loaded, saved)
    again.step(closure)
    assert again.state_dict()["param_groups"][0]["param_names"] == ["weight", "bias"]


def test_a_file_that_is_read_without_pickle(info: Any, tmp_path: Any) -> None:
    for kwargs in configurations(info):
        optimizer, _, _ = stepped(info, kwargs)
        torch.save(optimizer.state_dict(), tmp_path / "state.pt")
        loaded = torch.load(tmp_path / "state.pt", weights_only=True)
        assert_same(loaded, optimizer.state_dict())


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_a_copy_has_every_public_attribute(info: Any, copied: Callable[[Any], Any]) -> None:
    for kwargs in configurations(info):
        optimizer, _, _ = stepped(info, kwargs)
        public = [
            {k for k in vars(o) if not k.startswith("_")} for o in (optimizer, copied(optimizer))
        ]
        assert public[0] == public[1]


# Hooks of state_dict and load_state_dict


def test_hooks_of_state_dict(info: Any) -> None:
    """One before may write into `state` itself; one after may change or replace what comes."""

    def before(optimizer: Optimizer) -> None:
        optimizer.state["seen"] = 1

    def after(_: Optimizer, saved: dict[str, Any]) -> dict[str, Any]:
        saved["found"] = saved["state"].pop("seen", None)
        return saved

    for kwargs in configurations(info):
        optimizer, _, _ = stepped(info, kwargs)
        handle = optimizer.register_state_dict_post_hook(after)
        assert optimizer.state_dict()["found"] is None
        handle.remove()
        optimizer.register_state_dict_pre_hook(before)
        assert optimizer.state_dict()["state"]["seen"] == 1
        optimizer.register_state_dict_post_hook(after)
        saved = optimizer.state_dict()
        assert (saved["found"], "seen" in saved["state"]) == (1, False)
        optimizer.register_state_dict_post_hook(lambda *_: {})  # which is not None
        assert optimizer.state_dict() == {}


def test_hooks_of_load_state_dict(info: Any) -> None:
    def change(_: Optimizer, saved: dict[str, Any]) -> None:
        saved["param_groups"][0]["lr"] = 0.002

    def replace(_: Optimizer, saved: dict[str, Any]) -> dict[str, Any]:
        saved = copy.deepcopy(saved)
        saved["param_groups"][0]["lr"] = 0.003
        return saved

    def after(optimizer: Optimizer) -> None:
        optimizer.state["lr"] = optimizer.param_groups[0]["lr"]

    for kwargs in configurations(info):
        optimizer, _, closure = stepped(info, kwargs)
        optimizer.register_load_state_dict_post_hook(after)
        optimizer.register_load_state_dict_pre_hook(change)
        optimizer.load_state_dict(optimizer.state_dict())
        assert optimizer.state["lr"] == 0.002
        optimizer.register_load_state_dict_pre_hook(replace, prepend=True)
        optimizer.load_state_dict(optimizer.state_dict())
        assert optimizer.state["lr"] == 0.002  # the other comes after it
        optimizer.register_load_state_dict_pre_hook(replace)
        optimizer.load_state_dict(optimizer.state_dict())
        assert optimizer.state["lr"] == 0.003
        optimizer.step(closure)
