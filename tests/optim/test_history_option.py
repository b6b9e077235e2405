"""`history=` and `fused=` as options of the optimizers: what a step makes of them, what is saved,
and that what a step keeps for the next one is never stale."""

from __future__ import annotations

import copy
import gc
import io
import os
import pickle
import subprocess
import sys
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn

from hf_adalip import Lipschitz
from hf_adalip.optim import LipOptimizer
from hf_adalip.optim.forms.kernels import build as kernel_build
from hf_adalip.optim.forms.kernels import cpu
from tests.optim.cases import (
    CLASSES,
    GRADIENT,
    Named,
    assert_same,
    forget,
    named_params,
    random_grads,
    set_grads,
    snapshot,
    train,
)

needs_compiler = pytest.mark.skipif(bool(cpu.missing()), reason=f"no {cpu.missing()}")

REMEMBERING = [*GRADIENT, "adalipu", "rmslipu"]
"""Those that have a history. AdamLipU computes it again."""

SHAPES = {"a.weight": (12, 10), "a.bias": (12,), "b.weight": (5, 3, 3, 3), "b.bias": (), "c": (0,)}
SKETCHED = {"history": "sketch", "sketch_size": 32}
HISTORIES: dict[str, dict[str, Any]] = {
    name: {"history": name} for name in ("bfloat16", "float16", "float32", "float64")
} | {"sketch": SKETCHED}
FORMS: dict[str, dict[str, Any]] = {
    "loop": {"foreach": False},
    "foreach": {"foreach": True},
    "fused": {"fused": True},
}
FORM = [
    pytest.param(f, id=n, marks=needs_compiler if n == "fused" else ()) for n, f in FORMS.items()
]
forms = pytest.mark.parametrize("form", FORM)
remembering = pytest.mark.parametrize("name", REMEMBERING)


def build(name: str, params: Named, **options: Any) -> LipOptimizer:
    return CLASSES[name](list(params.items()), **{"lr": 0.01} | options)


def clones(params: Named) -> Named:
    return {n: p.detach().clone().requires_grad_() for n, p in params.items()}


def scales(optimizer: LipOptimizer) -> dict[str, float]:
    return {layer: rate.scale for layer, rate in optimizer.layer_learning_rates().items()}


def shaped(optimizer: LipOptimizer) -> dict[str, tuple[torch.dtype, torch.Size]]:
    """The histories of the first parameter."""
    state = optimizer.state[optimizer.param_groups[0]["params"][0]]
    kept = {n: x for n, x in state.items() if n.startswith(("prev_grad", "prev_update"))}
    return {n: (x.dtype, x.shape) for n, x in kept.items()}


# The forms agree


@pytest.mark.slow
@remembering
@pytest.mark.parametrize(
    ("dtype", "history"),
    [
        *((torch.float32, history) for history in HISTORIES),
        *((torch.float64, history) for history in ("bfloat16", "sketch")),
        *((torch.bfloat16, history) for history in ("float32", "sketch")),
    ],
    ids=str,
)
@pytest.mark.parametrize(
    "form", [{"foreach": True}, pytest.param({"fused": True}, marks=needs_compiler)], ids=str
)
def test_forms_agree(name: str, history: str, dtype: torch.dtype, form: dict[str, Any]) -> None:
    """20 steps, each from where the loop has come to: S and parameters to rounding."""
    options = HISTORIES[history] | {"layers": "module", "weight_decay": 0.1, "c": 0.1}
    loop, other = named_params(SHAPES, dtype), named_params(SHAPES, dtype)
    first, second = (
        build(name, loop, foreach=False, **options),
        build(name, other, **form, **options),
    )
    eps = torch.finfo(dtype).eps
    rtol = eps if dtype == torch.bfloat16 else 64 * eps
    for seed in range(20):
        for optimizer, params in ((first, loop), (second, other)):
            train(optimizer, params, [seed])
        assert scales(second) == pytest.approx(scales(first), rel=2e-6)
        for n in SHAPES:
            torch.testing.assert_close(other[n], loop[n], rtol=rtol, atol=rtol)
            other[n].data.copy_(loop[n])
            for key, value in first.state[loop[n]].items():
                found = second.state[other[n]][key]
                assert (found.dtype, found.shape) == (value.dtype, value.shape)
                found.copy_(value)


@pytest.mark.parametrize("count", [2**20, 2**20 - 1])
@needs_compiler
def test_default_form(count: int) -> None:
    """None is the fused form from a million elements on, and for them alone."""
    params = {"a": torch.zeros(count, requires_grad=True)}
    chosen = []
    for options in ({}, {"fused": False}, {"foreach": False}, {"foreach": False, "fused": False}):
        optimizer = build("adalip", params, **options)
        train(optimizer, params, [0])
        form = optimizer._plan.buckets[0].form
        assert form is not None
        chosen.append(form.__name__.rpartition(".")[2])
    first = "fused" if count == 2**20 else "foreach"
    assert chosen == [first, "foreach", "step", "step"]


AWKWARD: dict[str, Callable[[Tensor], Tensor]] = {
    "empty": lambda x: x[:0].clone(),
    "scalar": lambda x: x[0, 0, 0, 0].clone(),
    "channels last": lambda x: x.clone(memory_format=torch.channels_last),
    "gaps": lambda x: x.new_zeros(4, 3, 5, 12)[..., ::2].copy_(x),
    "expanded": lambda x: x.new_zeros(4, 3, 5, 1).expand(4, 3, 5, 6).clone(),
    "complex": lambda x: torch.complex(x, -x),
}


@pytest.mark.parametrize("history", [{}, {"history": "bfloat16"}, {"history": "float64"}, SKETCHED])
@needs_compiler
def test_fused_takes_whatever_it_is_given(history: dict[str, Any]) -> None:
    """Tensors that it cannot take are stepped otherwise, to the same numbers."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(4, 3, 5, 6, generator=generator)
    results = []
    for form in ({"foreach": False}, {"fused": True}):
        params = {n: made(x).requires_grad_() for n, made in AWKWARD.items()}
        groups = [{"params": list(params.items())[::2]}, {"params": list(params.items())[1::2]}]
        optimizer = CLASSES["adamlip"](groups, lr=0.01, **history, **form)
        for seed in range(5):
            grads = random_grads(params, seed)
            if seed % 2:  # other memory orders than the parameters'
                grads = {n: g.mT.contiguous().mT if g.dim() > 1 else g for n, g in grads.items()}
            set_grads(params, grads)
            optimizer.step()
        results.append((params, scales(optimizer)))
    (loop, expected), (other, found) = results
    assert found == pytest.approx(expected, rel=2e-6)
    for n in params:
        torch.testing.assert_close(other[n], loop[n], rtol=1e-5, atol=1e-6)


@forms
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_sketched_beside_a_float64_that_is_not(form: dict[str, Any], dtype: torch.dtype) -> None:
    """Also where the sketched one has no gradient, as what is frozen has none."""
    draw = torch.Generator().manual_seed(0)
    params = {
        "large": torch.randn(40, 40, dtype=dtype, generator=draw).requires_grad_(),
        "small": torch.randn(3, dtype=torch.float64, generator=draw).requires_grad_(),
    }
    optimizer = build("adalip", params, history="sketch", sketch_size=64, **form)
    for step in range(4):
        for name, p in params.items():
            gone = name == "large" and step in (0, 2)
            p.grad = None if gone else torch.randn(p.shape, dtype=p.dtype, generator=draw)
        optimizer.step()
    assert 0.1 < scales(optimizer)["large"] < 0.8 * 0.8 + 0.2 * 2
    assert all(p.isfinite().all() for p in params.values())


@pytest.mark.parametrize("history", ["bfloat16", "float16", "float32", "float64"])
@pytest.mark.parametrize("name", ["adalip", "rmslipu"])
@forms
def test_complex_history_is_that_of_the_real_view(
    name: str, history: str, form: dict[str, Any]
) -> None:
    z = {"a": torch.randn(40, 3, dtype=torch.complex64).requires_grad_()}
    x = {"a": torch.view_as_real(z["a"].detach().clone()).requires_grad_()}
    pair = [build(name, p, history=history, **form) for p in (z, x)]
    for _ in range(4):
        z["a"].grad = torch.randn(40, 3, dtype=torch.complex64)
        x["a"].grad = torch.view_as_real(z["a"].grad).clone()
        for optimizer in pair:
            optimizer.step()
    assert scales(pair[0]) == pytest.approx(scales(pair[1]), rel=1e-6)
    assert shaped(pair[0]) == shaped(pair[1])
    # And from there to a complex one and back.
    before = scales(pair[0])
    for how in ("exact", history):
        pair[0].param_groups[0]["history"] = how
        z["a"].grad = torch.zeros_like(z["a"])
        pair[0].step()
    assert scales(pair[0]) != before
    assert shaped(pair[0]) == shaped(pair[1])


@pytest.mark.skipif(not hasattr(Tensor, "grad_dtype"), reason="gradients have the dtype of theirs")
@forms
def test_a_gradient_of_higher_precision_is_not_rounded(form: dict[str, Any]) -> None:
    found = []
    for options in ({"foreach": False}, form):
        params = named_params({"a": (100,)}, torch.bfloat16)
        params["a"].grad_dtype = torch.float32
        optimizer = build("adamlip", params, history="float32", **options)
        for seed in range(4):
            params["a"].grad = random_grads({"a": torch.zeros(100)}, seed)["a"]
            optimizer.step()
        found.append(optimizer.state[params["a"]]["prev_grad"])
    torch.testing.assert_close(*found, rtol=0, atol=0)


@needs_compiler
def test_fused_with_nothing_to_step() -> None:
    p = torch.ones(3, requires_grad=True)
    optimizer = CLASSES["adamlip"]([{"params": []}, {"params": [p]}], fused=True, **SKETCHED)
    optimizer.step()
    p.grad = torch.ones_like(p)
    optimizer.step()
    assert (p < 1).all()


@pytest.mark.slow
@needs_compiler
def test_kernels_are_compiled_once() -> None:
    """Whatever changes that a schedule changes, for 10,000 tiny tensors too."""
    params = {f"p.{i}": torch.zeros(3, requires_grad=True) for i in range(10_000)}
    optimizer = build("adamlip", params, fused=True, weight_decay=0.1)
    for p in params.values():
        p.grad = torch.ones_like(p)
    optimizer.step()
    cpu._library.cache_clear()
    with mock.patch.object(kernel_build, "load", wraps=kernel_build.load) as compile_:
        optimizer.step()
        assert compile_.call_count == 1
        group = optimizer.param_groups[0]
        for options in ({"lr": 1.0}, {"betas": (0.5, 0.6)}, {"weight_decay": 0.2}, {"eps": 1e-3}):
            group.update(options)
            optimizer.step()
        late = torch.zeros(7, requires_grad=True)
        late.grad = torch.ones_like(late)
        optimizer.add_param_group({"params": [("late", late)]})
        optimizer.step()
        optimizer.state[late]["lipschitz_scale"].fill_(2.0)
        optimizer.state[late]["step"].fill_(100.0)
        optimizer.step()
        assert compile_.call_count == 1


# What a dtype costs, and mends


@pytest.mark.parametrize("name", ["adalipu", "rmslipu"])
@forms
@pytest.mark.slow
def test_float32_history_mends_the_underflow_of_small_updates(
    name: str, form: dict[str, Any]
) -> None:
    """Updates of 1e-8 are zero in float16, whose smallest number is 6e-8."""
    found = {}
    for label, dtype, history in (
        ("wide", torch.float32, "exact"),
        ("mended", torch.float16, "float32"),
        ("bare", torch.float16, "exact"),
    ):
        params = named_params({"a": (500,)}, torch.float16)
        params = {"a": params["a"].detach().to(dtype).requires_grad_()}
        optimizer = build(name, params, lr=1e-5, c=1e-12, history=history, **form)
        for seed in range(20):
            noise = random_grads({"a": torch.zeros(500)}, seed)["a"]
            params["a"].grad = ((1 + noise) * 2**-9).half().to(dtype)
            if label == "wide":
                for value in optimizer.state.values():  # moments rounded as the others' are
                    if "square_avg" in value:
                        value["square_avg"].copy_(value["square_avg"].half())
            optimizer.step()
        found[label] = scales(optimizer)["a"]
    assert found["mended"] == pytest.approx(found["wide"], rel=1e-3)
    if name == "adalipu":
        assert abs(found["bare"] / found["wide"] - 1) > 1e-2


@pytest.mark.parametrize("name", GRADIENT)
def test_a_bfloat16_history_bounds_the_error_of_scale(name: str) -> None:
    """Rounding moves x_{t-1} by at most 2⁻⁸·‖x_{t-1}‖ (ties: 2⁻⁹ of each element), and so the
    change; where that is about as long as the gradient, S is off by less than 2⁻⁸."""
    found = []
    for history in ("exact", "bfloat16"):
        params = named_params({"a": (500,)})
        optimizer = build(name, params, history=history)
        train(optimizer, params, range(30))
        found.append(scales(optimizer)["a"])
    assert found[1] == pytest.approx(found[0], rel=2**-8)
    assert found[1] != found[0]


# Sketches


@pytest.mark.slow
@forms
@pytest.mark.parametrize("name", ["adamlip", "adalipu"])
def test_scale_of_a_sketch_in_training(name: str, form: dict[str, Any]) -> None:
    """100 steps on scikit-learn's digits: at each, S is within 5 % of exact, from the same
    gradients."""
    datasets = pytest.importorskip("sklearn.datasets")
    x, y = datasets.load_digits(return_X_y=True)
    x, y = torch.tensor(x, dtype=torch.float32) / 16, torch.tensor(y)
    net = nn.Sequential(nn.Linear(64, 160), nn.ReLU(), nn.Linear(160, 10))
    exact = dict(net.named_parameters())
    other = clones(exact)
    lr = 0.001 if name == "adamlip" else 0.1
    options = {"layers": "module", "lr": lr} | form
    pair = build(name, exact, **options), build(name, other, history="sketch", **options)
    generator = torch.Generator().manual_seed(0)
    for _ in range(100):
        net.zero_grad()
        rows = torch.randint(len(x), (64,), generator=generator)
        nn.functional.cross_entropy(net(x[rows]), y[rows]).backward()
        for n, p in exact.items():
            other[n].grad = p.grad
        for optimizer in pair:
            optimizer.step()
        assert scales(pair[1]) == pytest.approx(scales(pair[0]), rel=0.05)
    assert set(shaped(pair[1])) == {
        ("prev_grad" if name == "adamlip" else "prev_update") + "_sketch"
    }
    assert scales(pair[1])["2"] == scales(pair[0])["2"] or name == "adalipu"


@remembering
@forms
def test_small_tensors_are_remembered_whole(name: str, form: dict[str, Any]) -> None:
    """As if there were no sketch, bit for bit."""
    found = []
    for history in ({}, {"history": "sketch", "sketch_size": 256}):
        params = named_params(SHAPES)
        optimizer = build(name, params, layers="module", **history, **form)
        train(optimizer, params, range(5))
        state = [optimizer.state[p] for p in params.values()]
        found.append(copy.deepcopy((state, [p.detach() for p in params.values()])))
    assert_same(*found)


@pytest.mark.parametrize("previous", ["applied", "proposed"])
@pytest.mark.parametrize("layers", ["tensor", "module"])
@forms
def test_sketch_of_the_remembered_update(previous: str, layers: str, form: dict[str, Any]) -> None:
    """With u_{t-1} a multiple of û_t, nothing is left to chance: a constant gradient."""
    found = []
    for history in ({}, SKETCHED):
        params = {"a.weight": torch.zeros(100, requires_grad=True), "a.bias": torch.zeros(8)}
        optimizer = build(
            "adalipu",
            params,
            previous=previous,
            layers=layers,
            c=1e-3,
            scale_bounds=None,
            **history,
            **form,
        )
        # One element that is not zero: its sketch has its norm, whatever the signs.
        for _ in range(6):
            params["a.weight"].grad = torch.nn.functional.one_hot(torch.tensor(17), 100).float()
            optimizer.step()
        found.append(optimizer.layer_learning_rates())
    for layer in found[0]:
        assert found[1][layer] == pytest.approx(found[0][layer], rel=1e-5)


@forms
def test_a_skipped_step_leaves_all_but_the_sketch(form: dict[str, Any]) -> None:
    params = named_params({n: shape for n, shape in SHAPES.items() if n != "c"})
    optimizer = build("adamlip", params, layers="module", **SKETCHED, **form)
    train(optimizer, params, range(3))
    before = snapshot(optimizer, params)
    grads = random_grads(params, 3)
    for bad in ("a.bias", "b.weight"):
        grads[bad].view(-1)[0] = float("nan")
    set_grads(params, grads)
    optimizer.step()
    after = snapshot(optimizer, params)
    for state in after["state"]["state"].values():
        state["nonfinite_steps"] -= state["nonfinite_steps"]
    for state in before["state"]["state"].values():
        forget(state)
    assert_same(after["params"], before["params"])
    assert_same(after["state"]["state"], before["state"]["state"])


@forms
def test_a_sketch_without_a_gradient_counts_as_the_change_and_is_forgotten(
    form: dict[str, Any],
) -> None:
    """An unused parameter of a layer that has others: as a gradient of zeros."""
    found = []
    for zeros in (False, True):
        params = named_params({"a.x": (100,), "a.y": (64,), "a.frozen": (99,)})
        params["a.frozen"].requires_grad_(False)
        optimizer = build("adalip", params, layers="module", **SKETCHED, **form)
        for seed in range(5):
            grads: dict[str, Any] = random_grads(params, seed)
            grads["a.frozen"] = None
            if seed in (2, 3):
                grads["a.x"] = torch.zeros(100) if zeros else None
            set_grads(params, grads)
            optimizer.step()
            if seed == 2:
                assert not optimizer.state[params["a.x"]]["prev_grad_sketch"].any()
        assert params["a.frozen"] not in optimizer.state
        found.append(scales(optimizer)["a"])
    assert found[0] == pytest.approx(found[1], rel=1e-6)


def test_bytes_of_a_sketch() -> None:
    """Less than 3 % over Adam's."""
    sizes = {}
    for kind in ("sketch", "adam"):
        net = nn.Sequential(nn.Linear(784, 1000), nn.Linear(1000, 1000), nn.Linear(1000, 10))
        params = dict(net.named_parameters())
        optimizer: torch.optim.Optimizer = torch.optim.Adam(params.values())
        if kind == "sketch":
            optimizer = build("adamlip", params, history="sketch")
        train(optimizer, params, [0])
        tensors = [x for state in optimizer.state.values() for x in state.values()]
        sizes[kind] = sum(x.nbytes for x in tensors)
    assert sizes["sketch"] < 1.03 * sizes["adam"]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_a_sketch_takes_less_memory_than_what_it_stands_for(dtype: torch.dtype) -> None:
    """It is of float32 at least, so that of a bfloat16 tensor has twice its bytes."""
    for elements in (32, 33, 64, 65):
        param = torch.ones(elements, dtype=dtype, requires_grad=True)
        optimizer = build("adamlip", {"a": param}, history="sketch", sketch_size=32)
        train(optimizer, {"a": param}, [0])
        (kept,) = (x for key, x in optimizer.state[param].items() if key.startswith("prev_grad"))
        assert kept.nbytes == min(param.nbytes, 32 * max(4, dtype.itemsize))


# Saving, loading, changing


@remembering
@pytest.mark.parametrize("history", HISTORIES)
def test_round_trip(name: str, history: str) -> None:
    """Through a file, by copying, into another dtype, and in another order of names."""
    params = named_params(SHAPES)
    optimizer = build(name, params, **HISTORIES[history])
    train(optimizer, params, range(3))
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    assert_same(saved["state"], optimizer.state_dict()["state"])

    turned = dict(reversed(list(clones(params).items())))
    restored = build(name, turned)
    restored.load_state_dict(saved)
    assert restored.param_groups[0]["history"] == HISTORIES[history]["history"]
    for n in SHAPES:
        assert_same(dict(restored.state[turned[n]]), dict(optimizer.state[params[n]]))
    copied = copy.deepcopy(optimizer)
    train(optimizer, params, [3, 4])
    train(restored, turned, ())
    train(copied, dict(zip(params, copied.param_groups[0]["params"], strict=True)), [3, 4])
    for seed in (3, 4):
        set_grads(turned, random_grads(params, seed))
        restored.step()
    assert_same(
        [p.detach() for p in copied.param_groups[0]["params"]],
        [p.detach() for p in params.values()],
    )
    for n in SHAPES:
        torch.testing.assert_close(turned[n], params[n], rtol=0, atol=0)

    half = {n: p.detach().bfloat16().requires_grad_() for n, p in params.items()}
    other = build(name, half)
    other.load_state_dict(saved)
    kept = shaped(other)
    wanted = {"sketch": torch.float32}.get(history) or getattr(torch, history)
    assert {dtype for dtype, _ in kept.values()} == {wanted}
    wide = {n: p.detach().double().requires_grad_() for n, p in params.items()}
    for target in (half, wide):
        again = build(name, target)
        again.load_state_dict(saved)
        train(again, target, [3])


CHANGES: list[tuple[dict[str, Any], dict[str, Any], bool]] = [
    # before, after, whether the history starts anew
    ({}, SKETCHED, True),
    (SKETCHED, {"history": "exact"}, True),
    (SKETCHED, {"sketch_size": 64}, True),
    (SKETCHED, {"sketch_size": 1024}, True),
    ({"history": "bfloat16"}, SKETCHED, True),
    ({"history": "bfloat16"}, {"history": "float32"}, False),
    ({}, {"history": torch.bfloat16}, False),
]


@pytest.mark.parametrize(("before", "after", "anew"), CHANGES, ids=str)
@pytest.mark.parametrize("loaded", [False, True])
@pytest.mark.parametrize("name", ["adamlip", "rmslipu"])
def test_changing_the_history(
    name: str, before: dict[str, Any], after: dict[str, Any], anew: bool, loaded: bool
) -> None:
    """S stays, also at the next step of a whole layer if any part of its history is lost, and where
    the first of its tensors keeps its own; nothing stale is left."""
    # The first run of tensors is that of the small ones.
    params = named_params({"z.w": (3,), "a.weight": (100,), "a.bias": (5,)})
    params = {"a.weight": params["a.weight"], **params} if loaded else params
    optimizer = build(name, params, layers="module", gamma=0.5, scale_bounds=None, **before)
    train(optimizer, params, range(4))
    scale, moving = scales(optimizer)["a"], optimizer
    if loaded:
        saved = copy.deepcopy(optimizer.state_dict())
        for group in saved["param_groups"]:
            group.update(after)
        moving = build(name, params, layers="module", gamma=0.5, scale_bounds=None)
        moving.load_state_dict(saved)
    else:
        optimizer.param_groups[0].update(after)
    assert scales(moving)["a"] == scale
    train(moving, params, [5])
    rate = moving.layer_learning_rates()["a"]
    assert (rate.scale == scale) == anew
    assert rate.lr == pytest.approx(0.01 * rate.scale, rel=1e-6)
    group = moving.param_groups[0]
    how, size = str(group["history"]).removeprefix("torch."), group["sketch_size"]
    sketched = how == "sketch" and size < 100
    stem = "prev_update" if name == "rmslipu" else "prev_grad"
    state = moving.state[params["a.weight"]]
    found = {n for n in state if n.startswith(("prev_grad", "prev_update"))}
    assert found == {stem + "_sketch" * sketched}
    (kept,) = (state[n] for n in found)
    assert kept.shape == ((size,) if sketched else (100,))
    assert kept.dtype == (torch.bfloat16 if how == "bfloat16" else torch.float32)
    others = clones(params)
    fresh = build(name, others, layers="module", **before | after)
    train(fresh, others, [0])
    assert set(state) == set(fresh.state[others["a.weight"]])  # nothing stale is left


@pytest.mark.parametrize("options", [{}, {"foreach": True}, {"fused": True}], ids=str)
@needs_compiler
def test_an_older_checkpoint_has_no_such_options(options: dict[str, Any]) -> None:
    params = named_params(SHAPES)
    optimizer = build("adamlip", params)
    train(optimizer, params, range(3))
    saved = copy.deepcopy(optimizer.state_dict())
    for group in saved["param_groups"]:
        for key in ("history", "sketch_size", "fused"):
            del group[key]
    restored = build("adamlip", params, **SKETCHED, **options)
    restored.load_state_dict(saved)
    before = scales(restored)
    assert before == scales(optimizer)
    assert set(shaped(restored)) == {"prev_grad_sketch"}
    train(restored, params, [3])
    assert scales(restored)["a.weight"] == before["a.weight"]


def test_a_sketch_of_another_precision_is_converted() -> None:
    wide, narrow = named_params(SHAPES, torch.float64), named_params(SHAPES)
    first, second = build("adalip", wide, **SKETCHED), build("adalip", narrow)
    train(first, wide, range(3))
    second.load_state_dict(first.state_dict())
    assert shaped(second) == {"prev_grad_sketch": (torch.float32, torch.Size([32]))}
    for params, optimizer in ((wide, first), (narrow, second)):
        set_grads(params, {n: g.to(params[n].dtype) for n, g in random_grads(wide, 3).items()})
        optimizer.step()
    assert scales(second) == pytest.approx(scales(first), rel=1e-5)


def test_a_momentum_that_comes_back_has_no_predecessor() -> None:
    """AdaLipU without momentum remembers its update, with it computes it again. What was kept for
    the one is of another step when the other ends."""
    params = named_params({"a": (50,)})
    optimizer = build("adalipu", params, scale_bounds=None)
    kept = []
    for momentum in (0.0, 0.9, 0.0, 0.9):
        optimizer.param_groups[0]["momentum"] = momentum
        before = scales(optimizer).get("a", 0.8)
        train(optimizer, params, [len(kept)])
        assert scales(optimizer)["a"] == pytest.approx(before)
        train(optimizer, params, [len(kept) + 10])
        assert scales(optimizer)["a"] != pytest.approx(before)
        kept.append(set(optimizer.state[params["a"]]) & {"prev_update", "prev_lr"})
    assert kept == [{"prev_update"}, {"prev_lr"}] * 2


# What is kept for the next step is never stale

Change = Callable[[LipOptimizer, Named, int], Any]


def _replace(key: str, make: Callable[[Tensor], Any]) -> Change:
    def change(optimizer: LipOptimizer, params: Named, step: int) -> None:
        state = optimizer.state[params["a.weight"]]
        state[key] = make(state[key])

    return change


def _delete(key: str) -> Change:
    return lambda optimizer, params, step: optimizer.state[params["a.weight"]].pop(key)


def _group(**options: Any) -> Change:
    """Turned on, and at the next change off again."""

    def change(optimizer: LipOptimizer, params: Named, step: int) -> None:
        group = optimizer.param_groups[0]
        for key, value in options.items():
            group[key] = value if group[key] != value else optimizer.defaults[key]

    return change


def _data(make: Callable[[Tensor], Tensor]) -> Change:
    def change(optimizer: LipOptimizer, params: Named, step: int) -> None:
        params["b.weight"].data = make(params["b.weight"].data)

    return change


def _moved(name: str, numbers: bool) -> Change:
    """What offloading does to state: the same tensors, elsewhere in memory."""

    def change(optimizer: LipOptimizer, params: Named, step: int) -> None:
        for x in optimizer.state[params[name]].values():
            if (x.dim() == 0) == numbers:
                x.data = x.data.clone()

    return change


def _add(optimizer: LipOptimizer, params: Named, step: int) -> None:
    params[f"late{step}.w"] = late = torch.full((40,), 0.5, requires_grad=True)
    optimizer.add_param_group({"params": [(f"late{step}.w", late)]})


def _remove(optimizer: LipOptimizer, params: Named, step: int) -> None:
    if len(optimizer.param_groups) > 1:
        optimizer.param_groups.pop()
    else:
        _add(optimizer, params, step)


def _rename(optimizer: LipOptimizer, params: Named, step: int) -> None:
    optimizer.param_groups[0]["layer_names"][:2] = ["one"] * 2


def _gaps(x: Tensor) -> Tensor:
    return x.new_zeros(*x.shape[:-1], 2 * x.shape[-1])[..., ::2].copy_(x)


CHANGED: dict[str, Change] = {
    "nothing": lambda *_: None,
    "S replaced": _replace("lipschitz_scale", lambda x: x * 2),
    "step replaced by a float": _replace("step", lambda x: 7.0),
    "norm replaced": _replace("prev_norm", lambda x: x / 3),
    "norm filled": lambda o, p, s: o.state[p["a.weight"]]["prev_norm"].fill_(0.3),
    "history replaced": _replace("prev_grad", torch.ones_like),
    "history of another dtype": _replace("prev_grad", Tensor.double),
    "moment replaced": _replace("exp_avg", torch.ones_like),
    "moment deleted": _delete("exp_avg"),
    "history deleted": _delete("prev_grad"),
    "norm deleted": _delete("prev_norm"),
    "S deleted": _delete("lipschitz_scale"),
    "tensors moved": _moved("a.weight", numbers=False),
    "numbers moved": _moved("a.bias", numbers=True),
    "state cleared": lambda o, p, s: o.state.clear(),
    "a state removed": lambda o, p, s: o.state.pop(p["a.bias"], None),
    "a state copied": lambda o, p, s: o.state.update(
        {p["a.bias"]: copy.deepcopy(o.state[p["a.bias"]])}
    ),
    "loaded": lambda o, p, s: o.load_state_dict(copy.deepcopy(o.state_dict())),
    "group added": _add,
    "group removed": _remove,
    "group replaced": lambda o, p, s: o.param_groups.__setitem__(0, dict(o.param_groups[0])),
    "layers renamed": _rename,
    "same shape": _data(Tensor.clone),
    "another dtype": _data(Tensor.double),
    "memory format": _data(lambda x: x.clone(memory_format=torch.channels_last)),
    "gaps": _data(_gaps),
    "requires_grad": lambda o, p, s: p["a.bias"].requires_grad_(not p["a.bias"].requires_grad),
    "gamma": _group(gamma=0.5),
    "c": _group(c=0.1),
    "theoretical c": _group(c="theoretical"),
    "bounds": _group(scale_bounds=(0.9, 1.1)),
    "nonfinite": _group(nonfinite="raise"),
    "weight decay": _group(weight_decay=0.1, decoupled_weight_decay=False),
    "maximize": _group(maximize=True),
    "lr": _group(lr=0.1),
    "history": _group(history="bfloat16"),
    "sketch": _group(history="sketch"),
    "sketch size": _group(history="sketch", sketch_size=64),
    "foreach": _group(foreach=True),
    "fused": _group(fused=True, foreach=None),
    "differentiable": _group(differentiable=False),
}


def followed(
    name: str, change: Change, anew: bool, at: set[int], silent: bool, **options: Any
) -> Any:
    """Parameters and state after 7 steps with changes between them, with or without `_plan`."""
    params = named_params({"a.weight": (12, 10), "a.bias": (12,), "b.weight": (5, 3, 3, 3)})
    optimizer = build(name, params, layers="module", **options)
    for step in range(7):
        if step in at:
            change(optimizer, params, step)
        if anew:
            optimizer.__dict__.pop("_plan", None)
        grads: dict[str, Any] = random_grads(params, step)
        if silent and step % 2:
            grads["a.bias"] = None
        for n, p in params.items():
            p.grad = None if grads[n] is None else grads[n]
        optimizer.step()
    return [(n, p.detach(), dict(optimizer.state.get(p, {}))) for n, p in params.items()]


CHANGES_IN_FORMS = [
    (change, form)
    for change in CHANGED
    for form in ([""] if change in ("foreach", "fused") else FORMS)  # "": the change is one of form
    if not (cpu.missing() and form in ("", "fused"))
]


@pytest.mark.slow
@pytest.mark.parametrize("at", [{1}, {2}, {3, 5}], ids=str)
@pytest.mark.parametrize(("change", "named"), CHANGES_IN_FORMS)
def test_a_step_uses_nothing_stale(change: str, at: set[int], named: str) -> None:
    form: dict[str, Any] = FORMS[named] if named else {}
    for silent, history in ((False, {}), (True, SKETCHED if "history" not in change else {})):
        runs = [
            followed("adamlip", CHANGED[change], anew, at, silent, **form, **history)
            for anew in (False, True)
        ]
        assert_same(*runs)


@pytest.mark.parametrize(
    "change", [_group(momentum=0.9), _group(momentum=0.9, nesterov=True)], ids=["heavy", "nesterov"]
)
@pytest.mark.parametrize("name", ["adalip", "adalipu"])
@forms
def test_a_momentum_uses_nothing_stale(name: str, change: Change, form: dict[str, Any]) -> None:
    for at in ({1}, {2}, {3, 5}, {2, 3, 4, 5}):
        assert_same(*(followed(name, change, anew, at, False, **form) for anew in (False, True)))


@forms
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_a_copy_in_mid_training(copied: Callable[[Any], Any], form: dict[str, Any]) -> None:
    """Both go on, each on its own."""
    params = named_params(SHAPES)
    optimizer = build("adamlip", params, layers="module", **SKETCHED, **form)
    train(optimizer, params, range(4))
    twin = copied(optimizer)
    theirs = dict(zip(params, twin.param_groups[0]["params"], strict=True))
    before = snapshot(twin, theirs)
    train(optimizer, params, range(4, 8))
    assert_same(snapshot(twin, theirs), before)
    train(twin, theirs, range(4, 8))
    assert_same(snapshot(twin, theirs), snapshot(optimizer, params))


@pytest.mark.slow
@forms
@pytest.mark.parametrize("history", ["exact", "sketch"])
def test_nothing_is_kept_alive(history: str, form: dict[str, Any]) -> None:
    """No gradient between steps; nothing of an optimizer that is gone, without the collector."""
    params = named_params({"a": (100,), "b": (3,)})
    optimizer = build("adamlip", params, history=history, sketch_size=32, **form)
    gc.collect()
    gc.disable()
    try:
        for seed in range(3):
            set_grads(params, random_grads(params, seed))
            grads = [weakref.ref(p.grad) for p in params.values()]
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            assert [ref() for ref in grads] == [None, None]
        refs = [weakref.ref(optimizer), *map(weakref.ref, params.values())]
        refs.append(weakref.ref(optimizer.state[params["a"]]["exp_avg"]))
        del optimizer, params
        assert [ref() for ref in refs] == [None] * 4
    finally:
        gc.enable()


@forms
def test_state_that_is_replaced_is_let_go(form: dict[str, Any]) -> None:
    """Who moves it to the host does it for the memory."""
    params = named_params({"a": (100,), "b": (30, 4)})
    optimizer = build("adamlip", params, **form)
    train(optimizer, params, range(3))
    refs = []
    for state in optimizer.state.values():
        for key in [key for key, x in state.items() if x.dim()]:
            refs.append(weakref.ref(state[key]))
            state[key] = state[key].clone()
    assert [ref() for ref in refs] == [None] * 6


@pytest.mark.parametrize("wrapped", [False, True])
def test_a_saved_number_has_memory_of_its_own(wrapped: bool) -> None:
    """Pickle writes the whole memory of each tensor: of a view, that of all others."""
    params = named_params({str(i): (50,) for i in range(20)})
    optimizer: Any
    if wrapped:
        optimizer = Lipschitz(torch.optim.SGD(list(params.values()), lr=0.01))
    else:
        optimizer = build("adamlip", params, **SKETCHED)
    for step in range(4):
        train(optimizer, params, [step])
        states = [*optimizer.state_dict()["state"].values()]
        values = [x for state in states for x in state.values()]
        assert all(x.untyped_storage().nbytes() == x.nbytes for x in values)
        assert all(x.untyped_storage().nbytes() == x.nbytes for x in pickled(optimizer))
        if step == 2:  # who takes part is worked out anew
            set_grads(params, dict.fromkeys(params) | {"1": torch.ones(50)})
            optimizer.step()


def pickled(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    copied = pickle.loads(pickle.dumps(optimizer))
    return [x for state in copied.state.values() for x in state.values()]


@pytest.mark.parametrize("wrapped", [False, True])
@pytest.mark.parametrize("history", ["exact", "sketch"])
def test_looking_at_the_state_within_a_step_changes_nothing(wrapped: bool, history: str) -> None:
    """As hooks do, and threads that save."""
    results = []
    for looks in (False, True):
        params = named_params(SHAPES)
        base = torch.optim.SGD(list(params.values()), lr=0.01)
        own = {"history": history, "sketch_size": 32} if not wrapped else {}
        optimizer: Any = Lipschitz(base) if wrapped else build("adamlip", params, **own)

        def closure(optimizer: Any = optimizer) -> None:
            copy.deepcopy(optimizer)
            optimizer.state_dict()

        if looks and wrapped:
            base.register_step_post_hook(lambda *_, look=closure: look())
        for step in range(6):
            set_grads(params, random_grads(params, step))
            optimizer.step(closure if looks else None)
        results.append(snapshot(optimizer, params))
    assert_same(*results)


# Errors

BAD: list[tuple[str, dict[str, Any], str]] = [
    ("adamlip", {"history": "int8"}, "history must be"),
    ("adamlip", {"history": torch.int8}, "history must be"),
    ("adamlip", {"history": None}, "history must be"),
    ("adamlip", {"sketch_size": 100}, "sketch_size must be a power of two >= 32, got 100"),
    ("adamlip", {"sketch_size": 16}, "sketch_size must be"),
    ("adamlip", {"sketch_size": True}, "sketch_size must be"),
    ("adamlip", {"sketch_size": 64.0}, "sketch_size must be"),
    ("adamlip", {"fused": "yes"}, "fused must be"),
    ("adamlip", {"fused": True, "foreach": True}, "exclude each other"),
    ("adamlip", {"fused": True, "differentiable": True}, "exclude each other"),
    ("adamlipu", {"history": "sketch"}, "nothing to act on"),
    ("adamlipu", {"history": "bfloat16"}, "nothing to act on"),
    ("adalipu", {"history": "sketch", "momentum": 0.9}, "nothing to act on"),
]


@pytest.mark.parametrize(("name", "options", "message"), BAD, ids=str)
def test_bad_options(name: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build(name, named_params(), **options)
    optimizer = build(name, named_params())
    with pytest.raises(ValueError, match=message):
        optimizer.add_param_group({"params": [torch.zeros(2)], **options})
    assert len(optimizer.param_groups) == 1


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("adamlip", {"history": "int8"}, "history must be"),
        ("adamlipu", {"history": "sketch"}, "nothing to act on"),
        ("adalipu", {"history": "sketch", "momentum": 0.9}, "nothing to act on"),
    ],
    ids=str,
)
@pytest.mark.parametrize("steps", [0, 3])
def test_bad_options_set_later(
    name: str, options: dict[str, Any], message: str, steps: int
) -> None:
    params = named_params()
    optimizer = build(name, params)
    train(optimizer, params, range(steps))
    optimizer.param_groups[0].update(options)
    with pytest.raises(ValueError, match=message):
        train(optimizer, params, [steps])


NO_COMPILER = """
import torch, sys
from hf_adalip import AdamLip
p = torch.zeros(2**20, requires_grad=True)
try:
    AdamLip([p], fused=True)
except RuntimeError as error:
    print(error)
optimizer = AdamLip([p])
p.grad = torch.ones_like(p)
optimizer.step()
print(optimizer._plan.buckets[0].form.__name__)
optimizer.param_groups[0]["fused"] = True
try:
    optimizer.step()
except RuntimeError as error:
    print(error, p.unique().numel())
"""


@pytest.mark.slow
def test_without_a_compiler(tmp_path: Path) -> None:
    """fused=True says what is missing, before anything has changed; None does without."""
    done = subprocess.run(
        [sys.executable, "-c", NO_COMPILER],
        env={**os.environ, "CXX": "/nonexistent", "XDG_CACHE_HOME": str(tmp_path)},
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    message, form, again = [x for x in done.stdout.splitlines() if "fused" in x or "foreach" in x]
    assert "needs a C++ compiler" in message
    assert form == "hf_adalip.optim.forms.foreach"
    assert "needs a C++ compiler" in again
