"""accelerate and torch.amp with our optimizers, which they take for any other."""

from __future__ import annotations

import copy

import accelerate
import pytest
import torch
from accelerate.state import AcceleratorState, GradientState
from torch import nn

from hf_adalip import create_optimizer
from hf_adalip.monitor import layerwise
from tests.optim.cases import assert_same

NAMES = ["adalip", "rmslip", "adamlip", "adalipu", "rmslipu", "adamlipu", "lip-nadam"]


@pytest.fixture(autouse=True)
def _fresh_state():
    yield
    AcceleratorState._reset_state(True)
    GradientState._reset_state()


def data(batches=12):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(8 * batches, 5, generator=generator)
    return torch.utils.data.TensorDataset(x, (x.sum(1) > 0).long())


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 2))


def prepared(name, **kwargs):
    accelerator = accelerate.Accelerator(cpu=True, **kwargs)
    model = net()
    optimizer = create_optimizer(model, name, lr=0.05, weight_decay=0.01)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda t: 1 / (1 + 0.1 * t))
    loader = torch.utils.data.DataLoader(data(), batch_size=8)
    return accelerator, *accelerator.prepare(model, optimizer, loader, scheduler)


def train(accelerator, model, optimizer, loader, scheduler, epochs=1):
    for _ in range(epochs):
        for x, y in loader:
            with accelerator.accumulate(model):
                accelerator.backward(nn.functional.cross_entropy(model(x), y))
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                scheduler.step()
                optimizer.zero_grad()


@pytest.mark.parametrize("name", NAMES)
def test_saved_state_goes_on_bit_for_bit(tmp_path, name):
    run = prepared(name)
    train(*run)
    run[0].save_state(str(tmp_path))
    train(*run)
    weights = [p.detach().clone() for p in run[1].parameters()]
    rates = layerwise(run[2]).layer_learning_rates()
    AcceleratorState._reset_state(True)

    again = prepared(name)
    again[0].load_state(str(tmp_path))
    train(*again)
    assert all(torch.equal(p, q) for p, q in zip(again[1].parameters(), weights, strict=True))
    assert layerwise(again[2]).layer_learning_rates() == rates


@pytest.mark.parametrize("name", NAMES)
def test_accumulated_batches_are_one_gradient(name):
    """S sees the accumulated gradient once, not its parts."""
    small = prepared(name, gradient_accumulation_steps=4)
    train(*small)
    AcceleratorState._reset_state(True)
    GradientState._reset_state()

    accelerator, model, optimizer, _, scheduler = prepared(name)
    loader = accelerator.prepare(torch.utils.data.DataLoader(data(), batch_size=32))
    train(accelerator, model, optimizer, loader, scheduler)
    found, expected = (layerwise(x).layer_learning_rates() for x in (small[2], optimizer))
    assert found.keys() == expected.keys()
    for layer, rate in expected.items():
        assert found[layer].scale == pytest.approx(rate.scale, rel=1e-4)


def test_bf16_autocast_keeps_float32_scales():
    run = prepared("adamlip", mixed_precision="bf16")
    train(*run)
    optimizer = layerwise(run[2])
    for state in optimizer.state.values():
        assert state["lipschitz_scale"].dtype == torch.float32
        assert state["prev_grad"].dtype == torch.float32


@pytest.mark.parametrize("name", NAMES)
def test_an_overflow_under_a_grad_scaler_changes_nothing(name):
    model = net()
    optimizer = create_optimizer(model, name, lr=0.05)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    x, y = data(1).tensors

    def step(spoil=False):
        optimizer.zero_grad()
        scaler.scale(nn.functional.cross_entropy(model(x), y)).backward()
        if spoil:
            model[0].weight.grad[0, 0] = torch.inf
        scaler.step(optimizer)
        scaler.update()

    step()
    step()
    weights = [p.detach().clone() for p in model.parameters()]
    rates = layerwise(optimizer).layer_learning_rates()
    step(spoil=True)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), weights, strict=True))
    assert layerwise(optimizer).layer_learning_rates() == rates
    step()
    assert not torch.equal(model[0].weight, weights[0])


@pytest.mark.parametrize("name", NAMES)
def test_accelerate_skips_an_overflow_whole(name):
    """As its prepared optimizer does under fp16, which it makes a scaler for on a GPU only: no
    step of the optimizer, and so none of the scheduler; all state stays as it is."""
    accelerate.Accelerator(cpu=True)
    model = net()
    optimizer = create_optimizer(model, name, lr=0.05)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    wrapped = accelerate.optimizer.AcceleratedOptimizer(optimizer, scaler=scaler)
    x, y = data(1).tensors

    def step(spoil=False):
        wrapped.zero_grad()
        scaler.scale(nn.functional.cross_entropy(model(x), y)).backward()
        if spoil:
            model[0].weight.grad[0, 0] = torch.inf
        wrapped.step()
        return wrapped.step_was_skipped

    assert [step(), step()] == [False, False]
    before = copy.deepcopy((list(model.parameters()), optimizer.state_dict()))
    assert step(spoil=True)
    assert_same((list(model.parameters()), optimizer.state_dict()), before)
    assert not step()


@pytest.mark.parametrize("name", ["adalip", "adamlip"])
def test_the_loss_scale_does_not_matter(name):
    """GradScaler divides it out before the optimizer sees a gradient."""
    results = []
    for scale in (1.0, 1024.0):
        model = net()
        optimizer = create_optimizer(model, name, lr=0.05)
        scaler = torch.amp.GradScaler("cpu", init_scale=scale)
        x, y = data(1).tensors
        for _ in range(5):
            optimizer.zero_grad()
            scaler.scale(nn.functional.cross_entropy(model(x), y)).backward()
            scaler.step(optimizer)
            scaler.update()
        results.append(
            [rate.scale for rate in layerwise(optimizer).layer_learning_rates().values()]
        )
    assert results[0] == pytest.approx(results[1], rel=1e-6)


# Secant, which is given closures


def secant_run(**kwargs):
    accelerator = accelerate.Accelerator(cpu=True, **kwargs)
    model = net()
    secant = create_optimizer(model, "secant-adamw", every=3)
    loader = torch.utils.data.DataLoader(data(24), batch_size=8)
    model, optimizer, loader = accelerator.prepare(model, secant, loader)
    return accelerator, model, optimizer, loader, secant


def secant_train(accelerator, model, optimizer, loader, secant):
    for x, y in loader:

        def closure(x=x, y=y):
            loss = nn.functional.cross_entropy(model(x), y)
            accelerator.backward(loss)
            return loss.detach()

        with accelerator.accumulate(model):
            secant.compute_gradients(closure, accelerator.gradient_accumulation_steps)
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()


@pytest.mark.parametrize("micro", [1, 3])
@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_secant_goes_on_bit_for_bit(tmp_path, micro, precision):
    options = {"gradient_accumulation_steps": micro, "mixed_precision": precision}
    run = secant_run(**options)
    secant_train(*run)
    assert run[-1]._step == 24 // micro
    assert len(run[-1].probes) > 3
    run[0].save_state(str(tmp_path))
    secant_train(*run)
    AcceleratorState._reset_state(True)
    GradientState._reset_state()
    again = secant_run(**options)
    again[0].load_state(str(tmp_path))
    secant_train(*again)
    for p, q in zip(run[1].parameters(), again[1].parameters(), strict=True):
        assert torch.equal(p, q)
    assert again[-1].rate == run[-1].rate


def test_a_prepared_secant_steps_with_a_closure():
    """Without accumulation torch's own way works, too: it is the same."""
    accelerator, model, optimizer, loader, secant = secant_run()
    for x, y in loader:

        def closure(x=x, y=y):
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(model(x), y)
            accelerator.backward(loss)
            return loss.detach()

        optimizer.step(closure)
    AcceleratorState._reset_state(True)
    GradientState._reset_state()
    other = secant_run()
    for x, y in other[3]:

        def gradients(x=x, y=y):
            loss = nn.functional.cross_entropy(other[1](x), y)
            other[0].backward(loss)
            return loss.detach()

        other[-1].compute_gradients(gradients)
        other[2].step()
        other[2].zero_grad()
    assert other[-1].probes == secant.probes
    for p, q in zip(model.parameters(), other[1].parameters(), strict=True):
        assert torch.equal(p, q)


def test_a_prepared_secant_without_a_closure_says_what_to_do():
    accelerator, model, optimizer, loader, _ = secant_run()
    x, y = next(iter(loader))
    accelerator.backward(nn.functional.cross_entropy(model(x), y))
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(RuntimeError, match=r"optimizer\.compute_gradients\(closure\) before step"):
        optimizer.step()
    assert_same(model.state_dict(), before)


def test_secant_refuses_accelerates_scaler():
    accelerate.Accelerator(cpu=True)
    model = net()
    secant = create_optimizer(model, "secant-adamw")
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    wrapped = accelerate.optimizer.AcceleratedOptimizer(secant, scaler=scaler)
    scaler.scale(model(torch.ones(1, 5)).sum()).backward()
    with pytest.raises(RuntimeError, match="cannot be stepped by a GradScaler"):
        wrapped.step()
