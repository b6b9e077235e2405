"""`Lipschitz` over optimizers that keep their moments in 8 bits."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from hf_adalip import Lipschitz

Make = Callable[[Any], torch.optim.Optimizer]


def train(net: nn.Module, optimizer: torch.optim.Optimizer, seeds: range) -> float:
    for seed in seeds:
        x = torch.randn(32, 64, generator=torch.Generator().manual_seed(seed))
        loss = (net(x) - x).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return loss.item()


def _dtype(x: Any) -> torch.dtype | None:
    return x.dtype if isinstance(x, torch.Tensor) else None


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 128), nn.Tanh(), nn.Linear(128, 64))


def wide(params: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(params, lr=1e-3, weight_decay=0.0)


def torchao(params: Any) -> torch.optim.Optimizer:
    kind = pytest.importorskip("torchao.optim").AdamW8bit
    made: torch.optim.Optimizer = kind(params, lr=1e-3, weight_decay=0.0)
    return made


def bitsandbytes(params: Any) -> torch.optim.Optimizer:
    kind = pytest.importorskip("bitsandbytes").optim.AdamW8bit
    made: torch.optim.Optimizer = kind(params, lr=1e-3, weight_decay=0.0)
    return made


@pytest.mark.parametrize("signal", ["gradient", "update"])
@pytest.mark.parametrize("make", [torchao, bitsandbytes])
def test_trains_as_with_moments_in_32_bits(
    make: Make, signal: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And goes on after saving, bit for bit."""
    monkeypatch.setattr(torch, "compile", lambda step, **_: step)  # torchao's, which takes minutes
    losses = []
    for base in (wide, make):
        net = network()
        optimizer = Lipschitz(base(net.parameters()), signal=signal)
        losses.append(train(net, optimizer, range(40)))
    assert losses[1] == pytest.approx(losses[0], rel=0.02)
    state = next(iter(optimizer.optimizer.state.values())).values()
    low = [x for x in state if type(x).__name__ == "OptimState8bit" or _dtype(x) == torch.uint8]
    assert len(low) == 2

    resumed = copy.deepcopy(net)
    other = Lipschitz(make(resumed.parameters()), signal=signal)
    torch.save(optimizer.state_dict(), saved := io.BytesIO())
    saved.seek(0)
    other.load_state_dict(torch.load(saved, weights_only=True))
    for one, its in ((net, optimizer), (resumed, other)):
        train(one, its, range(40, 43))
    assert all(
        torch.equal(p, q) for p, q in zip(net.parameters(), resumed.parameters(), strict=True)
    )
