"""Trainers of other packages: how Axolotl, ms-swift, Unsloth and llm-foundry make an optimizer.

The packages themselves are not needed here: what calls us stands in for their calls.
"""

from __future__ import annotations

import importlib
import sys
from importlib.metadata import EntryPoint
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("accelerate")

from transformers import BertConfig, BertForSequenceClassification, Trainer, TrainingArguments

import hf_adalip
from hf_adalip import register, trainer_kwargs
from hf_adalip.integrations.trainer import ModelOptimizer
from hf_adalip.monitor import layerwise, secant

ROOT = Path(__file__).parents[2]


def bert() -> torch.nn.Module:
    torch.manual_seed(0)
    return BertForSequenceClassification(
        BertConfig(
            vocab_size=20,
            hidden_size=8,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=8,
        )
    )


def trainer(path: Path, cls: type[Trainer] = Trainer, optim: str = "adamw_torch", **given: Any):
    options = {"max_steps": 4, "logging_steps": 2, "save_strategy": "no", "report_to": []}
    options |= {"use_cpu": True, "disable_tqdm": True, "max_grad_norm": 0.0, "weight_decay": 0.1}
    args = TrainingArguments(str(path), optim=optim, learning_rate=1e-3, **options)
    data = [{"input_ids": torch.full((4,), i % 20), "labels": i % 2} for i in range(16)]
    return cls(model=bert(), args=args, train_dataset=data, **given)


class MakesGroups(Trainer):
    """As Unsloth's and Axolotl's with a learning rate for embeddings: groups without names."""

    def create_optimizer(self, model=None):
        optimizer_cls, kwargs = self.get_optimizer_cls_and_kwargs(self.args)
        named = dict(self.model.named_parameters())
        embeddings = [p for name, p in named.items() if "embeddings" in name]
        others = [p for name, p in named.items() if "embeddings" not in name]
        decay, lr = kwargs.get("weight_decay", 0.0), kwargs["lr"]
        groups = [
            {"params": others, "weight_decay": decay, "lr": lr},
            {"params": embeddings, "weight_decay": decay, "lr": 5e-5},
            {"params": [], "weight_decay": 0.0, "lr": lr},
        ]
        self.optimizer = optimizer_cls(groups, **kwargs)
        return self.optimizer


class CallsFactoryWithArguments(Trainer):
    """As Axolotl's where it was given `optimizer_cls_and_kwargs`."""

    def create_optimizer(self, model=None):
        factory, kwargs = self.optimizer_cls_and_kwargs
        self.optimizer = factory()(self.model, self.args, **kwargs)
        return self.optimizer


@pytest.mark.filterwarnings("ignore:the training ends after")
@pytest.mark.parametrize("name", ["adamlip", "lip-nadam", "secant-adamw"])
def test_groups_of_the_trainers_own(tmp_path, name):
    register()
    made = trainer(tmp_path, MakesGroups, name)
    hf_adalip.attach(made)
    made.train()
    optimizer = secant(made.optimizer) or layerwise(made.optimizer)
    assert type(optimizer) is hf_adalip.get_optimizer_info(name).optimizer_class
    assert [group["initial_lr"] for group in optimizer.param_groups] == [1e-3, 5e-5, 1e-3]
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.1, 0.1, 0.0]


def test_a_factory_that_is_given_the_training_arguments(tmp_path):
    made = trainer(tmp_path, CallsFactoryWithArguments, **trainer_kwargs("adamlip", lr=1e-3))
    made.create_optimizer()
    assert type(made.optimizer) is hf_adalip.AdamLip
    assert made.optimizer.layers == "module"


def test_parameters_need_a_name_of_an_optimizer():
    params = list(bert().parameters())
    assert type(ModelOptimizer(params, name="rmslip", lr=0.1)) is hf_adalip.RMSLip
    with pytest.raises(TypeError, match="name"):
        ModelOptimizer(params, lr=0.1)


@pytest.fixture
def host(monkeypatch):
    """Makes a module of ours that imports a host, which a module of this content stands in for."""

    def load(ours: str, theirs: str, **content: Any) -> ModuleType:
        parent, _, child = theirs.partition(".")
        for name in (parent, *([theirs.rpartition(".")[0]] if child.count(".") else []), theirs):
            monkeypatch.setitem(sys.modules, name, ModuleType(name))
        vars(sys.modules[theirs]).update(content)
        monkeypatch.delitem(sys.modules, ours, raising=False)
        return importlib.import_module(ours)

    yield load
    for name in ("axolotl", "swift"):
        sys.modules.pop(f"hf_adalip.integrations.{name}", None)


@pytest.mark.filterwarnings("ignore:the training ends after")
def test_the_plugin_of_axolotl(tmp_path, host):
    """Its manager makes it without arguments, and calls `register` before it validates the
    configuration, and `post_trainer_create` before it trains."""
    module = host(
        "hf_adalip.integrations.axolotl",
        "axolotl.integrations.base",
        BasePlugin=type("BasePlugin", (), {}),
    )
    plugin = module.AdaLipPlugin()
    plugin.register({"optimizer": "adamlip"})
    made = trainer(tmp_path, optim="adamlip")
    plugin.post_trainer_create({}, made)
    made.train()
    assert isinstance(layerwise(made.optimizer), hf_adalip.AdamLip)
    assert "lipschitz_scale/median" in made.state.log_history[0]
    other = trainer(tmp_path)
    plugin.post_trainer_create({}, other)
    assert not hasattr(other, "_hf_adalip")


class OptimizerCallback:
    """What ms-swift's Trainer makes its optimizer by."""

    def __init__(self, args, trainer):
        self.args = args
        self.trainer = trainer

    def create_optimizer(self, model=None):
        return Trainer.create_optimizer(self.trainer)


class SwiftsTrainer(Trainer):
    """As ms-swift's: `--optimizer NAME` is a key of optimizers_map."""

    def __init__(self, *args, callback, **kwargs):
        self.optimizer_callback = callback(kwargs["args"], self)
        super().__init__(*args, **kwargs)

    def create_optimizer(self, model=None):
        self.optimizer = self.optimizer_callback.create_optimizer(model=model)
        groups = self.optimizer.param_groups
        self.optimizer.param_groups = [group for group in groups if len(group["params"]) > 0]
        return self.optimizer


@pytest.mark.filterwarnings("ignore:the training ends after")
@pytest.mark.parametrize("name", ["adamlip", "lip-adamw", "secant-adamw"])
def test_the_plugin_of_ms_swift(tmp_path, host, name):
    optimizers_map = {"default": OptimizerCallback}
    host(
        "hf_adalip.integrations.swift",
        "swift.optimizers",
        OptimizerCallback=OptimizerCallback,
        optimizers_map=optimizers_map,
    )
    assert optimizers_map["default"] is OptimizerCallback
    made = trainer(tmp_path, SwiftsTrainer, callback=optimizers_map[name])
    made.train()
    optimizer = secant(made.optimizer) or layerwise(made.optimizer)
    assert type(optimizer) is hf_adalip.get_optimizer_info(name).optimizer_class
    assert made.args.optim == name
    log = made.state.log_history[0]
    assert "secant/rate" in log if name.startswith("secant") else "layer_lr/median" in log


def test_the_entry_points_of_llm_foundry():
    """Its registry wants subclasses of Optimizer, called with `params` and what is configured."""
    tomllib = pytest.importorskip("tomllib")  # of Python 3.11
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    group = "llmfoundry_optimizers"
    points = [EntryPoint(*item, group) for item in project["entry-points"][group].items()]
    found = {point.name: point.load() for point in points}
    names = [name for name in hf_adalip.list_optimizers() if "-" not in name]
    assert {name: cls for name, cls in found.items() if name in names} == {
        name: hf_adalip.get_optimizer_info(name).optimizer_class for name in names
    }
    assert found["lipschitz_over"] is hf_adalip.LipschitzOver
    assert found["secant_over"] is hf_adalip.SecantOver
    for cls in found.values():
        assert issubclass(cls, torch.optim.Optimizer)
        cls(params=bert().parameters(), lr=1e-3, weight_decay=0.1)
