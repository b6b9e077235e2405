"""A state_dict goes to the parameters that it was saved for, whatever order they are in."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

from hf_adalip import AdamLip, Lipschitz
from hf_adalip.optim import LipOptimizer
from tests.optim.cases import (
    CLASSES,
    SHAPES,
    Named,
    assert_same,
    forms,
    named_params,
    snapshot,
    train,
    wrap,
)

Optimizer = LipOptimizer | Lipschitz

# Two of one shape, so that an exchange is seen by its numbers only.
EQUAL = {**SHAPES, "c.weight": (3, 4)}


def reordered(params: Named, order: list[str]) -> Named:
    """Copies of the parameters, in another order."""
    return {n: params[n].detach().clone().requires_grad_() for n in order}


def assert_goes_on_alike(
    optimizer: Optimizer, params: Named, restored: Optimizer, others: Named
) -> None:
    """Bit for bit, in what is kept and in the steps that follow."""

    def everything(optimizer: Optimizer, params: Named) -> dict[str, Any]:
        packed = snapshot(optimizer, {n: params[n] for n in EQUAL})
        names = [n for group in packed["state"]["param_groups"] for n in group["param_names"]]
        keys = [key for group in packed["state"]["param_groups"] for key in group["params"]]
        state = packed["state"]["state"]
        of = {n.split("module.")[-1]: state[k] for n, k in zip(names, keys, strict=True)}
        return {"params": packed["params"], "state": {n: of[n] for n in EQUAL}}

    assert_same(everything(restored, others), everything(optimizer, params))
    for seed in (7, 8):
        grads = {
            n: torch.randn(p.shape, dtype=torch.float64).to(p.dtype) for n, p in params.items()
        }
        for side in (params, others):
            for n, p in side.items():
                p.grad = grads[n].clone()
        optimizer.step()
        restored.step()
        assert_same(everything(restored, others), everything(optimizer, params), str(seed))


ORDERED = [
    (name, of, dtype)
    for name in CLASSES
    for of in ("the six", "Lipschitz")
    for dtype in (torch.float64, torch.bfloat16)
    # Lipschitz refuses to measure updates that were rounded
    if not (of == "Lipschitz" and name.endswith("u") and dtype == torch.bfloat16)
]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "of", "dtype"), ORDERED, ids=str)
@forms
@pytest.mark.parametrize("layers", ["tensor", "module"])
def test_another_order(name: str, of: str, dtype: torch.dtype, foreach: bool, layers: str) -> None:
    def build(params: Named) -> Optimizer:
        if of == "Lipschitz":
            return wrap(name, params.items(), lr=0.01, foreach=foreach, layers=layers)
        return CLASSES[name](params.items(), lr=0.01, foreach=foreach, layers=layers)

    params = named_params(EQUAL, dtype=dtype)
    optimizer = build(params)
    train(optimizer, params, range(3))
    others = reordered(params, ["c.weight", "b.weight", "a.bias", "a.weight"])
    restored = build(others)
    restored.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert_goes_on_alike(optimizer, params, restored, others)
    # Its own state_dict has its own order, and is loaded as it is (accelerate's prepare does so).
    restored.load_state_dict(restored.state_dict())
    assert_goes_on_alike(optimizer, params, restored, others)


def groups(params: Named, *parts: list[str]) -> list[dict[str, Any]]:
    return [{"params": [(n, params[n]) for n in part]} for part in parts]


@pytest.mark.parametrize("wrapped", [False, True], ids=["the six", "Lipschitz"])
def test_groups_in_another_order_bring_their_options(wrapped: bool) -> None:
    """The group without weight decay stays the one without."""

    def build(*parts: dict[str, Any]) -> Optimizer:
        return Lipschitz(torch.optim.Adam(parts)) if wrapped else AdamLip(list(parts))

    params = named_params(EQUAL)
    decayed, others_ = groups(params, ["a.weight", "b.weight"], ["c.weight", "a.bias"])
    optimizer = build(decayed | {"weight_decay": 0.3}, others_ | {"lr": 0.02})
    train(optimizer, params, range(3))

    others = reordered(params, list(params))
    first, second = groups(others, ["a.bias", "c.weight"], ["b.weight", "a.weight"])
    restored = build(first, second)
    restored.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert [g["weight_decay"] for g in restored.param_groups] == [0.0, 0.3]
    assert [g["lr"] for g in restored.param_groups] == [0.02, 0.001]
    assert_goes_on_alike(optimizer, params, restored, others)


def test_a_parameter_that_is_in_another_group_now() -> None:
    """Its state goes with it; the groups keep their options by place, and it has its group's."""
    params = named_params(EQUAL)
    first, second = groups(params, ["a.weight", "b.weight"], ["c.weight", "a.bias"])
    optimizer = AdamLip([first | {"weight_decay": 0.3}, second])
    train(optimizer, params, range(3))
    others = reordered(params, list(params))
    restored = AdamLip(groups(others, ["c.weight", "b.weight", "a.weight"], ["a.bias"]))
    restored.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert [g["weight_decay"] for g in restored.param_groups] == [0.3, 0.0]
    for n in params:
        assert_same(restored.state[others[n]], optimizer.state[params[n]])


@pytest.mark.parametrize(
    "prefix", ["module.", "_orig_mod.", "_orig_mod.module.", "_fsdp_wrapped_module."]
)
@pytest.mark.parametrize("saved_with_it", [False, True])
def test_what_wraps_a_model_does_not_rename_its_parameters(
    prefix: str, saved_with_it: bool
) -> None:
    def named(params: Named, with_prefix: bool) -> list[tuple[str, torch.Tensor]]:
        inner = {"b.weight": "b._checkpoint_wrapped_module.weight"} if with_prefix else {}
        return [(prefix * with_prefix + inner.get(n, n), p) for n, p in params.items()]

    params = named_params(EQUAL)
    optimizer = AdamLip(named(params, saved_with_it))
    train(optimizer, params, range(2))
    others = reordered(params, list(params)[::-1])
    restored = AdamLip(named(others, not saved_with_it))
    restored.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for n in params:
        assert_same(restored.state[others[n]], optimizer.state[params[n]])


def test_a_module_that_is_named_like_a_wrapper() -> None:
    """Without "module" two parameters would have one name: then names are taken literally."""
    shapes = {"module.weight": (3, 4), "weight": (3, 4)}
    params = named_params(shapes)
    optimizer = AdamLip(params.items())
    train(optimizer, params, range(2))
    others = reordered(params, ["weight", "module.weight"])
    restored = AdamLip(others.items())
    restored.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for n in params:
        assert_same(restored.state[others[n]], optimizer.state[params[n]])


@pytest.mark.parametrize("wrapped", [False, True], ids=["the six", "Lipschitz"])
def test_other_names_are_refused_and_change_nothing(wrapped: bool) -> None:
    def build(params: Named) -> Optimizer:
        return wrap("adamlip", params.items(), lr=0.1) if wrapped else AdamLip(params.items())

    params = named_params(EQUAL)
    optimizer = build(params)
    train(optimizer, params, range(2))
    others = {{"c.weight": "d.weight"}.get(n, n): p for n, p in named_params(EQUAL).items()}
    restored = build(others)
    train(restored, others, [5])
    before = snapshot(restored, others)
    with pytest.raises(ValueError, match=r"missing d\.weight; unexpected c\.weight"):
        restored.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert_same(snapshot(restored, others), before)


@pytest.mark.parametrize("nameless", ["saved", "loading", "both"])
def test_without_names_by_position(nameless: str) -> None:
    """As torch does: on which side they lack does not matter."""

    def build(params: Named, side: str) -> AdamLip:
        plain = nameless in (side, "both")
        return AdamLip(params.values() if plain else params.items())

    params = named_params(EQUAL)
    optimizer = build(params, "saved")
    train(optimizer, params, range(2))
    others = {f"other.{n}": p for n, p in reordered(params, list(params)).items()}
    restored = build(others, "loading")
    restored.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for p, q in zip(params.values(), others.values(), strict=True):
        assert_same(restored.state[q], optimizer.state[p])


def test_renaming_is_for_the_users_hook() -> None:
    """torch documents a load_state_dict_pre_hook for it: names are compared after it."""
    params = named_params(EQUAL)
    optimizer = AdamLip(params.items())
    train(optimizer, params, range(2))
    others = {n.replace("c.", "d."): p for n, p in list(named_params(EQUAL).items())[::-1]}
    restored = AdamLip(others.items())

    def rename(_: torch.optim.Optimizer, state: dict[str, Any]) -> dict[str, Any]:
        state = copy.deepcopy(state)
        for group in state["param_groups"]:
            group["param_names"] = [n.replace("c.", "d.") for n in group["param_names"]]
        return state

    restored.register_load_state_dict_pre_hook(rename)
    restored.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for n in params:
        assert_same(restored.state[others[n.replace("c.", "d.")]], optimizer.state[params[n]])


class Net(nn.Module):
    def __init__(self, *order: str) -> None:
        super().__init__()
        for name in order:
            self.add_module(name, nn.Linear(3, 3))


@pytest.mark.parametrize("flat", [False, True])
def test_torch_distributed_checkpoint_matches_names_itself(flat: bool) -> None:
    """The names in its state_dicts stay in the saved order while the parameters do not."""
    from torch.distributed.checkpoint.state_dict import (
        StateDictOptions,
        get_optimizer_state_dict,
        set_optimizer_state_dict,
    )

    options = StateDictOptions(flatten_optimizer_state_dict=flat)
    one, two = Net("a", "b", "c"), Net("c", "a", "b")
    optimizer, restored = (AdamLip(net.named_parameters()) for net in (one, two))
    for p in one.parameters():
        p.grad = torch.randn_like(p)
    optimizer.step()
    saved = get_optimizer_state_dict(one, optimizer, options=options)
    set_optimizer_state_dict(two, restored, optim_state_dict=saved, options=options)
    others = dict(two.named_parameters())
    for n, p in one.named_parameters():
        assert_same(restored.state[others[n]], optimizer.state[p])
