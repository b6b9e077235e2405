"""A state_dict that is refused has changed nothing: all of it is looked at before any is loaded."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch

from hf_adalip import AdamLip, Lipschitz
from tests.optim.cases import Named, assert_same, named_params, snapshot, train
from tests.optim.test_state import BUILDERS

KINDS = ["adamlip", "rmslipu", "adalipu momentum", "Lipschitz adamlip", "Lipschitz nadam"]
MOMENT = {"adamlip": "exp_avg_sq", "rmslipu": "square_avg", "adalipu momentum": "momentum_buffer"}
HISTORY = {"rmslipu": "prev_update", "adalipu momentum": "prev_lr"}

Spoil = Callable[[dict[str, Any], str], Any]


def number(name: str, value: Any) -> Spoil:
    def spoil(state: dict[str, Any], kind: str) -> None:
        state["state"][1][name] = value

    return spoil


def tensor(value: float) -> torch.Tensor:
    return torch.tensor(value)


def moment(value: Any) -> Spoil:
    def spoil(state: dict[str, Any], kind: str) -> None:
        state["state"][1][MOMENT.get(kind, "exp_avg")] = value

    return spoil


def history(value: Any) -> Spoil:
    def spoil(state: dict[str, Any], kind: str) -> None:
        state["state"][1][HISTORY.get(kind, "prev_grad")] = value

    return spoil


def option(name: str, value: Any) -> Spoil:
    def spoil(state: dict[str, Any], kind: str) -> None:
        state["param_groups"][0][name] = value

    return spoil


def without(key: str) -> Spoil:
    return lambda state, kind: {k: x for k, x in state.items() if k != key}


def put(key: str, value: Any) -> Spoil:
    return lambda state, kind: {**state, key: value}


def another_group(state: dict[str, Any], kind: str) -> None:
    state["param_groups"].append(copy.deepcopy(state["param_groups"][0]))


def fewer_params(state: dict[str, Any], kind: str) -> None:
    state["param_groups"][0]["params"].pop()


def other_names(state: dict[str, Any], kind: str) -> None:
    state["param_groups"][0]["param_names"] = ["x", "y", "z"]


BAD: dict[str, tuple[Spoil, str]] = {
    "S NaN": (number("lipschitz_scale", tensor(math.nan)), "lipschitz_scale.*> 0, got nan"),
    "S inf": (number("lipschitz_scale", tensor(math.inf)), "lipschitz_scale.*> 0, got inf"),
    "S zero": (number("lipschitz_scale", tensor(0.0)), "lipschitz_scale.*> 0, got 0"),
    "S negative": (number("lipschitz_scale", tensor(-1.0)), "lipschitz_scale.*> 0, got -1"),
    "S a string": (number("lipschitz_scale", "1.0"), "lipschitz_scale.*must be a number"),
    "S a list": (number("lipschitz_scale", [1.0]), "lipschitz_scale.*must be a number"),
    "S complex": (number("lipschitz_scale", torch.tensor(1j)), "lipschitz_scale.*must be a number"),
    "S two numbers": (number("lipschitz_scale", torch.ones(2)), "lipschitz_scale.*shape"),
    "norm NaN": (number("prev_norm", tensor(math.nan)), "prev_norm.*finite norm, got nan"),
    "norm inf": (number("prev_norm", tensor(math.inf)), "prev_norm.*finite norm, got inf"),
    "norm negative": (number("prev_norm", tensor(-3.0)), "prev_norm.*finite norm, got -3"),
    "skips NaN": (number("nonfinite_steps", tensor(math.nan)), "nonfinite_steps.*>= 0, got nan"),
    "rate inf": (number("layer_lr", tensor(math.inf)), "layer_lr.*>= 0, got inf"),
    "moment a string": (moment("x"), "must be a tensor, got 'x'"),
    "moment a list": (moment([1.0, 2.0, 3.0]), r"must be a tensor, got \[1.0"),
    "moment of another shape": (moment(torch.ones(7)), r"shape \(7,\) where \(3,\)"),
    "history of another shape": (history(torch.ones(3, 2)), "shape"),
    "history a string": (history("x"), "must be a (tensor|number)"),
    "state a list": (lambda s, k: s["state"].update({1: [1.0]}), r"state\[1\].* must be a dict"),
    "lr a string": (option("lr", "x"), "lr.*'x'"),
    "lr negative": (option("lr", -0.1), "lr.*-0.1"),
    "lr NaN": (option("lr", math.nan), "lr.*nan"),
    "lr inf": (option("lr", math.inf), "lr.*inf"),
    "lr two numbers": (option("lr", torch.ones(2)), "lr"),
    "weight decay None": (option("weight_decay", None), "weight_decay.*None"),
    "weight decay NaN": (option("weight_decay", math.nan), "weight_decay.*nan"),
    "group a list": (put("param_groups", [[]]), r"param_groups\[0\].* must be a dict, got \[\]"),
    "groups a dict": (put("param_groups", {}), "'?param_groups.* must be a list"),
    "no params": (lambda s, k: s["param_groups"][0].pop("params") and None, "params.*a list"),
    "another group": (another_group, "param"),
    "fewer params": (fewer_params, "param"),
    "other names": (other_names, "missing 'a.weight'|missing a.weight"),
    "names None": (option("param_names", None), "param_names.* must be a list of names"),
    "no state": (without("state"), "has no 'state'"),
    "no groups": (without("param_groups"), "has no 'param_groups'"),
    "state None": (put("state", None), "state.* must be a dict, got None"),
    "a list": (lambda state, kind: [state], "state_dict must be a dict"),
    "None": (lambda state, kind: 0, "state_dict must be a dict"),
}

OWN: dict[str, tuple[str, Spoil, str]] = {
    "betas": ("adamlip", option("betas", (2, 2)), r"betas.*\(2, 2\)"),
    "base's betas": ("Lipschitz adamlip", option("betas", (2, 2)), "Adam refuses.*beta.*2"),
    "base's eps": ("Lipschitz nadam", option("eps", "x"), "eps.*'x'"),
    "base's step": ("Lipschitz adamlip", number("step", tensor(math.nan)), "step.*>= 0, got nan"),
    "step negative": ("adamlip", number("step", tensor(-1.0)), "step.*>= 0, got -1"),
    "step NaN": ("rmslipu", number("step", tensor(math.nan)), "step.*>= 0, got nan"),
    "rate before": ("adamlipu", number("prev_lr", tensor(math.nan)), "prev_lr.*got nan"),
    "gamma": ("adamlip", option("gamma", 1.5), "gamma.*1.5"),
    "c": ("adamlip", option("c", -1.0), "c must be.*-1"),
    "bounds": ("adamlip", option("scale_bounds", (2.0, 1.0)), "scale_bounds.*1.0"),
    "nonfinite": ("adamlip", option("nonfinite", "stop"), "nonfinite.*'stop'"),
    "history": ("adamlip", option("history", "some"), "history.*'some'"),
    "previous": ("rmslipu", option("previous", "any"), "previous.*'any'"),
    "c_t": ("Lipschitz nadam", number("lipschitz_c", tensor(math.nan)), "lipschitz_c.*got nan"),
    "count of c": ("adalip theoretical", option("lipschitz_step", tensor(-2.0)), "lipschitz_step"),
    "count of c a string": (
        "Lipschitz nadam",
        option("lipschitz_step", "x"),
        "lipschitz_step.*'x'",
    ),
}


def refuses(kind: str, spoil: Spoil, message: str) -> None:
    runs = []
    for attempt in (True, False):
        params = named_params()
        optimizer = BUILDERS[kind](params)
        train(optimizer, params, range(3))
        if attempt:
            state = copy.deepcopy(optimizer.state_dict())
            state = spoiled if (spoiled := spoil(state, kind)) is not None else state
            before = snapshot(optimizer, params)
            kept = dict(optimizer.state), optimizer.param_groups, list(optimizer.param_groups)
            with pytest.raises((TypeError, ValueError), match=message) as error:
                optimizer.load_state_dict(state)
            assert "\n" not in str(error.value)
            now = dict(optimizer.state), optimizer.param_groups, list(optimizer.param_groups)
            assert all(a is b for a, b in zip(kept[0].values(), now[0].values(), strict=True))
            assert now[1] is kept[1]
            assert all(a is b for a, b in zip(kept[2], now[2], strict=True))
            assert_same(snapshot(optimizer, params), before)
        train(optimizer, params, range(3, 5))
        runs.append(snapshot(optimizer, params))
        optimizer.load_state_dict(optimizer.state_dict())  # it still loads what fits
    assert_same(*runs)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("what", BAD)
def test_a_refused_state_changes_nothing(kind: str, what: str) -> None:
    refuses(kind, *BAD[what])


@pytest.mark.parametrize("what", OWN)
def test_a_refused_value_of_its_own_changes_nothing(what: str) -> None:
    refuses(*OWN[what])


@pytest.mark.parametrize("kind", ["adamlip", "Lipschitz adamlip"])
def test_an_error_while_loading_changes_nothing(kind: str) -> None:
    """Also one that nobody has foreseen."""

    def refuses_all(_: torch.optim.Optimizer) -> None:
        raise KeyError("of a hook")

    params = named_params()
    optimizer = BUILDERS[kind](params)
    train(optimizer, params, range(3))
    before, state = snapshot(optimizer, params), copy.deepcopy(optimizer.state_dict())
    state["param_groups"][0]["lr"] = 0.7
    inner = getattr(optimizer, "optimizer", optimizer)
    handle = inner.register_load_state_dict_post_hook(refuses_all)
    with pytest.raises(KeyError, match="of a hook"):
        optimizer.load_state_dict(state)
    assert_same(snapshot(optimizer, params), before)
    handle.remove()
    optimizer.load_state_dict(state)
    assert optimizer.param_groups[0]["lr"] == 0.7


def propagating(wrapped: bool, params: Named) -> Any:
    if wrapped:
        return Lipschitz(torch.optim.Adam(params.items()), nonfinite="propagate")
    return AdamLip(params.items(), nonfinite="propagate")


@pytest.mark.parametrize("wrapped", [False, True], ids=["AdamLip", "Lipschitz"])
def test_what_propagate_has_left_loads_again(wrapped: bool) -> None:
    params, others = named_params(), named_params()
    optimizer, restored = propagating(wrapped, params), propagating(wrapped, others)
    train(optimizer, params, range(2))
    for _ in range(2):
        for p in params.values():
            p.grad = torch.full_like(p, math.nan)
        optimizer.step()
    assert all(state["lipschitz_scale"].isnan() for state in optimizer.state.values())
    restored.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert_same(restored.state_dict(), optimizer.state_dict())


@pytest.mark.parametrize("kind", ["adamlip", "Lipschitz adamlip"])
def test_a_scale_outside_of_new_bounds_loads(kind: str) -> None:
    """Bounds may be changed on purpose; the next step keeps S inside."""
    params = named_params()
    optimizer = BUILDERS[kind](params)
    train(optimizer, params, range(3))
    state = copy.deepcopy(optimizer.state_dict())
    for kept in state["state"].values():
        kept["lipschitz_scale"].fill_(300.0)
    optimizer.load_state_dict(state)
    train(optimizer, params, [3])
    assert all(rate.scale <= 10 for rate in optimizer.layer_learning_rates().values())
