"""transformers.Trainer with small random models: every way in, logs, cards, resuming."""

from __future__ import annotations

import os
import subprocess
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("transformers")

from transformers import (
    BertConfig,
    BertForSequenceClassification,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    ViTConfig,
    ViTForImageClassification,
)

import hf_adalip
from hf_adalip import OptimizerInfo, attach, register, register_optimizer, trainer_kwargs
from hf_adalip.cli import main
from hf_adalip.cli.doctor import doctor
from hf_adalip.diagnose import examine
from hf_adalip.monitor import layerwise
from hf_adalip.registry import _REGISTRY

SIX = ["adalip", "rmslip", "adamlip", "adalipu", "rmslipu", "adamlipu"]


def bert():
    torch.manual_seed(0)
    return BertForSequenceClassification(
        BertConfig(
            vocab_size=50,
            hidden_size=16,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=32,
            num_labels=2,
        )
    )


def texts():
    """Sentences whose label is their first token: something a model can learn."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(2, 50, (64, 8), generator=generator)
    labels = torch.arange(64) % 2
    tokens[:, 0] = labels
    return [{"input_ids": t, "labels": int(y)} for t, y in zip(tokens, labels, strict=True)]


def arguments(path, **kwargs):
    defaults = {
        "max_steps": 12,
        "logging_steps": 3,
        "max_grad_norm": 0.0,  # of which `attach` warns where it clips
        "per_device_train_batch_size": 8,
        "report_to": [],
        "save_strategy": "no",
        "use_cpu": True,
        "disable_tqdm": True,
        "seed": 1,
    }
    return TrainingArguments(output_dir=str(path), **(defaults | kwargs))


def weights(trainer):
    return torch.cat([p.detach().flatten() for p in trainer.model.parameters()])


@pytest.mark.slow
@pytest.mark.parametrize("name", SIX)
def test_an_optimizer_given_to_trainer_trains(tmp_path, name):
    model = bert()
    cls = hf_adalip.get_optimizer_info(name).optimizer_class
    lr = 0.3 if "ada" in name and "adam" not in name else 3e-3
    optimizer = cls(model.named_parameters(), lr=lr, layers="module")
    trainer = Trainer(
        model=model,
        args=arguments(tmp_path, max_steps=40, logging_steps=10),
        train_dataset=texts(),
        optimizers=(optimizer, None),
    )
    attach(trainer)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < 0.9 * losses[0]


class TrainsItsLoss(Trainer):
    """As sentence-transformers' trains a loss with parameters of its own, and by `--optim`."""

    head = None

    def get_optimizer_cls_and_kwargs(self, args, model=None):
        optimizer_cls, kwargs = super().get_optimizer_cls_and_kwargs(args, model)
        params = list(self.model.parameters())
        groups = [
            {"params": params[1:], "weight_decay": 0.1},
            {"params": [], "weight_decay": 0.0},
            {"params": [params[0], *self.head.parameters()], "weight_decay": 0.0, "lr": 0.02},
        ]
        return optimizer_cls, {**kwargs, "optimizer_dict": groups}

    def compute_loss(self, model, inputs, *args, **kwargs):
        return model(**inputs).loss + self.head(torch.ones(1, 3)).square().sum()


@pytest.mark.parametrize("name", ["adamlip", "lip-adamw"])
def test_parameter_groups_that_a_trainer_makes_itself(tmp_path, name):
    register()
    args = arguments(tmp_path, optim=name, learning_rate=1e-3)
    trainer = TrainsItsLoss(model=bert(), args=args, train_dataset=texts())
    trainer.head = torch.nn.Linear(3, 3)
    before = [p.detach().clone() for p in trainer.head.parameters()]
    trainer.train()
    after = list(trainer.head.parameters())
    assert not any(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    optimizer = layerwise(trainer.optimizer)
    assert [g["initial_lr"] for g in optimizer.param_groups] == [1e-3, 0.02]
    assert [g["weight_decay"] for g in optimizer.param_groups] == [0.1, 0.0]
    layers = optimizer.layer_learning_rates()
    assert {"bert.embeddings.word_embeddings", "classifier"} < set(layers)
    assert len([layer for layer in layers if layer.startswith("optimizer_dict")]) == 2


def test_the_factory_sees_the_model(tmp_path):
    trainer = Trainer(
        model=bert(),
        args=arguments(tmp_path),
        train_dataset=texts(),
        **trainer_kwargs("adamlip", lr=1e-3, weight_decay=0.01, gamma=0.7),
    )
    trainer.train()
    optimizer = layerwise(trainer.optimizer)
    assert isinstance(optimizer, hf_adalip.AdamLip)
    assert optimizer.param_groups[0]["gamma"] == 0.7
    (group,) = optimizer.param_groups
    assert group["weight_decay"] == 0.01
    # Trainer's own rule for what to decay
    decayed = trainer.get_decay_parameter_names(trainer.model)
    assert set(group["param_names"]) - set(group["no_weight_decay"]) == set(decayed)
    assert "bert.encoder.layer.0.attention.self.query" in optimizer.layer_learning_rates()


def test_a_vision_transformer_in_bf16_trains(tmp_path):
    torch.manual_seed(0)
    config = ViTConfig(
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
        image_size=8,
        patch_size=4,
        num_labels=2,
    )
    generator = torch.Generator().manual_seed(0)
    images = [
        {"pixel_values": torch.randn(3, 8, 8, generator=generator) + i % 2, "labels": i % 2}
        for i in range(32)
    ]
    trainer = Trainer(
        model=ViTForImageClassification(config),
        args=arguments(tmp_path, bf16=True, max_steps=30, logging_steps=10),
        train_dataset=images,
        **trainer_kwargs("adamlip", lr=3e-3),
    )
    attach(trainer)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0]
    state = layerwise(trainer.optimizer).state
    assert {s["lipschitz_scale"].dtype for s in state.values()} == {torch.float32}


@pytest.mark.slow
@pytest.mark.parametrize("name", [*SIX, "lip-nadam"])
@pytest.mark.parametrize("way", ["autocast", "parameters"])
def test_bf16(tmp_path, name, way):
    """Autocast, and a model in bf16: S stays float32 and finite, and the model's dtype is kept."""
    model = bert() if way == "autocast" else bert().bfloat16()
    trainer = Trainer(
        model=model,
        args=arguments(tmp_path, bf16=way == "autocast", max_steps=6),
        train_dataset=texts(),
        **trainer_kwargs(name, lr=1e-3),
    )
    before = weights(trainer)
    trainer.train()
    optimizer = layerwise(trainer.optimizer)
    dtype = torch.float32 if way == "autocast" else torch.bfloat16
    for param, state in optimizer.state.items():
        assert param.dtype == dtype
        assert state["lipschitz_scale"].dtype == torch.float32
    rates = optimizer.layer_learning_rates().values()
    assert all(0.1 <= rate.scale <= 10.0 and not rate.nonfinite_steps for rate in rates)
    assert len({rate.scale for rate in rates}) > len(rates) / 2
    assert weights(trainer).isfinite().all()
    assert not torch.equal(weights(trainer), before)


@pytest.mark.slow
@pytest.mark.parametrize("way", ["optimizers", "kwargs", "optim"])
def test_resuming_is_bit_exact(tmp_path, way):
    def trainer(path):
        model = bert()
        options, extra = {}, {"save_strategy": "steps", "save_steps": 5}
        if way == "optimizers":
            options["optimizers"] = (hf_adalip.AdamLip(model.parameters(), lr=1e-3), None)
        elif way == "kwargs":
            options.update(trainer_kwargs("adamlipu", lr=1e-3, weight_decay=0.1))
        else:
            register()
            extra |= {"optim": "rmslip", "optim_args": "alpha=0.9,layers=tensor"}
        args = arguments(path, **extra)
        return Trainer(model=model, args=args, train_dataset=texts(), **options)

    whole = trainer(tmp_path / "whole")
    whole.train()
    again = trainer(tmp_path / "again")
    again.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-5"))
    assert torch.equal(weights(whole), weights(again))
    rates = [layerwise(t.optimizer).layer_learning_rates() for t in (whole, again)]
    assert rates[0] == rates[1]


def test_registered_names_take_the_training_arguments(tmp_path):
    register()
    register()  # twice is once
    args = arguments(
        tmp_path,
        optim="adamlip",
        optim_args="gamma=0.9,c=theoretical,scale_bounds=0.2:5",
        learning_rate=2e-3,
        weight_decay=0.03,
        adam_beta1=0.8,
        adam_epsilon=1e-6,
    )
    trainer = Trainer(model=bert(), args=args, train_dataset=texts())
    optimizer = trainer.create_optimizer()
    assert isinstance(optimizer, hf_adalip.AdamLip)
    group = optimizer.param_groups[0]
    expected = {
        "lr": 2e-3,
        "weight_decay": 0.03,
        "betas": (0.8, 0.999),
        "eps": 1e-6,
        "gamma": 0.9,
        "c": "theoretical",
        "scale_bounds": (0.2, 5),
    }
    assert {key: group[key] for key in expected} == expected
    assert optimizer.layers == "module"


def test_an_optimizer_of_trainers_own_is_not_replaced(monkeypatch):
    from transformers.trainer_optimizer import _OPTIMIZER_HANDLERS
    from transformers.training_args import OptimizerNames

    register()
    before = _OPTIMIZER_HANDLERS[OptimizerNames.LOMO]
    monkeypatch.setattr("hf_adalip.registry._REGISTRY", dict(_REGISTRY))
    register_optimizer(OptimizerInfo("lomo", hf_adalip.AdamLip))
    with pytest.raises(ValueError, match="cannot register 'lomo' with transformers"):
        register()
    assert _OPTIMIZER_HANDLERS[OptimizerNames.LOMO] is before


@pytest.mark.slow
@pytest.mark.parametrize("way", ["kwargs", "optimizers"])
def test_options_that_a_checkpoint_replaces_are_told(tmp_path, way):
    def run(gamma, **options):
        model = bert()
        if way == "kwargs":
            given = trainer_kwargs("adamlip", lr=1e-3, weight_decay=0.1, gamma=gamma)
        else:  # groups that have other options than the optimizer's defaults
            group = {"params": list(model.named_parameters()), "gamma": gamma}
            given = {"optimizers": (hf_adalip.AdamLip([group], layers="module"), None)}
        args = arguments(tmp_path, save_strategy="steps", save_steps=6, logging_steps=20)
        trainer = Trainer(model=model, args=args, train_dataset=texts(), **given)
        attach(trainer)
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            trainer.train(**options)
        return [str(one.message) for one in seen if "checkpoint has" in str(one.message)]

    resume = {"resume_from_checkpoint": str(tmp_path / "checkpoint-6")}
    assert run(0.7) == []
    assert run(0.7, **resume) == []
    (text,) = run(0.5, **resume)
    assert "other options than the optimizer: gamma=0.7 for 0.5: " in text


def test_logs_reach_the_history_and_every_callback(tmp_path):
    seen = []

    class Tracker(TrainerCallback):
        def on_log(self, args, state, control, logs, **kwargs):
            seen.append(dict(logs))

    trainer = Trainer(
        model=bert(),
        args=arguments(tmp_path),
        train_dataset=texts(),
        callbacks=[Tracker()],
        **trainer_kwargs("adamlip", lr=1e-3),
    )
    attach(trainer, log_layers=True)
    trainer.train()
    rates = layerwise(trainer.optimizer).layer_learning_rates()
    for logged in (seen[-2], trainer.state.log_history[-2]):
        assert logged["lipschitz_scale/min"] <= logged["lipschitz_scale/median"]
        assert logged["layer_lr/max"] == max(rate.lr for rate in rates.values())
        assert logged["lipschitz_scale/classifier"] == rates["classifier"].scale
    assert not any("/" in key for key in seen[-1])  # the summary at the end is no training log


def test_the_model_card_names_what_ran(tmp_path):
    trainer = Trainer(
        model=bert(),
        args=arguments(tmp_path),
        train_dataset=texts(),
        **trainer_kwargs("adamlip", lr=3e-3, gamma=0.7),
    )
    attach(trainer)
    trainer.train()
    trainer.create_model_card()
    card = (tmp_path / "README.md").read_text()
    assert "- learning_rate: 0.003\n" in card
    assert "- optimizer: AdamLip with lr=0.003, " in card
    assert "gamma=0.7" in card
    assert "OptimizerNames" not in card


def test_the_model_card_has_the_first_learning_rate_of_a_plateau(tmp_path):
    """That schedule lowers it and, unlike torch's others, does not note what it was."""
    args = arguments(
        tmp_path,
        max_steps=4,
        lr_scheduler_type="reduce_lr_on_plateau",
        lr_scheduler_kwargs={"patience": 0, "threshold": 1e9},
        eval_strategy="steps",
        eval_steps=1,
    )
    data = {"train_dataset": texts(), "eval_dataset": texts()}
    trainer = Trainer(model=bert(), args=args, **data, **trainer_kwargs("adamlip", lr=3e-3))
    attach(trainer)
    trainer.train()
    assert trainer.optimizer.param_groups[0]["lr"] < 3e-3
    trainer.create_model_card()
    card = (tmp_path / "README.md").read_text()
    assert "- learning_rate: 0.003\n" in card
    assert "- optimizer: AdamLip with lr=0.003, " in card


def test_a_second_training_has_a_record_of_its_own(tmp_path):
    pytest.importorskip("matplotlib")
    args = arguments(tmp_path / "out", max_steps=3, logging_steps=1, max_grad_norm=1e-6)
    kwargs = trainer_kwargs("adamlip", lr=1e-3)
    trainer = Trainer(model=bert(), args=args, train_dataset=texts(), **kwargs)
    attach(trainer, plot=True)
    for _ in range(2):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            trainer.train()
        logged = [x["clipped_steps"] for x in trainer.state.log_history if "clipped_steps" in x]
        assert logged == [1.0, 2.0, 3.0]
        history = hf_adalip.monitor.LayerRateHistory
        steps = history.load(tmp_path / "out" / "layer_learning_rates.json").steps
        assert steps == [1, 2, 3]


def test_attach_is_for_trainers():
    optimizer = hf_adalip.AdamLip([torch.ones(1, requires_grad=True)])
    with pytest.raises(TypeError, match=r"transformers\.Trainer, got hf_adalip\..*AdamLip$"):
        attach(optimizer)


def test_attach_refuses_a_trainer_without_s(tmp_path):
    trainer = Trainer(model=bert(), args=arguments(tmp_path), train_dataset=texts())
    attach(trainer)
    before = weights(trainer)
    with pytest.raises(RuntimeError, match="no learning rate per layer"):
        trainer.train()
    assert torch.equal(before, weights(trainer))


@pytest.mark.parametrize(
    ("arguments_", "error", "message"),
    [
        ({"name": "adamlip"}, ValueError, "needs lr"),
        ({"name": "adamlip", "lr": None}, ValueError, "needs lr"),
        ({"name": "adamlp", "lr": 1e-3}, ValueError, "did you mean adamlip"),
        ({"name": "adamlip", "lr": -1.0}, ValueError, r"lr must be .* got -1\.0"),
        ({"name": "adamlip", "lr": 1e-3, "gama": 0.9}, TypeError, "gama"),
        ({"name": "adamlip", "lr": 1e-3, "layers": "block"}, ValueError, "'block'"),
    ],
)
def test_trainer_kwargs_refuses_what_would_fail_later(arguments_, error, message):
    with pytest.raises(error, match=message):
        trainer_kwargs(**arguments_)


def test_layers_may_be_a_function_of_the_models_own_names(tmp_path):
    def block(name):
        return name.split(".")[0] if "encoder" not in name else ".".join(name.split(".")[:4])

    trainer = Trainer(
        model=bert(),
        args=arguments(tmp_path, max_steps=2),
        train_dataset=texts(),
        **trainer_kwargs("adamlip", lr=1e-3, layers=block),
    )
    trainer.train()
    layers = layerwise(trainer.optimizer).layer_learning_rates()
    assert set(layers) == {
        "bert.encoder.layer.0",
        "bert.encoder.layer.1",
        "bert",
        "classifier",
    }


SCRIPT = """
import torch
from dataclasses import dataclass
from transformers import BertConfig, BertForSequenceClassification, HfArgumentParser
from transformers import Trainer, TrainingArguments

(args,) = HfArgumentParser(TrainingArguments).parse_args_into_dataclasses()
model = BertForSequenceClassification(BertConfig(
    vocab_size=50, hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
    intermediate_size=32))
data = [{"input_ids": torch.full((4,), i % 50), "labels": i % 2} for i in range(16)]
trainer = Trainer(model=model, args=args, train_dataset=data)
trainer.train()
group = trainer.optimizer.param_groups[0]
print("RAN", type(trainer.optimizer.optimizer).__name__, group["gamma"], args.optim.value)
"""


def run(*command, cwd):
    env = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    env["TORCH_LOGS"] = "-torch.utils._pytree"  # which logs that torchao calls what is deprecated
    return subprocess.run(
        [sys.executable, "-m", *command],
        cwd=cwd,
        env=env,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    "launcher", [[], ["accelerate.commands.launch", "--cpu", "--num_processes", "1", "-m"]]
)
def test_an_unmodified_script_takes_optim(tmp_path, launcher):
    Path(tmp_path / "train.py").write_text(SCRIPT)
    done = run(
        *launcher,
        *("hf_adalip.run", "train.py", "--output_dir", "out", "--max_steps", "2"),
        *("--use_cpu", "true", "--report_to", "none", "--save_strategy", "no"),
        *("--optim", "adamlip", "--optim_args", "gamma=0.9"),
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert "RAN AdamLip 0.9 adamlip" in done.stdout


@pytest.mark.slow
def test_run_logs_and_writes_cards_as_attach_does(tmp_path):
    """Of a module as well, and it leaves another optimizer alone."""
    (tmp_path / "package").mkdir()
    Path(tmp_path / "package" / "train.py").write_text(
        SCRIPT + "\ntrainer.create_model_card()\nprint('LOGGED', trainer.state.log_history[0])\n"
    )
    options = ["--max_steps=4", "--logging_steps=2", "--use_cpu=true", "--report_to=none"]
    command = ["hf_adalip.run", "-m", "package.train", "--output_dir=out", *options]
    done = run(*command, "--optim=adamlip", "--optim_args=gamma=0.9", cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "'lipschitz_scale/median'" in done.stdout
    card = Path(tmp_path / "out" / "README.md").read_text()
    assert "- optimizer: AdamLip with lr=5e-05, " in card
    assert "OptimizerNames" not in card
    done = run("hf_adalip.run", "-m", "package.missing", cwd=tmp_path)
    assert done.returncode == 1
    assert done.stderr.splitlines() == ["hf_adalip: no module named package.missing"]


def test_attach_draws_at_the_end(tmp_path):
    pytest.importorskip("matplotlib")
    trainer = Trainer(
        model=bert(),
        args=arguments(tmp_path / "out"),
        train_dataset=texts(),
        **trainer_kwargs("adamlip", lr=1e-3),
    )
    attach(trainer, plot=True)
    trainer.train()
    assert (tmp_path / "out" / "layer_learning_rates.png").read_bytes().startswith(b"\x89PNG")
    assert hf_adalip.monitor.LayerRateHistory.load(
        tmp_path / "out" / "layer_learning_rates.json"
    ).steps == list(range(1, 13))


@pytest.mark.parametrize("given", ["name=adamlipu", "model_or_params=1", "params=1"])
def test_arguments_that_are_not_the_users(given, tmp_path):
    register()
    trainer = Trainer(
        model=bert(), args=arguments(tmp_path, optim="adamlip", optim_args=given), train_dataset=[]
    )
    with pytest.raises(TypeError, match=f"adamlip has no argument '{given.split('=')[0]}'"):
        trainer.create_optimizer()


@pytest.mark.slow
def test_run_says_how_it_is_used(tmp_path):
    done = run("hf_adalip.run", cwd=tmp_path)
    assert done.returncode == 2
    assert "usage: python -m hf_adalip.run SCRIPT" in done.stdout
    done = run("hf_adalip.run", "missing.py", cwd=tmp_path)
    assert done.returncode == 1
    assert "no script at missing.py" in done.stderr


@pytest.fixture
def script(tmp_path, monkeypatch):
    """SCRIPT in the working folder, and what Python and transformers keep restored after it."""
    monkeypatch.setattr(sys, "argv", sys.argv)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.chdir(tmp_path)
    Path("train.py").write_text(SCRIPT)
    return ["--output_dir", "out", "--use_cpu", "true", "--report_to", "none"]


def test_the_doctor_stops_a_script_that_is_right(script, capsys):
    assert doctor("train.py", [*script, "--optim", "adamlip", "--num_train_epochs", "99"]) == 0
    assert capsys.readouterr().out == "nothing wrong (watched for 20 steps)\n"
    assert not any(Path("out").glob("*"))


def test_the_doctor_leaves_nothing_where_transformers_is_not_known(script, monkeypatch, capsys):
    """Whose release `register` refuses."""
    from hf_adalip.diagnose import trial

    def refuse():
        raise ImportError("another transformers")

    watched_by = trial._watched_by
    monkeypatch.setattr(trial, "_watched_by", lambda watching, _: watched_by(watching, refuse))
    assert doctor("train.py", [*script, "--num_train_epochs", "99"]) == 1
    assert "RAN" not in capsys.readouterr().out
    assert not any(Path("out").glob("*"))


def test_the_doctor_finds_another_optimizer(script, capsys):
    assert doctor("train.py", script) == 1
    out = capsys.readouterr().out
    assert "Trainer trains with optim=adamw_torch" in out
    assert "trainer_kwargs(" in out
    assert "RAN" not in out


def test_the_doctor_says_that_a_script_does_not_train(script, capsys):
    Path("train.py").write_text("print('done')")
    assert doctor("train.py", script) == 2
    assert "train.py: no step of an optimizer with a learning rate per" in capsys.readouterr().err


def test_the_doctor_finds_an_optimizer_that_deepspeed_drops(tmp_path):
    model = bert()
    trainer = Trainer(
        model=model,
        args=arguments(tmp_path),
        optimizers=(hf_adalip.AdamLip(model.parameters()), None),
    )
    assert examine(trainer) == []
    trainer.is_deepspeed_enabled = True
    (found,) = examine(trainer)
    assert "drops the AdamLip" in found.what
    assert "trainer_kwargs" in found.change


def test_the_doctor_reports_what_attach_refuses(script, capsys):
    Path("train.py").write_text(
        "from hf_adalip.diagnose import Finding, WrongOptimizerError\n"
        "raise WrongOptimizerError(Finding('AdamLip is dropped', 'DeepSpeed', 'pass another'))\n"
    )
    assert doctor("train.py", script) == 1
    out = capsys.readouterr().out
    assert "- AdamLip is dropped: DeepSpeed. Pass another\n1 thing wrong" in out


def test_the_doctor_finds_an_optimizer_in_deepspeeds_configuration(tmp_path, monkeypatch):
    trainer = Trainer(model=bert(), args=arguments(tmp_path), **trainer_kwargs("adamlip", lr=1e-3))
    assert examine(trainer) == []
    plugin = SimpleNamespace(deepspeed_config={"optimizer": {"type": "AdamW"}})
    state = SimpleNamespace(deepspeed_plugin=plugin)
    monkeypatch.setattr(trainer, "accelerator", SimpleNamespace(state=state))
    trainer.is_deepspeed_enabled = True
    (found,) = examine(trainer)
    assert "of its own, AdamW" in found.what


def test_the_doctor_leaves_a_trainers_own_create_optimizer_alone(tmp_path):
    class Own(Trainer):
        def create_optimizer(self, model=None):
            self.optimizer = hf_adalip.AdamLip(self.model.parameters())
            return self.optimizer

    assert examine(Own(model=bert(), args=arguments(tmp_path))) == []


def test_the_command_lists_optimizers(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["hf-adalip", "optimizers", "adamlip*"])
    main()
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == [
        "adamlip",
        "adamlipu",
    ]
    monkeypatch.setattr(sys, "argv", ["hf-adalip", "optimizers", "adamlp*"])
    with pytest.raises(SystemExit, match=r"no name matches 'adamlp\*'"):
        main()
