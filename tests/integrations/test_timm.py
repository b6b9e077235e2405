"""timm's factory and groups with the registered names."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("timm")

from timm import create_model
from timm.optim import create_optimizer_v2, list_optimizers, optimizer_kwargs

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
