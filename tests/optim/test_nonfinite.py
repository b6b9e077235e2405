"""A gradient with inf or NaN in it: skipped, refused, or computed with; never spread silently."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _get_current_dispatch_mode

from hf_adalip import AdamLip, Lipschitz
from hf_adalip.optim.estimator import FORGOTTEN
from hf_adalip.optim.forms.kernels import cpu
from hf_adalip.optim.release import release_gradients
from tests.optim.cases import (
    CLASSES,
    SHAPES,
    Named,
    assert_same,
    forget,
    forms,
    momentum_only,
    named_params,
    random_grads,
    set_grads,
    six,
    snapshot,
    train,
)

bads = pytest.mark.parametrize("bad", [-math.inf, math.nan], ids=str)
every_layers = pytest.mark.parametrize("layers", ["tensor", "module"])


def bad_grads(params: Named, seed: int, bad: float, name: str = "a.bias") -> Named:
    """Random gradients, one number of which is bad."""
    grads = random_grads(params, seed)
    grads[name].view(-1)[-1] = bad
    return grads


def hit(layers: str) -> list[str]:
    """The tensors whose layer a bad "a.bias" belongs to."""
    return ["a.bias"] if layers == "tensor" else ["a.weight", "a.bias"]


def options_of(name: str) -> dict[str, Any]:
    """With all the state that the rule has."""
    own = {"momentum": 0.9, "nesterov": True} if momentum_only(name) else {}
    return {"lr": 0.1, "weight_decay": 0.1, **own}


COUNT = "nonfinite_steps"


def state_but_count(optimizer: torch.optim.Optimizer, p: Tensor) -> dict[str, Tensor]:
    return {k: v.clone() for k, v in optimizer.state[p].items() if k != COUNT}


# skip


@six
@forms
@bads
@every_layers
def test_skip_leaves_the_layer_alone(name: str, foreach: bool, bad: float, layers: str) -> None:
    """Its parameters, moments, S and step, bit for bit; the count moves, x_{t-1} is forgotten."""
    params = named_params()
    optimizer = CLASSES[name](params.items(), layers=layers, foreach=foreach, **options_of(name))
    train(optimizer, params, range(3))
    before = {
        n: (params[n].detach().clone(), state_but_count(optimizer, params[n])) for n in params
    }
    set_grads(params, bad_grads(params, 3, bad))
    optimizer.step()
    for n, (value, state) in before.items():
        unchanged = n in hit(layers)
        assert torch.equal(params[n], value) == unchanged, n
        if unchanged:
            forget(state)
            assert_same(state_but_count(optimizer, params[n]), state, n)
        assert optimizer.state[params[n]][COUNT].item() == unchanged, n
    counts = {n: r.nonfinite_steps for n, r in optimizer.layer_learning_rates().items()}
    assert counts == (
        {"a": 1, "b": 0} if layers == "module" else {"a.weight": 0, "a.bias": 1, "b.weight": 0}
    )


@six
@forms
@every_layers
def test_other_layers_step_as_if_alone(name: str, foreach: bool, layers: str) -> None:
    """And after the bad step the skipped layer goes on as if that step had not been, but for
    x_{t-1}, which is forgotten."""
    results = []
    for bad_step in (True, False):
        params = named_params()
        optimizer = CLASSES[name](
            params.items(), layers=layers, foreach=foreach, **options_of(name)
        )
        train(optimizer, params, range(3))
        grads = bad_grads(params, 3, math.nan)
        if not bad_step:
            for n in hit(layers):
                grads[n] = None  # a whole layer without a gradient
        set_grads(params, grads)
        optimizer.step()
        for n in hit(layers) if not bad_step else ():
            forget(optimizer.state[params[n]])
        train(optimizer, params, range(4, 7))
        results.append(snapshot(optimizer, params))
        for p in params.values():
            assert all(v.isfinite().all() for v in (p, *optimizer.state[p].values()))
    for result in results:
        for state in result["state"]["state"].values():
            del state[COUNT]
    assert_same(*results)


@six
@forms
@bads
@every_layers
def test_skip_on_the_very_first_step(name: str, foreach: bool, bad: float, layers: str) -> None:
    """The next step is then the first: A = α."""
    results = []
    for bad_first in (True, False):
        params = named_params()
        optimizer = CLASSES[name](
            params.items(), layers=layers, foreach=foreach, **options_of(name)
        )
        if bad_first:
            set_grads(params, {n: torch.full_like(p, bad) for n, p in params.items()})
            optimizer.step()
            assert_same({n: p.detach() for n, p in params.items()}, detached(named_params()))
            for rate in optimizer.layer_learning_rates().values():
                assert rate == (1.0, 0.0, 0.0, 1)
        train(optimizer, params, range(3))
        results.append(detached(params))
    assert_same(*results)


def detached(params: Named) -> Named:
    return {n: p.detach() for n, p in params.items()}


@six
@forms
@bads
@pytest.mark.parametrize("count", [1, 2])
def test_after_a_skip_the_scale_waits_for_two_signals(
    name: str, foreach: bool, bad: float, count: int
) -> None:
    """A ratio takes two in succession: S stays in the first step after it, which A = α·S takes."""
    params = named_params()
    optimizer = CLASSES[name](params.items(), lr=0.1, foreach=foreach)
    train(optimizer, params, range(3))
    rates = [optimizer.layer_learning_rates()["a.bias"]]
    seeds = range(3, 6 + count)
    for seed in seeds:
        spoiled = seed < 3 + count
        set_grads(params, bad_grads(params, seed, bad) if spoiled else random_grads(params, seed))
        optimizer.step()
        rates.append(optimizer.layer_learning_rates()["a.bias"])
    skipped, first, second = rates[1 : 1 + count], rates[1 + count], rates[2 + count]
    assert all(rate.scale == rates[0].scale and rate.norm == 0.0 for rate in skipped)
    assert first.scale == rates[0].scale
    assert first.lr == pytest.approx(0.1 * first.scale, rel=1e-6)
    assert first.norm > 0
    assert second.scale != first.scale
    if not name.endswith("u"):
        g, h = (random_grads(params, seed)["a.bias"] for seed in (3 + count, 4 + count))
        assert first.norm == pytest.approx(g.norm().item())
        ratio = (g.norm() / ((h - g).norm() + 1e-8)).item()
        assert second.scale == pytest.approx(0.8 * first.scale + 0.2 * ratio)


@six
@forms
def test_a_skipped_layer_is_one_that_has_begun(name: str, foreach: bool) -> None:
    """Zero gradients and lr = 0 are a step for it, in which its moments decay, and none for a layer
    that has had no gradient yet."""
    results = []
    for grad in (math.nan, None):
        p = torch.zeros(1, requires_grad=True)
        optimizer = CLASSES[name]([p], foreach=foreach, **options_of(name))
        for value in (1.0, 2.0, grad):
            p.grad = None if value is None else torch.tensor([value])
            optimizer.step()
        optimizer.param_groups[0]["lr"] = 0.0
        for _ in range(3):
            p.grad = torch.zeros(1)
            optimizer.step()
        state = state_but_count(optimizer, p)
        assert state["prev_norm"] == 0
        del state["lipschitz_scale"]
        results.append(state)
    assert_same(*results)


@six
@forms
def test_skips_are_counted(name: str, foreach: bool) -> None:
    params = named_params()
    optimizer = CLASSES[name](params.items(), foreach=foreach, layers="module")
    for seed in range(7):
        grads = bad_grads(params, seed, math.nan) if seed % 2 else random_grads(params, seed)
        set_grads(params, grads)
        optimizer.step()
    rates = optimizer.layer_learning_rates()
    assert (rates["a"].nonfinite_steps, rates["b"].nonfinite_steps) == (3, 0)


@six
@forms
def test_a_bad_tensor_and_one_without_gradient(name: str, foreach: bool) -> None:
    """The silent one is skipped with its layer."""
    params = named_params()
    optimizer = CLASSES[name](params.items(), foreach=foreach, layers="module")
    train(optimizer, params, range(2))
    before = snapshot(optimizer, params)
    states = before["state"]["state"]
    forget(states[0])
    states[1]["prev_norm"].fill_(FORGOTTEN)
    grads: dict[str, Any] = bad_grads(params, 2, math.inf, "a.weight")
    grads |= {"a.bias": None, "b.weight": None}
    set_grads(params, grads)
    optimizer.step()
    after = snapshot(optimizer, params)
    for state in (before, after):
        for tensor_state in state["state"]["state"].values():
            tensor_state.pop(COUNT)
    assert_same(after, before)


@pytest.mark.parametrize("name", ["adalipu", "rmslipu", "adamlipu"])
@forms
def test_a_finite_gradient_whose_update_is_not(name: str, foreach: bool) -> None:
    """-U: the signal overflows, though the gradient does not. Nothing may be poisoned."""
    p = torch.zeros(3, requires_grad=True)
    own = {"eps": 0.0} if not momentum_only(name) else {}
    optimizer = CLASSES[name]([p], lr=1e30, foreach=foreach, **own)
    grads = [torch.tensor([1.0, 2.0, 3.0]), torch.tensor([1e15, 0.0, 1.0]), torch.zeros(3)]
    for grad in grads:
        p.grad = grad
        optimizer.step()
    values = (p, *optimizer.state[p].values())
    assert all(v.isfinite().all() for v in values)


@six
@forms
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["float16", "bfloat16"])
def test_low_precision_gradients_do_not_overflow_the_norm(
    name: str, foreach: bool, dtype: torch.dtype
) -> None:
    """60000² is not a float16, but the norm is a float32: such a gradient is not skipped."""
    p = torch.zeros(8, dtype=dtype, requires_grad=True)
    optimizer = CLASSES[name]([p], lr=1e-6, foreach=foreach)
    p.grad = torch.full((8,), 60000.0, dtype=dtype)
    optimizer.step()
    (rate,) = optimizer.layer_learning_rates().values()
    assert rate.nonfinite_steps == 0
    assert p.all()


def forgets_what_overflowed(optimizer: torch.optim.Optimizer, p: Tensor) -> None:
    """1e5 is no float16: the step after it has nothing to compare with, and the next one has."""
    scales = []
    for value in (1.0, 2.0, 1e5, 3.0, 4.0):
        before = p.detach().clone()
        p.grad = torch.full((8,), value)
        optimizer.step()
        assert p.isfinite().all()
        assert (p != before).all()
        ((_, (scale, _, norm, skipped)),) = optimizer.layer_learning_rates().items()
        scales.append(scale)
        assert norm == pytest.approx(value * math.sqrt(8))
        assert skipped == 0
    assert scales[3] == scales[2]
    assert scales[4] == pytest.approx(0.8 * scales[3] + 0.2 * 3)


every_nonfinite = pytest.mark.parametrize("nonfinite", ["skip", "raise", "propagate"])


@every_nonfinite
@forms
def test_a_history_that_overflows_is_forgotten(foreach: bool, nonfinite: str) -> None:
    p = torch.ones(8, requires_grad=True)
    options: dict[str, Any] = {"history": "float16", "nonfinite": nonfinite, "foreach": foreach}
    forgets_what_overflowed(AdamLip([p], lr=0.1, **options), p)


@pytest.mark.skipif(not hasattr(Tensor, "grad_dtype"), reason="gradients have the dtype of theirs")
@every_nonfinite
def test_a_history_of_lipschitz_that_overflows_is_forgotten(nonfinite: str) -> None:
    """float16 parameters whose gradients are float32 have a history of float16."""
    p = torch.zeros(8, dtype=torch.float16, requires_grad=True)
    p.grad_dtype = torch.float32
    forgets_what_overflowed(Lipschitz(torch.optim.Rprop([p], lr=0.1), nonfinite=nonfinite), p)


# Squares that overflow


def in_every_form() -> list[dict[str, bool]]:
    fused = [] if cpu.missing() else [{"fused": True}]
    return [{"foreach": False}, {"foreach": True}, *fused]


FIRST = 2.0**64  # 1.8e19, whose square is the first to overflow float32


@six
@pytest.mark.parametrize("size", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_a_gradient_whose_square_overflows_is_left_out(
    name: str, size: int, dtype: torch.dtype
) -> None:
    """In every form alike: a second moment would be infinite for good. Of float64 parameters, one
    is left out whose norm is no float32, which S and norms are."""
    for form in in_every_form():
        p = torch.ones(size, dtype=dtype, requires_grad=True)
        optimizer = CLASSES[name]([p], lr=1e-3, **form)
        counts = []
        for value in (1.0, 1e18, 1e20, -1e38, 2.0, FIRST, 1e39, 1e155):
            before = p.detach().clone()
            p.grad = torch.tensor([0.0] * (size - 1) + [value], dtype=dtype)
            optimizer.step()
            (rate,) = optimizer.layer_learning_rates().values()
            counts.append(rate.nonfinite_steps - sum(counts))
            assert torch.equal(p, before) or not counts[-1], (form, value)
            assert all(x.isfinite().all() for x in (p, *optimizer.state[p].values())), form
        wide = dtype == torch.float64
        assert counts == ([0] * 6 + [1, 1] if wide else [0, 0, 1, 1, 0, 1, 1, 1]), form


@pytest.mark.parametrize("name", ["adalip", "adamlip"])
def test_the_norm_of_a_layer_may_overflow_where_no_element_does(name: str) -> None:
    for form in in_every_form():
        params = named_params()
        optimizer = CLASSES[name](params.items(), layers="module", **form)
        set_grads(params, {n: torch.full_like(p, 1.5e19) for n, p in params.items()})
        before = {n: p.clone() for n, p in detached(params).items()}
        optimizer.step()
        assert_same(detached(params), before)
        assert all(r.nonfinite_steps == 1 for r in optimizer.layer_learning_rates().values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_float32_and_float64_layers_side_by_side(dtype: torch.dtype) -> None:
    """Each by its own dtype, and a layer of both by the narrower one."""
    for form in in_every_form():
        params = {
            "a.w": torch.ones(2, dtype=torch.float64, requires_grad=True),
            "a.b": torch.ones(2, dtype=dtype, requires_grad=True),
            "b.w": torch.ones(2, dtype=torch.float64, requires_grad=True),
            "c.w": torch.ones(2, dtype=torch.float32, requires_grad=True),
        }
        optimizer = CLASSES["adamlip"](params.items(), layers="module", **form)
        set_grads(params, {n: torch.full_like(p, 1e20) for n, p in params.items()})
        optimizer.step()
        counts = {n: r.nonfinite_steps for n, r in optimizer.layer_learning_rates().items()}
        assert counts == {"a": int(dtype == torch.float32), "b": 0, "c": 1}


@six
def test_raise_where_a_square_overflows(name: str) -> None:
    for form in in_every_form():
        p = torch.ones(1, requires_grad=True)
        optimizer = CLASSES[name]([("p", p)], nonfinite="raise", **form)
        p.grad = torch.tensor([1e20])
        with pytest.raises(RuntimeError, match=r"or its square.*\(p\)"):
            optimizer.step()
        assert not optimizer.state
        p.grad = torch.tensor([1e18])
        optimizer.step()


@pytest.mark.parametrize("signal", ["gradient", "update"])
def test_a_base_never_sees_a_gradient_whose_square_overflows(signal: Any) -> None:
    for fused in [None] if signal == "update" or cpu.missing() else [False, True]:
        params = [torch.ones(1, requires_grad=True), torch.ones(3, requires_grad=True)]
        base = torch.optim.Adam(params, lr=0.1)
        optimizer = Lipschitz(base, signal=signal, fused=fused)
        for value in (1.0, 1e20, -1e38, 2.0):
            for p in params:
                p.grad = torch.full_like(p, value)
            optimizer.step()
        for p in params:
            kept = (p, *base.state[p].values(), *optimizer.state[p].values())
            assert all(x.isfinite().all() for x in kept)
            assert optimizer.state[p][COUNT] == 2
            assert base.state[p]["step"] == 2


def test_a_change_whose_square_overflows_is_forgotten() -> None:
    """Of two gradients that fit: in every form, S keeps its value."""
    for form in in_every_form():
        p = torch.ones(1, requires_grad=True)
        optimizer = CLASSES["adalip"]([p], lr=1e-20, **form)
        for value in (1.5e19, -1.5e19):
            p.grad = torch.tensor([value])
            optimizer.step()
        (rate,) = optimizer.layer_learning_rates().values()
        assert rate.scale == pytest.approx(0.8)
        assert rate.nonfinite_steps == 0


def test_released_gradients_whose_squares_overflow_are_left_out() -> None:
    p = torch.ones(1, requires_grad=True)
    optimizer = AdamLip([p], lr=0.1)
    with release_gradients(optimizer):
        for value in (1.0, 1e20, 2.0):
            (p * value).sum().backward()
            optimizer.step()
    assert optimizer.state[p][COUNT] == 1
    assert all(x.isfinite().all() for x in (p, *optimizer.state[p].values()))


# raise


@six
@forms
@bads
@every_layers
@pytest.mark.parametrize("steps", [0, 2], ids=["first step", "later"])
def test_raise_changes_nothing(
    name: str, foreach: bool, bad: float, layers: str, steps: int
) -> None:
    """Not the state either, which before a first step is empty; and it names the layer."""
    params = named_params()
    optimizer = CLASSES[name](
        params.items(), layers=layers, foreach=foreach, nonfinite="raise", **options_of(name)
    )
    train(optimizer, params, range(steps))
    before = snapshot(optimizer, params)
    set_grads(params, bad_grads(params, steps, bad))
    layer = "a" if layers == "module" else "a.bias"
    with pytest.raises(RuntimeError, match=rf"not finite.*\({re.escape(layer)}\)"):
        optimizer.step()
    assert_same(snapshot(optimizer, params), before)
    if steps == 0:
        assert not optimizer.state


def test_raise_is_no_step_of_the_theoretical_c() -> None:
    params = named_params()
    optimizer = CLASSES["adalip"](params.items(), c="theoretical", nonfinite="raise")
    train(optimizer, params, range(2))
    before = snapshot(optimizer, params)
    set_grads(params, bad_grads(params, 2, math.nan))
    with pytest.raises(RuntimeError):
        optimizer.step()
    assert_same(snapshot(optimizer, params), before)


@six
@forms
def test_after_raise_training_goes_on(name: str, foreach: bool) -> None:
    results = []
    for bad_step in (True, False):
        params = named_params()
        optimizer = CLASSES[name](params.values(), foreach=foreach, nonfinite="raise")
        train(optimizer, params, range(2))
        if bad_step:
            set_grads(params, bad_grads(params, 2, math.inf))
            with pytest.raises(RuntimeError):
                optimizer.step()
        train(optimizer, params, range(3, 5))
        results.append(snapshot(optimizer, params))
    assert_same(*results)


@pytest.mark.parametrize(
    "form",
    [
        {},
        pytest.param(
            {"fused": True},
            marks=pytest.mark.skipif(bool(cpu.missing()), reason=f"needs {cpu.missing()}"),
        ),
    ],
    ids=["foreach", "fused"],
)
def test_raise_and_skip_in_different_groups(form: dict[str, Any]) -> None:
    """The group that skips does not raise; the one that raises stops both."""
    params = named_params()
    groups = [
        {"params": [("a.bias", params["a.bias"])]},
        {"params": [("b.weight", params["b.weight"])], "nonfinite": "raise"},
    ]
    optimizer = CLASSES["adamlip"](groups, **form)
    live = {n: params[n] for n in ("a.bias", "b.weight")}
    set_grads(live, bad_grads(live, 0, math.nan, "a.bias"))
    optimizer.step()
    assert optimizer.layer_learning_rates()["a.bias"].nonfinite_steps == 1
    before = snapshot(optimizer, params)
    set_grads(live, bad_grads(live, 1, math.nan, "b.weight"))
    with pytest.raises(RuntimeError, match=r"b\.weight"):
        optimizer.step()
    assert_same(snapshot(optimizer, params), before)


# propagate


@six
@forms
@bads
def test_propagate_computes_with_it(name: str, foreach: bool, bad: float) -> None:
    """What torch.optim does: the layer is lost, the others are not."""
    params = named_params()
    optimizer = CLASSES[name](params.items(), foreach=foreach, nonfinite="propagate", lr=0.1)
    train(optimizer, params, [0])
    set_grads(params, bad_grads(params, 1, bad))
    optimizer.step()
    assert not params["a.bias"].isfinite().all()
    assert params["a.weight"].isfinite().all()
    rates = optimizer.layer_learning_rates()
    assert math.isfinite(rates["a.weight"].scale)
    assert {n: r.nonfinite_steps for n, r in rates.items()} == {
        n: int(n == "a.bias") for n in SHAPES
    }


@six
@forms
@every_nonfinite
def test_finite_gradients_give_the_same_numbers(name: str, foreach: bool, nonfinite: str) -> None:
    results = []
    for value in ("skip", nonfinite):
        params = named_params()
        optimizer = CLASSES[name](params.items(), foreach=foreach, nonfinite=value, layers="module")
        train(optimizer, params, range(4))
        results.append(snapshot(optimizer, params))
        del results[-1]["state"]["param_groups"]
    assert_same(*results)


# No synchronisation


class NoLookingAtNumbers(TorchDispatchMode):
    """Refuses what on a GPU would make the host wait for the device."""

    FORBIDDEN = ("_local_scalar_dense", "item", "is_nonzero", "nonzero", "equal", "masked_select")

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func.overloadpacket.__name__ in self.FORBIDDEN:
            raise AssertionError(f"{func} reads a tensor on the host")
        return func(*args, **(kwargs or {}))


@pytest.fixture
def no_looking(monkeypatch: pytest.MonkeyPatch) -> NoLookingAtNumbers:
    """The mode, for the with statement; tolist and numpy read CPU memory behind its back."""
    real = {look: getattr(Tensor, look) for look in ("tolist", "numpy", "__array__")}

    def guarded(look: str) -> Callable[..., Any]:
        def call(self: Tensor, *args: Any, **kwargs: Any) -> Any:
            if isinstance(_get_current_dispatch_mode(), NoLookingAtNumbers):
                raise AssertionError(f"{look} reads a tensor on the host")
            return real[look](self, *args, **kwargs)

        return call

    for look in real:
        monkeypatch.setattr(Tensor, look, guarded(look))
    return NoLookingAtNumbers()


@pytest.mark.parametrize(
    "look", [Tensor.item, bool, float, lambda x: x.tolist(), Tensor.nonzero, lambda x: x.numpy()]
)
def test_the_watch_watches(look: Callable[[Tensor], Any], no_looking: NoLookingAtNumbers) -> None:
    with pytest.raises(AssertionError), no_looking:
        look(torch.ones(1))


@six
@forms
@every_layers
@pytest.mark.parametrize(
    "extra",
    [{}, {"c": "theoretical"}, {"weight_decay": 0.1, "decoupled_weight_decay": False}],
    ids=["", "theoretical", "L2"],
)
@pytest.mark.parametrize("make_lr", [float, torch.tensor], ids=["float lr", "tensor lr"])
def test_a_step_never_synchronises(
    name: str,
    foreach: bool,
    layers: str,
    extra: dict[str, Any],
    make_lr: Callable[[float], Any],
    no_looking: NoLookingAtNumbers,
) -> None:
    params = named_params()
    optimizer = CLASSES[name](
        params.items(), lr=make_lr(0.1), layers=layers, foreach=foreach, **extra
    )
    train(optimizer, params, [0])
    set_grads(params, bad_grads(params, 1, math.nan))
    with no_looking:
        optimizer.step()
    params["a.bias"].grad = None  # and with a tensor of a layer that is silent
    with no_looking:
        optimizer.step()
    with pytest.raises(AssertionError), no_looking:  # reports are made on request only
        optimizer.layer_learning_rates()
