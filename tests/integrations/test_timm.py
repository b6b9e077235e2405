"""timm's factory and groups with the registered names."""

from __future__ import annotations

import copy
import functools
import inspect

import pytest
import torch

pytest.importorskip("timm")

from timm import create_model
from timm.optim import (
    OptimInfo,
    create_optimizer_v2,
    get_optimizer_class,
    get_optimizer_info,
    list_optimizers,
    optimizer_kwargs,
)
from torch import nn

import hf_adalip
import hf_adalip.timm

SIX = ["adalip", "rmslip", "adamlip", "adalipu", "rmslipu", "adamlipu"]


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return create_model(
        "vit_tiny_patch16_224", img_size=32, embed_dim=24, depth=2, num_heads=2, num_classes=3
    )


def train(model, optimizer, steps=3):
    images = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = torch.nn.functional.cross_entropy(model(images), torch.tensor([0, 1, 2, 0]))
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def test_all_names_are_registered():
    assert set(hf_adalip.list_optimizers()) - {"lip-rprop"} <= set(list_optimizers())


@pytest.mark.parametrize("name", [*SIX, "lip-nadam"])
def test_timms_factory_trains_a_vit(model, name):
    before = [p.detach().clone() for p in model.parameters()]
    optimizer = create_optimizer_v2(model, name, lr=1e-3, weight_decay=0.05)
    losses = train(model, optimizer)
    assert losses[-1] < losses[0]
    assert {group["weight_decay"] for group in optimizer.param_groups} == {0.0, 0.05}
    model.load_state_dict(dict(zip(dict(model.named_parameters()), before, strict=True)), False)


def test_secant_from_timms_factory_takes_a_closure(model):
    optimizer = create_optimizer_v2(model, "secant-adamw", weight_decay=0.05, model=model)
    assert type(optimizer) is hf_adalip.Secant
    assert {group["lr"] for group in optimizer.param_groups} == {1.0}
    with pytest.raises(RuntimeError, match="needs a closure"):
        train(model, optimizer, steps=1)
    x = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))

    def closure():
        optimizer.zero_grad()
        loss = torch.nn.functional.cross_entropy(model(x), torch.tensor([0, 1, 2, 0]))
        loss.backward()
        return loss.detach()

    before = {name: value.clone() for name, value in model.state_dict().items()}
    losses = [optimizer.step(closure) for _ in range(4)]
    assert losses[-1] < losses[0]
    model.load_state_dict(before)


def test_what_timm_cannot_have_is_told(monkeypatch):
    monkeypatch.setattr("hf_adalip.registry._REGISTRY", {})
    hf_adalip.register_optimizer(hf_adalip.OptimizerInfo("mine", torch.optim.Rprop))
    with pytest.warns(UserWarning, match="mine is not registered with timm, which .*: Rprop takes"):
        hf_adalip.timm.register()
    assert "mine" not in list_optimizers()
    hf_adalip.register_optimizer(hf_adalip.OptimizerInfo("lamb", torch.optim.SGD))
    with pytest.raises(ValueError, match="cannot register 'lamb' with timm"):
        hf_adalip.timm.register()


def test_momentum_is_timms_default_unless_given(model):
    assert create_optimizer_v2(model, "adalip").defaults["momentum"] == 0.9
    assert create_optimizer_v2(model, "adalip", momentum=0.0).defaults["momentum"] == 0.0


def test_options_of_the_command_line_go_through(model):
    from types import SimpleNamespace

    args = SimpleNamespace(
        opt="adamlip", lr=0.1, weight_decay=0.0, momentum=0.9, opt_eps=1e-6, opt_betas=(0.8, 0.9)
    )
    optimizer = create_optimizer_v2(model, **optimizer_kwargs(args), gamma=0.6, scale_bounds=None)
    defaults = optimizer.defaults
    assert (defaults["eps"], defaults["betas"]) == (1e-6, (0.8, 0.9))
    assert (defaults["gamma"], defaults["scale_bounds"]) == (0.6, None)
    with pytest.raises(TypeError, match="gama"):
        create_optimizer_v2(model, "adamlip", gama=0.6)


def test_layer_decays_lr_scale_reaches_the_layers(model):
    from timm.scheduler import StepLRScheduler

    optimizer = create_optimizer_v2(model, "adamlip", lr=1e-3, layer_decay=0.5)
    scheduler = StepLRScheduler(optimizer, decay_t=100)
    scheduler.step(0)
    scales = {group["lr_scale"] for group in optimizer.param_groups}
    assert len(scales) > 2
    train(model, optimizer, steps=1)
    for group in optimizer.param_groups:
        assert group["lr"] == pytest.approx(1e-3 * group["lr_scale"])
        for param in group["params"]:  # a first step is taken at α
            assert optimizer.state[param]["layer_lr"].item() == pytest.approx(group["lr"])


def test_our_groups_make_layers_of_modules(model):
    from hf_adalip.layers import parameter_groups

    optimizer = create_optimizer_v2(
        model,
        "adamlip",
        lr=1e-3,
        param_group_fn=lambda net: parameter_groups(net, 0.05),
        layers="module",
    )
    train(model, optimizer, steps=1)
    assert "blocks.0.attn.qkv" in optimizer.layer_learning_rates()


def test_lookahead(model):
    from hf_adalip.monitor import layerwise

    optimizer = create_optimizer_v2(model, "lookahead_adamlip", lr=1e-3)
    train(model, optimizer, steps=7)
    inner = layerwise(optimizer)
    assert isinstance(inner, hf_adalip.AdamLip)
    state = optimizer.state_dict()
    again = create_optimizer_v2(model, "lookahead_adamlip", lr=1e-3)
    again.load_state_dict(state)
    assert layerwise(again).layer_learning_rates() == inner.layer_learning_rates()


def test_lookahead_over_a_wrapper_resumes():
    """Which keeps its slow weights in the state of what it is over."""
    found = []
    for resumed in (False, True):
        torch.manual_seed(0)
        x = torch.randn(3, requires_grad=True)
        optimizer = create_optimizer_v2([x], "lookahead_lip-nadam", lr=1e-2)
        for step in range(9):
            if resumed and step == 4:
                state = copy.deepcopy(optimizer.state_dict())
                optimizer = create_optimizer_v2([x], "lookahead_lip-nadam", lr=1e-2)
                optimizer.load_state_dict(state)
            x.grad = torch.cos(x.detach() + step)
            optimizer.step()
        found.append(x.detach())
    assert torch.equal(*found)


# What timm asks of every optimizer in its registry


six = pytest.mark.parametrize("name", SIX)


@six
def test_the_registry_holds_the_class(name):
    cls = get_optimizer_class(name, bind_defaults=False)
    assert cls is hf_adalip.get_optimizer_info(name).optimizer_class
    assert get_optimizer_class(name) is cls  # it has no defaults of its own to bind
    info = get_optimizer_info(name)
    assert isinstance(info, OptimInfo)
    assert (info.name, info.opt_class, info.second_order) == (name, cls, False)
    assert (name, info.description) in list_optimizers(name, with_description=True)
    assert name in list_optimizers("*lip*", exclude_filters=["lip-*"])
    assert cls([nn.Parameter(torch.ones(2))]).layers == "tensor"


@six
def test_the_record_says_which_arguments_the_class_takes(name):
    """What it does not take (eps of AdaLip) is dropped by timm."""
    info = get_optimizer_info(name)
    takes = inspect.signature(get_optimizer_class(name, bind_defaults=False).__init__).parameters
    assert info.has_eps == ("eps" in takes)
    assert info.has_betas == ("betas" in takes)
    assert info.has_momentum == ("momentum" in takes)
    given = {"eps": 1e-6, "betas": (0.5, 0.6), "momentum": 0.5}
    optimizer = create_optimizer_v2([nn.Parameter(torch.ones(4, 4))], name, lr=1e-3, **given)
    (group,) = optimizer.param_groups
    assert {key: group[key] for key in given if key in takes} == {
        key: value for key, value in given.items() if key in group
    }


def test_a_wrapped_optimizers_class_makes_it():
    cls = get_optimizer_class("lip-nadam", bind_defaults=False)
    assert issubclass(cls, hf_adalip.Lipschitz)
    optimizer = cls([nn.Parameter(torch.ones(2))], lr=0.5, gamma=0.6)
    assert type(optimizer) is hf_adalip.Lipschitz
    assert type(optimizer.optimizer) is torch.optim.NAdam
    assert (optimizer.param_groups[0]["lr"], optimizer.hyperparameters["gamma"]) == (0.5, 0.6)
    with pytest.raises(TypeError, match="did you mean gamma"):
        cls([nn.Parameter(torch.ones(2))], gama=0.6)


def test_what_timm_has_of_ours_is_not_wrapped_again():
    for name in ("lip-adamlip", "lip-lip-adam"):
        with pytest.raises(ValueError, match=f"unknown optimizer '{name}'"):
            hf_adalip.get_optimizer_info(name)


def test_defaults_of_a_record_are_timms(monkeypatch):
    from timm.optim._optim_factory import default_registry

    monkeypatch.setattr("hf_adalip.registry._REGISTRY", {})
    monkeypatch.setattr(default_registry, "_optimizers", dict(default_registry._optimizers))
    own = {"gamma": 0.95, "momentum": 0.0}
    hf_adalip.register_optimizer(
        hf_adalip.OptimizerInfo("slowlip", hf_adalip.AdaLip, signal="gradient", defaults=own)
    )
    hf_adalip.timm.register()
    hf_adalip.timm.register()  # which finds it there
    params = [nn.Parameter(torch.ones(2))]
    bound = get_optimizer_class("slowlip")
    assert (bound.func, bound.keywords) == (hf_adalip.AdaLip, own)
    for optimizer in (bound(params), create_optimizer_v2(params, "slowlip")):
        assert {key: optimizer.defaults[key] for key in own} == own
    assert create_optimizer_v2(params, "slowlip", gamma=0.5).defaults["gamma"] == 0.5


def line(weight, bias, optimizer):
    inputs = torch.linspace(-1, 1, weight.shape[1], dtype=weight.dtype)

    def closure():
        optimizer.zero_grad()
        loss = (weight.mv(inputs) + bias).pow(2).sum()
        loss.backward()
        return loss

    return closure


GROUPS = {
    "parameters": lambda w, b: ([w, b], {"lr": 1e-2}),
    "groups": lambda w, b: ([{"params": [w]}, {"params": [b], "lr": 1e-2}], {"lr": 1e-3}),
    "one group": lambda w, b: ([{"params": b, "lr": 1e-2}], {"lr": 1e-3}),
    "no lr": lambda w, b: ([{"params": b, "lr": 1e-2}], {}),
    "weight decay": lambda w, b: ([w, b], {"lr": 1e-3, "weight_decay": 0.1}),
    "foreach": lambda w, b: ([w, b], {"lr": 1e-2, "foreach": True}),
    "loop": lambda w, b: ([w, b], {"lr": 1e-2, "foreach": False}),
    "capturable": lambda w, b: ([w, b], {"lr": torch.tensor(1e-2), "capturable": True}),
}


@pytest.mark.slow
@six
@pytest.mark.parametrize("groups", GROUPS)
@pytest.mark.parametrize("contiguous", [True, False])
def test_the_factorys_optimizer_descends(name, groups, contiguous):
    weight, bias = torch.randn(6, 4), torch.randn(6)
    if not contiguous:
        weight, bias = (torch.stack([x, x], -1)[..., 0] for x in (weight, bias))
    weight, bias = nn.Parameter(weight), nn.Parameter(bias)
    params, options = GROUPS[groups](weight, bias)
    optimizer = create_optimizer_v2(params, name, **options)
    assert repr(optimizer)
    closure = line(weight, bias, optimizer)
    first = closure().item()
    for _ in range(30):
        optimizer.step(closure)
    assert closure().item() < first


@six
def test_maximize_ascends(name):
    weight, bias = nn.Parameter(torch.randn(6, 4)), nn.Parameter(torch.randn(6))
    optimizer = create_optimizer_v2([weight, bias], name, lr=1e-3, maximize=True)
    closure = line(weight, bias, optimizer)
    first = closure().item()
    for _ in range(10):
        optimizer.step(closure)
    assert closure().item() > first


@six
@pytest.mark.parametrize("prefix", ["", "lookahead_"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_state_dict_goes_on_alike(name, prefix, dtype):
    """Also in parameters of another dtype, where the numbers are kept and what is of a
    parameter's shape follows it."""
    params = [nn.Parameter(torch.randn(6, 4)), nn.Parameter(torch.randn(6))]
    optimizer = create_optimizer_v2(params, prefix + name, lr=1e-2)
    closure = line(*params, optimizer)
    for _ in range(5):
        optimizer.step(closure)
    others = [nn.Parameter(p.detach().to(dtype, copy=True)) for p in params]
    again = create_optimizer_v2(others, prefix + name, lr=1e-2)
    saved = copy.deepcopy(optimizer.state_dict())
    again.load_state_dict(copy.deepcopy(saved))
    loaded = again.state_dict()
    for key, kept in saved["state"].items():
        for entry, value in kept.items():
            found = loaded["state"][key][entry]
            assert found.dtype == (dtype if value.dim() else value.dtype), entry
            assert torch.equal(found.to(value.dtype), value), entry
    other_closure = line(*others, again)
    for _ in range(5):
        optimizer.step(closure)
        again.step(other_closure)
    for p, q in zip(params, others, strict=True):
        exact = {"rtol": 0, "atol": 0} if dtype == p.dtype else {"rtol": 1e-4, "atol": 1e-5}
        torch.testing.assert_close(q.detach().to(p.dtype), p.detach(), **exact)
    public = [{key for key in vars(o) if key[0] != "_"} for o in (again, copy.deepcopy(again))]
    assert public[0] == public[1]


@six
@pytest.mark.parametrize("prefix", ["", "lookahead_"])
def test_rosenbrocks_valley(name, prefix):
    """One coordinate after the other, as timm has it."""
    x = nn.Parameter(torch.tensor([1.5, 1.5]))
    lr = 1e-4 if name.startswith("adalip") else 1e-2
    optimizer = create_optimizer_v2([x], prefix + name, lr=lr, momentum=0.0)

    def closure(here):
        optimizer.zero_grad()
        loss = (1 - x[0]) ** 2 + 100 * (x[1] - x[0] ** 2) ** 2
        loss.backward()
        x.grad[1 - here] = 0.0
        return loss

    first = closure(0).item()
    for i in range(150):
        optimizer.step(functools.partial(closure, i % 2))
    assert closure(0).item() < 0.2 * first


@six
def test_a_small_model_descends_at_every_step(name):
    net = nn.Sequential(nn.Linear(2, 3), nn.Sigmoid(), nn.Linear(3, 1), nn.Sigmoid())
    inputs = torch.arange(6.0).reshape(3, 2) / 10
    optimizer = create_optimizer_v2(net, name, lr=1e-2)
    losses = []
    for _ in range(15):
        optimizer.zero_grad()
        loss = net(inputs).sum()
        loss.backward()
        losses.append(loss.item())
        optimizer.step()
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < losses[0]


@six
def test_lookahead_keeps_its_own_when_it_loads_the_state_without_it(name):
    x = nn.Parameter(torch.ones(4))
    base = create_optimizer_v2([x], name, lr=1e-2)
    x.grad = torch.ones(4)
    base.step()
    optimizer = create_optimizer_v2([x], f"lookahead_{name}", lr=1e-2)
    optimizer.load_state_dict(base.state_dict())
    optimizer.step()
    assert optimizer.param_groups[0]["lookahead_step"] >= 1
