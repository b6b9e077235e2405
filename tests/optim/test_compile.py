"""torch.compile of a step, as far as it takes torch's own Adam, and deterministic algorithms.

torch 2.15 breaks the graph around the step of its own optimizers on purpose (the decorator that
they share sets and restores the gradient mode), and at the wrapper that a learning rate scheduler
puts around it. So `fullgraph=True` is for the function inside these, as in torch's own tests.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter

from hf_adalip import AdamLip, Lipschitz, create_optimizer
from tests.optim.cases import CLASSES, assert_same, bare_step, forms

Step = Callable[[], Any]


@pytest.fixture(autouse=True)
def _nothing_compiled() -> Iterator[None]:
    torch._dynamo.reset()
    torch._dynamo.eval_frame.TorchPatcher.patch()  # gives all optimizers' steps the same wrappers
    yield
    torch._dynamo.reset()


def train(
    make: Callable[[Any], torch.optim.Optimizer],
    compiled: Callable[[Step], Step],
    of: Callable[[torch.optim.Optimizer], Step] = bare_step,
    steps: int = 6,
) -> dict[str, Any]:
    """With the learning rate changed between steps."""
    torch.manual_seed(0)
    model = nn.Linear(3, 2)
    optimizer = make(model)
    step = compiled(of(optimizer))
    for _ in range(steps):
        model(torch.randn(4, 3)).square().mean().backward()
        step()
        optimizer.zero_grad()
        for group in optimizer.param_groups:
            if isinstance(group["lr"], Tensor):
                group["lr"].mul_(0.9)
            else:
                group["lr"] *= 0.9
    state = optimizer.state_dict()
    del state["param_groups"]
    return {"params": [p.detach() for p in model.parameters()], "state": state}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "foreach", "make_lr"),
    [
        ("adamlip", False, torch.tensor),
        ("adamlip", True, float),
        ("adalip", True, torch.tensor),
        ("rmslip", False, float),
        ("adalipu", False, float),
        ("rmslipu", True, torch.tensor),
        ("adamlipu", True, float),
    ],
)
def test_a_step_is_one_graph(name: str, foreach: bool, make_lr: Callable[[float], Any]) -> None:
    """One for the first step, which makes the state, one for all others, whatever lr, S and step
    are; the same bits as eager."""

    def make(model: nn.Module) -> torch.optim.Optimizer:
        layers = "module" if foreach else "tensor"
        return CLASSES[name](
            model.named_parameters(), lr=make_lr(0.1), layers=layers, foreach=foreach
        )

    counter = CompileCounter()
    compiled = train(make, lambda f: torch.compile(f, backend=counter, fullgraph=True))
    assert counter.frame_count == 2
    assert_same(compiled, train(make, lambda f: f))


def whole_step(
    make: Callable[[Any], torch.optim.Optimizer], steps: int = 6
) -> tuple[list[int], float]:
    """A user's training step, compiled, with a scheduler beside it.

    Returns:
        how many graphs there are after each step, and the largest difference from eager.
    """
    results, graphs = [], []
    for backend in (None, CompileCounter()):
        torch.manual_seed(0)
        model = nn.Linear(3, 2)
        optimizer = make(model)
        scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)

        def train_step(x: Tensor, model: Any = model, optimizer: Any = optimizer) -> Tensor:
            loss = model(x).square().mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            return loss.detach()

        if backend is not None:
            train_step = torch.compile(train_step, backend=backend)
        for _ in range(steps):
            train_step(torch.randn(4, 3))
            scheduler.step()
            if backend is not None:
                graphs.append(backend.frame_count)
        results.append([p.detach() for p in model.parameters()])
    pairs = zip(*results, strict=True)
    return graphs, max((p - q).abs().max().item() for p, q in pairs)


@pytest.mark.slow
def test_a_whole_training_step_breaks_where_adams_does() -> None:
    """At the backward pass and around the optimizer's step. The first of our steps, which makes
    the state, is a graph of its own; then nothing is compiled again. The bits are eager's."""

    def adam(model: nn.Module) -> torch.optim.Optimizer:
        return torch.optim.Adam(model.parameters(), lr=torch.tensor(0.1))

    def adamlip(model: nn.Module) -> torch.optim.Optimizer:
        return AdamLip(model.parameters(), lr=torch.tensor(0.1))

    (theirs, _), (ours, difference) = whole_step(adam), whole_step(adamlip)
    assert theirs == [theirs[0]] * len(theirs)
    assert ours == [theirs[0], *[theirs[0] + 1] * (len(ours) - 1)]
    assert difference == 0.0


@pytest.mark.slow
@pytest.mark.parametrize("signal", ["gradient", "update"])
def test_lipschitz_is_not_compiled_again(signal: str) -> None:
    """The step of the base breaks the graph, and torch's SGD rounds otherwise when compiled."""

    def make(model: nn.Module) -> torch.optim.Optimizer:
        base = torch.optim.SGD(model.parameters(), lr=torch.tensor(0.1), momentum=0.9)
        return Lipschitz(base, signal=signal, nonfinite="propagate")

    graphs, difference = whole_step(make)
    assert len(set(graphs[1:])) == 1
    assert difference < 1e-7


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a C++ compiler")
def test_inductor() -> None:
    """Which fuses multiplications and additions, and so rounds otherwise than eager."""

    def make(model: nn.Module) -> torch.optim.Optimizer:
        return AdamLip(model.parameters(), lr=torch.tensor(0.1), foreach=True)

    compiled = train(make, lambda f: torch.compile(f, fullgraph=True))
    eager = train(make, lambda f: f)
    torch.testing.assert_close(compiled, eager, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", [*CLASSES, "lip-nadam"])
@forms
def test_deterministic_algorithms(name: str, foreach: bool) -> None:
    """Nothing that torch knows to be nondeterministic is used, and twice gives the same bits."""

    def make(model: nn.Module) -> torch.optim.Optimizer:
        return create_optimizer(model, name, lr=0.1, weight_decay=0.1, foreach=foreach)

    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=False)
    try:
        first, second = (
            train(make, lambda f: f, of=lambda optimizer: optimizer.step) for _ in range(2)
        )
    finally:
        torch.use_deterministic_algorithms(before)
    assert_same(first, second)


@pytest.mark.parametrize("name", [*CLASSES, "lip-nadam"])
def test_the_protocol_of_fused_scalers_is_not_claimed(name: str) -> None:
    """GradScaler leaves it to optimizers with this mark to unscale the gradients."""
    optimizer = create_optimizer(nn.Linear(3, 2), name, lr=0.1)
    assert not getattr(optimizer, "_step_supports_amp_scaling", False)
