"""What an optimizer keeps, and that saving and loading it loses nothing."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict

from hf_adalip import AdaLip, AdaLipU, AdamLip, AdamLipU, Lipschitz, RMSLip, create_optimizer
from hf_adalip.optim import LipOptimizer
from tests.optim.cases import (
    CLASSES,
    Named,
    assert_same,
    forms,
    named_params,
    set_grads,
    six,
    snapshot,
    train,
    wrap,
)

SCALARS = {"step", "lipschitz_scale", "prev_norm", "layer_lr", "nonfinite_steps"}
THEORETICAL = {"lipschitz_c"}

KEPT: list[tuple[str, dict[str, Any], set[str], set[str]]] = [
    # of the parameter's shape; scalars beside SCALARS
    ("adalip", {}, {"prev_grad"}, set()),
    ("adalip", {"momentum": 0.9}, {"prev_grad", "momentum_buffer"}, set()),
    ("adalip", {"momentum": 0.9, "nesterov": True}, {"prev_grad", "momentum_buffer"}, set()),
    ("rmslip", {}, {"prev_grad", "square_avg"}, set()),
    ("adamlip", {}, {"prev_grad", "exp_avg", "exp_avg_sq"}, set()),
    ("adamlip", {"c": "theoretical"}, {"prev_grad", "exp_avg", "exp_avg_sq"}, THEORETICAL),
    ("adalipu", {}, {"prev_update"}, set()),
    # -U forms compute the previous update again where their moments allow it: no history.
    ("adalipu", {"momentum": 0.9}, {"momentum_buffer"}, {"prev_lr"}),
    ("adalipu", {"momentum": 0.9, "nesterov": True}, {"momentum_buffer", "prev_update"}, set()),
    ("rmslipu", {}, {"square_avg", "prev_update"}, set()),
    ("adamlipu", {}, {"exp_avg", "exp_avg_sq"}, {"prev_lr"}),
    ("adamlipu", {"c": "theoretical"}, {"exp_avg", "exp_avg_sq"}, {"prev_lr"} | THEORETICAL),
]


@pytest.mark.parametrize(("name", "options", "shaped", "scalars"), KEPT)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@forms
def test_what_is_kept(
    name: str,
    options: dict[str, Any],
    shaped: set[str],
    scalars: set[str],
    dtype: torch.dtype,
    foreach: bool,
) -> None:
    """torch's names; tensors of the parameter's shape and dtype; float32 numbers."""
    params = named_params(dtype=dtype)
    optimizer = CLASSES[name](params.items(), foreach=foreach, **options)
    train(optimizer, params, range(2))
    for p in params.values():
        state = optimizer.state[p]
        assert {k for k, v in state.items() if v.dim()} == shaped
        assert {k for k, v in state.items() if not v.dim()} == SCALARS | scalars
        for key, value in state.items():
            if key in shaped:
                assert (value.shape, value.dtype) == (p.shape, dtype)
            else:
                assert (value.shape, value.dtype) == ((), torch.float32)
            assert not value.requires_grad


@six
@pytest.mark.usefixtures("float64")
def test_numbers_follow_the_default_dtype(name: str) -> None:
    """As torch.optim's `step` does."""
    params = named_params(dtype=torch.float32)
    optimizer = CLASSES[name](params.items())
    train(optimizer, params, [0])
    for state in optimizer.state.values():
        assert {v.dtype for v in state.values() if not v.dim()} == {torch.float64}


@six
def test_the_step_of_the_theoretical_c_is_the_optimizers(name: str) -> None:
    """It is the scheduler's: kept with the group, and counted when a layer has no gradient too."""
    params = named_params()
    optimizer = CLASSES[name](params.items(), c="theoretical")
    train(optimizer, {n: params[n] for n in ("a.weight",)}, range(2))
    set_grads(params, {})
    optimizer.step()
    assert optimizer.param_groups[0]["lipschitz_step"].item() == 3
    others = named_params()
    restored = CLASSES[name](others.items(), c="theoretical")
    restored.load_state_dict(through_file(optimizer.state_dict()))
    assert restored.param_groups[0]["lipschitz_step"].item() == 3
    optimizer.step()
    assert restored.param_groups[0]["lipschitz_step"].item() == 3


@six
def test_no_state_before_a_step(name: str) -> None:
    optimizer = CLASSES[name](named_params().items())
    assert not optimizer.state
    assert optimizer.state_dict()["state"] == {}


# Round trips

Kind = Callable[[Named], torch.optim.Optimizer]


def builders() -> dict[str, Kind]:
    """The six, with all the options that state depends on, and Lipschitz over some others."""

    def lip(name: str, **options: Any) -> Kind:
        return lambda params: CLASSES[name](params.items(), lr=0.05, layers="module", **options)

    def over(name: str, **options: Any) -> Kind:
        return lambda params: wrap(name, params.items(), lr=0.05, **options)

    def nadam(params: Named) -> Lipschitz:
        return Lipschitz(torch.optim.NAdam(params.items(), lr=0.05), c="theoretical")

    kinds = {name: lip(name) for name in CLASSES}
    kinds |= {f"{name} momentum": lip(name, momentum=0.9) for name in ("adalip", "adalipu")}
    kinds["adalipu nesterov"] = lip("adalipu", momentum=0.9, nesterov=True)
    kinds |= {f"{name} theoretical": lip(name, c="theoretical") for name in ("adalip", "adamlipu")}
    kinds |= {f"Lipschitz {name}": over(name) for name in CLASSES}
    kinds["Lipschitz momentum"] = over("adalip", momentum=0.9)
    kinds["Lipschitz nadam"] = nadam
    return kinds


BUILDERS = builders()


def through_file(state: dict[str, Any]) -> dict[str, Any]:
    """What a checkpoint does; weights_only refuses what is not plain tensors and numbers."""
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


TRIPS: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda state: pickle.loads(pickle.dumps(state)),
    "file": through_file,
}

DTYPES = ["float32", "bfloat16"]


@pytest.mark.parametrize(
    ("kind", "dtype"),
    # torch.optim.NAdam's own load_state_dict makes a bf16 of its mu_product, and Lipschitz does
    # not measure updates that are rounded into bf16 parameters.
    [
        (k, d)
        for k in BUILDERS
        for d in DTYPES
        if d == "float32" or not ("nadam" in k or (k.startswith("Lipschitz") and k.endswith("u")))
    ],
)
@pytest.mark.parametrize("trip", TRIPS)
def test_round_trip(kind: str, trip: str, dtype: str) -> None:
    """Bit for bit (S stays float32 though the parameters are not), and then the same steps."""
    params = named_params(dtype=getattr(torch, dtype))
    optimizer = BUILDERS[kind](params)
    train(optimizer, params, range(3))
    before = snapshot(optimizer, params)

    others = {n: p.detach().clone().requires_grad_() for n, p in params.items()}
    restored = BUILDERS[kind](others)
    restored.load_state_dict(TRIPS[trip](optimizer.state_dict()))
    assert_same(snapshot(restored, others), before)
    assert_same(snapshot(optimizer, params), before)

    train(optimizer, params, range(3, 6))
    train(restored, others, range(3, 6))
    assert_same(snapshot(restored, others), snapshot(optimizer, params))


@pytest.mark.parametrize("kind", BUILDERS)
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_copies_of_the_optimizer_itself(kind: str, copied: Callable[[Any], Any]) -> None:
    """With its parameters, as torch.optim's: independent, and stepping alike."""
    params = named_params()
    optimizer = BUILDERS[kind](params)
    train(optimizer, params, range(2))
    clone, others = copied((optimizer, params))
    train(optimizer, params, range(2, 4))
    train(clone, others, range(2, 4))
    assert_same(snapshot(clone, others), snapshot(optimizer, params))
    train(optimizer, params, [4])
    assert not torch.equal(params["a.weight"], others["a.weight"])


@pytest.mark.parametrize("kind", BUILDERS)
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
@pytest.mark.parametrize("first", [[], ["a.weight"]], ids=["no step", "one parameter"])
def test_copies_of_what_has_not_stepped_all_parameters(
    kind: str, copied: Callable[[Any], Any], first: list[str]
) -> None:
    """As where a head is unfrozen later."""
    params = named_params()
    optimizer = BUILDERS[kind](params)
    if first:
        train(optimizer, {name: params[name] for name in first}, range(1))
    clone, others = copied((optimizer, params))
    for own, named in ((optimizer, params), (clone, others)):
        train(own, named, range(1, 3))
    assert_same(snapshot(clone, others), snapshot(optimizer, params))


@pytest.mark.parametrize("kind", BUILDERS)
def test_loaded_numbers_are_copies(kind: str) -> None:
    """Stepping what was saved changes no S that was loaded, nor the other way round.

    Tensors of the parameter's shape that need no conversion are shared, as torch.optim shares
    them: a copy would need twice the memory.
    """
    params = named_params()
    optimizer = BUILDERS[kind](params)
    train(optimizer, params, range(2))
    others = named_params()
    restored = BUILDERS[kind](others)
    restored.load_state_dict(optimizer.state_dict())
    loaded = copy.deepcopy(restored.layer_learning_rates())
    train(optimizer, params, range(2, 4))
    assert restored.layer_learning_rates() == loaded
    kept = copy.deepcopy(optimizer.layer_learning_rates())
    train(restored, others, range(2, 4))
    assert optimizer.layer_learning_rates() == kept


@six
def test_state_loads_into_the_other_form(name: str) -> None:
    """foreach is in the state_dict of a group, as in torch, and the numbers fit either."""
    params, others = named_params(), named_params()
    loop = CLASSES[name](params.items(), foreach=False)
    train(loop, params, range(2))
    multi = CLASSES[name](others.items(), foreach=True)
    multi.load_state_dict(copy.deepcopy(loop.state_dict()))
    multi.param_groups[0]["foreach"] = True
    for n in params:
        others[n].data.copy_(params[n])
    train(loop, params, range(2, 4))
    train(multi, others, range(2, 4))
    for n in params:
        torch.testing.assert_close(params[n], others[n])


def test_state_moves_to_the_dtype_of_the_parameters() -> None:
    """A float32 checkpoint into a bf16 model: moments are cast, S is not."""
    params, others = named_params(), named_params(dtype=torch.bfloat16)
    optimizer, restored = AdamLip(params.items()), AdamLip(others.items())
    train(optimizer, params, range(3))
    restored.load_state_dict(optimizer.state_dict())
    for n in params:
        saved, loaded = optimizer.state[params[n]], restored.state[others[n]]
        for key, value in saved.items():
            if value.dim():
                assert_same(loaded[key], value.bfloat16())
            else:
                assert_same(loaded[key], value)
    train(restored, others, [3])


@six
def test_an_empty_state_loads(name: str) -> None:
    params = named_params()
    optimizer = CLASSES[name](params.items())
    fresh = copy.deepcopy(optimizer.state_dict())
    train(optimizer, params, range(2))
    optimizer.load_state_dict(fresh)
    assert not optimizer.state
    train(optimizer, params, [0])
    for rate in optimizer.layer_learning_rates().values():
        assert rate.lr == pytest.approx(optimizer.param_groups[0]["lr"])


# Checkpoints of other versions

NEW_OPTIONS = [
    "gamma",
    "c",
    "scale_bounds",
    "nonfinite",
    "decoupled_weight_decay",
    "foreach",
    "maximize",
    "capturable",
    "differentiable",
    "layer_names",
]


@six
@pytest.mark.parametrize("option", NEW_OPTIONS)
def test_an_older_group_takes_the_options_of_the_optimizer(name: str, option: str) -> None:
    params, others = named_params(), named_params()
    given = {"gamma": 0.7, "c": 1e-3, "scale_bounds": (0.2, 5.0), "nonfinite": "propagate"}
    optimizer = CLASSES[name](params.items(), **given)
    train(optimizer, params, range(2))
    state = copy.deepcopy(optimizer.state_dict())
    del state["param_groups"][0][option]
    restored = CLASSES[name](others.items(), **given)
    restored.load_state_dict(state)
    assert restored.param_groups[0][option] == optimizer.param_groups[0][option]
    train(restored, others, range(2, 4))


def test_options_come_from_the_checkpoint() -> None:
    """As in torch: what was saved is what training goes on with."""
    params = named_params()
    optimizer = AdamLip(params.items(), lr=0.3, gamma=0.7, scale_bounds=None)
    train(optimizer, params, [0])
    restored = AdamLip(named_params().items(), lr=0.1)
    restored.load_state_dict(optimizer.state_dict())
    (group,) = restored.param_groups
    assert (group["lr"], group["gamma"], group["scale_bounds"]) == (0.3, 0.7, None)


def test_layers_come_from_the_model() -> None:
    """Names are not loaded: that a checkpoint was made with others is no reason to follow it."""
    params = named_params()
    optimizer = AdamLip(params.items(), layers="module")
    train(optimizer, params, [0])
    renamed = {f"module.{n}": p for n, p in named_params().items()}
    restored = AdamLip(renamed.items(), layers=lambda name: name[0].upper())
    restored.load_state_dict(optimizer.state_dict())
    assert list(restored.layer_learning_rates()) == ["A", "B"]


@pytest.mark.parametrize(
    "wrapped",
    ["module.{}", "_orig_mod.{}", "module._orig_mod.{}", "_fsdp_wrapped_module.{}"],
)
def test_wrapping_a_model_does_not_rename_its_layers(wrapped: str) -> None:
    params = {wrapped.format(n): p for n, p in named_params().items()}
    for layers, names in (("module", ["a", "b"]), ("tensor", list(named_params()))):
        optimizer = AdamLip(params.items(), layers=layers)
        train(optimizer, params, [0])
        assert list(optimizer.layer_learning_rates()) == names


def test_scale_bounds_survive_json() -> None:
    """Some engines keep param_groups as JSON, where a tuple becomes a list."""
    params = named_params()
    optimizer = AdamLip(params.items())
    train(optimizer, params, [0])
    state = copy.deepcopy(optimizer.state_dict())
    group = state["param_groups"][0]
    group["scale_bounds"], group["betas"] = list(group["scale_bounds"]), list(group["betas"])
    optimizer.load_state_dict(state)
    train(optimizer, params, [1])


@six
@pytest.mark.parametrize("key", ["nonfinite_steps", "layer_lr", "prev_norm"])
@forms
def test_state_that_is_missing_starts_as_before_a_first_step(
    name: str, key: str, foreach: bool
) -> None:
    params, others = named_params(), named_params()
    optimizer = CLASSES[name](params.items(), foreach=foreach)
    train(optimizer, params, range(2))
    state = copy.deepcopy(optimizer.state_dict())
    for tensor_state in state["state"].values():
        del tensor_state[key]
    restored = CLASSES[name](others.items(), foreach=foreach)
    restored.load_state_dict(state)
    initial = {"nonfinite_steps": 0.0, "layer_lr": 0.0, "prev_norm": -1.0}
    for p in others.values():
        assert restored.state[p][key].item() == initial[key]
        assert restored.state[p][key].dtype == torch.float32
    train(restored, others, range(2, 4))
    assert all(p.isfinite().all() for p in others.values())


@pytest.mark.parametrize("name", ["adamlip", "adalipu"])
@pytest.mark.parametrize("key", ["nonfinite_steps", "layer_lr", "prev_norm"])
def test_a_number_that_a_wrapped_optimizers_state_lacks_starts_anew(name: str, key: str) -> None:
    params, others = named_params(), named_params()
    optimizer, restored = (
        BUILDERS[f"Lipschitz {name}"](params),
        BUILDERS[f"Lipschitz {name}"](others),
    )
    train(optimizer, params, range(2))
    state = copy.deepcopy(optimizer.state_dict())
    for tensor_state in state["state"].values():
        del tensor_state[key]
    restored.load_state_dict(state)
    assert isinstance(restored, Lipschitz)
    for p, q in zip(params.values(), others.values(), strict=True):
        kept = {n: x for n, x in optimizer.state[p].items() if n != key}
        assert_same({n: x for n, x in restored.state[q].items() if n != key}, kept)
        assert restored.state[q][key].item() == (-1.0 if key == "prev_norm" else 0.0)
    train(restored, others, range(2, 4))
    assert all(p.isfinite().all() for p in others.values())


@pytest.mark.parametrize(
    ("kind", "key"),
    [
        ("adamlip", "prev_grad"),
        ("rmslipu", "prev_update"),
        ("adamlipu", "prev_lr"),
        ("adalipu momentum", "prev_lr"),
        ("Lipschitz adamlip", "prev_grad"),
        ("Lipschitz adamlipu", "prev_update"),
    ],
)
def test_without_its_history_a_layer_keeps_s_for_a_step(kind: str, key: str) -> None:
    """‖x_{t-1}‖ alone would make an S of a change that nobody knows."""
    params, others = named_params(), named_params()
    optimizer, restored = BUILDERS[kind](params), BUILDERS[kind](others)
    train(optimizer, params, range(2))
    state = copy.deepcopy(optimizer.state_dict())
    for tensor_state in state["state"].values():
        del tensor_state[key]
    restored.load_state_dict(state)
    before = optimizer.layer_learning_rates()
    train(restored, others, [2])
    for layer, rate in restored.layer_learning_rates().items():
        assert rate.scale == before[layer].scale
        assert rate.lr == pytest.approx(0.05 * rate.scale)


@pytest.mark.parametrize("kind", ["adamlipu theoretical", "Lipschitz nadam"])
def test_a_group_without_the_step_of_the_theoretical_c_counts_from_the_start(kind: str) -> None:
    params, others = named_params(), named_params()
    optimizer, restored = BUILDERS[kind](params), BUILDERS[kind](others)
    train(optimizer, params, range(2))
    state = copy.deepcopy(optimizer.state_dict())
    del state["param_groups"][0]["lipschitz_step"]
    train(restored, others, [0])  # its own count is not the checkpoint's
    restored.load_state_dict(state)
    train(restored, others, [2])
    assert restored.param_groups[0]["lipschitz_step"].item() == 1
    for p, q in zip(params.values(), others.values(), strict=True):
        before, after = optimizer.state[p]["lipschitz_c"], restored.state[q]["lipschitz_c"]
        assert after >= before  # Eq. A.3's never decreases


def test_a_constant_c_continues_as_a_theoretical_one() -> None:
    params, others = named_params(), named_params()
    optimizer = AdamLip(params.items())
    train(optimizer, params, range(2))
    restored = AdamLip(others.items(), c="theoretical")
    state = copy.deepcopy(optimizer.state_dict())
    state["param_groups"][0]["c"] = "theoretical"
    restored.load_state_dict(state)
    train(restored, others, range(2, 4))
    assert all(s["lipschitz_c"] >= 1e-8 for s in restored.state.values())


def test_a_checkpoint_of_torch_adam() -> None:
    """Its moments and step are taken over; S starts."""
    params, others = named_params(), named_params()
    adam = torch.optim.Adam(params.items(), lr=0.01)
    train(adam, params, range(3))
    restored = AdamLip(others.items(), lr=0.01)
    restored.load_state_dict(adam.state_dict())
    for n in params:
        for key in ("exp_avg", "exp_avg_sq", "step"):
            assert_same(restored.state[others[n]][key], adam.state[params[n]][key])
    train(restored, others, [3])
    for rate in restored.layer_learning_rates().values():
        assert rate.lr == pytest.approx(0.01)


@pytest.mark.parametrize(
    ("base", "options", "kind", "option"),
    [
        (torch.optim.Adam, {"amsgrad": True}, AdamLip, "amsgrad=True"),
        (torch.optim.SGD, {"momentum": 0.9, "dampening": 0.5}, AdaLip, "dampening=0.5"),
        (torch.optim.RMSprop, {"centered": True}, RMSLip, "centered=True"),
        (torch.optim.RMSprop, {"momentum": 0.9}, RMSLip, "momentum=0.9"),
    ],
)
def test_an_option_of_torch_that_we_do_not_have(
    base: Any, options: dict[str, Any], kind: Any, option: str
) -> None:
    params, others = named_params(), named_params()
    saved = base(params.items(), lr=0.01, **options)
    train(saved, params, range(3))
    restored = kind(others.items(), lr=0.02)
    train(restored, others, [0])
    before = snapshot(restored, others)
    with pytest.raises(ValueError, match=f"{option}, which {kind.__name__} does not have"):
        restored.load_state_dict(saved.state_dict())
    assert_same(snapshot(restored, others), before)


def test_a_key_of_the_users_group_is_loaded_again() -> None:
    params = named_params()
    optimizer = AdamLip([{"params": list(params.items()), "momentum": 0.9}])
    train(optimizer, params, [0])
    optimizer.load_state_dict(optimizer.state_dict())
    assert optimizer.param_groups[0]["momentum"] == 0.9


def test_the_form_of_weight_decay_comes_with_torchs_state() -> None:
    """Adam adds it to the gradient, AdamW does not."""
    for base in (torch.optim.Adam, torch.optim.AdamW):
        params = named_params()
        saved = base(params.items()).state_dict()
        restored = AdamLip(params.items())
        restored.load_state_dict(saved)
        expected = saved["param_groups"][0].get("decoupled_weight_decay", True)  # not of torch 2.6
        assert restored.param_groups[0]["decoupled_weight_decay"] == expected


# Hooks


@pytest.mark.parametrize("kind", ["adamlip", "Lipschitz adamlip"])
def test_the_users_load_hooks_are_honoured(kind: str) -> None:
    """One that renames keys of an old format, as torch documents load_state_dict_pre_hook."""
    params, others = named_params(dtype=torch.bfloat16), named_params(dtype=torch.bfloat16)
    optimizer, restored = BUILDERS[kind](params), BUILDERS[kind](others)
    train(optimizer, params, range(3))
    old = copy.deepcopy(optimizer.state_dict())
    for tensor_state in old["state"].values():
        tensor_state["S"] = tensor_state.pop("lipschitz_scale")

    def rename(_: torch.optim.Optimizer, state: dict[str, Any]) -> dict[str, Any]:
        state = copy.deepcopy(state)
        for tensor_state in state["state"].values():
            tensor_state["lipschitz_scale"] = tensor_state.pop("S")
        return state

    seen = []
    restored.register_load_state_dict_pre_hook(rename)
    restored.register_load_state_dict_post_hook(
        lambda o: seen.extend(s["lipschitz_scale"].clone() for s in o.state.values())
    )
    restored.load_state_dict(old)
    for n in params:
        for key, value in optimizer.state[params[n]].items():
            assert_same(restored.state[others[n]][key], value, key)
    # The user's post-hook sees what was restored, not torch's cast.
    assert {s.dtype for s in seen} == {torch.float32}


@pytest.mark.parametrize("kind", ["adamlip", "Lipschitz adamlip"])
def test_state_dict_hooks(kind: str) -> None:
    params = named_params()
    optimizer = BUILDERS[kind](params)
    calls = []
    optimizer.register_state_dict_pre_hook(lambda *_: calls.append("pre"))
    optimizer.register_state_dict_post_hook(lambda *_: calls.append("post"))
    optimizer.state_dict()
    assert calls == ["pre", "post"]


@pytest.mark.parametrize("kind", ["adamlip", "Lipschitz adamlip"])
def test_a_hook_may_write_into_state_and_replace_what_is_saved(kind: str) -> None:
    params = named_params()
    optimizer = BUILDERS[kind](params)
    train(optimizer, params, range(2))
    optimizer.register_state_dict_pre_hook(lambda o: o.state.update(seen=1))
    assert optimizer.state_dict()["state"]["seen"] == 1
    optimizer.register_state_dict_post_hook(lambda _, saved: saved["state"].pop("seen") and None)
    assert "seen" not in optimizer.state_dict()["state"]
    optimizer.register_state_dict_post_hook(lambda *_: {})
    assert optimizer.state_dict() == {}


@pytest.mark.parametrize("kind", ["adamlip", "adalipu", "Lipschitz adamlip"])
@pytest.mark.parametrize("entry", [3, "text", None, [1, 2], {"a": 1}], ids=str)
def test_an_entry_of_state_that_is_no_parameters(kind: str, entry: Any) -> None:
    params, others = named_params(), named_params()
    optimizer, restored = BUILDERS[kind](params), BUILDERS[kind](others)
    optimizer.state["global"] = entry
    train(optimizer, params, range(2))
    saved = optimizer.state_dict()
    assert saved["state"]["global"] == entry
    restored.load_state_dict(through_file(saved))
    assert restored.state["global"] == entry
    assert restored.state_dict()["state"]["global"] == entry
    for copied in (copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))):
        assert copied.state["global"] == entry
    train(restored, others, [2])
    assert restored.layer_learning_rates()


def test_entries_of_the_base_and_of_lipschitz_stay_apart() -> None:
    params = named_params()
    base = torch.optim.SGD(params.items(), lr=0.1)
    optimizer = Lipschitz(base)
    base.state["calls"], optimizer.state["calls"], optimizer.state["own"] = 1, 2, 3
    saved = optimizer.state_dict()
    base.state.clear()
    optimizer.state.clear()
    optimizer.load_state_dict(saved)
    assert (dict(base.state), dict(optimizer.state)) == ({"calls": 1}, {"calls": 2, "own": 3})


def test_loading_leaves_no_hooks_behind() -> None:
    params = named_params()
    optimizer = AdamLip(params.items())
    before = len(optimizer._optimizer_load_state_dict_pre_hooks)
    for _ in range(3):
        optimizer.load_state_dict(optimizer.state_dict())
    assert len(optimizer._optimizer_load_state_dict_pre_hooks) == before
    assert len(optimizer._optimizer_load_state_dict_post_hooks) == 0


# What does not fit


def wrong(state: dict[str, Any], how: str) -> dict[str, Any]:
    state = copy.deepcopy(state)
    if how == "groups":
        state["param_groups"].append(dict(state["param_groups"][0]))
    else:
        state["param_groups"][0]["params"].pop()
    return state


@pytest.mark.parametrize("kind", ["adalip", "adamlipu", "Lipschitz adamlip"])
@pytest.mark.parametrize("how", ["groups", "params"])
def test_a_state_of_another_model_is_refused(kind: str, how: str) -> None:
    """With torch's ValueError, nothing changed, and the optimizer still loads what fits."""
    params = named_params()
    optimizer = BUILDERS[kind](params)
    train(optimizer, params, range(2))
    before = snapshot(optimizer, params)
    with pytest.raises(ValueError, match="param"):
        optimizer.load_state_dict(wrong(optimizer.state_dict(), how))
    assert_same(snapshot(optimizer, params), before)
    optimizer.load_state_dict(copy.deepcopy(before["state"]))
    assert_same(snapshot(optimizer, params), before)


@pytest.mark.parametrize("kind", ["adamlip", "rmslipu", "lip-nadam"])
def test_a_state_of_other_shapes_is_refused(kind: str) -> None:
    """As of a classifier that was replaced; nothing of it is loaded then."""
    small, large = (named_params({"a": (n, 6), "b": (n,)}) for n in (2, 5))
    saved, optimizer = (
        create_optimizer(list(p.items()), kind, lr=0.1, layers="tensor") for p in (small, large)
    )
    train(saved, small, [0])
    train(optimizer, large, [0])
    before = snapshot(optimizer, large)
    with pytest.raises(ValueError, match=r"has shape \(2, 6\) where \(5, 6\) is needed"):
        optimizer.load_state_dict(saved.state_dict())
    assert_same(snapshot(optimizer, large), before)
    if kind != "lip-nadam":
        moment = "square_avg" if kind == "rmslipu" else "exp_avg"
        optimizer.state[large["a"]][moment] = torch.ones(6)
        before = snapshot(optimizer, large)
        with pytest.raises(ValueError, match=r"has shape \(6,\) where \(5, 6\) is needed"):
            train(optimizer, large, [1])
        assert_same(snapshot(optimizer, large), before)


def test_groups_with_different_state_round_trip() -> None:
    """A tensor of a group without momentum has no buffer to save."""

    def build(params: Named) -> LipOptimizer:
        first, second, third = params.items()
        groups: list[dict[str, Any]] = [
            {"params": [first], "momentum": 0.9},
            {"params": [second], "c": "theoretical"},
            {"params": [third]},
        ]
        return AdaLipU(groups)

    params, others = named_params(), named_params()
    optimizer, restored = build(params), build(others)
    train(optimizer, params, range(3))
    restored.load_state_dict(through_file(optimizer.state_dict()))
    for n in params:
        others[n].data.copy_(params[n])
    train(optimizer, params, range(3, 5))
    train(restored, others, range(3, 5))
    assert_same(snapshot(restored, others), snapshot(optimizer, params))


def test_frozen_parameters_have_no_state_to_save() -> None:
    params = named_params()
    params["a.bias"].requires_grad_(False)
    optimizer = AdaLip(params.items())
    train(optimizer, {n: p for n, p in params.items() if n != "a.bias"}, range(2))
    state = optimizer.state_dict()
    assert sorted(state["state"]) == [0, 2]
    restored = AdaLip(named_params().items())
    restored.load_state_dict(state)
    assert list(restored.layer_learning_rates()) == ["a.weight", "b.weight"]


def test_a_momentum_that_is_switched_on_later() -> None:
    """A scheduler or a user may change any option of a group between steps."""
    params = named_params()
    optimizer = AdaLip(params.items())
    train(optimizer, params, [0])
    optimizer.param_groups[0]["momentum"] = 0.9
    train(optimizer, params, range(1, 3))
    assert all(isinstance(s["momentum_buffer"], Tensor) for s in optimizer.state.values())


def test_recomputed_updates_need_no_more_memory_than_adam() -> None:
    params, others = named_params(), named_params()
    ours, adam = AdamLipU(params.items()), torch.optim.Adam(others.items())
    train(ours, params, [0])
    train(adam, others, [0])

    def size(optimizer: torch.optim.Optimizer) -> int:
        return sum(v.numel() for s in optimizer.state.values() for v in s.values() if v.dim())

    assert size(ours) == size(adam)


@six
@pytest.mark.parametrize("lr", [1e-2, torch.tensor(1e-2)], ids=["number", "tensor"])
def test_making_the_state_before_training_moves_nothing(name: str, lr: float | Tensor) -> None:
    """torch.distributed.checkpoint makes it by a step with zero gradients and lr = 0, after which
    torch's own Adam, also as the base of Lipschitz, is one step ahead in its bias correction."""
    net = torch.nn.Linear(4, 3)
    plain, asked = copy.deepcopy(net), copy.deepcopy(net)
    for model in (plain, asked):
        optimizer = create_optimizer(model, name, lr=lr, weight_decay=0.1, c="theoretical")
        if model is asked:
            get_optimizer_state_dict(model, optimizer)
        for step in range(4):
            optimizer.zero_grad()
            model(torch.full((2, 4), step + 1.0)).square().sum().backward()
            optimizer.step()
    assert_same(list(asked.parameters()), list(plain.parameters()))


@pytest.mark.parametrize("wrapped", [False, True], ids=["AdamLip", "Lipschitz"])
def test_structure_of_another_model_is_not_loaded(wrapped: bool) -> None:
    params = named_params()
    saved = AdamLip([{"params": params.items(), "no_weight_decay": ["a.bias"]}])
    train(saved, params, [0])
    own = list(named_params().values())
    optimizer = Lipschitz(torch.optim.Adam(own)) if wrapped else AdamLip(own)
    optimizer.load_state_dict(saved.state_dict())
    assert "no_weight_decay" not in optimizer.param_groups[0]
    for p in own:
        p.grad = torch.ones_like(p)
    optimizer.step()


@pytest.mark.parametrize("kind", ["adamlip", "adalipu"])
def test_state_that_is_moved_by_its_data_is_the_state_that_is_stepped(kind: str) -> None:
    """`x.data = x.data.to(device)`, with which many a script moves an optimizer's state."""
    results = []
    for moves in (False, True):
        params = named_params()
        optimizer = CLASSES[kind](params.values())
        train(optimizer, params, range(3))
        for x in (x for state in optimizer.state.values() for x in state.values() if moves):
            x.data = x.data.clone()
        train(optimizer, params, range(3, 6))
        results.append(snapshot(optimizer, params))
    assert_same(*results)


def test_state_that_a_graph_may_have_captured_stays_where_it_is() -> None:
    params = named_params()
    optimizer = AdamLip(params.values(), capturable=True)
    train(optimizer, params, range(1))
    where = {id(x): x.data_ptr() for state in optimizer.state.values() for x in state.values()}
    train(optimizer, params, range(1, 4))
    now = {id(x): x.data_ptr() for state in optimizer.state.values() for x in state.values()}
    assert now == where
