"""The forms of a step agree with each other, for every dtype and layout, and with torch's rules."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import hf_adalip.optim.forms.foreach as foreach_module
from hf_adalip import AdaLip, AdamLip, RMSLip
from hf_adalip.optim import LipOptimizer
from tests.optim.cases import (
    CLASSES,
    SHAPES,
    Named,
    assert_same,
    forms,
    momentum_only,
    named_params,
    random_grads,
    set_grads,
    six,
    snapshot,
    train,
)

REAL = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
dtypes = pytest.mark.parametrize("dtype", REAL, ids=lambda d: str(d).removeprefix("torch."))


def tolerance(dtype: torch.dtype) -> dict[str, float]:
    """A few units in the last place; one for low precision, where rounding may tip over."""
    ulp = torch.finfo(dtype).eps
    many = 8 if dtype in (torch.float64, torch.float32) else 1.01
    return {"rtol": many * ulp, "atol": many * ulp}


def options_of(name: str) -> list[dict[str, Any]]:
    common: list[dict[str, Any]] = [{}, {"weight_decay": 0.1, "layers": "module"}]
    if momentum_only(name):
        return [*common, {"momentum": 0.9}, {"momentum": 0.9, "nesterov": True}]
    return [*common, {"eps_in_sqrt": True, "weight_decay": 0.1, "decoupled_weight_decay": False}]


ALL = [(name, i) for name in CLASSES for i in range(len(options_of(name)))]


def both(name: str, params: Named, **options: Any) -> list[tuple[LipOptimizer, Named]]:
    """A loop and a foreach optimizer on clones of the parameters (their strides kept)."""
    result = []
    for foreach in (False, True):
        own = {n: p.detach().clone().requires_grad_() for n, p in params.items()}
        kind = CLASSES[name]
        result.append((kind(list(own.items()), lr=0.05, foreach=foreach, **options), own))
    return result


def assert_close(a: tuple[LipOptimizer, Named], b: tuple[LipOptimizer, Named]) -> None:
    for n in a[1]:
        torch.testing.assert_close(a[1][n], b[1][n], **tolerance(a[1][n].dtype))
        left, right = a[0].state[a[1][n]], b[0].state[b[1][n]]
        assert left.keys() == right.keys()
        for key in left:
            assert left[key].dtype == right[key].dtype
            close = tolerance(left[key].dtype)
            torch.testing.assert_close(
                left[key], right[key], **close, msg=lambda m, k=key: f"{k} {m}"
            )


# Loop and foreach


@pytest.mark.parametrize(("name", "option"), ALL)
@dtypes
def test_loop_equals_foreach(name: str, option: int, dtype: torch.dtype) -> None:
    """One step at a time: a later one would start from what rounding made of the first."""
    loop, multi = both(name, named_params(dtype=dtype), **options_of(name)[option])
    for seed in range(4):
        train(*loop, [seed])
        train(*multi, [seed])
        assert_close(loop, multi)
        for n in SHAPES:
            multi[1][n].data.copy_(loop[1][n])
            for key, value in loop[0].state[loop[1][n]].items():
                multi[0].state[multi[1][n]][key].copy_(value)


@six
@given(
    shapes=st.lists(st.lists(st.integers(0, 4), max_size=3).map(tuple), min_size=1, max_size=5),
    seed=st.integers(0, 1000),
)
@settings(max_examples=15)
def test_loop_equals_foreach_for_any_shapes(
    name: str, shapes: list[tuple[int, ...]], seed: int
) -> None:
    """0-dim, empty and one-element tensors among them."""
    named = named_params({f"m.{i}": shape for i, shape in enumerate(shapes)}, torch.float64, seed)
    for layers in ("tensor", "module"):
        # c: Adam's first update of a one-element tensor is ±lr, so that two are often equal.
        loop, multi = both(name, named, layers=layers, c=0.1)
        for optimizer, params in (loop, multi):
            train(optimizer, params, range(3))
            assert all(p.isfinite().all() for p in params.values())
        for n in named:
            torch.testing.assert_close(loop[1][n], multi[1][n], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(("name", "option"), ALL)
@pytest.mark.parametrize("size", [1, 13])
def test_pieces_change_nothing(
    name: str, option: int, size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the foreach form cuts batches and tensors is not seen in the numbers."""
    results = []
    for limit in (2**19, size):
        monkeypatch.setattr(foreach_module, "_CACHED_PIECE", limit)
        params = named_params(dtype=torch.float64)
        optimizer = CLASSES[name](
            list(params.items()), lr=0.05, foreach=True, **options_of(name)[option]
        )
        train(optimizer, params, range(4))
        results.append([*params.values(), *optimizer.state_dict()["state"].values()])
    torch.testing.assert_close(*results, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("history", ["exact", "bfloat16", "sketch"])
def test_pieces_of_tensors_that_cannot_be_cut(
    history: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those that are not contiguous, or sketched, are taken whole."""
    results = []
    for limit in (2**19, 5):
        monkeypatch.setattr(foreach_module, "_CACHED_PIECE", limit)
        weight = torch.linspace(-1, 1, 60, dtype=torch.float64).view(6, 10).t()
        params = {"a": weight.requires_grad_(), "b": torch.ones(33, dtype=torch.float64)}
        params["b"].requires_grad_()
        optimizer = AdamLip(params.items(), lr=0.05, foreach=True, history=history, sketch_size=32)
        train(optimizer, params, range(4))
        results.append([*params.values(), *optimizer.state_dict()["state"].values()])
    torch.testing.assert_close(*results, rtol=1e-12, atol=1e-12)


@six
@forms
def test_mixed_dtypes_in_a_group(name: str, foreach: bool) -> None:
    """As if each dtype had an optimizer of its own, and one layer can have several."""
    kinds = dict(zip(SHAPES, (torch.float32, torch.bfloat16, torch.float64), strict=True))

    def mixed() -> Named:
        return {n: p.detach().to(kinds[n]).requires_grad_() for n, p in named_params().items()}

    together = mixed()
    optimizer = CLASSES[name](list(together.items()), lr=0.05, foreach=foreach)
    train(optimizer, together, range(4))
    for n, p in mixed().items():
        alone = CLASSES[name]([p], lr=0.05, foreach=foreach)
        for seed in range(4):
            p.grad = random_grads(mixed(), seed)[n]
            alone.step()
        torch.testing.assert_close(together[n], p, **tolerance(kinds[n]))

    whole = mixed()
    single = CLASSES[name](list(whole.items()), lr=0.05, foreach=foreach, layers=lambda _: "all")
    train(single, whole, range(4))
    wide = {n: p.detach().double().requires_grad_() for n, p in mixed().items()}
    exact = CLASSES[name](list(wide.items()), lr=0.05, foreach=foreach, layers=lambda _: "all")
    for seed in range(4):
        set_grads(wide, {n: g.double() for n, g in random_grads(mixed(), seed).items()})
        exact.step()
    (rate,), (expected,) = (o.layer_learning_rates().values() for o in (single, exact))
    # The state of the bf16 tensor is rounded.
    assert rate.scale == pytest.approx(expected.scale, rel=2e-2)
    assert rate.norm == pytest.approx(expected.norm, rel=1e-2)


# Layouts


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "channels_last": lambda x: x.clone(memory_format=torch.channels_last),
    "transposed": lambda x: x.permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0),
    "strided": lambda x: x.new_zeros(2, 3, 4, 10)[..., ::2].copy_(x),
}


@pytest.mark.parametrize(("name", "option"), ALL)
@forms
def test_complex_is_its_real_view(name: str, option: int, foreach: bool) -> None:
    """A complex tensor is one layer of twice as many numbers."""
    generator = torch.Generator().manual_seed(0)

    def draw() -> Tensor:
        return torch.randn(4, 3, dtype=torch.complex64, generator=generator)

    z = draw().requires_grad_()
    x = torch.view_as_real(z.detach().clone()).requires_grad_()
    options = options_of(name)[option] | {"foreach": foreach, "lr": 0.05}
    complex_, real = (CLASSES[name]([("m.p", p)], **options) for p in (z, x))
    for _ in range(5):
        z.grad = draw()
        x.grad = torch.view_as_real(z.grad).clone()
        complex_.step()
        real.step()
    torch.testing.assert_close(torch.view_as_real(z.detach()), x.detach(), rtol=0, atol=0)
    assert complex_.layer_learning_rates() == real.layer_learning_rates()
    for key, value in complex_.state[z].items():
        assert value.dtype == (torch.complex64 if value.dim() else torch.float32), key


@six
@forms
@pytest.mark.parametrize("layout", LAYOUTS)
def test_memory_layout_is_not_seen(name: str, foreach: bool, layout: str) -> None:
    generator = torch.Generator().manual_seed(0)

    def draw() -> Tensor:
        return torch.randn(2, 3, 4, 5, dtype=torch.float64, generator=generator)

    plain = draw().requires_grad_()
    other = LAYOUTS[layout](plain.detach()).requires_grad_()
    options = options_of(name)[-1] | {"foreach": foreach, "lr": 0.05}
    first, second = (CLASSES[name]([("m.p", p)], **options) for p in (plain, other))
    for _ in range(4):
        plain.grad = draw()
        other.grad = LAYOUTS[layout](plain.grad)
        first.step()
        second.step()
    torch.testing.assert_close(plain, other, rtol=1e-12, atol=1e-13)
    for key, value in second.state[other].items():
        torch.testing.assert_close(value, first.state[plain][key], rtol=1e-12, atol=1e-13)
        if layout == "channels_last" and value.dim():
            assert value.is_contiguous(memory_format=torch.channels_last), key


@six
@forms
def test_expanded_gradient(name: str, foreach: bool) -> None:
    """The gradient of a sum is one number in memory, seen everywhere."""
    results = []
    for spread in (Tensor.contiguous, lambda x: x):
        p = torch.zeros(3, 4, requires_grad=True)
        optimizer = CLASSES[name]([p], lr=0.05, foreach=foreach)
        for value in (1.0, -2.0, 0.5):
            p.grad = spread(torch.tensor(value).expand(3, 4))
            optimizer.step()
        results.append(snapshot(optimizer, {"p": p}))
    assert_same(*results)


@six
@forms
def test_low_precision_is_rounded_once(name: str, foreach: bool) -> None:
    """A bf16 step is the float32 step of the same numbers, rounded at its end."""
    narrow = named_params(dtype=torch.bfloat16)
    wide = {n: p.detach().float().requires_grad_() for n, p in narrow.items()}
    optimizers = [CLASSES[name](list(p.items()), lr=0.05, foreach=foreach) for p in (narrow, wide)]
    grads = random_grads(narrow, 0)
    set_grads(narrow, grads)
    set_grads(wide, {n: g.float() for n, g in grads.items()})
    for optimizer in optimizers:
        optimizer.step()
    for n in narrow:
        assert torch.equal(narrow[n], wide[n].bfloat16())
    assert optimizers[0].layer_learning_rates() == optimizers[1].layer_learning_rates()


# Without S, the optimizers are torch's

TORCH: list[tuple[str, type, dict[str, Any], type, dict[str, Any]]] = []


def same(ours: type, our_options: dict[str, Any], theirs: type, **options: Any) -> None:
    label = " ".join([theirs.__name__, *options])
    TORCH.append((label, ours, options | our_options, theirs, options))


coupled = {"decoupled_weight_decay": False}
same(AdaLip, {}, torch.optim.SGD)
same(AdaLip, coupled, torch.optim.SGD, momentum=0.9)
same(AdaLip, coupled, torch.optim.SGD, momentum=0.9, weight_decay=0.1)
same(AdaLip, coupled, torch.optim.SGD, momentum=0.9, weight_decay=0.1, nesterov=True)
same(AdaLip, coupled, torch.optim.SGD, momentum=0.9, weight_decay=0.1, maximize=True)
same(RMSLip, {}, torch.optim.RMSprop)
same(RMSLip, coupled, torch.optim.RMSprop, alpha=0.9, eps=1e-3, weight_decay=0.1)
same(RMSLip, coupled, torch.optim.RMSprop, weight_decay=0.1, maximize=True)
same(AdamLip, {}, torch.optim.Adam)
same(AdamLip, coupled, torch.optim.Adam, betas=(0.5, 0.9), eps=1e-3, weight_decay=0.1)
same(AdamLip, coupled, torch.optim.Adam, weight_decay=0.1, maximize=True)
same(AdamLip, {}, torch.optim.AdamW, weight_decay=0.1)


@pytest.mark.parametrize(
    ("ours", "options", "theirs", "torch_options"),
    [case[1:] for case in TORCH],
    ids=[case[0] for case in TORCH],
)
@forms
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
def test_torch_with_a_scale_of_one(
    ours: type,
    options: dict[str, Any],
    theirs: type,
    torch_options: dict[str, Any],
    foreach: bool,
    dtype: torch.dtype,
) -> None:
    """scale_bounds=(1, 1) makes S constant, and with it the base optimizer of the paper."""
    a, b = named_params(dtype=dtype), named_params(dtype=dtype)
    optimizer = ours(a.values(), lr=0.01, scale_bounds=(1, 1), foreach=foreach, **options)
    expected = theirs(b.values(), lr=0.01, foreach=foreach, **torch_options)
    for seed in range(20):
        grads = random_grads(a, seed)
        set_grads(a, grads)
        set_grads(b, grads)
        optimizer.step()
        expected.step()
    ulp = torch.finfo(dtype).eps
    for n in a:
        torch.testing.assert_close(a[n], b[n], rtol=50 * ulp, atol=50 * ulp)
        for key, value in expected.state[b[n]].items():
            actual = optimizer.state[a[n]][key]
            torch.testing.assert_close(
                actual, value, rtol=50 * ulp, atol=50 * ulp, check_dtype=False
            )


# Norms


@pytest.mark.parametrize("name", ["adalip", "adalipu"])
@forms
def test_norm_of_a_large_tensor(name: str, foreach: bool) -> None:
    """8 M float32 numbers: a plain CPU vector_norm is off by 1e-4 (its float32 accumulator)."""
    size, lr = 2**23, 0.5
    p = torch.zeros(size, requires_grad=True)
    p.grad = torch.rand(size, generator=torch.Generator().manual_seed(0))
    optimizer = CLASSES[name]([p], lr=lr, foreach=foreach)
    optimizer.step()
    exact = p.grad.double().norm().item() * (lr if name == "adalipu" else 1.0)
    (rate,) = optimizer.layer_learning_rates().values()
    assert rate.norm == pytest.approx(exact, rel=1e-6)


@forms
@pytest.mark.parametrize("size", [4095, 4096, 4097, 3 * 4096, 10_000])
@dtypes
def test_norm_of_every_size(foreach: bool, size: int, dtype: torch.dtype) -> None:
    """Around the size of the norm's blocks, and in low precision, whose squares would overflow."""
    p = torch.zeros(size, dtype=dtype, requires_grad=True)
    generator = torch.Generator().manual_seed(0)
    p.grad = (300 * torch.randn(size, generator=generator)).to(dtype)
    optimizer = AdaLip([p], lr=1e-6, foreach=foreach)
    optimizer.step()
    (rate,) = optimizer.layer_learning_rates().values()
    assert rate.norm == pytest.approx(p.grad.double().norm().item(), rel=1e-6)
