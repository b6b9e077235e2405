"""The registry: names, records, and optimizers made for a model."""

from __future__ import annotations

import sys

import pytest
import torch
from torch import nn

import hf_adalip
from hf_adalip import (
    OptimizerInfo,
    create_optimizer,
    get_optimizer_info,
    list_optimizers,
    register_optimizer,
)
from hf_adalip.layers import parameter_groups
from hf_adalip.optim.forms.kernels import cpu
from hf_adalip.registry import _REGISTRY, PEERS, describe_optimizer

SIX = {
    "adalip": hf_adalip.AdaLip,
    "rmslip": hf_adalip.RMSLip,
    "adamlip": hf_adalip.AdamLip,
    "adalipu": hf_adalip.AdaLipU,
    "rmslipu": hf_adalip.RMSLipU,
    "adamlipu": hf_adalip.AdamLipU,
}


def model() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 3), nn.LayerNorm(3), nn.Linear(3, 2))


def test_the_six_are_listed_with_their_records():
    assert set(SIX) <= set(list_optimizers())
    assert list_optimizers("adam*") == ["adamlip", "adamlipu"]
    assert all(text for _, text in list_optimizers(with_description=True))
    for name, cls in SIX.items():
        info = get_optimizer_info(name)
        assert info.optimizer_class is cls
        assert info.signal == ("update" if name.endswith("u") else "gradient")
        assert info.reference


def test_a_record_cannot_be_changed():
    info = get_optimizer_info("adamlip")
    with pytest.raises(AttributeError):
        info.name = "other"
    with pytest.raises(TypeError):
        info.defaults["lr"] = 1.0


@pytest.mark.parametrize("name", SIX)
def test_a_model_gives_names_layers_and_the_weight_decay_split(name):
    optimizer = create_optimizer(model(), name, lr=0.1, weight_decay=0.01)
    assert type(optimizer) is SIX[name]
    (group,) = optimizer.param_groups
    assert group["param_names"] == [name for name, _ in model().named_parameters()]
    assert group["layer_names"] == ["0", "0", "1", "1", "2", "2"]
    assert group["weight_decay"] == 0.01
    assert group["no_weight_decay"] == ["0.bias", "1.bias", "1.weight", "2.bias"]
    assert optimizer.defaults["lr"] == 0.1


@pytest.mark.parametrize("name", SIX)
@pytest.mark.parametrize("foreach", [False, True], ids=["loop", "foreach"])
@pytest.mark.parametrize("decoupled", [False, True])
def test_one_group_with_spared_parameters_is_two_groups(name, foreach, decoupled):
    options = {"layers": "module", "foreach": foreach, "decoupled_weight_decay": decoupled}
    one, two = model(), model()
    two.load_state_dict(one.state_dict())
    runs = [
        (net, SIX[name](parameter_groups(net, 0.1, split=split), lr=0.01, **options))
        for net, split in ((one, False), (two, True))
    ]
    for step in range(4):
        for net, optimizer in runs:
            optimizer.zero_grad()
            for i, p in enumerate(net.parameters()):
                p.grad = torch.randn(
                    p.shape, generator=torch.Generator().manual_seed(10 * step + i)
                )
            optimizer.step()
    for p, q in zip(one.parameters(), two.parameters(), strict=True):
        assert torch.equal(p, q)
    assert runs[0][1].layer_learning_rates() == runs[1][1].layer_learning_rates()


def test_a_spared_parameter_has_to_be_there():
    group = {"params": list(model().named_parameters()), "no_weight_decay": ["0.bais"]}
    with pytest.raises(ValueError, match=r"no_weight_decay names '0.bais'"):
        hf_adalip.AdamLip([group])


def test_parameters_keep_torchs_meaning():
    optimizer = create_optimizer(model().parameters(), "adamlip", weight_decay=0.5, gamma=0.5)
    (group,) = optimizer.param_groups
    assert (group["weight_decay"], group["gamma"], group["lr"]) == (0.5, 0.5, 1e-3)
    assert len(set(group["layer_names"])) == 6  # without names a layer is a tensor


def test_frozen_parameters_and_the_models_own_list_are_respected():
    net = model()
    net[0].requires_grad_(False)
    net.no_weight_decay = lambda: {"2.*"}
    groups = parameter_groups(net, weight_decay=0.1)
    assert [name for group in groups for name, _ in group["params"]] == [
        "1.weight",
        "1.bias",
        "2.weight",
        "2.bias",
    ]
    assert all(group["weight_decay"] == 0.0 for group in groups)


def test_the_models_own_list_is_of_the_names_before_it_was_wrapped():
    net = model()
    net.no_weight_decay = lambda: {"2.*", "0.weight"}
    for wrapped in (net, torch.compile(net)):
        (group,) = parameter_groups(wrapped, weight_decay=0.1)  # the others are biases and norms
        assert (group["weight_decay"], len(group["params"])) == (0.0, 6)


def test_a_model_with_nothing_to_train_is_refused():
    with pytest.raises(ValueError, match="Sequential has no parameter with requires_grad"):
        create_optimizer(model().requires_grad_(False), "adamlip")


@pytest.mark.parametrize("base", ["sgd", "nadam", "adamw", "rprop", "adafactor"])
def test_lip_names_wrap_any_torch_optimizer(base):
    optimizer = create_optimizer(model(), f"lip-{base}", lr=0.1, gamma=0.6)
    assert isinstance(optimizer, hf_adalip.Lipschitz)
    assert type(optimizer.optimizer).__name__.lower() == base
    assert optimizer.hyperparameters["gamma"] == 0.6
    assert optimizer.param_groups[0]["layer_names"][0] == "0"


@pytest.mark.parametrize("base", ["sgd", "nadam", "adamw", "adafactor", "lamb"])
def test_secant_names_wrap_any_torch_or_timm_optimizer(base):
    if base == "lamb":
        pytest.importorskip("timm")
    net = model()
    optimizer = create_optimizer(net, f"secant-{base}", weight_decay=0.1, every=7)
    assert type(optimizer) is hf_adalip.Secant
    assert type(optimizer.optimizer).__name__.lower() == base
    assert optimizer.every == 7
    assert optimizer.model is net
    groups = optimizer.param_groups
    assert [(group["lr"], group["weight_decay"]) for group in groups] == [(1.0, 0.1), (1.0, 0.0)]
    params = list(model().parameters())
    other = create_optimizer(params, f"secant-{base}", lr=0.3)
    assert other.model is None
    assert other.param_groups[0]["lr"] == 0.3


def test_secant_names_are_listed_and_described():
    names = list_optimizers("secant-*")
    assert {"secant-adamw", "secant-sgd"} < set(names)
    assert not {"secant-rprop", "secant-lbfgs", "secant-asgd", "secant-sparseadam"} & set(names)
    for name, description in list_optimizers("secant-*", with_description=True):
        info = get_optimizer_info(name)
        assert info.optimizer_class is hf_adalip.Secant
        assert not info.takes_layers
        assert (
            description == f"{info.base.__name__} at a learning rate that it finds (experimental)"
        )
    optimizer = create_optimizer(model(), "secant-adamw", weight_decay=0.1, every=7)
    text = describe_optimizer(optimizer)
    assert text.startswith("Secant(AdamW) with every=7, ")
    assert "weight_decay=0.1" in text
    assert "lr" not in text


@pytest.mark.parametrize("name", ["secant-rprop", "secant-lbfgs", "secant-adamlip", "secant-"])
def test_secant_names_that_are_refused(name):
    with pytest.raises(ValueError, match=f"unknown optimizer '{name}'"):
        get_optimizer_info(name)


def test_arguments_of_secant_and_its_base_are_checked():
    with pytest.raises(TypeError, match=r"secant-sgd has no argument 'momentun'; did you mean mom"):
        create_optimizer(model(), "secant-sgd", momentun=0.9)
    with pytest.raises(ValueError, match="every must be an integer"):
        create_optimizer(model(), "secant-sgd", every=0)
    with pytest.raises(TypeError, match="law must be a Law or None, got 'fast'"):
        create_optimizer(model(), "secant-sgd", law="fast")


@pytest.mark.skipif(bool(cpu.missing()), reason=f"needs {cpu.missing()}")
def test_fused_is_for_lipschitz_and_its_base():
    assert create_optimizer(model(), "lip-adamw", fused=False).param_groups[0]["fused"] is False
    fused = create_optimizer(model(), "lip-adamw", fused=True)
    assert fused.param_groups[0]["fused"] is True
    assert fused._fused is True
    assert create_optimizer(model(), "lip-nadam", fused=True)._fused is True  # which has no such


def test_lip_names_reach_timms_optimizers():
    timm_optim = pytest.importorskip("timm.optim")
    optimizer = create_optimizer(model(), "lip-lamb", lr=0.1)
    assert isinstance(optimizer.optimizer, timm_optim.Lamb)


@pytest.mark.parametrize("name", ["lambc", "larc", "cadamw", "adoptw", "momentum"])
def test_a_timm_name_keeps_what_distinguishes_it(name):
    """lambc is Lamb with trust_clip=True, larc is Lars with it, and so on."""
    timm_optim = pytest.importorskip("timm.optim")
    defaults = timm_optim.get_optimizer_info(name).defaults
    optimizer = create_optimizer(model(), f"lip-{name}", lr=0.1)
    assert defaults
    assert {key: optimizer.optimizer.defaults[key] for key in defaults} == defaults


def test_plain_names_are_the_base_optimizers_to_compare_with():
    optimizer = create_optimizer(model(), "adamw", lr=0.1, weight_decay=0.0)
    assert type(optimizer) is torch.optim.AdamW
    assert {group["weight_decay"] for group in optimizer.param_groups} == {0.0}


@pytest.mark.parametrize("name", PEERS)
def test_optimizers_of_other_packages_to_compare_with(name, monkeypatch):
    package, cls = PEERS[name]
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ValueError, match=f"{name} needs {package}: pip install {package}"):
        create_optimizer(model(), name)
    monkeypatch.undo()
    pytest.importorskip(package)
    optimizer = create_optimizer(model(), name, lr=0.1)
    assert type(optimizer).__name__ == cls
    assert {group["weight_decay"] for group in optimizer.param_groups} == {0.0}
    assert name not in list_optimizers()  # they have no S


@pytest.mark.parametrize("name", ["adamlp", "lip-nadamm", "nothing-like-it", "lip-lbfgs"])
def test_an_unknown_name_is_named_with_its_neighbours(name):
    with pytest.raises(ValueError, match=f"unknown optimizer '{name}'") as error:
        create_optimizer(model(), name)
    if name == "adamlp":
        assert "did you mean adamlip" in str(error.value)


def test_without_timm_its_names_are_not_unknown_but_missing(monkeypatch):
    monkeypatch.setattr("hf_adalip.registry._has_timm", lambda: False)
    with pytest.raises(ValueError, match="of torch or timm, which is not installed"):
        create_optimizer(model(), "lip-lamb")


@pytest.mark.parametrize("name", [hf_adalip.AdamLip, None, 3])
def test_what_is_no_name_is_refused(name):
    with pytest.raises(TypeError, match="name must be a string such as"):
        create_optimizer(model(), name)


def test_an_argument_that_the_optimizer_does_not_take_is_refused():
    with pytest.raises(TypeError, match="momentum"):
        create_optimizer(model(), "adamlip", momentum=0.9)
    with pytest.raises(TypeError, match="amsgrad"):
        create_optimizer(model(), "adamlip", amsgrad=True)


def test_an_optimizer_can_be_registered_once(monkeypatch):
    monkeypatch.setattr("hf_adalip.registry._REGISTRY", dict(_REGISTRY))
    own = {"gamma": 0.95, "weight_decay": 0.1, "layers": "tensor"}
    info = OptimizerInfo("slowlip", hf_adalip.AdamLip, signal="gradient", defaults=own)
    register_optimizer(info)
    assert create_optimizer(model(), "slowlip").defaults["gamma"] == 0.95
    made = create_optimizer(model(), "slowlip", gamma=0.5)
    assert made.defaults["gamma"] == 0.5
    assert made.layers == "tensor"
    assert {group["weight_decay"] for group in made.param_groups} == {0.1}
    made = create_optimizer(model(), "slowlip", weight_decay=0.0, layers="module")
    assert made.layers == "module"
    assert {group["weight_decay"] for group in made.param_groups} == {0.0}
    with pytest.raises(ValueError, match="there is an optimizer 'slowlip' already"):
        register_optimizer(info)


@pytest.mark.parametrize("name", ["adamlip", "sgd", "adafactor", "lip-adam", "lip-lamb"])
def test_a_name_that_is_taken_is_refused(name):
    if name == "lip-lamb":
        pytest.importorskip("timm")
    with pytest.raises(ValueError, match=f"there is an optimizer '{name}' already; choose another"):
        register_optimizer(OptimizerInfo(name, torch.optim.SGD))
    assert list_optimizers().count(name) <= 1


@pytest.mark.parametrize("name", ["Adam", "adam_lip", ""])
def test_names_that_timm_or_a_shell_would_mangle_are_refused(name):
    with pytest.raises(ValueError, match="lower case and without underscores"):
        OptimizerInfo(name, hf_adalip.AdamLip)


def test_only_optimizer_classes_are_registered():
    with pytest.raises(TypeError, match=r"subclass of torch\.optim\.Optimizer"):
        OptimizerInfo("thing", lambda params: None)


def test_a_description_says_what_ran():
    optimizer = create_optimizer(model(), "adamlip", lr=0.5, weight_decay=0.1, gamma=0.7)
    torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.0)
    text = describe_optimizer(optimizer)
    assert text.startswith("AdamLip with lr=0.5, ")
    for part in ("weight_decay=0.1", "gamma=0.7", "layers=module", "scale_bounds=(0.1, 10.0)"):
        assert part in text
    wrapped = describe_optimizer(create_optimizer(model(), "lip-nadam", lr=0.5))
    assert wrapped.startswith("Lipschitz(NAdam) with lr=0.5, ")
    assert "signal=gradient" in wrapped


def test_what_is_no_pattern_record_or_name_is_refused():
    with pytest.raises(TypeError, match=r'filter must be a pattern such as "adam\*", got 5'):
        list_optimizers(5)
    with pytest.raises(TypeError, match="info must be an OptimizerInfo, got 5"):
        register_optimizer(5)
    with pytest.raises(TypeError, match="name must be a string, got 5"):
        OptimizerInfo(name=5, optimizer_class=hf_adalip.AdamLip)
    with pytest.raises(TypeError, match="defaults must be a mapping of arguments, got 5"):
        OptimizerInfo("mine", hf_adalip.AdamLip, defaults=5)
