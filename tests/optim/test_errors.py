"""A bad input gives an error that names the argument and the value, and changes nothing."""

from __future__ import annotations

import copy
import io
import math
import re
from collections import UserList
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from hf_adalip import AdaLip, AdamLip, AdamLipU, Lipschitz, create_optimizer
from hf_adalip.optim.forms.kernels import cpu
from tests.optim.cases import (
    CLASSES,
    UPDATE,
    assert_same,
    momentum_only,
    named_params,
    random_grads,
    set_grads,
    six,
    snapshot,
    train,
)

Bad = list[tuple[dict[str, Any], str]]

COMMON: Bad = [
    ({"maximize": "no"}, "maximize.*'no'"),
    ({"decoupled_weight_decay": 1}, "decoupled_weight_decay.*1"),
    ({"foreach": "yes"}, "foreach.*'yes'"),
    ({"lr": -0.1}, "lr.*-0.1"),
    ({"lr": math.nan}, "lr.*nan"),
    ({"lr": math.inf}, "lr.*inf"),
    ({"lr": "0.1"}, "lr.*'0.1'"),
    ({"lr": None}, "lr.*None"),
    ({"lr": True}, "lr.*True"),
    ({"lr": torch.tensor(-0.5)}, "lr.*-0.5"),
    ({"lr": torch.tensor(math.nan)}, "lr.*nan"),
    ({"lr": torch.tensor([0.1, 0.2])}, "lr.*one element.*2"),
    ({"weight_decay": -1e-3}, "weight_decay.*-0.001"),
    ({"weight_decay": math.nan}, "weight_decay.*nan"),
    ({"weight_decay": math.inf}, "weight_decay.*inf"),
    ({"gamma": 0}, "gamma.*0"),
    ({"gamma": 1}, "gamma.*1"),
    ({"gamma": -0.5}, "gamma.*-0.5"),
    ({"gamma": math.nan}, "gamma.*nan"),
    ({"gamma": "0.8"}, "gamma.*'0.8'"),
    ({"gamma": None}, "gamma.*None"),
    ({"c": 0.0}, "c must.*0.0"),
    ({"c": -1e-8}, "c must.*-1e-08"),
    ({"c": math.inf}, "c must.*inf"),
    ({"c": math.nan}, "c must.*nan"),
    ({"c": "theoretic"}, "c must.*theoretical.*'theoretic'"),
    ({"c": None}, "c must.*None"),
    ({"layers": "row"}, "layers.*'row'"),
    ({"layers": None}, "layers.*None"),
    ({"layers": 3}, "layers.*3"),
    ({"scale_bounds": 2.0}, "scale_bounds.*2.0"),
    ({"scale_bounds": (1.0,)}, r"scale_bounds.*\(1.0,\)"),
    ({"scale_bounds": (0.5, 2.0, 3.0)}, r"scale_bounds.*\(0.5, 2.0, 3.0\)"),
    ({"scale_bounds": (2.0, 0.5)}, r"scale_bounds.*\(2.0, 0.5\)"),
    ({"scale_bounds": (0.0, 2.0)}, r"scale_bounds.*\(0.0, 2.0\)"),
    ({"scale_bounds": (-1.0, 2.0)}, r"scale_bounds.*\(-1.0, 2.0\)"),
    ({"scale_bounds": (math.nan, 2.0)}, r"scale_bounds.*\(nan, 2.0\)"),
    ({"scale_bounds": (0.5, math.nan)}, r"scale_bounds.*\(0.5, nan\)"),
    ({"scale_bounds": ("a", "b")}, r"scale_bounds.*\('a', 'b'\)"),
    ({"nonfinite": "ignore"}, "nonfinite.*'ignore'"),
    ({"nonfinite": None}, "nonfinite.*None"),
    ({"foreach": True, "differentiable": True}, "foreach.*differentiable"),
    ({"capturable": True, "nonfinite": "raise"}, "nonfinite.*capturable"),
]
MOMENTUM: Bad = [
    ({"momentum": -0.1}, "momentum.*-0.1"),
    ({"momentum": 1.0}, "momentum.*1.0"),
    ({"momentum": math.nan}, "momentum.*nan"),
    ({"momentum": None}, "momentum.*None"),
    ({"nesterov": True}, "nesterov.*momentum"),
]
EPS: Bad = [
    ({"eps": -1e-8}, "eps.*-1e-08"),
    ({"eps": math.nan}, "eps.*nan"),
    ({"eps": math.inf}, "eps.*inf"),
    ({"eps": None}, "eps.*None"),
]
ALPHA: Bad = [
    ({"alpha": -0.1}, "alpha.*-0.1"),
    ({"alpha": 1.0}, "alpha.*1.0"),
    ({"alpha": math.nan}, "alpha.*nan"),
]
BETAS: Bad = [
    ({"betas": (1.0, 0.999)}, r"betas.*\(1.0, 0.999\)"),
    ({"betas": (0.9, -0.1)}, r"betas.*\(0.9, -0.1\)"),
    ({"betas": (0.9, math.nan)}, r"betas.*\(0.9, nan\)"),
    ({"betas": (0.9,)}, r"betas.*\(0.9,\)"),
    ({"betas": 0.9}, "betas.*0.9"),
    ({"betas": None}, "betas.*None"),
]
PREVIOUS: Bad = [
    ({"previous": "next"}, "previous.*'next'"),
]


def bad_values(name: str) -> Bad:
    own = MOMENTUM if momentum_only(name) else EPS + (ALPHA if "rms" in name else BETAS)
    return COMMON + own + (PREVIOUS if name in UPDATE else [])


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [(name, *case) for name in CLASSES for case in bad_values(name)],
)
def test_bad_values(name: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        CLASSES[name](named_params().items(), **options)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [(n, *case) for n in ("adalip", "rmslip", "adamlipu") for case in bad_values(n)],
)
def test_bad_values_in_a_group(name: str, options: dict[str, Any], message: str) -> None:
    """At the start and later: the groups that there were are as they were, and go on."""
    params = named_params()
    first, *rest = params.items()
    with pytest.raises(ValueError, match=message):
        CLASSES[name]([{"params": [first]}, {"params": rest, **options}])
    optimizer = CLASSES[name]([first])
    train(optimizer, dict([first]), [0])
    before = snapshot(optimizer, params)
    with pytest.raises(ValueError, match=message):
        optimizer.add_param_group({"params": rest, **options})
    assert_same(snapshot(optimizer, params), before)
    optimizer.add_param_group({"params": rest})
    train(optimizer, params, [1])


@pytest.mark.parametrize("name", ["adalip", "rmslip", "adamlip"])
def test_previous_is_an_option_of_updates(name: str) -> None:
    for given in ("applied", "proposed"):
        for make in (
            lambda params, own: CLASSES[name](params, **own),
            lambda params, own: CLASSES[name]([{"params": params, **own}]),
        ):
            with pytest.raises(ValueError, match=f"previous='{given}' is for the -U forms"):
                make([*named_params().values()], {"previous": given})


@six
def test_differentiable_is_for_the_whole_optimizer(name: str) -> None:
    """torch's decorator of `step` asks the optimizer."""
    params = [*named_params().values()]
    with pytest.raises(ValueError, match="differentiable=True cannot be for one group"):
        CLASSES[name]([{"params": params, "differentiable": True}])


@pytest.mark.parametrize(
    "options",
    [
        {"lr": 0},
        {"lr": np.float64(0.1)},
        {"lr": torch.tensor([0.1])},
        {"gamma": np.float32(0.5)},
        {"c": 1},
        {"scale_bounds": [0.5, 2]},
        {"scale_bounds": (0.5, math.inf)},
        {"scale_bounds": (1, 1)},
        {"betas": [0.9, 0.99]},
        {"betas": (0, 0)},
        {"eps": 0},
        {"weight_decay": 0},
    ],
    ids=str,
)
def test_values_that_are_fine(options: dict[str, Any]) -> None:
    params = named_params()
    train(AdamLip(params.items(), **options), params, range(2))
    assert all(p.isfinite().all() for p in params.values())


# Parameters


@six
@pytest.mark.parametrize("empty", [[], iter([]), [{"params": []}]], ids=["list", "iter", "group"])
def test_no_parameters(name: str, empty: Any) -> None:
    """As torch: an empty list is an error, an empty group is not."""
    empty = copy.copy(empty)
    if isinstance(empty, list) and empty:
        assert CLASSES[name](empty).layer_learning_rates() == {}
        return
    with pytest.raises(ValueError, match="empty parameter list"):
        CLASSES[name](empty)


@six
def test_a_parameter_given_twice(name: str) -> None:
    p, q = torch.zeros(2, requires_grad=True), torch.zeros(2, requires_grad=True)
    with pytest.raises(ValueError, match="more than one parameter group"):
        CLASSES[name]([{"params": [p, q]}, {"params": [p]}])
    named = [("a.weight", p), ("b.weight", p)]
    for layers in ("module", lambda _: "one"):  # in which it would count twice
        with pytest.raises(ValueError, match=r"'b.weight' is in .* more than once: its gradient"):
            CLASSES[name](named, layers=layers)
    optimizer = CLASSES[name](named[:1])
    for wrong in (
        {"params": [("a.bias", p)]},
        {"params": [("c", q), ("d", q)], "layers": "module"},
    ):
        with pytest.raises(ValueError, match="more than"):
            optimizer.add_param_group(wrong)
    assert [g["params"] for g in optimizer.param_groups] == [[p]]
    with pytest.raises(ValueError, match="names are missing"):
        CLASSES[name]([("a", p), p])


@six
@pytest.mark.parametrize("form", ["foreach", "fused", None])
def test_a_parameter_given_twice_is_a_layer_once(name: str, form: str | None) -> None:
    """torch warns, and steps it twice; S of the second of two equal gradients would be a pole."""
    if form == "fused" and cpu.missing():
        pytest.skip(f"needs {cpu.missing()}")
    options = {"foreach": False} if form is None else {form: True}
    results = []
    for twice in (False, True):
        params = named_params()
        p, q, r = params.values()
        if twice:
            with pytest.warns(
                UserWarning, match=r"duplicate .* \(number 2\): each is stepped once"
            ):
                optimizer = CLASSES[name]([p, q, p], lr=0.1, **options)
            with pytest.warns(UserWarning, match=r"group with duplicate parameters \('d'\)"):
                CLASSES[name]([("c", r), ("d", r)])
            with pytest.warns(UserWarning, match="group with duplicate parameters"):
                optimizer.add_param_group({"params": iter([r, r])})
        else:
            optimizer = CLASSES[name]([p, q], lr=0.1, **options)
            optimizer.add_param_group({"params": [r]})
        train(optimizer, params, range(3))
        results.append(snapshot(optimizer, params))
    assert_same(*results)


def test_a_base_that_steps_a_parameter_twice_is_refused() -> None:
    """S would scale the step of its step."""
    p, q = torch.zeros(2, requires_grad=True), torch.zeros(2, requires_grad=True)
    with pytest.warns(UserWarning, match="group with duplicate parameters"):
        base = torch.optim.SGD([p, q, p], lr=0.1)
    with pytest.raises(ValueError, match=r"number 2 is in .* more than once: .* S twice in its"):
        Lipschitz(base)
    assert "layer_names" not in base.param_groups[0]
    optimizer = Lipschitz(torch.optim.SGD([p], lr=0.1))
    with (
        pytest.warns(UserWarning, match="duplicate parameters"),
        pytest.raises(ValueError, match="more than once"),
    ):
        optimizer.add_param_group({"params": [q, q]})
    assert len(optimizer.param_groups) == 1


@six
@pytest.mark.parametrize(
    ("params", "error"),
    [
        (torch.zeros(3, requires_grad=True), TypeError),
        ([1.0], TypeError),
        (["weight"], TypeError),
        ([{"params": {torch.zeros(3, requires_grad=True)}}], TypeError),
        ([torch.zeros(3, requires_grad=True) * 2], ValueError),
    ],
    ids=["tensor", "number", "string", "group of a set", "not a leaf"],
)
def test_what_is_not_parameters(name: str, params: Any, error: type[Exception]) -> None:
    """torch's errors come through."""
    with pytest.raises(error):
        CLASSES[name](params)


@pytest.mark.parametrize(
    ("entry", "shown"),
    [
        (lambda p: ("a",), r"\('a'\)"),
        (lambda p: (1, p), r"\(1, Parameter\)"),
        (lambda p: ("a", p, 1), r"\('a', Parameter, 1\)"),
        (lambda p: (), r"\(\)"),
    ],
    ids=["no tensor", "number", "three", "empty"],
)
def test_what_is_no_named_parameter(entry: Any, shown: str) -> None:
    p = torch.nn.Parameter(torch.zeros(3))
    given = entry(p)
    ways: list[Callable[[Any], Any]] = [
        *CLASSES.values(),
        lambda params: create_optimizer(params, "lip-adam"),
        lambda params: create_optimizer(params, "sgd"),
        lambda params: AdamLip([torch.zeros(2)]).add_param_group({"params": params}),
        lambda params: Lipschitz(torch.optim.SGD([torch.zeros(2)])).add_param_group(
            {"params": params}
        ),
    ]
    for make in ways:
        for params in ([given], iter([given])):
            with pytest.raises(TypeError, match=r"params must be .*, got " + shown):
                make(params)
    with pytest.raises(TypeError, match=r"params must be .*, got " + shown):
        AdamLip([{"params": [given]}])


def test_names_of_parameters_are_one_string_each() -> None:
    p = torch.nn.Parameter(torch.zeros(3))
    with pytest.raises(TypeError, match="name of a parameter must be a string, got 1"):
        Lipschitz(torch.optim.Adam([(1, p)]))
    for make in (AdamLip, lambda params: Lipschitz(torch.optim.Adam(params))):
        with pytest.raises(TypeError, match="name of a parameter must be a string, got 1"):
            make([{"params": [p], "param_names": [1]}])
        with pytest.raises(ValueError, match="name for each of 1 parameters, got 2"):
            make([{"params": [p], "param_names": ["a", "b"]}])


def test_a_group_that_is_not_a_dict() -> None:
    optimizer = AdaLip(named_params().values())
    with pytest.raises(TypeError, match=r"param_group must be a dict.*list"):
        optimizer.add_param_group([torch.zeros(1, requires_grad=True)])
    assert len(optimizer.param_groups) == 1


def test_named_and_unnamed_groups() -> None:
    """torch refuses the mixture; nothing is added."""
    named, unnamed = named_params(), named_params()
    optimizer = AdaLip(named.items())
    with pytest.raises(ValueError, match="names"):
        optimizer.add_param_group({"params": list(unnamed.values())})
    assert len(optimizer.param_groups) == 1


def test_a_generator_is_read_once() -> None:
    """add_param_group looks for duplicates; what it looked at must still be there."""
    params = named_params()
    optimizer = AdaLip(p for p in list(params.values())[:1])
    optimizer.add_param_group({"params": (p for p in list(params.values())[1:])})
    assert [len(g["params"]) for g in optimizer.param_groups] == [1, 2]


# Layers


@six
@pytest.mark.parametrize("layers", ["module", lambda name: name], ids=["module", "callable"])
def test_layers_need_names(name: str, layers: Any) -> None:
    """And the error says where to get them."""
    with pytest.raises(ValueError, match=r"names.*named_parameters\(\)"):
        CLASSES[name](named_params().values(), layers=layers)


@six
@pytest.mark.parametrize("key", [None, 3, ("a", "b")], ids=str)
def test_a_layer_function_returns_a_string(name: str, key: Any) -> None:
    with pytest.raises(ValueError, match=rf"layers.*{re.escape(repr(key))}.*'b\.weight'"):
        CLASSES[name](named_params().items(), layers=lambda n: key if n == "b.weight" else n)


def test_a_layer_function_that_raises() -> None:
    """Its own error; the group is not added."""
    params = named_params()
    first, *rest = params.items()

    def layers(name: str) -> str:
        return {"a.weight": "a"}[name]

    optimizer = AdaLip([first], layers=layers)
    with pytest.raises(KeyError, match=r"a\.bias"):
        optimizer.add_param_group({"params": rest})
    assert len(optimizer.param_groups) == 1
    optimizer.add_param_group({"params": rest, "layers": "tensor"})
    assert len(optimizer.param_groups) == 2


def test_the_users_group_is_not_used_up() -> None:
    """A group that was refused, or its "layers", is still what the user wrote."""
    p = torch.zeros(2, requires_grad=True)
    for params in (p, [p]):
        group = {"params": params, "layers": "row"}
        optimizer = AdaLip([torch.zeros(2, requires_grad=True)])
        with pytest.raises(ValueError, match="'row'"):
            optimizer.add_param_group(group)
        assert group["layers"] == "row"


CONFLICTS: list[tuple[type, dict[str, Any], dict[str, Any]]] = [
    (AdaLip, {"gamma": 0.5}, {"gamma": 0.6}),
    (AdaLip, {"c": 1e-3}, {"c": "theoretical"}),
    (AdamLip, {"scale_bounds": None}, {"scale_bounds": (0.5, 2.0)}),
    (AdamLip, {"nonfinite": "skip"}, {"nonfinite": "raise"}),
    (AdamLipU, {"previous": "applied"}, {"previous": "proposed"}),
]


@pytest.mark.parametrize(("kind", "one", "other"), CONFLICTS)
def test_a_layer_has_one_way_to_estimate_its_scale(
    kind: type, one: dict[str, Any], other: dict[str, Any]
) -> None:
    """Groups of a layer may differ in lr and decay, and not in gamma: named, nothing changed."""
    params = named_params()
    pairs = [(n, params[n]) for n in ("a.weight", "a.bias")]
    groups = [{"params": [p], **own} for p, own in zip(pairs, (one, other), strict=True)]
    optimizer = kind(groups, layers="module")
    before = snapshot(optimizer, params)
    set_grads(params, random_grads(params, 0))
    (option,) = one
    with pytest.raises(ValueError, match=rf"layer 'a'.*{option}"):
        optimizer.step()
    assert_same(snapshot(optimizer, params), before)
    optimizer.param_groups[1][option] = one[option]
    optimizer.step()


@six
@pytest.mark.parametrize("groups", [1, 2])
def test_equal_names_do_not_make_one_layer_of_two_tensors(name: str, groups: int) -> None:
    """Two models in one optimizer (a GAN's) have the same names, and layers="tensor" needs none."""

    def draw() -> dict[str, Tensor]:
        return named_params({"first": (3,), "second": (3,)})

    together, apart = draw(), draw()
    pairs = [("conv.weight", p) for p in together.values()]
    given = pairs if groups == 1 else [{"params": [pair]} for pair in pairs]
    optimizer = CLASSES[name](given)
    alone = [CLASSES[name]([p]) for p in apart.values()]
    for seed in range(3):
        train(optimizer, together, [seed])
        set_grads(apart, random_grads(apart, seed))
        for other in alone:
            other.step()
    for n, other in zip(apart, alone, strict=True):
        expected = other.state[apart[n]]["lipschitz_scale"].item()
        assert optimizer.state[together[n]]["lipschitz_scale"].item() == expected


@pytest.mark.parametrize("layers", ["module", lambda name: name[:1]], ids=["module", "callable"])
def test_equal_names_have_no_modules(layers: Any) -> None:
    """Whose module they are in cannot be told: refused, by name, and the group is not added."""
    first, *rest = named_params().items()
    twin = torch.zeros(3, 4, requires_grad=True)
    with pytest.raises(ValueError, match=r"'a\.weight'"):
        AdaLip([first, *rest, ("a.weight", twin)], layers=layers)
    optimizer = AdaLip([first, *rest], layers=layers)
    with pytest.raises(ValueError, match=r"'a\.weight'"):
        optimizer.add_param_group({"params": [("a.weight", twin)]})
    assert len(optimizer.param_groups) == 1


def test_different_gammas_in_different_layers_are_fine() -> None:
    params = named_params()
    groups = [
        {"params": [(n, p)], "gamma": 0.5 if n.startswith("a") else 0.6} for n, p in params.items()
    ]
    train(AdaLip(groups, layers="module"), params, range(2))


# A step that cannot be taken


def flat_buffer(params: dict[str, Tensor]) -> list[Tensor]:
    flat = torch.cat([p.detach().flatten() for p in params.values()]).requires_grad_()
    flat.grad = torch.ones_like(flat)
    return [flat]


@six
@pytest.mark.parametrize("swap", [flat_buffer, lambda params: []], ids=["flat", "none"])
def test_replaced_parameters_are_noticed(
    name: str, swap: Callable[[dict[str, Tensor]], list[Tensor]]
) -> None:
    """DeepSpeed puts flat buffers in the place of parameters: no silent wrong S."""
    params = named_params()
    optimizer = CLASSES[name](params.items())
    replaced = swap(params)
    optimizer.param_groups[0]["params"] = replaced
    before = [p.detach().clone() for p in replaced]
    with pytest.raises(RuntimeError, match="layers cannot be told apart"):
        optimizer.step()
    assert_same([p.detach() for p in replaced], before)


@six
def test_a_parameter_that_gets_another_size(name: str) -> None:
    """Before it has state, as with torch's own; later, its state says that it cannot be."""
    params = named_params()
    optimizer = CLASSES[name](params.items())
    params["b.weight"].data = torch.ones(5, 3)
    train(optimizer, params, range(2))
    before = params["a.bias"].detach().clone()
    params["b.weight"].data = torch.ones(4, 3)
    if optimizer.state[params["b.weight"]].keys() & {"exp_avg", "square_avg", "prev_grad"}:
        with pytest.raises(ValueError, match="belongs to another parameter"):
            train(optimizer, params, [2])
        assert_same(params["a.bias"].detach(), before)


@six
def test_a_bad_option_set_later_is_refused_at_the_step(name: str) -> None:
    """gamma written into a group by hand is checked before it is used."""
    params = named_params()
    optimizer = CLASSES[name](params.items())
    train(optimizer, params, [0])
    optimizer.param_groups[0]["gamma"] = 1.5
    before = snapshot(optimizer, params)
    set_grads(params, random_grads(params, 1))
    with pytest.raises(ValueError, match=r"gamma.*1\.5"):
        optimizer.step()
    assert_same(snapshot(optimizer, params), before)


def test_errors_in_a_closure_come_through() -> None:
    params = named_params()
    optimizer = AdamLip(params.items())
    train(optimizer, params, [0])
    before = snapshot(optimizer, params)

    def closure() -> Tensor:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        optimizer.step(closure)
    assert_same(snapshot(optimizer, params), before)


@six
@pytest.mark.parametrize("mark", ["tensor_model_parallel", "model_parallel"])
def test_a_tensor_parallelism_without_a_group_is_refused(name: str, mark: str) -> None:
    params = named_params()
    optimizer = CLASSES[name](params.items())
    for p in params.values():
        setattr(p, mark, True)
        p.grad = torch.ones_like(p)
    before = [p.detach().clone() for p in params.values()]
    with pytest.raises(NotImplementedError, match="its norm cannot be had"):
        optimizer.step()
    assert_same(list(params.values()), before)


@pytest.mark.parametrize("kind", [list, tuple, UserList])
def test_sequences_of_any_kind_are_taken(kind: Callable[[Any], Any]) -> None:
    """OmegaConf's ListConfig, for one, is no list."""
    params = named_params()
    options = {"betas": kind([0.8, 0.9]), "scale_bounds": kind([0.5, 2.0])}
    optimizer = AdamLip(params.items(), **options)
    same = AdamLip(named_params().items(), betas=(0.8, 0.9), scale_bounds=(0.5, 2.0))
    for key in ("betas", "scale_bounds"):
        assert type(optimizer.param_groups[0][key]) is (list if kind is list else tuple)
        assert tuple(optimizer.param_groups[0][key]) == same.param_groups[0][key]
    train(optimizer, params, [0])
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    optimizer.load_state_dict(torch.load(file, weights_only=True))
    wrapped = Lipschitz(torch.optim.SGD(params.values()), scale_bounds=kind([0.5, 2.0]))
    assert wrapped.hyperparameters["scale_bounds"] == (0.5, 2.0)
