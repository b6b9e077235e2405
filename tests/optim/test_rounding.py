"""Stochastic rounding of bfloat16 parameters: what it rounds to, and the same bits everywhere."""

from __future__ import annotations

import copy
import math
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hf_adalip import AdaLip, AdamLip, LionLip, create_optimizer, release_gradients
from hf_adalip.optim import rounding
from hf_adalip.optim import step as loop
from hf_adalip.optim.batch import Batch
from hf_adalip.optim.forms import foreach, fused
from hf_adalip.optim.forms.kernels import cpu
from hf_adalip.optim.hashing import GOLDEN
from hf_adalip.optim.rounding import Draws, rounded
from hf_adalip.optim.rules import SGD
from hf_adalip.optim.sharding import Place, Shard
from hf_adalip.optim.sharding.fsdp1 import FSDP1Shard
from hf_adalip.optim.signals import Gradients
from tests.optim.cases import (
    CLASSES,
    Named,
    assert_same,
    bare_step,
    named_params,
    random_grads,
    set_grads,
    train,
)

SHAPES = {"a.weight": (33, 70), "a.bias": (33,), "b": (), "c.weight": (4, 3, 3, 3)}
FORMS = {"loop": {"foreach": False}, "foreach": {"foreach": True}, "fused": {"fused": True}}
every_form = pytest.mark.parametrize(
    "form",
    [
        *("loop", "foreach"),
        pytest.param("fused", marks=pytest.mark.skipif(bool(cpu.missing()), reason="no compiler")),
    ],
)
needs_compiler = pytest.mark.skipif(bool(cpu.missing()), reason=f"needs {cpu.missing()}")

CONSTANT_S: dict[str, Any] = {"scale_bounds": (1.0, 1.0)}
"""S = 1, which does not depend on the order in which squares are added up."""


def bf16(seed: int = 0) -> Named:
    params = named_params(SHAPES, torch.bfloat16, seed)
    weight = params["c.weight"].detach().to(memory_format=torch.channels_last)
    return {**params, "c.weight": weight.requires_grad_()}


def values(params: Named) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in params.items()}


def of(shape: tuple[int, ...], seed: int = 7) -> Draws:
    return Draws(seed, Place(shape, (0,) * len(shape)), 0)


# What is rounded, and where to


def test_right_on_average() -> None:
    """The mean of n draws is within four of its standard errors √(p·(1-p)/n) of the value."""
    n = 40_000
    low, up = torch.tensor([1.0, 1.0078125])  # neighbours in bfloat16
    for part in (1 / 65536, 0.01, 0.3, 0.5, 0.99):
        for sign in (1, -1):
            value = sign * (low + part * (up - low))
            found = rounded(value.expand(n), of((n,)), 12345)
            assert set(found.tolist()) <= {sign * low.item(), sign * up.item()}
            assert torch.equal(found, found.bfloat16().float())
            chance = ((value.abs() - low) / (up - low)).item()
            error = (found.abs() == up).double().mean().item() - chance
            assert abs(error) <= 4 * math.sqrt(chance * (1 - chance) / n)


def test_right_on_average_at_every_element_and_step() -> None:
    """One element's bits at successive steps, and one step's at successive elements and names."""
    steps = torch.arange(1.0, 4097)
    seeds = [rounding._seed(f"layers.{i}.weight") for i in range(4)]
    assert len({*seeds}) == 4
    for index in (0, 1, 2**31, 2**32 + 1, 2**40):
        for seed in seeds:
            value = torch.full_like(steps, 1.001953125)
            at = torch.full(steps.shape, index)
            up = rounding._rounded(value, at, seed, rounding._keys(seed, steps)) > 1
            mean = up.double().mean().item()
            assert abs(mean - 0.25) <= 4 * math.sqrt(0.25 * 0.75 / len(steps))


def test_draws_are_independent() -> None:
    """Of neighbouring elements, of successive steps, and of two parameters."""
    n = 2**16
    half = torch.full((n,), 1.00390625)

    def ups(seed: int, step: float) -> Tensor:
        key = rounding._keys(seed, torch.tensor(step))
        return (rounded(half, of((n,), seed), key) > 1).double() - 0.5

    one = ups(7, 1.0)
    for other in (one.roll(1), one.roll(64), ups(7, 2.0), ups(8, 1.0), ups(7 + GOLDEN, 1.0)):
        assert abs((one * other).mean().item()) <= 4 * 0.25 / math.sqrt(n)


def test_what_is_not_rounded() -> None:
    """Numbers that bfloat16 has, and what is not finite."""
    inside = torch.randn(1000).bfloat16().float()
    outside = [0.0, -0.0, math.inf, -math.inf, math.nan, 1e-40]
    exact = torch.cat([inside, torch.tensor(outside).bfloat16().float()])
    found = rounded(exact, of(tuple(exact.shape)), 99)
    torch.testing.assert_close(found, exact, rtol=0, atol=0, equal_nan=True)
    assert torch.equal(found.signbit(), exact.signbit())


@every_form
def test_parameters_that_are_not_bfloat16_are_left_alone(form: str) -> None:
    dtypes = {"a.weight": torch.bfloat16, "a.bias": torch.float32, "b": torch.float16}
    found = []
    for on in (False, True):
        shapes = {name: SHAPES[name] for name in dtypes}
        params = {
            name: p.detach().to(dtypes[name]).requires_grad_()
            for name, p in named_params(shapes).items()
        }
        train(AdamLip(params.items(), stochastic_rounding=on, **FORMS[form]), params, range(3))
        found.append(values(params))
    plain, stochastic = found
    for name, dtype in dtypes.items():
        assert torch.equal(plain[name], stochastic[name]) == (dtype != torch.bfloat16), name


# The same bits


def test_the_documented_bits() -> None:
    def mix(x: int) -> int:
        x = (x ^ (x >> 16)) * 0x85EBCA6B % 2**32
        x = (x ^ (x >> 13)) * 0xC2B2AE35 % 2**32
        return x ^ (x >> 16)

    seed = 0x811C9DC5
    for byte in b"a.weight":
        seed = (seed ^ byte) * 0x01000193 % 2**32
    step, start, size = 5, 2**32 - 4, 8
    key = mix((seed + GOLDEN * step) % 2**32)
    found = rounded(
        torch.full((size,), 1.00390625),
        Draws(rounding._seed("a.weight"), Place((), ()), start),
        rounding._keys(seed, torch.tensor(float(step))),
    )
    for i, x in zip(range(start, start + size), found.tolist(), strict=True):
        word = mix(mix((i + seed) % 2**32) ^ (key + GOLDEN * (i >> 32)) % 2**32)
        assert (x > 1) == (0x8000 + (word & 0xFFFF) >= 0x10000)


@pytest.mark.parametrize(
    "place",
    [
        *(((7, 5, 4), (0, 0, 0), (7, 5, 4)), ((7, 5, 4), (3, 0, 0), (2, 5, 4))),
        *(((7, 5, 4), (0, 2, 0), (7, 3, 4)), ((7, 5, 4), (1, 2, 1), (4, 1, 3))),
        *(((9,), (4,), (5,)), ((3, 4), (1, 0), (0, 4)), ((), (), ())),
    ],
)
def test_a_shard_is_rounded_as_the_whole(place: tuple[tuple[int, ...], ...]) -> None:
    shape, offset, size = place
    whole = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    inside = tuple(slice(at, at + n) for at, n in zip(offset, size, strict=True))
    expected = rounded(whole, of(shape), 5)[inside]
    draws = Draws(7, Place(shape, offset), None)
    assert torch.equal(rounded(whole[inside].clone(), draws, 5), expected)


def batch(sizes: list[int], draws: list[Draws]) -> Batch:
    """Of plain SGD, whose arithmetic every form rounds alike."""
    generator = torch.Generator().manual_seed(0)
    group = {"differentiable": False, "maximize": False, "momentum": 0.0, "nesterov": False}
    group |= {"weight_decay": 0.1, "decoupled_weight_decay": True}
    params, grads, history = (
        [torch.randn(n, generator=generator).bfloat16() for n in sizes] for _ in range(3)
    )
    states = [{"prev_grad": x} for x in history]
    steps = torch.arange(1.0, 1 + len(sizes))
    made = Batch(
        *(SGD(), Gradients(), group, [], params, grads, states, steps, 0.01, (), ("prev_grad",)),
        draws=draws,
    )
    local: Any = [
        SimpleNamespace(shard=SimpleNamespace(start=x.start), state=state)
        for x, state in zip(draws, states, strict=True)
    ]
    made.local_params = local
    return made


@needs_compiler
def test_forms_are_equal_bit_for_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    """From the same gradients and S; also where an index passes 2³², and where a form cuts."""
    monkeypatch.setattr(foreach, "_CACHED_PIECE", 1000)
    sizes = [0, 1, 127, 128, 700, 20_000, 40]
    starts = [0, 5, 2**32 - 60, 2**31, 2**32 - 300, 2**33 - 12_345, 2**40]
    draws = [Draws(3 * i, Place((), ()), start) for i, start in enumerate(starts)]
    found = []
    for form in (loop, foreach, fused):
        made = batch(sizes, draws)
        made.params[4][:2] = torch.tensor([math.inf, math.nan])
        rates = torch.linspace(0.001, 0.1, len(sizes))
        stepped = torch.ones(len(sizes), dtype=torch.bool)
        stepped[6] = False
        form.advance(made, rates, rates, stepped)
        found.append([x.clone() for x in made.params])
    for other in found[1:]:
        for x, y in zip(found[0], other, strict=True):
            torch.testing.assert_close(x, y, rtol=0, atol=0, equal_nan=True)
    assert torch.equal(found[0][6], batch(sizes, draws).params[6])


@every_form
@pytest.mark.parametrize("kind", [*CLASSES.values(), LionLip], ids=lambda x: x.__name__)
def test_training_is_that_of_the_loop(kind: Any, form: str) -> None:
    """A difference in the last place of float32 may turn a rounding, with a chance of 2⁻¹⁶."""
    found = []
    for options in (FORMS["loop"], FORMS[form]):
        params = bf16()
        optimizer = kind(params.items(), lr=1e-2, stochastic_rounding=True, **options)
        train(optimizer, params, range(4))
        found.append(values(params))
    for name, expected in found[0].items():
        different = (found[1][name] != expected).sum().item()
        assert different <= (0 if form == "loop" else 3), name


@every_form
def test_the_order_of_named_parameters_does_not_matter(form: str) -> None:
    found = []
    for order in (1, -1):
        params = bf16()
        named = list(params.items())[::order]
        optimizer = AdamLip(named, stochastic_rounding=True, **FORMS[form])
        train(optimizer, params, range(3))
        found.append(values(params))
    assert_same(*found)


def test_parameters_draw_by_name_or_else_by_position() -> None:
    """Two equal ones go their own ways; wrappers do not rename them."""
    values = torch.linspace(-1, 1, 500).bfloat16()

    def stepped(*names: str) -> list[Tensor]:
        params = [values.clone().requires_grad_() for _ in (names or (1, 2))]
        given: Any = list(zip(names, params, strict=True)) if names else params
        optimizer = AdaLip(given, lr=1e-3, stochastic_rounding=True)
        for p in params:
            p.grad = torch.ones_like(p)
        optimizer.step()
        return [p.detach() for p in params]

    one, two = stepped("one", "two")
    assert not torch.equal(one, two)
    assert_same(stepped("module.two", "module._orig_mod.one"), [two, one])
    first, second = stepped()
    assert not torch.equal(first, second)
    assert_same(stepped(), [first, second])


@every_form
def test_resuming_goes_on_bit_for_bit(form: str) -> None:
    params = bf16()
    optimizer = AdamLip(params.items(), stochastic_rounding=True, **FORMS[form])
    train(optimizer, params, range(2))
    saved, others = copy.deepcopy(optimizer.state_dict()), bf16(seed=1)
    with torch.no_grad():
        for name, p in params.items():
            others[name].copy_(p)
    restored = AdamLip(list(others.items())[::-1])
    restored.load_state_dict(saved)
    assert restored.param_groups[0]["stochastic_rounding"] is True
    for one, its in ((optimizer, params), (restored, others)):
        train(one, its, range(2, 5))
    assert_same(values(others), values(params))


def test_states_of_before_load() -> None:
    params = bf16()
    optimizer = AdamLip(params.items())
    train(optimizer, params, range(2))
    state = copy.deepcopy(optimizer.state_dict())
    del state["param_groups"][0]["stochastic_rounding"]
    for on in (False, True):
        restored = AdamLip(bf16().items(), stochastic_rounding=on)
        restored.load_state_dict(state)
        assert restored.param_groups[0]["stochastic_rounding"] is on


@every_form
def test_gradient_release_is_the_same(form: str) -> None:
    found = []
    for released in (False, True):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(8, 30), nn.Tanh(), nn.Linear(30, 3)).bfloat16()
        optimizer = AdamLip(net.named_parameters(), stochastic_rounding=True, **FORMS[form])
        if released:
            release_gradients(optimizer, bucket_cap_mb=0)
        for step in range(3):
            x = torch.randn(5, 8, generator=torch.Generator().manual_seed(step)).bfloat16()
            net(x).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        found.append([p.detach() for p in net.parameters()])
    assert_same(*found)


def test_a_step_that_is_left_out_leaves_parameters_alone() -> None:
    params = bf16()
    optimizer = AdamLip(params.items(), stochastic_rounding=True)
    train(optimizer, params, [0])
    before = values(params)
    grads = random_grads(params, 1)
    grads["a.weight"][0, 0] = math.nan
    set_grads(params, grads)
    optimizer.step()
    assert torch.equal(params["a.weight"], before["a.weight"])
    assert not torch.equal(params["a.bias"], before["a.bias"])


@pytest.mark.slow
@pytest.mark.parametrize("form", ["loop", "foreach"])
def test_compiled(form: str) -> None:
    """torch.compile follows a step into one graph, with the same bits."""
    torch._dynamo.reset()
    found = []
    for compiles in (False, True):
        params = bf16()
        optimizer = AdamLip(params.items(), stochastic_rounding=True, **FORMS[form])
        step = bare_step(optimizer)
        if compiles:
            step = torch.compile(step, backend="eager", fullgraph=True)
        for seed in range(3):
            set_grads(params, random_grads(params, seed))
            step()
        found.append(values(params))
    assert_same(*found)


def test_capturable_draws_the_same() -> None:
    """There numbers stay on the device."""
    found = []
    for capturable in (False, True):
        params = bf16()
        optimizer = AdamLip(
            *(params.items(),), capturable=capturable, stochastic_rounding=True, foreach=False
        )
        train(optimizer, params, range(3))
        found.append(values(params))
    assert_same(*found)


# What is refused


def test_refused_without_anything_to_round() -> None:
    params = named_params()
    optimizer = AdamLip(params.items(), stochastic_rounding=True)
    set_grads(params, random_grads(params, 0))
    before = values(params)
    with pytest.raises(ValueError, match=r"stochastic_rounding=True .*float32.*leave it out"):
        optimizer.step()
    assert_same(values(params), before)
    assert not optimizer.state


@pytest.mark.parametrize("value", [1, None, "yes"])
def test_refused_values(value: Any) -> None:
    with pytest.raises(ValueError, match="stochastic_rounding must be True or False"):
        AdamLip(bf16().items(), stochastic_rounding=value)


def test_refused_with_differentiable() -> None:
    with pytest.raises(ValueError, match="stochastic_rounding=True and differentiable=True"):
        AdamLip(bf16().items(), stochastic_rounding=True, differentiable=True)


@pytest.mark.parametrize(
    ("part", "shard", "what"),
    [(None, FSDP1Shard, "FSDP1's slices"), (0, Shard, "DeepSpeed's flat tensors")],
)
def test_refused_where_elements_are_not_known(part: int | None, shard: Any, what: str) -> None:
    for dtype in (torch.bfloat16, torch.float32):
        p = torch.zeros(3, dtype=dtype)
        group = {"params": [torch.zeros(3).bfloat16()], "stochastic_rounding": True}
        param: Any = SimpleNamespace(group=group, param=p, part=part, shard=shard(p))
        with (
            pytest.raises(NotImplementedError, match=f"stochastic_rounding=True .*{what} hold")
            if dtype == torch.bfloat16
            else nullcontext()
        ):
            rounding.refuse_unless_roundable([group], [param])


def test_by_name() -> None:
    net = nn.Linear(3, 2).bfloat16()
    optimizer = create_optimizer(net, "adamlip", lr=1e-3, stochastic_rounding=True)
    assert all(group["stochastic_rounding"] for group in optimizer.param_groups)
    with pytest.raises(TypeError, match="stochastic_rounding"):
        create_optimizer(net, "lip-adamw", lr=1e-3, stochastic_rounding=True)


# Training


def distance(dtype: torch.dtype, name: str, lr: float, **options: Any) -> float:
    """How far a quadratic is from its minimum, at most 1, after 500 steps that each are too small
    for bfloat16."""
    target = torch.linspace(0.5, 1.5, 256)
    start = target + 0.25
    param = start.clone().to(dtype).requires_grad_()
    optimizer = create_optimizer([("x", param)], name, lr=lr, **options)
    for step in range(500):
        noise = torch.randn(256, generator=torch.Generator().manual_seed(step))
        param.grad = (param.detach().float() - target + 0.1 * noise).to(dtype)
        optimizer.step()
    return ((param.detach().float() - target).norm() / (start - target).norm()).item()


@pytest.mark.slow
@pytest.mark.parametrize(("name", "lr"), [("adalip", 2e-3), ("adamlip", 3e-4), ("lionlip", 3e-4)])
def test_trains_where_rounding_to_the_nearest_stands_still(name: str, lr: float) -> None:
    wide = distance(torch.float32, name, lr)
    assert wide < 0.7
    assert distance(torch.bfloat16, name, lr) > 0.98
    assert distance(torch.bfloat16, name, lr, stochastic_rounding=True) == pytest.approx(
        wide, abs=0.05
    )
