"""Secant in transformers.Trainer: measured through its own training steps."""

from __future__ import annotations

import json

import pytest
import torch

pytest.importorskip("transformers")

from transformers import Trainer

from hf_adalip import Secant, attach, register, trainer_kwargs
from hf_adalip.monitor import secant
from hf_adalip.optim.secant import Law
from tests.integrations.test_trainer import SCRIPT, arguments, bert, run, texts, weights

HELD = Law(climb=0, fall=1)
"""The rate of the start, for good: then nothing distinguishes a training from the base's."""


class OwnLoss(Trainer):
    """Takes something out of the inputs and draws random numbers."""

    def compute_loss(self, model, inputs, *args, **kwargs):
        labels = inputs.pop("labels")
        logits = model(**inputs).logits
        noise = torch.rand(len(labels), device=logits.device)
        return (torch.nn.functional.cross_entropy(logits, labels, reduction="none") * noise).mean()


def trained(path, way="kwargs", kind=Trainer, resume=None, attached=True, lr=1.0, **options):
    law = {"law": options.pop("law")} if "law" in options else {}
    every = options.pop("every", 5)
    model, given = bert(), {}
    if way == "optimizers":
        base = torch.optim.AdamW(model.parameters(), lr=lr)
        given["optimizers"] = (Secant(base, every, model=model, **law), None)
    elif way == "kwargs":
        given = trainer_kwargs("secant-adamw", lr=lr, every=every, **law)
    elif way == "optim":
        register()
        options |= {"optim": "secant-adamw", "optim_args": f"every={every}", "learning_rate": lr}
    else:
        given["optimizers"] = (way(model), None)
    options = {"lr_scheduler_type": "constant"} | options
    trainer = kind(model=model, args=arguments(path, **options), train_dataset=texts(), **given)
    if attached:
        attach(trainer)
    trainer.train(resume_from_checkpoint=resume)
    return trainer


@pytest.mark.slow
@pytest.mark.parametrize("way", ["optimizers", "kwargs", "optim"])
def test_the_given_lr_does_not_matter(tmp_path, way):
    one = trained(tmp_path, way, lr=1.0)
    other = trained(tmp_path, way, lr=1e-6)
    assert torch.equal(weights(one), weights(other))
    assert secant(one.optimizer).probes == secant(other.optimizer).probes
    assert len(secant(one.optimizer).probes) > 3
    assert secant(one.optimizer).model is one.model
    assert secant(one.optimizer).every == 5


@pytest.mark.parametrize(
    "schedule",
    [{"lr_scheduler_type": "linear", "warmup_steps": 6}, {"lr_scheduler_type": "constant"}],
    ids=["warm-up", "constant"],
)
def test_it_learns_without_an_lr(tmp_path, schedule):
    trainer = trained(tmp_path, max_steps=60, logging_steps=10, lr=None, **schedule)
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < 0.6 * losses[0]
    assert secant(trainer.optimizer).param_groups[0]["initial_lr"] == 1.0


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"label_smoothing_factor": 0.2},
        {"bf16": True},
        {"gradient_accumulation_steps": 3, "max_grad_norm": 0.1},
        {"kind": OwnLoss},
    ],
    ids=["plain", "smoothed", "bf16", "accumulated, clipped", "own loss"],
)
def test_measuring_leaves_no_trace(tmp_path, options):
    """With dropout, as Bert has; the base's own training at the rate found is the same."""
    found = trained(tmp_path, law=HELD, every=2, **options)
    optimizer = secant(found.optimizer)
    assert len(optimizer.probes) > 4

    def base(model):
        return torch.optim.AdamW(model.parameters(), lr=optimizer.rate, weight_decay=0.0)

    expected = trained(tmp_path, base, attached=False, **options)
    assert torch.equal(weights(found), weights(expected))
    logs = [[x["loss"] for x in t.state.log_history if "loss" in x] for t in (found, expected)]
    assert logs[0] == logs[1]


def test_a_micro_batch_is_measured_once_more_with_all_that_it_was_given(tmp_path):
    seen = []

    class Noted(Trainer):
        def training_step(self, model, inputs, num_items_in_batch=None):
            draws = torch.get_rng_state().tolist()  # of dropout
            key = inputs["input_ids"].tolist(), inputs["labels"].tolist(), num_items_in_batch, draws
            seen.append((self.state.global_step, key))
            return super().training_step(model, inputs, num_items_in_batch)

    optimizer = secant(
        trained(tmp_path, kind=Noted, gradient_accumulation_steps=2, law=HELD).optimizer
    )
    measured = {probe.step for probe in optimizer.probes}  # at the next step, whose count it is
    for step in range(1, 12):
        keys = [key for at, key in seen if at == step]
        if step in measured:
            assert keys[0] == keys[1] != keys[2]
        assert len(keys) == 2 + (step in measured)


def test_the_start_knows_of_what_is_accumulated(tmp_path):
    """Of equal sentences and without dropout a step's gradient is four times a micro-batch's, and
    SGD's steps are as long as their gradients. (For Bert, Trainer leaves it to the model to divide
    the loss, and it does not.)"""

    class Equal(Trainer):
        def compute_loss(self, model, inputs, *args, **kwargs):
            assert model.training
            ids = inputs["input_ids"] * 0 + 3
            out = self.accelerator.unwrap_model(model).bert.embeddings.word_embeddings(ids)
            return (out.square() * torch.linspace(1, 2, 16)).sum() / len(ids)

    def base(model):
        return Secant(torch.optim.SGD(model.parameters(), lr=1.0), model=model)

    one = trained(tmp_path, base, kind=Equal, max_steps=1)
    accumulated = {"gradient_accumulation_steps": 4, "per_device_train_batch_size": 2}
    four = trained(tmp_path, base, kind=Equal, max_steps=1, **accumulated)
    assert secant(four.optimizer).rate > 0
    assert 4 * secant(four.optimizer).rate == pytest.approx(secant(one.optimizer).rate, rel=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("step", [1, 4, 5, 6, 10])
def test_resuming_is_bit_exact(tmp_path, step):
    """Where a measurement is due and where none is."""
    options = {"save_strategy": "steps", "save_steps": step, "max_steps": 12}
    options |= {"lr_scheduler_type": "linear", "warmup_steps": 3}
    whole = trained(tmp_path / "whole", "optim", **options)
    again = trained(
        tmp_path / "again",
        "optim",
        resume=str(tmp_path / "whole" / f"checkpoint-{step}"),
        **options,
    )
    assert torch.equal(weights(whole), weights(again))
    optimizers = [secant(t.optimizer) for t in (whole, again)]
    assert optimizers[0]._now == optimizers[1]._now
    assert optimizers[1].probes == optimizers[0].probes


def test_logs_card_and_pictures_say_the_rate(tmp_path):
    model = bert()
    trainer = Trainer(
        model=model,
        args=arguments(tmp_path),
        train_dataset=texts(),
        **trainer_kwargs("secant-adamw", weight_decay=0.1),
    )
    attach(trainer, plot=True)
    trainer.train()
    optimizer = secant(trainer.optimizer)
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert all(entry["secant/rate"] > 0 for entry in logs)
    assert logs[-1]["secant/rate"] == optimizer.rate
    assert logs[-1]["secant/r"] == optimizer.probes[-1].r
    assert logs[-1]["secant/probes"] == len(optimizer.probes)
    table = json.loads((tmp_path / "secant.json").read_text())
    assert table["step"] == [probe.step for probe in optimizer.probes]
    assert table["rate"] == [probe.rate for probe in optimizer.probes]
    assert table["r"] == [probe.r for probe in optimizer.probes]
    assert (tmp_path / "secant.png").stat().st_size > 1000
    trainer.create_model_card()
    card = (tmp_path / "README.md").read_text()
    assert f"- learning_rate: {optimizer.rate:.3g} at the end, found by Secant" in card
    assert "- optimizer: Secant(AdamW) with every=20, rate=" in card


# What is refused


@pytest.mark.parametrize("way", ["optimizers", "kwargs", "optim"])
def test_without_attach_the_first_step_says_what_to_do(tmp_path, way):
    with pytest.raises(RuntimeError, match=r"call hf_adalip\.attach\(trainer\) before train\(\)"):
        trained(tmp_path, way, attached=False)


def test_a_checkpoint_of_another_optimizer_is_refused(tmp_path):
    options = {"save_strategy": "steps", "save_steps": 6}
    trained(tmp_path, lambda m: torch.optim.AdamW(m.parameters()), attached=False, **options)
    with pytest.raises(ValueError, match="not of Secant"):
        trained(tmp_path, "optimizers", resume=str(tmp_path / "checkpoint-6"), **options)


def test_fp16_is_refused_before_the_first_step(tmp_path):
    """accelerate has a GradScaler for it on a GPU only."""
    trainer = Trainer(
        model=bert(),
        args=arguments(tmp_path),
        train_dataset=texts(),
        **trainer_kwargs("secant-adamw"),
    )
    attach(trainer)
    trainer.accelerator.scaler = torch.amp.GradScaler("cpu")
    before = weights(trainer)
    with pytest.raises(RuntimeError, match=r"fp16=True .* use bf16=True"):
        trainer.train()
    assert torch.equal(before, weights(trainer))


def test_a_training_step_that_counts_its_calls_is_refused(tmp_path):
    class Counting(Trainer):
        calls = 0

        def compute_loss(self, *args, **kwargs):
            self.calls += 1
            return self.calls * super().compute_loss(*args, **kwargs)

    with pytest.raises(RuntimeError, match="called again at the same parameters"):
        trained(tmp_path, kind=Counting)


@pytest.mark.slow
def test_an_unmodified_script_takes_optim(tmp_path):
    logged = "print('LOGGED', trainer.state.log_history[0])"
    (tmp_path / "train.py").write_text("\n".join([*SCRIPT.splitlines()[:-2], logged]))
    options = ("--max_steps=4", "--logging_steps=2", "--use_cpu=true", "--report_to=none")
    given = ("--optim=secant-adamw", "--optim_args=every=2", "--output_dir=out")
    done = run("hf_adalip.run", "train.py", *options, *given, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "'secant/rate'" in done.stdout
