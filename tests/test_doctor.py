"""What the doctor and `attach` find: each fires on the bad case and is silent on the good one."""

from __future__ import annotations

import copy
import math
import os
import subprocess
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

pytest.importorskip("transformers")

from accelerate.state import AcceleratorState, GradientState
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    BertLMHeadModel,
    Trainer,
    TrainingArguments,
    get_scheduler,
)

from hf_adalip import AdamLip, AdamLipU, Secant, attach, release_gradients, trainer_kwargs
from hf_adalip.cli.doctor import doctor
from hf_adalip.diagnose.checks import (
    LOOKS,
    Watch,
    WrongOptimizerError,
    diverged,
    examine,
    replaced_options,
)
from hf_adalip.integrations.trainer import chance_loss

ROOT = Path(__file__).parents[1]
STEPS = LOOKS + 4


class Net(nn.Module):
    """A regression whose gradients have the norm `size`, roughly, and change from step to step."""

    def __init__(self, size=1.0, **extra):
        super().__init__()
        self.first, self.last, self.size = nn.Linear(4, 8), nn.Linear(8, 1), size
        for name, module in extra.items():
            self.add_module(name, module)

    def forward(self, x, labels):
        out = self.last(torch.tanh(self.first(x)))[:, 0]
        return {"loss": self.size * ((out - labels) ** 2).mean()}


class LoRA(Net):
    """In whose first step the gradient of `a` is exactly 0."""

    def __init__(self):
        super().__init__(a=nn.Linear(4, 2, bias=False), b=nn.Linear(2, 8, bias=False))
        nn.init.zeros_(self.b.weight)

    def forward(self, x, labels):
        hidden = torch.tanh(self.first(x) + self.b(self.a(x)))
        return {"loss": ((self.last(hidden)[:, 0] - labels) ** 2).mean()}


class DeadReLU(Net):
    def forward(self, x, labels):
        out = self.last(torch.relu(self.first(x) - 100))[:, 0]
        return {"loss": ((out - labels) ** 2).mean()}


def rows():
    x = torch.randn(64, 4, generator=torch.Generator().manual_seed(0))
    return [{"x": row, "labels": row.sum() ** 2} for row in x]


def arguments(tmp_path, **options):
    defaults = {
        "max_steps": STEPS,
        "logging_steps": 1,
        "per_device_train_batch_size": 4,
        "max_grad_norm": 0.0,
        "report_to": [],
        "save_strategy": "no",
        "use_cpu": True,
        "disable_tqdm": True,
    }
    return TrainingArguments(str(tmp_path), **(defaults | options))


def told(tmp_path, net=None, optimizers=None, way=None, **options):
    """What `attach` warns of in a training."""
    torch.manual_seed(0)
    net = net or Net()
    way = way if way is not None else trainer_kwargs("adamlip", lr=1e-3)
    given = {"optimizers": optimizers(net)} if optimizers else way
    trainer = Trainer(net, arguments(tmp_path, **options), train_dataset=rows(), **given)
    attach(trainer)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        trainer.train()
    return [str(one.message) for one in seen if one.category is UserWarning]


def test_a_changing_clip_is_told_once(tmp_path):
    (text,) = told(tmp_path, max_grad_norm=1.0)
    assert text.startswith("gradients are clipped to a norm of 1 by a factor that changes, from 0.")
    assert "max_grad_norm=0" in text


@pytest.mark.parametrize(
    "options", [{"max_grad_norm": 0.0}, {"max_grad_norm": 1e3}, {"max_steps": 10}]
)
def test_no_clip_and_one_that_is_not_reached_are_not(tmp_path, options):
    assert (
        told(tmp_path, **({"max_grad_norm": 1.0} if "max_steps" in options else {}) | options) == []
    )


@pytest.mark.parametrize("logging_steps", [2, 500])
def test_a_clip_is_seen_in_steps_that_are_not_logged(tmp_path, logging_steps):
    (text,) = told(tmp_path, max_grad_norm=1.0, logging_steps=logging_steps)
    assert text.startswith("gradients are clipped to a norm of 1 by a factor that changes, from 0.")


def test_a_training_that_has_diverged_is_told_at_the_end(tmp_path):
    """Also where Trainer leaves the losses out of its logs, and there is no log."""

    class Broken(Net):
        def forward(self, x, labels):
            return {"loss": super().forward(x, labels)["loss"] * float("nan")}

    seen = told(tmp_path, Broken(), logging_steps=500)
    (text,) = [one for one in seen if "diverged" in one]
    assert text.startswith("the training loss at the end is nan: the training has diverged. Begin")
    way = trainer_kwargs("adalip", lr=50.0, scale_bounds=None)
    seen = told(tmp_path, way=way, max_steps=60, logging_steps=500)
    assert [one for one in seen if "diverged" in one]
    assert told(tmp_path, max_steps=60, logging_steps=500) == []


def test_chance_is_known_of_classifiers_and_language_models(tmp_path):
    config = BertConfig(vocab_size=50, hidden_size=8, num_hidden_layers=1, num_attention_heads=2)
    config.intermediate_size = 8
    for model, chance in (
        (BertForSequenceClassification(config), math.log(2)),
        (BertForMaskedLM(config), None),
        (BertLMHeadModel(config), math.log(50)),
        (Net(), None),
    ):
        trainer = Trainer(model, arguments(tmp_path))
        assert chance_loss(trainer) == chance
        trainer.compute_loss_func = lambda *args, **kwargs: 0
        assert chance_loss(trainer) is None
    assert (
        diverged(2.31, "loss", math.log(10)).what == "the loss is 2.31, and that of guessing 2.303"
    )
    assert diverged(2.2, "loss", math.log(10)) is None
    assert diverged(50.0, "loss", None, 2.0).why == "the training has diverged"
    assert diverged(3.0, "loss", None, 2.0) is None


def test_counts_are_of_every_step_and_those_not_finite_are_left_out():
    watch = Watch()
    for i in range(1000):
        watch.clip(torch.tensor(math.nan if i == 500 else 2.0 + i % 2), 1.0)
    assert (watch.clipping.steps, watch.clipping.clipped) == (999, 999)
    (found,) = watch.findings()
    assert "from 0.33 to 0.5" in found.what
    for _ in range(20):
        watch.clip(torch.tensor(0.5), 1.0)
    assert watch.findings() == []  # it has ended
    assert (watch.clipping.steps, watch.clipping.clipped) == (1019, 999)


def factors(*norms):
    watch = Watch()
    for norm in norms:
        watch.clip(norm, 1.0)
    return watch.findings()


def test_what_of_a_clip_s_sees():
    assert factors(*[5.0] * 12) == []  # a constant factor cancels in S
    assert factors(*[0.5] * 6, 30.0, *[0.5] * 5) == []  # a spike is what a clip is for
    assert factors(*[0.3, 0.9] * 6) == []  # it changes nothing
    assert factors(*[2.0, 3.0] * 4) == []  # too few to judge
    assert factors(*[2.0, 2.02] * 6) == []  # by 1 %
    (found,) = factors(*[2.0, 3.0] * 6)
    assert "from 0.33 to 0.5" in found.what
    (found,) = factors(*[0.5, 3.0] * 6)
    assert "from 0.33 to 1" in found.what


def test_an_optimizer_of_frozen_parameters_alone_is_told_once(tmp_path):
    """As PEFT leaves one that was made of the model before its adapters."""

    def too_early(net):
        optimizer = AdamLip(net.named_parameters(), lr=1e-3)
        net.requires_grad_(False)
        net.add_module("adapter", nn.Linear(4, 4))
        net.forward = lambda x, labels: {"loss": (net.adapter(x).sum(1) - labels).square().mean()}
        return optimizer, None

    (text,) = told(tmp_path, Net(), too_early)
    assert text.startswith("none of the optimizer's parameters requires a gradient: ")
    assert "once it is as it will be" in text
    watch, weight = Watch(), nn.Parameter(torch.ones(2), requires_grad=False)
    watch.layers(AdamLip([weight]), {})  # in a loop
    assert [str(found) for found in watch.findings()] == [text]


def test_attaching_again_changes_what_is_logged_and_no_more(tmp_path):
    trainer = Trainer(
        Net(),
        arguments(tmp_path, max_grad_norm=1.0),
        train_dataset=rows(),
        **trainer_kwargs("adamlip", lr=1e-3),
    )
    attach(trainer)
    attach(trainer, log_layers=True)
    with pytest.warns(UserWarning, match="gradients are clipped") as seen:
        trainer.train()
    assert len([one for one in seen if "gradients are clipped" in str(one.message)]) == 1
    assert any(key.startswith("layer_lr/first") for key in trainer.state.log_history[0])


def test_layers_without_a_gradient_are_told(tmp_path):
    (text,) = told(tmp_path, Net(head=nn.Linear(3, 3), spare=nn.Linear(2, 2)))
    assert text.startswith("no gradient reaches head, spare: ")
    (text,) = told(tmp_path, DeadReLU())
    assert text.startswith("no gradient reaches first: ")
    assert "ReLU" in text


def test_frozen_layers_and_those_that_start_late_are_not(tmp_path):
    frozen = Net(head=nn.Linear(3, 3).requires_grad_(False))

    def made(net):
        return AdamLip(net.named_parameters(), lr=1e-3, layers="module"), None

    assert told(tmp_path, frozen) == []
    assert told(tmp_path, frozen, made) == []
    assert told(tmp_path, LoRA()) == []


def test_a_learning_rate_of_0_is_no_dead_layer(tmp_path):
    """With which the updates, of which the -U forms make S, are 0."""

    def made(net):
        optimizer = AdamLipU(net.named_parameters(), lr=1e-3, layers="module")
        return optimizer, get_scheduler("linear", optimizer, 2 * STEPS, 3 * STEPS)

    assert told(tmp_path, optimizers=made) == []
    assert told(tmp_path, way=trainer_kwargs("adamlipu", lr=0.0)) == []


def test_a_layer_whose_gradient_ends_is_told():
    """As None, with which its numbers stay as they are, and not as 0."""
    net = nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 2)])
    optimizer = AdamLip(net.named_parameters(), lr=1e-3, layers="module")
    watch = Watch()
    for step in range(LOOKS + 2):
        optimizer.zero_grad()
        x = torch.randn(3, 2)
        (net[0](x) + (net[1](x) if step < 2 else 0)).square().mean().backward()
        optimizer.step()
        assert watch.findings() == []
        watch.layers(optimizer, optimizer.layer_learning_rates())
    (found,) = watch.findings()
    assert found.what == "no gradient reaches 1"


def test_clipping_to_0_is_told():
    watch = Watch()
    watch.clip(2.0, 0.0)
    (found,) = watch.findings()
    assert found.what == "gradients are clipped to a norm of 0"
    watch = Watch()
    watch.clip(0.0, 0.0, "values of 1")  # what clip_grad_value_ makes of 0
    assert watch.findings() == []


def test_weight_decay_that_is_not_used_is_told(tmp_path):
    (text,) = told(tmp_path, weight_decay=0.1)
    assert text.startswith("TrainingArguments(weight_decay=0.1) is not used: ")
    assert "decays with none" in text
    way = trainer_kwargs("adamlip", lr=1e-3, weight_decay=0.01)
    (text,) = told(tmp_path, way=way, weight_decay=0.1)
    assert "decays with 0.01" in text
    way = {"optimizer_cls_and_kwargs": (AdamLip, {"lr": 1e-3, "weight_decay": 0.01})}
    (text,) = told(tmp_path, way=way)
    assert text.startswith("weight_decay=0.01 of optimizer_cls_and_kwargs is not used: ")
    assert "TrainingArguments(weight_decay=0.01)" in text


def test_a_learning_rate_that_is_not_used_is_told(tmp_path):
    (text,) = told(tmp_path, learning_rate=0.1)
    assert text.startswith("TrainingArguments(learning_rate=0.1) is not used: ")
    assert "lr=0.001. Give the optimizer that one" in text
    assert told(tmp_path, learning_rate=1e-3) == []
    assert told(tmp_path, learning_rate=1e-3, lr_scheduler_type="constant") == []


def test_weight_decay_that_is_used_is_not(tmp_path):
    way = trainer_kwargs("adamlip", lr=1e-3, weight_decay=0.01)
    assert told(tmp_path, way=way) == []
    assert told(tmp_path, way=way, weight_decay=0.01) == []
    way = {"optimizer_cls_and_kwargs": (AdamLip, {"lr": 1e-3, "weight_decay": 0.01})}
    assert told(tmp_path, way=way, weight_decay=0.01) == []
    assert told(tmp_path, way={"optimizer_cls_and_kwargs": (AdamLip, {"lr": 1e-3})}) == []


def test_a_clip_of_released_gradients_is_told(tmp_path):
    def released(net):
        optimizer = AdamLip(net.named_parameters(), lr=1e-3)
        release_gradients(optimizer)
        return optimizer, None

    (text,) = told(tmp_path, optimizers=released, max_grad_norm=1.0)
    assert text.startswith("TrainingArguments(max_grad_norm=1) clips nothing: ")
    assert told(tmp_path, optimizers=released) == []


def test_options_that_a_checkpoint_replaces():
    params = [nn.Parameter(torch.ones(3))]
    saved = AdamLip(params, betas=(0.8, 0.9), gamma=0.5).state_dict()
    for own, replaced in (
        ({"gamma": 0.5, "betas": [0.8, 0.9]}, None),
        ({"gamma": 0.5, "betas": (0.8, 0.9), "tag": "mine"}, None),
        ({"betas": (0.8, 0.9)}, "gamma=0.5 for 0.8"),
        ({"gamma": 0.5, "betas": (0.8, 0.9), "lr": 0.5}, "lr=0.001 for 0.5"),
    ):
        optimizer = AdamLip([{"params": params, **own}])
        made = [dict(group) for group in optimizer.param_groups]
        optimizer.load_state_dict(copy.deepcopy(saved))
        finding = replaced_options(optimizer, made)
        assert (finding and finding.what.partition(": ")[2]) == replaced


def scheduled(name, steps, **options):
    def made(net):
        optimizer = AdamLip(net.named_parameters(), lr=1e-3, **options)
        return optimizer, get_scheduler(name, optimizer, 0, steps)

    return made


def test_a_schedule_that_ends_early_is_told(tmp_path):
    (text,) = told(tmp_path, optimizers=scheduled("linear", 6))
    assert text.startswith(f"the learning rate is 0 from step 6 of {STEPS} on: ")
    assert f"num_training_steps={STEPS}" in text
    (text,) = told(tmp_path, optimizers=scheduled("constant", 6, gamma=0.99))
    assert text.startswith(f"the training ends after {STEPS} steps: ")
    assert "1/(1-γ) = 100 steps" in text
    assert f"gamma={1 - 4 / STEPS:.2g}" in text


def test_s_has_hardly_left_1_at_the_usual_gamma_too(tmp_path):
    (text,) = told(tmp_path, optimizers=scheduled("constant", 5), max_steps=5)
    assert text.startswith("the training ends after 5 steps: ")
    assert "33% of it is still the 1" in text
    assert told(tmp_path, optimizers=scheduled("constant", 7), max_steps=7) == []
    assert told(tmp_path, optimizers=scheduled("constant", 4), max_steps=4) == []


def by_group(*factors):
    def made(net):
        groups = [{"params": list(part.named_parameters())} for part in (net.first, net.last)]
        optimizer = AdamLip(groups, lr=1e-3)
        return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, list(factors))

    return made


def test_schedules_of_groups_are_all_looked_at(tmp_path):
    def until(end):
        return lambda step: float(step < end)

    (text,) = told(tmp_path, optimizers=by_group(until(99), until(6)))
    assert text.startswith(f"the learning rate of group 1 is 0 from step 6 of {STEPS} on: ")
    assert told(tmp_path, optimizers=by_group(until(0), until(99))) == []  # left out on purpose
    (text,) = told(tmp_path, optimizers=by_group(until(0), until(0)))
    assert text.startswith(f"the learning rate is 0 from step 0 of {STEPS} on: ")


def test_any_schedule_that_ends_early_is_told(tmp_path):
    def ending(net):
        optimizer = AdamLip(net.named_parameters(), lr=1e-3)
        return optimizer, torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, 3)

    (text,) = told(tmp_path, optimizers=ending)
    assert text.startswith("the learning rate has become 0, and the training goes on: ")
    (text,) = told(tmp_path, optimizers=scheduled("linear", 2))  # and once, where both see it
    assert text.startswith("the learning rate is 0 from step 2 ")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["linear", "cosine", "constant", "inverse_sqrt"])
def test_one_that_ends_with_the_training_is_not(tmp_path, name):
    assert told(tmp_path, optimizers=scheduled(name, STEPS)) == []
    assert told(tmp_path, optimizers=scheduled(name, 2), max_steps=2) == []


@pytest.mark.parametrize(
    ("plugin", "config", "change"),
    [
        (
            "fsdp_plugin",
            {"fsdp_version": 1, "use_orig_params": False},
            "fsdp_use_orig_params: true",
        ),
        ("deepspeed_plugin", {"stage": 2, "round_robin_gradients": True}, "round_robin_gradients"),
        ("fsdp_plugin", {"fsdp_version": 1, "use_orig_params": True}, None),
        ("fsdp_plugin", {"fsdp_version": 2, "use_orig_params": None}, None),
        ("deepspeed_plugin", {"stage": 2}, None),
        ("deepspeed_plugin", {"stage": 3, "round_robin_gradients": True}, None),
    ],
)
def test_flat_shards_without_layers(tmp_path, monkeypatch, plugin, config, change):
    trainer = Trainer(Net(), arguments(tmp_path), **trainer_kwargs("adamlip", lr=1e-3))
    deepspeed = plugin == "deepspeed_plugin"
    given = {"deepspeed_config": {"zero_optimization": config}} if deepspeed else config
    state = SimpleNamespace(**{plugin: SimpleNamespace(**given)})
    monkeypatch.setattr(trainer, "accelerator", SimpleNamespace(state=state))
    trainer.is_deepspeed_enabled = deepspeed
    if change is None:
        assert examine(trainer) == []
        attach(trainer)
        return
    (found,) = examine(trainer)
    assert change in found.change
    with pytest.raises(WrongOptimizerError, match="layers are lost"):
        attach(trainer)


LOOP = """
import torch
from hf_adalip import AdamLip
torch.manual_seed(0)
net = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 1))
optimizer = OPTIMIZER
for step in range(50):
    x = torch.randn(4, 4)
    ((net(x)[:, 0] - x.sum(1)) ** 2).mean().backward()
    CLIP
    optimizer.step()
    optimizer.zero_grad()
print("ENDED")
"""
OURS = "AdamLip(net.named_parameters(), lr=1e-3)"

TRAINER = """
from tests.test_doctor import *
def is_fsdp(self, before=Trainer.create_accelerator_and_postprocess):
    before(self)
    self.is_fsdp_enabled = True
Trainer.create_accelerator_and_postprocess = is_fsdp
net = Net()
Trainer(net, arguments("out"), train_dataset=rows(), OPTIMIZER).train()
"""

ON_ONE_DEVICE = TRAINER.replace("_enabled = True", "_enabled = False")


@pytest.fixture
def script(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", sys.argv)
    monkeypatch.setattr(sys, "path", [*sys.path, str(ROOT)])
    monkeypatch.chdir(tmp_path)

    def written(text, optimizer=OURS, clip="pass"):
        Path("train.py").write_text(text.replace("OPTIMIZER", optimizer).replace("CLIP", clip))
        return "train.py"

    yield written
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


def test_the_doctor_watches_any_loop(script, capsys):
    assert doctor(script(LOOP), []) == 0
    assert capsys.readouterr().out == "nothing wrong (watched for 20 steps)\n"
    clip = "torch.nn.utils.clip_grad_norm_(net.parameters(), 0.1)"
    original = torch.nn.utils.clip_grad_norm_
    assert doctor(script(LOOP, clip=clip), []) == 1
    assert "- gradients are clipped to a norm of 0.1 " in capsys.readouterr().out
    assert torch.nn.utils.clip_grad_norm_ is original
    assert doctor(script(LOOP, clip=clip.replace("0.1", "1e3")), []) == 0
    capsys.readouterr()
    steady = "n = torch.nn.utils.get_total_norm([p.grad for p in net.parameters()])"
    steady += "; [p.grad.mul_(0.05 / n) for p in net.parameters()]; "
    steady += clip.replace("0.1", "0.04")  # by one factor, which S does not see
    assert doctor(script(LOOP, clip=steady), []) == 0
    assert capsys.readouterr().out == (
        "nothing wrong (watched for 20 steps; 20 of 20 gradients were clipped to a norm of 0.04)\n"
    )


@pytest.mark.parametrize(
    ("clip", "told"),
    [
        ("clip_grads_with_norm_(net.parameters(), 0.1, NORM)", "a norm of 0.1 by a factor"),
        ("clip_grad_value_(net.parameters(), 0.01)", "values of 0.01 by a factor"),
        ("clip_grad_norm_(net.parameters(), 0.0)", "a norm of 0: they are 0 then"),
        ("clip_grad_value_(net.parameters(), 1e3)", None),
    ],
)
def test_the_doctor_watches_every_way_to_clip(script, capsys, clip, told):
    norm = "torch.nn.utils.get_total_norm([p.grad for p in net.parameters()])"
    clip = f"torch.nn.utils.{clip.replace('NORM', norm)}"
    assert doctor(script(LOOP, clip=clip), []) == int(told is not None)
    out = capsys.readouterr().out
    assert f"- gradients are clipped to {told}" in out if told else out.startswith("nothing wrong")
    assert out.count("\n") == (2 if told else 1)


def test_the_doctor_sees_the_schedule_of_a_loop(script, capsys):
    schedule = "torch.optim.lr_scheduler.ExponentialLR(optimizer, 1.0)"
    text = LOOP.replace("for step", f"schedule = {schedule}\nfor step")
    text = text.replace("optimizer.zero_grad()", "optimizer.zero_grad(); schedule.step()")
    assert doctor(script(text), []) == 0
    short = "torch.optim.lr_scheduler.PolynomialLR(optimizer, 5)"
    assert doctor(script(text.replace(schedule, short)), []) == 1
    assert "- the learning rate has become 0, and the training goes on" in capsys.readouterr().out


def test_the_doctor_stops_at_another_optimizer(script, capsys):
    assert doctor(script(LOOP, "torch.optim.Adam(net.parameters())"), []) == 2
    found = capsys.readouterr()
    assert "Adam took some, and has none" in found.err
    assert "ENDED" not in found.out
    given = "optimizers=(torch.optim.AdamW(net.parameters()), None)"
    assert doctor(script(ON_ONE_DEVICE, given), []) == 1
    found = capsys.readouterr()
    assert "- Trainer trains with the AdamW of optimizers=(...): " in found.out
    assert "1 thing wrong" in found.out


def test_gradients_that_are_not_finite_are_told(script, capsys):
    text = LOOP.replace("x.sum(1)", "1e30 * step")
    assert doctor(script(text), []) == 1
    assert "was inf or NaN in 19 steps: " in capsys.readouterr().out


def test_the_doctor_tells_what_our_optimizers_refuse(script, capsys):
    assert doctor(script(LOOP, 'AdamLip(net.parameters(), layers="module")'), []) == 1
    assert "- layers='module' needs the parameters' names" in capsys.readouterr().out
    assert doctor(script(LOOP, 'AdamLip(net.parameters(), history="half")'), []) == 1
    assert '- history must be "exact"' in capsys.readouterr().out
    with pytest.raises(ZeroDivisionError):
        doctor(script("1 / 0"), [])


def test_the_doctor_explains_optimizers_under_fsdp(script, capsys):
    given = "optimizers=(AdamLip(net.parameters()), None)"
    assert doctor(script(TRAINER, given), []) == 1
    out = capsys.readouterr().out
    assert "- Trainer refuses optimizers=(...) under FSDP: " in out
    assert "Pass Trainer(..., **trainer_kwargs(" in out
    given = '**trainer_kwargs("adamlip", lr=1e-3)'
    assert doctor(script(ON_ONE_DEVICE, given), []) == 0
    assert [path.name for path in Path().iterdir()] == ["train.py"]


SECANT = "Secant(torch.optim.SGD(net.parameters(), 1.0, momentum=0.9), every=5)"
MEASURED = """
from hf_adalip import Secant
def closure():
    optimizer.zero_grad()
    loss = ((net(x)[:, 0] - x.sum(1)) ** 2).mean()
    loss.backward()
    return loss.detach()
"""


def test_the_doctor_says_what_secant_found(script, capsys):
    """Its clipping changes nothing that is compared, and lr is only what a schedule multiplies."""
    loop = LOOP.replace("optimizer = ", MEASURED + "optimizer = ")
    text = loop.replace("optimizer.step()", "optimizer.step(closure)")
    assert doctor(script(text, SECANT), []) == 0
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith("nothing wrong (watched for 20 steps; a rate of ")
    assert " was found after 12 measurements, the last with r = " in line
    assert doctor(script(loop, SECANT), []) == 1
    assert "needs a closure; call optimizer.step(closure)" in capsys.readouterr().out
    clip = "optimizer.compute_gradients(closure)\n    "
    clip += "torch.nn.utils.clip_grad_norm_(net.parameters(), 0.1)"
    assert doctor(script(loop, SECANT, clip=clip), []) == 0
    schedule = "schedule = torch.optim.lr_scheduler.PolynomialLR(optimizer, 5)"
    short = text.replace("for step", f"{schedule}\nfor step")
    short = short.replace("step(closure)", "step(closure); schedule.step()")
    assert doctor(script(short, SECANT), []) == 1
    assert "- the learning rate has become 0, and the training goes on" in capsys.readouterr().out


@pytest.mark.parametrize("attached", [True, False])
def test_the_doctor_knows_secant_in_a_trainer(script, capsys, attached):
    text = ON_ONE_DEVICE.replace("net = Net()", "net = Net(norm=nn.BatchNorm1d(8))")
    if attached:
        text = text.replace("Trainer(net", "trainer = Trainer(net")
        text = text.replace(").train()", ")\nattach(trainer)\ntrainer.train()")
    given = "optimizers=(Secant(torch.optim.AdamW(net.parameters())OPTIONS), None)"
    text = "from hf_adalip import Secant\n" + text.replace("arguments(", "arguments(SCHEDULE")
    text = text.replace('SCHEDULE"out"', '"out", lr_scheduler_type="constant"')
    for options, told in ((", model=net", ""), ("", "running statistics")):
        optimizer = given.replace("OPTIONS", options)
        assert doctor(script(text, optimizer), []) == int(bool(told) or not attached)
        out = capsys.readouterr().out
        assert told in out
        assert ("call hf_adalip.attach(trainer) before train()" in out) == (not attached)
        assert ("a rate of " in out) == attached


def test_attach_warns_of_statistics_that_secant_does_not_see(tmp_path):
    net = Net(norm=nn.BatchNorm1d(8))
    made = {"model": net}, {}
    for options, count in zip(made, (0, 1), strict=True):
        seen = told(
            tmp_path,
            net,
            lambda net, options=options: (
                Secant(torch.optim.AdamW(net.parameters()), **options),
                None,
            ),
            max_steps=3,
        )
        assert len([text for text in seen if "running statistics" in text]) == count


def content(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_the_doctor_finds_and_leaves_nothing_in_the_mnist_recipe(script, capsys, tmp_path):
    recipe = str(ROOT / "recipes" / "mnist.py")
    options = ["--dataset_name=digits", "--cpu", "--per_device_train_batch_size=32"]
    folder = tmp_path / "out"
    assert doctor(recipe, [*options, f"--output_dir={folder}"]) == 0
    assert capsys.readouterr().out.endswith("nothing wrong (watched for 20 steps)\n")
    assert not folder.exists()
    (folder / "step_5").mkdir(parents=True)
    for name in ("all_results.json", "model.safetensors", "step_5/checkpoint.json"):
        (folder / name).write_text("mine")
    before = content(tmp_path)
    for option in ("--overwrite_output_dir", "--resume_from_checkpoint=latest"):
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()
        saving = ["--checkpointing_steps=10", "--with_tracking", option]
        assert doctor(recipe, [*options, *saving, f"--output_dir={folder}"]) == 0
        assert content(tmp_path) == before


def test_the_doctor_leaves_nothing_of_a_trainer_recipe(script, capsys, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("to be or not to be " * 500)
    folder = tmp_path / "out"
    (folder / "checkpoint-5").mkdir(parents=True)
    for name in ("all_results.json", "model.safetensors", "checkpoint-5/mine"):
        (folder / name).write_text("mine")
    before = content(tmp_path)
    options = [f"--train_file={text}", f"--output_dir={folder}", "--overwrite_output_dir"]
    options += ["--use_cpu=true", "--hidden_size=32", "--num_hidden_layers=1", "--block_size=32"]
    options += ["--num_attention_heads=2", "--report_to=none", "--save_steps=3"]
    options += ["--save_strategy=steps", "--per_device_train_batch_size=2", "--max_steps=30"]
    assert doctor(str(ROOT / "recipes" / "causal_lm.py"), options) == 0
    assert capsys.readouterr().out.endswith("nothing wrong (watched for 20 steps)\n")
    assert content(tmp_path) == before


WITHOUT = """
import sys
class Without:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "transformers":
            raise ImportError(f"No module named {name}")
sys.meta_path.insert(0, Without())
import runpy
sys.argv = sys.argv[1:]
runpy.run_module(sys.argv[0], run_name="__main__")
"""


def without_transformers(*command):
    return subprocess.run(
        [sys.executable, "-c", WITHOUT, *command],
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )


@pytest.mark.slow
def test_loops_need_no_transformers(script):
    done = without_transformers("hf_adalip.cli", "doctor", script(LOOP))
    assert (done.returncode, done.stdout) == (0, "nothing wrong (watched for 20 steps)\n")
    done = without_transformers("hf_adalip.run", script(LOOP))
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert line.startswith("hf_adalip: cannot register with transformers")
