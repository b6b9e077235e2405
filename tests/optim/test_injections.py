"""Gradients that go wrong at random: no state is poisoned, and no other layer moved."""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from hf_adalip import Lipschitz
from hf_adalip.optim.forms.kernels import cpu
from tests.optim.cases import CLASSES

BAD = (math.nan, math.inf, -math.inf, 1e38, -1e38, 1e20, 1e-40)
SHAPES = [(), (1,), (3,), (2, 3), (33,), (1,), (5,), (4, 2)] * 4
STEPPED = 1e-40  # which is no reason to leave a step out

BASES = {
    "Lipschitz SGD": (torch.optim.SGD, {"momentum": 0.9}, {}),
    "Lipschitz Adam": (torch.optim.Adam, {}, {}),
    "Lipschitz NAdam": (torch.optim.NAdam, {}, {}),
    "Lipschitz RMSprop updates": (torch.optim.RMSprop, {}, {"signal": "update"}),
}
FORMS = ("loop", "foreach", "fused")
DTYPES = (torch.float32, torch.bfloat16)


def flags(form: str) -> dict[str, bool]:
    return {"fused": True} if form == "fused" else {"foreach": form == "foreach", "fused": False}


def kinds() -> Iterator[tuple[str, str, torch.dtype]]:
    """Optimizer, form and dtype."""
    for name in (*CLASSES, *BASES):
        updates = name.endswith("updates")
        for form in FORMS[: 2 if updates or cpu.missing() else 3]:
            for dtype in DTYPES[: 1 if updates else 2]:
                yield name, form, dtype


class Trained:
    """Some tiny layers and their optimizer."""

    def __init__(self, name: str, form: str, dtype: torch.dtype) -> None:
        generator = torch.Generator().manual_seed(0)
        self.params = [
            torch.randn(shape, generator=generator).to(dtype).requires_grad_() for shape in SHAPES
        ]
        if name in CLASSES:
            own: dict[str, Any] = {"momentum": 0.9} if name.startswith("adalip") else {}
            kind = CLASSES[name]
            self.optimizer: Any = kind(
                self.params, lr=1e-3, weight_decay=0.01, **own, **flags(form)
            )
        else:
            base, options, ours = BASES[name]
            inner = base(self.params, lr=1e-3, foreach=form != "loop", **options)
            fused = {} if "signal" in ours else {"fused": form == "fused"}
            self.optimizer = Lipschitz(inner, **ours, **fused)

    def step(self, grads: list[Tensor]) -> None:
        for p, grad in zip(self.params, grads, strict=True):
            p.grad = grad.clone()
        self.optimizer.step()

    def tensors(self, i: int) -> dict[str, Tensor]:
        """A parameter and all state that is kept for it."""
        p = self.params[i]
        states = [self.optimizer, getattr(self.optimizer, "optimizer", None)]
        found = {"parameter": p.detach()}
        for place, of in enumerate(states):
            kept = of.state[p] if of is not None else {}
            found |= {f"{place}.{key}": x for key, x in kept.items() if isinstance(x, Tensor)}
        return found


def inject(
    name: str, form: str, dtype: torch.dtype, rounds: int, seed: int
) -> tuple[int, Counter[str]]:
    """Rounds of one step with injections, and one without, beside a twin that has had none.

    Returns:
        how many injections there were, and how often what went wrong.
    """
    draw = random.Random(f"{name} {form} {dtype} {seed}")
    generator = torch.Generator().manual_seed(seed)
    run, twin = Trained(name, form, dtype), Trained(name, form, dtype)
    count, wrong = 0, Counter[str]()
    for turn in range(rounds + 1):
        grads = [torch.randn(shape, generator=generator).to(dtype) for shape in SHAPES]
        few = draw.random() < 0.2
        hit = {i: draw.choice(BAD) for i in range(len(SHAPES)) if draw.random() < 0.5}
        if few:
            hit = dict([hit.popitem()]) if hit else {}
        # torch's foreach SGD rounds bfloat16 otherwise when any of its tensors has no buffer yet.
        if turn == 0 and (seed % 2 or name == "Lipschitz SGD"):
            hit = {}
        count += len(hit)
        spoiled = [grad.clone() for grad in grads]
        before = {i: run.params[i].detach().clone() for i in hit}
        for i, bad in hit.items():
            spoiled[i].view(-1)[draw.randrange(spoiled[i].numel())] = bad
        run.step(spoiled)
        twin.step(grads)
        left_out = [i for i, bad in hit.items() if bad != STEPPED]
        wrong["left out, and moved"] += sum(
            not torch.equal(run.params[i], before[i]) for i in left_out
        )
        for again in (False, True):
            if again:
                grads = [torch.randn(shape, generator=generator).to(dtype) for shape in SHAPES]
                run.step(grads)
                twin.step(grads)
            for i in range(len(SHAPES)):
                mine, others = run.tensors(i), twin.tensors(i)
                if i not in hit:
                    same = mine.keys() == others.keys() and all(
                        torch.equal(x, others[key]) for key, x in mine.items()
                    )
                    wrong["another layer moved"] += not same
                elif not all(x.isfinite().all() for x in mine.values()):
                    wrong["state poisoned"] += 1
        if wrong.total():
            run, twin = Trained(name, form, dtype), Trained(name, form, dtype)
            continue
        with torch.no_grad():
            for i in hit:  # the twin goes on from what the injections have left
                mine, others = run.tensors(i), twin.tensors(i)
                for key, x in mine.items():
                    others[key].copy_(x)
    return count, +wrong


@pytest.mark.slow
@pytest.mark.parametrize(("name", "form", "dtype"), kinds())
def test_some_injections(name: str, form: str, dtype: torch.dtype) -> None:
    count, wrong = inject(name, form, dtype, rounds=2, seed=0)
    assert count
    assert not wrong


@pytest.mark.slow
def test_twenty_thousand_injections() -> None:
    """Layer, value and step at random, over all optimizers, forms and dtypes."""
    every, total, wrong = list(kinds()), 0, Counter[str]()
    seed = 1
    while total < 20_000:
        for kind in every:
            count, found = inject(*kind, rounds=10, seed=seed)
            total += count
            wrong += Counter({f"{kind}: {what}": n for what, n in found.items()})
        seed += 1
    assert not wrong
