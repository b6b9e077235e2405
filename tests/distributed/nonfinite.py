"""One rank's gradient becomes infinite during a training; run on ranks from the tests.

    torchrun --nproc-per-node 2 -m tests.distributed.nonfinite OUTPUT.json ENGINE...

Rank 0 writes {case: {what should hold: whether it does on every rank}}.
"""

from __future__ import annotations

import math
import sys

import torch
import torch.distributed as dist
from torch import nn

from hf_adalip import create_optimizer
from hf_adalip.optim.estimator import FORGOTTEN
from tests.distributed.engines import Net, batch, data_parallel_share, finish, wrap

SIX = ("adalip", "rmslip", "adamlip", "adalipu", "rmslipu", "adamlipu")
NAMES = {
    **{name: {} for name in SIX},
    "lip-nadam": {},
    "lip-nadam by updates": {"signal": "update"},
}
BAD, STEPS = 3, 6
LAYER = "b"  # whose gradient it is


def local(x):
    """This rank's part of it."""
    return x.to_local() if hasattr(x, "to_local") else x


class Training:
    """Net under an engine. In step BAD the last rank's share of LAYER's gradient gets an inf."""

    def __init__(self, engine, name, scaler=None, **options):
        torch.manual_seed(0)
        self.net, _ = wrap(engine, Net())
        self.inner = getattr(self.net, "module", self.net)
        self.optimizer = create_optimizer(
            self.net, name.split()[0], lr=1e-2, layers="module", weight_decay=0.01, **options
        )
        self.scaler = scaler
        self.share = data_parallel_share(engine)
        self.is_last = dist.get_rank() == dist.get_world_size() - 1
        self.hook = self.inner.b.weight.register_hook(self._spoil) if engine == "ddp" else None

    def _spoil(self, grad):
        """Before DDP reduces it; FSDP2 has reduced it already."""
        if self.step == BAD and self.spoiled and self.is_last:
            grad = grad.clone()
            grad.view(-1)[-1] = math.inf
        return grad

    def gradients(self, step, spoiled=True):
        self.step, self.spoiled = step, spoiled
        x, y = batch(step)
        self.optimizer.zero_grad()
        loss = nn.functional.cross_entropy(self.net(x[self.share]), y[self.share])
        (self.scaler.scale(loss) if self.scaler else loss).backward()
        if step == BAD and spoiled and self.is_last and self.hook is None:
            local(self.inner.b.weight.grad).view(-1)[-1] = math.inf

    def apply(self):
        """The step; the message of the error that it raises, if it does."""
        try:
            if self.scaler:
                self.scaler.step(self.optimizer)
                self.scaler.update()
            else:
                self.optimizer.step()
        except RuntimeError as error:
            return str(error)
        return None

    def until(self, start, end):
        for step in range(start, end):
            self.gradients(step)
            assert self.apply() is None

    def snapshot(self):
        """{layer: {what: this rank's part}}, of parameters and all state but the count of skips."""
        found = {}
        states = self.optimizer.state_dict()["state"]
        trained = [n for n, p in self.inner.named_parameters() if p.requires_grad]
        order = [n.removeprefix("module.") for g in self.groups for n in g["param_names"]]
        assert sorted(order) == sorted(trained)
        params = dict(self.inner.named_parameters())
        for key, name in enumerate(order):
            of_layer = found.setdefault(name.rpartition(".")[0], {})
            of_layer[name] = local(params[name]).detach().clone()
            for what, value in states.get(key, {}).items():
                if what != "nonfinite_steps":
                    of_layer[f"{name}.{what}"] = local(value).clone()
        return found

    @property
    def groups(self):
        return self.optimizer.param_groups

    @property
    def skipped(self):
        """{layer: steps left out}."""
        rates = self.optimizer.layer_learning_rates().items()
        return {name.removeprefix("module."): rate.nonfinite_steps for name, rate in rates}


def same(x, y):
    return x.keys() == y.keys() and all(
        torch.equal(value, y[layer][what])
        for layer, values in x.items()
        for what, value in values.items()
    )


def remembered(layer):
    """What of a layer's snapshot a step that is left out does not change."""
    forgotten = ("prev_norm", "prev_grad", "prev_update")
    return {what: x for what, x in layer.items() if what.rpartition(".")[2] not in forgotten}


def skip(engine, name, options):
    """The layer stays as it is on every rank, but for its forgotten predecessor; the others go on
    as if it had had no gradient."""
    run = Training(engine, name, **options)
    run.until(0, BAD)
    before = run.snapshot()
    run.gradients(BAD)
    error = run.apply()
    after = run.snapshot()
    skipped = run.skipped
    run.until(BAD + 1, STEPS)

    twin = Training(engine, name, **options)
    twin.until(0, BAD)
    twin.gradients(BAD, spoiled=False)
    for p in twin.inner.b.parameters():
        p.grad = None
    twin.apply()
    for p in twin.inner.b.parameters():
        twin.optimizer.state[p]["prev_norm"].fill_(FORGOTTEN)
    twin.until(BAD + 1, STEPS)
    return {
        "no error": error is None,
        "layer unchanged": same(*({LAYER: remembered(x[LAYER])} for x in (before, after))),
        "others moved": all(not same({n: before[n]}, {n: after[n]}) for n in ("a", "c", "norm")),
        "counted": skipped == {layer: int(layer == LAYER) for layer in skipped},
        "goes on as without the step": same(run.snapshot(), twin.snapshot()),
    }


def stopped(engine, name, options, scaler):
    """nonfinite="raise", or a GradScaler: nothing at all is changed on any rank."""
    run = Training(engine, name, scaler and scaler(), **options)
    run.until(0, BAD)
    before = run.snapshot()
    run.gradients(BAD)
    error = run.apply()
    unchanged, skipped = same(before, run.snapshot()), run.skipped
    run.until(BAD + 1, STEPS)

    twin = Training(engine, name, scaler and scaler(), **options)
    twin.until(0, BAD)
    twin.until(BAD + 1, STEPS)
    found = {
        "nothing changed": unchanged and not any(skipped.values()),
        "goes on as without the step": same(run.snapshot(), twin.snapshot()),
    }
    if scaler:
        return found | {
            "no error": error is None,
            "lower scale": run.scaler.get_scale() == scaler().get_scale() / 2,
        }
    return found | {
        "raises and names the layer": f"({LAYER})" in (error or "").replace("module.", "")
    }


def propagate(engine, name, options):
    """What the user asked for: the layer is lost, on every rank, the others are not."""
    run = Training(engine, name, **options)
    run.until(0, BAD)
    run.gradients(BAD)
    run.apply()
    rates = {n.removeprefix("module."): r for n, r in run.optimizer.layer_learning_rates().items()}
    return {
        "layer lost": not math.isfinite(rates[LAYER].norm + rates[LAYER].scale),
        "others finite": all(
            value.isfinite().all()
            for layer, values in run.snapshot().items()
            if layer != LAYER
            for value in values.values()
        ),
        "counted": rates[LAYER].nonfinite_steps == 1,
    }


def overflowing_update(engine, name, options):
    """A finite gradient whose update overflows in one shard, with the signal "update"."""
    run = Training(engine, name, **options)
    run.until(0, BAD)
    run.gradients(BAD, spoiled=False)
    before = run.snapshot()
    lrs = [group["lr"] for group in run.groups]
    for p in run.inner.parameters():
        if p.grad is not None:
            local(p.grad).zero_()
    if run.is_last or engine == "ddp":
        local(run.inner.b.weight.grad).view(-1)[-1] = 1e15
    for group in run.groups:
        group["lr"], group["weight_decay"] = 1e30, 0.0
    error = run.apply()
    for group, lr in zip(run.groups, lrs, strict=True):
        group["lr"] = lr
    after = run.snapshot()
    return {
        "no error": error is None,
        "layer unchanged": same(*({LAYER: remembered(x[LAYER])} for x in (before, after))),
        "counted": run.skipped[LAYER] == 1,
    }


def scaler():
    return torch.amp.GradScaler("cpu", init_scale=16.0)


def cases(engine):
    for name, options in NAMES.items():
        yield f"{engine}, {name}, skip", skip(engine, name, options)
        raises = options | {"nonfinite": "raise"}
        yield f"{engine}, {name}, raise", stopped(engine, name, raises, None)
        yield f"{engine}, {name}, GradScaler", stopped(engine, name, options, scaler)
    for name in ("adamlip", "adalipu", "lip-nadam", "lip-nadam by updates"):
        options = NAMES[name] | {"nonfinite": "propagate"}
        yield f"{engine}, {name}, propagate", propagate(engine, name, options)
    for name, options in (("adalipu", {}), ("lip-sgd by updates", {"signal": "update"})):
        yield f"{engine}, {name}, update", overflowing_update(engine, name, options)


def main():
    path, *engines = sys.argv[1:]
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    found = {case: checks for engine in engines for case, checks in cases(engine)}
    everyone = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, found)
    merged = {
        case: {check: all(x[case][check] for x in everyone) for check in checks}
        for case, checks in found.items()
    }
    finish(path, merged)


if __name__ == "__main__":
    main()
