"""`step_parameter`: parameters stepped by the training loop, in hooks of its own."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hf_adalip import AdamLip, Lipschitz, release_gradients
from hf_adalip.optim import LipOptimizer
from tests.optim.cases import CLASSES, assert_same
from tests.optim.test_release import Net, loss_of, maker, result, train


def step_within_backward(net: nn.Module, optimizer: LipOptimizer) -> None:
    """As OneTrainer's trainer does."""
    for group in optimizer.param_groups:
        for index, parameter in enumerate(group["params"]):

            def hook(parameter: Tensor, group: dict[str, Any] = group, index: int = index) -> None:
                optimizer.step_parameter(parameter, group, index)
                parameter.grad = None

            if parameter.requires_grad:
                parameter.register_post_accumulate_grad_hook(hook)


@pytest.mark.parametrize("calls_step", [True, False])
@pytest.mark.parametrize("name", CLASSES)
def test_the_numbers_are_those_of_step(name: str, calls_step: bool) -> None:
    """Whether `step` is called at the end, where it finds no gradient, or not."""
    net = Net()
    other = copy.deepcopy(net)
    optimizer, stepped_early = maker(name)(net), maker(name)(other)
    step_within_backward(other, stepped_early)
    for seed in range(5):
        loss_of(net, seed).backward()
        optimizer.step()
        optimizer.zero_grad()
        loss_of(other, seed).backward()
        if calls_step:
            stepped_early.step()
    assert all(parameter.grad is None for parameter in other.parameters())
    assert_same(result(other, stepped_early), result(net, optimizer))


def test_ordinary_steps_go_on_from_it() -> None:
    net = Net()
    optimizer = maker("adamlip")(net)
    other = copy.deepcopy(net)
    expected = maker("adamlip")(other)
    for seed in range(4):
        loss_of(net, seed).backward()
        loss_of(other, seed).backward()
        if seed % 2:
            for parameter in net.parameters():
                if parameter.grad is not None:
                    optimizer.step_parameter(parameter)
        else:
            optimizer.step()
        expected.step()
        optimizer.zero_grad()
        expected.zero_grad()
    assert_same(result(net, optimizer), result(other, expected))


def test_a_parameter_without_a_gradient_is_left() -> None:
    weight = nn.Parameter(torch.ones(2))
    optimizer = AdamLip([weight])
    optimizer.step_parameter(weight)
    assert torch.equal(weight, torch.ones(2))
    assert not optimizer.state


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"layers": "module"}, "makes one layer 'embed|makes one layer 'hidden"),
        ({"nonfinite": "raise"}, 'choose nonfinite="skip"'),
        ({"capturable": True}, "choose capturable=False"),
        ({"c": "theoretical"}, "choose a number"),
    ],
    ids=["module", "raise", "capturable", "theoretical"],
)
def test_options_that_are_refused(options: dict[str, Any], match: str) -> None:
    net = Net()
    optimizer = maker("adamlip", **options)(net)
    loss_of(net, 0).backward()
    before = copy.deepcopy(net.state_dict())
    with pytest.raises(ValueError, match=match):
        optimizer.step_parameter(net.embed.weight)
    assert_same(net.state_dict(), before)
    assert not optimizer.state


def test_places_that_are_refused() -> None:
    net = Net()
    optimizer = maker("adamlip")(net)
    loss_of(net, 0).backward()
    first, second = optimizer.param_groups
    for parameter, group, index in (
        (nn.Parameter(torch.ones(3)), None, None),
        (net.embed.weight, second, None),
        (net.embed.weight, first, 1),
    ):
        with pytest.raises(ValueError, match=r"parameter, of shape .* is none of the optimizer's"):
            optimizer.step_parameter(parameter, group, index)
    with pytest.raises(TypeError, match="parameter must be a tensor of the optimizer's, got None"):
        optimizer.step_parameter(None)
    assert not optimizer.state


def test_a_group_added_later_counts() -> None:
    net = Net()
    optimizer = AdamLip([("embed.weight", net.embed.weight)])
    loss_of(net, 0).backward()
    optimizer.step_parameter(net.embed.weight)
    optimizer.add_param_group({"params": [("scale", net.scale)]})
    optimizer.step_parameter(net.scale)
    assert optimizer.state[net.scale]["step"] == 1
    twin = nn.Parameter(torch.ones(2))
    optimizer.add_param_group({"params": [("twin", twin)], "layers": lambda _: "scale"})
    with pytest.raises(ValueError, match="makes one layer 'scale' of 2 parameters"):
        optimizer.step_parameter(net.scale)


def test_it_is_one_or_the_other() -> None:
    net = Net()
    optimizer = maker("adamlip")(net)
    with release_gradients(optimizer), pytest.raises(RuntimeError, match="call its remove"):
        optimizer.step_parameter(net.scale)
    train(net, optimizer, range(2))
    assert not hasattr(Lipschitz(torch.optim.Adam(net.parameters())), "step_parameter")


def test_it_is_no_part_of_a_copy_or_of_a_state() -> None:
    net = Net()
    optimizer = maker("adamlip")(net)
    loss_of(net, 0).backward()
    optimizer.step_parameter(net.embed.weight)
    twin = copy.deepcopy(optimizer)
    assert twin._parameter_plans is None
    assert_same(twin.state_dict()["state"], optimizer.state_dict()["state"])
