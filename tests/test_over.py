"""`LipschitzOver` and `SecantOver`: the wrappers as classes that are called with parameters."""

from __future__ import annotations

import copy
import importlib
import inspect
import pickle

import pytest
import torch
from torch import nn

import hf_adalip
from hf_adalip import Lipschitz, LipschitzOver, Secant, SecantOver
from hf_adalip.monitor import layerwise, secant
from hf_adalip.registry import describe_optimizer


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 2))


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> None:
    for step in steps:
        x = torch.randn(8, 4, generator=torch.Generator().manual_seed(step))

        def closure(x=x):
            optimizer.zero_grad()
            loss = (model(x) - x[:, :2]).square().mean()
            loss.backward()
            return loss

        optimizer.step(closure)


def assert_same(one: nn.Module, two: nn.Module) -> None:
    for p, q in zip(one.parameters(), two.parameters(), strict=True):
        assert torch.equal(p, q)


def groups(model: nn.Module) -> list[dict]:
    named = list(model.named_parameters())
    return [{"params": named[:2]}, {"params": named[2:], "lr": 0.02, "weight_decay": 0.0}]


FORMS = {
    "tensors": lambda model: model.parameters(),
    "named": lambda model: model.named_parameters(),
    "groups": groups,
}


@pytest.mark.parametrize("form", FORMS)
def test_lipschitz_over_is_lipschitz_of_the_base(form):
    one, two = net(), net()
    options = {"gamma": 0.7, "scale_bounds": None, "signal": "update"}
    by_name = LipschitzOver(
        FORMS[form](one), "nadam", lr=0.01, weight_decay=0.1, momentum_decay=0.01, **options
    )
    base = torch.optim.NAdam(FORMS[form](two), lr=0.01, weight_decay=0.1, momentum_decay=0.01)
    by_hand = Lipschitz(base, **options)
    for model, optimizer in ((one, by_name), (two, by_hand)):
        train(model, optimizer, range(5))
    assert_same(one, two)
    assert by_name.layer_learning_rates() == by_hand.layer_learning_rates()
    assert isinstance(by_name, Lipschitz)
    assert layerwise(by_name) is by_name
    assert "(NAdam) with lr=0.01, " in describe_optimizer(by_name)


@pytest.mark.parametrize("form", FORMS)
def test_secant_over_is_secant_of_the_base(form):
    one, two = net(), net()
    by_name = SecantOver(FORMS[form](one), "adamw", 0.5, betas=(0.9, 0.95), every=3, model=one)
    base = torch.optim.AdamW(FORMS[form](two), lr=0.5, betas=(0.9, 0.95))
    by_hand = Secant(base, every=3, model=two)
    for model, optimizer in ((one, by_name), (two, by_hand)):
        train(model, optimizer, range(8))
    assert_same(one, two)
    assert by_name.rate == by_hand.rate > 0
    assert by_name.probes == by_hand.probes
    assert secant(by_name) is by_name


def test_defaults_are_those_of_the_base_and_of_the_wrapper():
    (group,) = LipschitzOver(net().parameters()).param_groups
    assert (group["lr"], group["weight_decay"]) == (1e-3, 0.01)  # AdamW's
    (group,) = SecantOver(net().parameters()).param_groups
    assert (group["lr"], group["weight_decay"]) == (1.0, 0.01)
    for over, wrapper in ((LipschitzOver, Lipschitz), (SecantOver, Secant)):
        ours, theirs = (inspect.signature(cls).parameters for cls in (over, wrapper))
        for name in set(theirs) - {"optimizer"}:
            assert ours[name].default == theirs[name].default
            assert ours[name].annotation == theirs[name].annotation


def test_base_may_be_the_path_of_a_class():
    optimizer = LipschitzOver(net().parameters(), "torch.optim.adamw.AdamW", lr=0.1)
    assert type(optimizer.optimizer) is torch.optim.AdamW
    optimizer = SecantOver(net().parameters(), "torch.optim.RAdam")
    assert type(optimizer.optimizer) is torch.optim.RAdam
    assert optimizer.param_groups[0]["lr"] == 1.0


def test_base_may_be_of_timm():
    pytest.importorskip("timm")
    optimizer = LipschitzOver(net().parameters(), "Lamb", lr=0.1)
    assert type(optimizer.optimizer).__name__ == "Lamb"


def test_none_is_the_bases_own_value_where_it_is_one():
    optimizer = LipschitzOver(net().parameters(), "lamb", lr=1e-3, max_grad_norm=None)
    assert optimizer.param_groups[0]["max_grad_norm"] is None
    with pytest.raises(TypeError, match="nonsense"):
        LipschitzOver(net().parameters(), "adamw", nonsense=None)


def test_options_of_a_group():
    """Layers are a group's own; what there is one of for all groups is refused in a group."""
    model = net()
    group = {"params": list(model.named_parameters()), "layers": "module"}
    optimizer = LipschitzOver([group], "sgd", lr=0.1)
    assert optimizer.param_groups[0]["layer_names"] == ["0", "0", "2", "2"]
    assert "layers" not in optimizer.param_groups[0]
    for over, name in ((LipschitzOver, "gamma"), (SecantOver, "every")):
        params = {"params": list(model.parameters()), name: 0.5}
        with pytest.raises(ValueError, match=f"{name}=0.5, of which .* has one for all groups"):
            over([params], "sgd", lr=0.1)
        made = over([nn.Parameter(torch.ones(2))], "sgd", lr=0.1)
        with pytest.raises(ValueError, match=f"{name}=0.5, of which"):
            made.add_param_group(params)
        assert len(made.param_groups) == 1


def test_fused_is_for_both():
    optimizer = LipschitzOver(net().parameters(), "adamw", fused=False)
    assert optimizer.optimizer.defaults["fused"] is False
    assert optimizer._fused is False
    LipschitzOver(net().parameters(), "nadam", fused=False)  # which has no such argument


@pytest.mark.parametrize("over", [LipschitzOver, SecantOver])
@pytest.mark.parametrize("way", ["state_dict", "deepcopy", "pickle"])
def test_training_goes_on_bit_for_bit(over, way):
    one = net()
    optimizer = over(one.named_parameters(), "adam", lr=0.01)
    train(one, optimizer, range(4))
    if way == "state_dict":
        two = net()
        two.load_state_dict(one.state_dict())
        other = over(two.named_parameters(), "adam", lr=0.01)
        other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    elif way == "deepcopy":
        two, other = copy.deepcopy((one, optimizer))
    else:
        two, other = pickle.loads(pickle.dumps((one, optimizer)))
    assert type(other) is over
    for model, resumed in ((one, optimizer), (two, other)):
        train(model, resumed, range(4, 12))
    assert_same(one, two)


def test_a_schedule_acts_on_it():
    optimizer = LipschitzOver(net().parameters(), "sgd", lr=1.0, layers="tensor")
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)
    optimizer.step()
    schedule.step()
    assert optimizer.param_groups[0]["lr"] == 0.5


@pytest.mark.parametrize(
    ("over", "arguments", "error", "message"),
    [
        (LipschitzOver, {"base": "nadan"}, ValueError, "nadam, radam, .* got 'nadan'"),
        (LipschitzOver, {"base": "lbfgs"}, ValueError, r"\(not asgd, lbfgs, sparseadam\)"),
        (LipschitzOver, {"base": "adamlip"}, ValueError, "got 'adamlip'"),
        (LipschitzOver, {"base": "torch.optim.LBFGS"}, ValueError, "LBFGS evaluates several"),
        (LipschitzOver, {"base": "hf_adalip.AdamLip"}, ValueError, "has an S per layer already"),
        (LipschitzOver, {"base": "no.such.Class"}, ValueError, "'no.such.Class' cannot be import"),
        (LipschitzOver, {"base": "torch.nn.Linear"}, ValueError, "'torch.nn.Linear' is no class"),
        (LipschitzOver, {"base": None}, TypeError, "base must be a string .* got None"),
        (LipschitzOver, {"momentun": 0.9, "base": "sgd"}, TypeError, "'momentun'; did you mean m"),
        (LipschitzOver, {"optimizer": 1}, TypeError, "no argument 'optimizer'"),
        (LipschitzOver, {"every": 3}, TypeError, "no argument 'every'"),
        (LipschitzOver, {"gamma": 2.0}, ValueError, "gamma must be"),
        (LipschitzOver, {"layers": "module"}, ValueError, "needs the parameters' names"),
        (SecantOver, {"base": "rprop"}, ValueError, "not asgd, lbfgs, rprop, sparseadam"),
        (SecantOver, {"base": "torch.optim.Rprop"}, ValueError, "Rprop has rates of its own"),
        (SecantOver, {"gamma": 0.9}, TypeError, "no argument 'gamma'"),
        (SecantOver, {"every": 0}, ValueError, "every must be"),
    ],
)
def test_what_is_refused(over, arguments, error, message):
    with pytest.raises(error, match=message):
        over(net().parameters(), **arguments)


# As the hosts call them


@pytest.mark.parametrize("name", ["LipschitzOver", "SecantOver", "AdamLip"])
def test_found_by_the_path_of_its_class_and_called_with_parameters(name):
    """kohya's sd-scripts and torchtune: positional parameters; mmengine and llm-foundry: the first
    argument by its name."""
    cls = getattr(importlib.import_module("hf_adalip"), name)
    assert issubclass(cls, torch.optim.Optimizer)
    optimizer = cls(net().parameters(), lr=1e-3, betas=[0.9, 0.95])
    assert tuple(optimizer.param_groups[0]["betas"]) == (0.9, 0.95)
    first = next(iter(inspect.signature(cls).parameters))
    assert first == "params"
    alone = [{"params": [p], "weight_decay": 0.0} for p in net().parameters()]
    optimizer = cls(**{first: alone, "lr": 1e-3, "weight_decay": 0.1})
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.0] * 4


SIX = ["AdaLip", "RMSLip", "AdamLip", "AdaLipU", "RMSLipU", "AdamLipU", "LionLip"]


@pytest.mark.parametrize("name", [*SIX, "LipschitzOver", "SecantOver"])
def test_arguments_on_the_command_line_of_lightning(name):
    """As LightningCLI takes an optimizer: all arguments but the parameters, by their types."""
    jsonargparse = pytest.importorskip("jsonargparse")
    cls = getattr(hf_adalip, name)
    parser = jsonargparse.ArgumentParser(exit_on_error=False)
    like_lightning = {"instantiate": False, "fail_untyped": False, "skip": {"params"}}
    parser.add_subclass_arguments((torch.optim.Optimizer,), "optimizer", **like_lightning)
    given = {"lr": "0.1", "scale_bounds": "[0.2, 5]", "c": "theoretical", "layers": "tensor"}
    if name == "LipschitzOver":
        given |= {"base": "sgd", "dict_kwargs.momentum": "0.5"}
    if name == "SecantOver":
        given = {"lr": "0.1", "base": "sgd", "every": "7", "dict_kwargs.momentum": "0.5"}
    command = [f"--optimizer=hf_adalip.{name}"]
    command += [f"--optimizer.{key}={value}" for key, value in given.items()]
    config = parser.parse_args(command).optimizer
    arguments = {**config.init_args.as_dict(), **dict(config.get("dict_kwargs") or {})}
    assert set(inspect.signature(cls).parameters) - {"params", "base_arguments"} <= set(arguments)
    optimizer = cls(net().parameters(), **arguments)
    assert optimizer.param_groups[0]["lr"] == 0.1
    if name == "SecantOver":
        assert optimizer.every == 7
    else:
        assert layerwise(optimizer) is optimizer
    number = "every" if name == "SecantOver" else "gamma"
    with pytest.raises(jsonargparse.ArgumentError, match=number):
        parser.parse_args([command[0], f"--optimizer.{number}=high"])
