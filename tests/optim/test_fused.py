"""The fused form against the loop, pass by pass, from the same tensors."""

from __future__ import annotations

import copy
import itertools
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor
from torch.testing._internal.two_tensor import TwoTensor

from hf_adalip import AdamLip, Lipschitz
from hf_adalip.optim import LipOptimizer
from hf_adalip.optim import step as loop
from hf_adalip.optim.batch import Batch
from hf_adalip.optim.forms import fused
from hf_adalip.optim.forms.kernels import COLUMNS, Constants, KernelError, Spec, Tensors, cpu
from hf_adalip.optim.forms.kernels.build import warn_once
from tests.optim.cases import (
    CLASSES,
    GRADIENT,
    Named,
    assert_same,
    momentum_only,
    named_params,
    random_grads,
    set_grads,
    snapshot,
)

pytestmark = pytest.mark.skipif(bool(cpu.missing()), reason=f"needs {cpu.missing()}")

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
CUTS = (0, 1, 31, 32, 33, 1023, 1024, 1025, 16383, 16384, 16385, 20_000)
"""Around what a vector, a block and a chunk of step.cpp hold."""


MOMENTUM = {"momentum": 0.9, "weight_decay": 0.1}
COUPLED = {"weight_decay": 0.1, "decoupled_weight_decay": False, "maximize": True}
NESTEROV = MOMENTUM | COUPLED | {"nesterov": True}
EPS = COUPLED | {"eps_in_sqrt": True, "eps": 1e-3}


def options_of(name: str) -> list[dict[str, Any]]:
    """The last has most of them."""
    own = [MOMENTUM, COUPLED, NESTEROV] if momentum_only(name) else [{"weight_decay": 0.1}, EPS]
    return [{}, *own]


def combinations() -> Iterator[Any]:
    for name in CLASSES:
        options = options_of(name)
        # Which writes the history late, as it may stop the step.
        late = options[-1] | {"nonfinite": "raise"}
        for dtype in (torch.float32, torch.bfloat16) if name in GRADIENT else ():
            yield pytest.param(name, late, dtype, id=f"{name}-late-{dtype}")
        for dtype in DTYPES:
            for i in range(len(options)) if dtype == torch.float32 else (len(options) - 1,):
                yield pytest.param(name, options[i], dtype, id=f"{name}-{i}-{dtype}")


every = pytest.mark.parametrize(("name", "options", "dtype"), list(combinations()))


def close(actual: Tensor, expected: Tensor, ulps: float = 16) -> None:
    """Within `ulps` roundings of the wide dtype, and one of a low precision in which it is kept.

    An element may be a difference that cancels, so its error is measured against the largest.
    """
    assert actual.dtype == expected.dtype
    wide = torch.finfo(torch.float64 if expected.dtype == torch.float64 else torch.float32).eps
    low = torch.finfo(expected.dtype).eps
    largest = expected.abs().nan_to_num(0, 0, 0).max().item() if expected.numel() else 0.0
    rtol = low if low > wide else ulps * wide
    torch.testing.assert_close(
        actual, expected, rtol=rtol, atol=ulps * wide * largest, equal_nan=True
    )


@contextmanager
def compared() -> Iterator[None]:
    """Lets each pass of the loop form be done by the fused form too, on clones, and compares."""
    loop_measure, loop_advance = loop.measure, loop.advance

    def measure(batch: Batch) -> Tensor:
        before = frozen(batch)
        expected = loop_measure(batch)
        assert same(before, frozen(batch))
        copy = clone(batch)
        close(fused.measure(copy), expected)
        early = () if batch.stoppable else batch.history_keys
        assert same(frozen(batch, early), frozen(copy, early))
        return expected

    def advance(batch: Batch, rates: Tensor, history_rates: Tensor, active: Tensor) -> None:
        copy = clone(batch)
        loop_advance(batch, rates, history_rates, active)
        fused.measure(copy)  # which may have written the history
        fused.advance(copy, rates, history_rates, active)
        for i in range(len(batch.params)):
            close(copy.params[i], batch.params[i].detach())
            for name in (*batch.moment_keys, *batch.history_keys):
                close(copy.states[i][name], batch.states[i][name])

    with mock.patch.multiple(loop, measure=measure, advance=advance):
        yield


def clone(batch: Batch) -> Batch:
    return replace(
        batch,
        params=[p.detach().clone() for p in batch.params],
        states=[{k: v.clone() for k, v in state.items()} for state in batch.states],
        prepared=None,
        memo={},
    )


def frozen(batch: Batch, without: Sequence[str] = ()) -> list[Tensor]:
    """All that a step may change, copied."""
    copy = clone(batch)
    states = (item for state in copy.states for item in state.items())
    return [*copy.params, *(x for name, x in states if name not in without)]


def same(a: list[Tensor], b: list[Tensor]) -> bool:
    """Bit for bit; NaN is NaN."""
    return all(torch.equal(x.nan_to_num(7.0), y.nan_to_num(7.0)) for x, y in zip(a, b, strict=True))


def build(name: str, params: Named, **options: Any) -> LipOptimizer:
    return CLASSES[name](list(params.items()), **{"lr": 0.05, "foreach": False} | options)


def run(name: str, params: Named, steps: int = 3, **options: Any) -> None:
    optimizer = build(name, params, **options)
    with compared():
        for seed in range(steps):
            set_grads(params, random_grads(params, seed))
            optimizer.step()


def sized(sizes: Any, dtype: torch.dtype = torch.float32) -> Named:
    return named_params({f"m.{i}": (size,) for i, size in enumerate(sizes)}, dtype)


# Equal to the loop


@every
def test_equals_loop(name: str, options: dict[str, Any], dtype: torch.dtype) -> None:
    run(name, sized((1, 33, 5000), dtype), **options)


@given(
    name=st.sampled_from(list(CLASSES)),
    sizes=st.lists(st.sampled_from(CUTS) | st.integers(0, 20_000), min_size=1, max_size=6),
)
@settings(max_examples=30, deadline=None)
def test_equals_loop_for_any_sizes(name: str, sizes: list[int]) -> None:
    run(name, sized(sizes), steps=2)


@pytest.mark.parametrize("name", CLASSES)
def test_many_tensors_of_any_shape(name: str) -> None:
    """More tensors than chunks or threads, empty and 0-dim ones among them."""
    shapes = [(), (0,), (1,), (3, 0), (2, 3), (4, 1, 5)] * 50
    run(name, named_params({f"m.{i}": shape for i, shape in enumerate(shapes)}), steps=2, c=0.1)


@pytest.mark.parametrize(
    ("dtype", "history"),
    [
        (torch.float32, torch.bfloat16),
        (torch.float32, torch.float16),
        (torch.float16, torch.float32),
        (torch.float64, torch.bfloat16),
    ],
)
@pytest.mark.parametrize("name", ["adalip", "rmslipu"])
def test_history_of_another_dtype(name: str, dtype: torch.dtype, history: torch.dtype) -> None:
    params = sized((1, 33, 5000), dtype)
    optimizer = build(name, params)
    key = "prev_grad" if name == "adalip" else "prev_update"
    for seed in range(3):
        set_grads(params, random_grads(params, seed))
        with compared():
            optimizer.step()
        for state in optimizer.state.values():
            state[key] = state[key].to(history)


def test_tensor_lr_and_no_eps() -> None:
    """eps = 0 makes 0/0 of the first u_{t-1}, which is zero."""
    run("adamlipu", sized((1, 40)), lr=torch.tensor(0.05), eps=0.0)


# Memory order


ORDERS = {
    "channels_last": lambda x: x.clone(memory_format=torch.channels_last),
    "transposed": lambda x: x.permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0),
    "strided": lambda x: x.new_zeros(*x.shape[:-1], 2 * x.shape[-1])[..., ::2].copy_(x),
    "expanded": lambda x: x[:1, :, :, :1].expand_as(x),
    "negative": lambda x: torch.complex(x, -x).conj().imag,
}


@pytest.mark.parametrize("of_grad", ORDERS)
@pytest.mark.parametrize("of_param", ["channels_last", "transposed"])
@pytest.mark.parametrize("shape", [(2, 3, 4, 5), (6, 5, 1, 1), (1, 1, 3, 1)])
def test_any_memory_order(shape: tuple[int, ...], of_param: str, of_grad: str) -> None:
    """Of the parameter, and another one of the gradient and of the state."""
    draw = torch.Generator().manual_seed(0)
    param = ORDERS[of_param](torch.randn(shape, generator=draw)).requires_grad_()
    optimizer = build("adamlip", {"m.p": param})
    for _ in range(3):
        param.grad = ORDERS[of_grad](torch.randn(shape, generator=draw))
        with compared():
            optimizer.step()
        state = optimizer.state[param]
        for key in ("exp_avg", "prev_grad"):
            state[key] = state[key].contiguous()


def test_what_fits() -> None:
    x = torch.randn(4, 6, 2, 2)
    for dense in (x, x.half(), x.double(), x[1:3], x[:0], x[0, 0, 0, 0], x.transpose(0, 1)):
        assert fused.fits(dense, None)
        assert fused.fits(dense, dense.clone())
    assert fused.fits(x.to(memory_format=torch.channels_last), x)
    gaps = [x[:, 1:], x[..., 0], x[:1].expand(4, 6, 2, 2)]
    for other in (*gaps, x.to(torch.complex64), x.long(), x.to_sparse()):
        assert not fused.fits(other, None)
    assert not fused.fits(x, x.half())
    assert not fused.fits(x, x.to_sparse())
    assert fused.missing(torch.device("cpu")) is None
    assert "meta" in (fused.missing(torch.device("meta")) or "")


def two(shape: tuple[int, ...]) -> Tensor:
    return TwoTensor(torch.randn(shape), torch.randn(shape))


@pytest.mark.parametrize("wrapped", [False, True])
def test_tensors_with_operators_of_their_own(wrapped: bool) -> None:
    """Their elements are not where kernels would look for them: no address is 0."""
    results = []
    for options in ({"fused": True}, {}):
        torch.manual_seed(0)
        param = torch.nn.Parameter(two((20, 30)))
        optimizer: Any
        if wrapped:
            base = torch.optim.Adam([param], lr=0.1, foreach=False)
            optimizer = Lipschitz(base, **options)
        else:
            optimizer = AdamLip([param], lr=0.1, **options)
        for _ in range(3):
            param.grad = two((20, 30))
            optimizer.step()
        results.append(param.detach())
    assert torch.equal(results[0].a, results[1].a)
    assert torch.equal(results[0].b, results[1].b)


def test_fake_tensors() -> None:
    with FakeTensorMode():
        param = torch.nn.Parameter(torch.randn(1100, 1000))  # enough for the default
        optimizer = AdamLip([param], lr=0.1)
        for _ in range(2):
            param.grad = torch.randn(1100, 1000)
            optimizer.step()
        assert optimizer.state[param]["prev_grad"].shape == param.shape


@pytest.mark.parametrize("key", ["exp_avg", "exp_avg_sq", "prev_grad"])
def test_state_that_is_elsewhere(key: str) -> None:
    param = torch.nn.Parameter(torch.randn(10, 10))
    optimizer = AdamLip([param], lr=0.1, fused=True)
    for _ in range(2):
        param.grad = torch.randn(10, 10)
        optimizer.step()
    optimizer.state[param][key] = optimizer.state[param][key].to("meta")
    before = param.detach().clone()
    with pytest.raises(ValueError, match="another shape or device than its parameter"):
        optimizer.step()
    assert torch.equal(param, before)


# What is not finite, and what must not move


def last_advance(name: str, params: Named, **options: Any) -> tuple[Batch, Tensor, Tensor]:
    """Batch, rates and `history_rates` of a second step that was not taken."""
    optimizer = build(name, params, **options)
    set_grads(params, random_grads(params, 0))
    optimizer.step()
    set_grads(params, random_grads(params, 1))
    with mock.patch.object(loop, "advance") as caught:
        optimizer.step()
    batch, rates, history_rates, _ = caught.call_args.args
    return batch, rates, history_rates


@pytest.mark.parametrize("name", CLASSES)
def test_what_does_not_go_stays_bit_for_bit(name: str) -> None:
    """But for its history, which becomes zero."""
    batch, rates, history_rates = last_advance(name, sized((40_000, 5, 0, 40_000, 5)))
    for grad in batch.grads[2:]:
        grad.fill_(torch.nan)
    before, rates = clone(batch), rates.clone()
    rates[3:] = torch.nan
    active = torch.tensor([True, True, True, False, False])
    fused.measure(batch)
    fused.advance(batch, rates, history_rates, active)
    for i in range(5):
        if i >= 2:
            for key in batch.history_keys:
                before.states[i][key].zero_()
        now = [batch.params[i], *batch.states[i].values()]
        then = [before.params[i], *before.states[i].values()]
        assert same(now, then) == (i >= 2)
        assert all(x.isfinite().all() for x in now)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["adamlip", "adamlipu"])
def test_not_finite_is_seen_and_propagates(name: str, dtype: torch.dtype, value: float) -> None:
    params = sized((2000, 3, 40_000), dtype)
    optimizer = build(name, params, nonfinite="propagate", **EPS)
    for seed in range(2):
        grads = random_grads(params, seed)
        grads["m.2"][33_333] = value
        set_grads(params, grads)
        with compared():
            optimizer.step()
    rates = [rate.norm for rate in optimizer.layer_learning_rates().values()]
    assert list(np.isfinite(rates)) == [True, True, False]


def test_squares_may_overflow() -> None:
    """As those of the loop, to infinity: not to NaN, and not unseen."""
    batch, *_ = last_advance("adamlip", sized((50, 5000)))
    batch.grads[1].fill_(1e30)
    expected, found = loop.measure(batch), fused.measure(batch)
    assert found[1].tolist() == expected[1].tolist() == [torch.inf] * 3
    close(found[0], expected[0])


# Sums


@pytest.mark.parametrize("name", ["adamlip", "adamlipu"])
def test_number_of_threads_is_not_seen(name: str) -> None:
    batch, rates, history_rates = last_advance(name, sized((300_000, 1, 17_000, 50)))
    active = torch.ones(4, dtype=torch.bool)
    threads, results = torch.get_num_threads(), []
    try:
        for n in (1, 2, 3, 7):
            torch.set_num_threads(n)
            copy = clone(batch)
            norms = fused.measure(copy)
            fused.advance(copy, rates, history_rates, active)
            results.append([norms, *frozen(copy)])
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert same(results[0], other)


@pytest.mark.parametrize("fill", [None, 1 / 3], ids=["random", "constant"])
def test_norm_of_a_large_tensor(fill: float | None) -> None:
    """16 M numbers, also equal ones, whose roundings do not cancel."""
    size = 2**24
    grad = torch.rand(size, generator=torch.Generator().manual_seed(0))
    if fill is not None:
        grad.fill_(fill)
    spec = Spec("SGD", "gradient", torch.float32, torch.float32)
    tensors = Tensors([grad], [grad], (), [torch.zeros_like(grad)], [])
    norms = cpu.measure(spec, tensors, torch.ones(1, 9), Constants(0.0, 0.0, 0.0, 0.0, 0.0))
    exact = grad.double().norm().item()
    for column in range(3):
        assert norms[0, column].item() == pytest.approx(exact, rel=2e-7)


# Sketch


def sketch_of(x: np.ndarray[Any, Any], k: int, start: int) -> np.ndarray[Any, Any]:
    """As kernels/__init__.py defines it, an element at a time."""

    def mix(n: int) -> int:
        n ^= n >> 16
        n = n * 0x85EBCA6B % 2**32
        n ^= n >> 13
        n = n * 0xC2B2AE35 % 2**32
        return n ^ n >> 16

    result = np.zeros(k)
    for i, value in enumerate(x.tolist(), start):
        sign = 1 - 2 * (mix((i // 32 + 0x9E3779B9) % 2**32) >> i % 32 & 1)
        result[(i + mix((i // k + 2 * 0x9E3779B9) % 2**32)) % k] += sign * value
    return result


@pytest.mark.parametrize("k", [32, 256])
@pytest.mark.parametrize("start", [0, 5, 1_000_003])
def test_sketch(k: int, start: int) -> None:
    """Of g, beside the norms: also from the middle of a parameter, as a shard is."""
    draw = torch.Generator().manual_seed(0)
    sizes = (1, 40_000, 0, 300)
    grads = [torch.randn(size, generator=draw) for size in sizes]
    spec = Spec("SGD", "gradient", torch.float32, None, sketch=k)
    tensors = Tensors(grads, grads, (), [], [start] * len(sizes))
    constants = Constants(0.0, 0.0, 0.0, 0.0, 0.0)
    rows = cpu.measure(spec, tensors, torch.ones(len(sizes), 9), constants)
    for grad, row in zip(grads, rows, strict=True):
        expected = torch.from_numpy(sketch_of(grad.double().numpy(), k, start)).float()
        torch.testing.assert_close(row[3:], expected, rtol=1e-5, atol=1e-4)
        torch.testing.assert_close(row[:2], grad.norm().expand(2))
        assert row[2] == 0


def test_sketches_of_shards_add_up() -> None:
    grad = torch.randn(70_000, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    spec = Spec("SGD", "gradient", torch.float64, None, sketch=64)

    def sketch(cuts: list[int]) -> Tensor:
        parts = [grad[a:b] for a, b in itertools.pairwise(cuts)]
        tensors = Tensors(parts, parts, (), [], cuts[:-1])
        numbers = torch.ones(len(parts), len(COLUMNS), dtype=torch.float64)
        rows = cpu.measure(spec, tensors, numbers, Constants(0.0, 0.0, 0.0, 0.0, 0.0))
        return rows[:, 3:].sum(0)

    torch.testing.assert_close(sketch([0, 1, 33_333, 70_000]), sketch([0, 70_000]))


# Compilation


def test_what_a_schedule_changes_does_not_recompile() -> None:
    params = sized((40,))
    optimizer = build("adamlip", params, weight_decay=0.1)
    compiled = set()
    for step in range(4):
        set_grads(params, random_grads(params, step))
        for group in optimizer.param_groups:
            group |= {"lr": 0.1 / (step + 1), "betas": (0.1 * step, 0.9 - 0.1 * step)}
            group |= {"weight_decay": 0.1 * step, "eps": 10.0**-step}
        with compared():
            optimizer.step()
        compiled.add(cpu._library.cache_info().misses)
    assert len(compiled) == 1


def test_without_a_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "/nonexistent/g++")
    for cached in (cpu.missing, cpu._library):
        monkeypatch.setattr(cpu, cached.__name__, cached.__wrapped__)
    lack = cpu.missing()
    assert lack is not None
    assert "CXX" in lack
    assert "/nonexistent/g++" in lack
    with pytest.raises(RuntimeError, match=r"fused=True .* needs .* CXX"):
        cpu.library(Spec("SGD", "gradient", torch.float32, torch.float32))


@pytest.mark.parametrize("size", [7, 2**20])
def test_kernels_that_do_not_compile(size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """By a compiler too old for them, or on a full disk. It is an error where the fused form was
    asked for, before anything has changed; else the step is that of the foreach form."""
    monkeypatch.setattr(cpu, "_library", lambda spec: KernelError("too old"))

    def stepped(make: Any, steps: int = 3) -> Any:
        params = {"a": torch.ones(size, requires_grad=True)}
        optimizer = make(params)
        for seed in range(steps):
            params["a"].grad = torch.randn(size, generator=torch.Generator().manual_seed(seed))
            optimizer.step()
        return snapshot(optimizer, params)["params"], optimizer.layer_learning_rates()

    def adamlip(**form: Any) -> Any:
        return lambda params: AdamLip(params.items(), lr=0.1, **form)

    def lipschitz(**form: Any) -> Any:
        return lambda params: Lipschitz(torch.optim.Adam(params.values(), lr=0.1), **form)

    for make, plain in ((adamlip, {"foreach": True}), (lipschitz, {"fused": False})):
        warn_once.cache_clear()
        with warnings.catch_warnings(record=True) as warned:
            warnings.simplefilter("always")
            result = stepped(make())
        said = ["too old; steps go without them, and take longer"]
        assert [str(w.message) for w in warned] == (said if size == 2**20 else [])
        assert_same(result, stepped(make(**plain)))
        params = {"a": torch.ones(size, requires_grad=True)}
        params["a"].grad = torch.ones(size)
        with pytest.raises(KernelError, match="too old"):
            make(fused=True)(params).step()
        assert (params["a"] == 1).all()


def test_one_kernel_of_two_that_does_not_compile(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is known before the other one writes any history."""
    kinds = {"a": torch.float32, "b": torch.bfloat16}
    params = {n: torch.ones(40, dtype=dtype, requires_grad=True) for n, dtype in kinds.items()}
    optimizer = AdamLip(params.items(), fused=True)
    set_grads(params, random_grads(params, 0))
    optimizer.step()
    before = snapshot(optimizer, params)
    compiles, error = cpu._library, KernelError("too old")
    monkeypatch.setattr(
        cpu, "_library", lambda spec: error if spec.dtype == torch.bfloat16 else compiles(spec)
    )
    set_grads(params, random_grads(params, 1))
    with pytest.raises(KernelError, match="too old"):
        optimizer.step()
    assert_same(snapshot(optimizer, params), before)


@pytest.mark.parametrize("bad", ["a", "b"])
@pytest.mark.parametrize(
    ("failure", "form"),
    [("shape", {"fused": True}), ("shape", {"foreach": True}), ("option", {"fused": True})],
)
def test_what_fails_fails_before_any_history_is_written(
    failure: str, form: dict[str, Any], bad: str
) -> None:
    params = named_params({"a": (4, 5), "b": (4, 5)})
    (good,) = params.keys() - {bad}
    forms = {good: {"fused": True}, bad: form}
    optimizer = AdamLip([{"params": [(n, p)], **forms[n]} for n, p in params.items()])
    for seed in range(3):
        grads: dict[str, Any] = random_grads(params, seed)
        if seed < 2:
            grads[bad] = None
        set_grads(params, grads)
        if seed < 2:
            optimizer.step()
    if failure == "option":
        optimizer.param_groups["ab".index(bad)]["eps"] = None
    else:
        params[bad].data = torch.ones(5, 4)
    before = optimizer.state[params[good]]["prev_grad"].clone()
    with pytest.raises((RuntimeError, ValueError, TypeError)):
        optimizer.step()
    assert before.any()
    assert torch.equal(optimizer.state[params[good]]["prev_grad"], before)


def test_state_that_was_saved_in_another_memory_order_is_laid_out_once() -> None:
    params = [torch.randn(8, 3, 3, 3).requires_grad_() for _ in range(2)]
    saved = AdamLip(params, fused=True)
    set_grads(dict(enumerate(params)), dict(enumerate(map(torch.randn_like, params))))
    saved.step()
    last = [p.detach().to(memory_format=torch.channels_last).requires_grad_() for p in params]
    optimizer = AdamLip(last, fused=True)
    optimizer.load_state_dict(copy.deepcopy(saved.state_dict()))
    for p, q in zip(params, last, strict=True):
        p.grad, q.grad = p.detach() / 3, q.detach() / 3
    saved.step()
    optimizer.step()
    for p, q in zip(params, last, strict=True):
        close(q.detach(), p.detach())
        for name in ("exp_avg", "exp_avg_sq", "prev_grad"):
            assert optimizer.state[q][name].stride() == q.stride()
            close(optimizer.state[q][name], saved.state[p][name])


@pytest.mark.usefixtures("alone")
def test_a_shard_whose_memory_was_replaced() -> None:
    """As engines do that move state out of the way between steps."""
    mesh = init_device_mesh("cpu", (1,))
    sums = []
    for moved in (False, True):
        param = torch.nn.Parameter(DTensor.from_local(torch.ones(40), mesh))
        optimizer = AdamLip([param], lr=0.1, fused=True)
        for seed in range(6):
            grad = torch.randn(40, generator=torch.Generator().manual_seed(seed))
            param.grad = DTensor.from_local(grad, mesh)
            if moved and seed == 4:
                for x in optimizer.state[param].values():
                    if isinstance(x, DTensor):
                        x._local_tensor = x._local_tensor.clone()
            optimizer.step()
        state = optimizer.state[param]
        sums.append([x.to_local() if isinstance(x, DTensor) else x for x in state.values()])
    assert_same(*sums)


def test_autograd_sees_the_change() -> None:
    """A backward through parameters that a step has changed is an error, as with torch's."""
    batch, rates, history_rates = last_advance("adalip", sized((3,)))
    p = batch.params[0].requires_grad_()
    loss = (p * p).sum()
    with torch.no_grad():
        fused.advance(batch, rates, history_rates, torch.ones(1, dtype=torch.bool))
    with pytest.raises(RuntimeError, match="inplace"):
        loss.backward()


@pytest.mark.parametrize("kind", ["adamlip", "Lipschitz"])
@pytest.mark.parametrize("swapped", [True, False])
def test_a_model_is_built_on_meta(kind: str, swapped: bool) -> None:
    """The device is looked at when parameters are stepped. to_empty replaces them or, as under
    FSDP2, swaps what they are."""

    def make(params: Any) -> Any:
        if kind == "adamlip":
            return AdamLip(params, fused=True)
        return Lipschitz(torch.optim.SGD(params, lr=0.1), fused=True)

    with torch.device("meta"):
        model, added = torch.nn.Linear(2, 3), torch.nn.Linear(3, 2)
        optimizer = make(model.parameters())
        optimizer.add_param_group({"params": list(added.parameters())})
        for p in model.parameters():
            p.grad = torch.zeros_like(p)
    with pytest.raises(
        RuntimeError, match=r"fused=True cannot step .* on the meta device.*to_empty"
    ):
        optimizer.step()
    optimizer.zero_grad()
    before = torch.__future__.get_swap_module_params_on_conversion()
    torch.__future__.set_swap_module_params_on_conversion(swapped)
    try:
        for module in (model, added):
            module.to_empty(device="cpu")
    finally:
        torch.__future__.set_swap_module_params_on_conversion(before)
    for module in (model, added):
        for p in module.parameters():
            torch.nn.init.ones_(p)
            p.grad = torch.ones_like(p)
    optimizer.step()  # of parameters that were replaced, none has a gradient
    assert bool(optimizer.layer_learning_rates()) == swapped
    assert all((p < 1).all() == swapped for p in (*model.parameters(), *added.parameters()))
