"""Gradient release: parameters stepped within backward get the numbers of the ordinary step."""

from __future__ import annotations

import copy
import gc
import math
import weakref
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor
from torch.nn import functional as F
from torch.optim.lr_scheduler import LambdaLR

from hf_adalip import AdamLip, Lipschitz, release_gradients
from hf_adalip.optim import LipOptimizer
from hf_adalip.optim import release as release_module
from hf_adalip.optim.forms.kernels import cpu
from tests.optim.cases import CLASSES, assert_same, forms, momentum_only, six, snapshot
from tests.optim.test_nonfinite import NoLookingAtNumbers, no_looking  # noqa: F401


class Net(nn.Module):
    """With a tied, a frozen and an unused parameter, and one that some steps do not use."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 6)  # the output's weight, too
        self.hidden = nn.ModuleList(nn.Linear(6, 6) for _ in range(4))
        self.norm = nn.LayerNorm(6)
        self.scale = nn.Parameter(torch.tensor(0.5))
        self.expert = nn.Linear(6, 6)
        self.unused = nn.Linear(2, 2)
        self.hidden[1].bias.requires_grad_(False)

    def forward(self, tokens: Tensor, routed: bool) -> Tensor:
        x = self.embed(tokens)
        for layer in self.hidden:
            x = x + torch.tanh(layer(x))
        if routed:
            x = x + self.expert(x)
        return F.linear(self.norm(x) * self.scale, self.embed.weight)


def loss_of(net: Net, seed: int) -> Tensor:
    tokens = torch.randint(0, 11, (5, 7), generator=torch.Generator().manual_seed(seed))
    return F.cross_entropy(
        net(tokens, routed=seed % 3 != 1).flatten(0, 1).float(), tokens.flatten()
    )


def groups_of(net: Net) -> list[dict[str, Any]]:
    named = list(net.named_parameters())
    return [
        {"params": [(n, p) for n, p in named if p.dim() > 1]},
        {"params": [(n, p) for n, p in named if p.dim() < 2], "lr": 0.01, "weight_decay": 0.0},
    ]


Make = Callable[[Net], LipOptimizer]


def maker(name: str, **options: Any) -> Make:
    own = {"lr": 0.03, "weight_decay": 0.1} | options
    return lambda net: CLASSES[name](groups_of(net), **copy.deepcopy(own))  # a lr tensor's own


def warm_up(step: int) -> float:
    return step / 3 if step < 3 else (step - 2) ** -0.5


def train(net: Net, optimizer: LipOptimizer, seeds: range, rate: Any = warm_up) -> dict[str, Any]:
    """The same loop for both."""
    scheduler = LambdaLR(optimizer, rate)
    for seed in seeds:
        loss_of(net, seed).backward()
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
    return result(net, optimizer)


def result(net: Net, optimizer: LipOptimizer) -> dict[str, Any]:
    rates = optimizer.layer_learning_rates()
    return snapshot(optimizer, dict(net.named_parameters())) | {
        "rates": {name: torch.tensor(rate, dtype=torch.float64) for name, rate in rates.items()}
    }


CAPS = (0, 2**-12, 25)  # MiB: each parameter alone, some together, all together


def both(make: Make, run: Callable[[Net, LipOptimizer], Any], **to: Any) -> list[Any]:
    """What `run` returns with ordinary steps, and with gradients released, whatever the cap."""
    results = []
    for cap in (None, *CAPS):
        torch.manual_seed(0)
        net = Net().to(**to)
        optimizer = make(net)
        released = nullcontext() if cap is None else release_gradients(optimizer, bucket_cap_mb=cap)
        with released:
            results.append(run(net, optimizer))
    for other in results[2:]:
        assert_same(other, results[1])
    return results[:2]


def options_of(name: str) -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = {
        "plain": {},
        "theoretical": {"c": "theoretical"},
        "coupled": {"decoupled_weight_decay": False, "maximize": True},
        "propagate": {"nonfinite": "propagate", "scale_bounds": None},
        "lr tensor": {"lr": torch.tensor(0.03)},
    }
    if momentum_only(name):
        found |= {"nesterov": {"momentum": 0.9, "nesterov": True}, "momentum": {"momentum": 0.9}}
    if name.endswith("u"):
        found |= {"proposed": {"previous": "proposed"}}
    return found


ALL = [(name, option) for name in CLASSES for option in options_of(name)]


# The same numbers


@pytest.mark.slow
@pytest.mark.parametrize(("name", "option"), ALL)
@forms
def test_the_numbers_are_those_of_the_ordinary_step(name: str, option: str, foreach: bool) -> None:
    """Two groups, a schedule that starts at zero; tied, frozen, unused, at times unused ones."""
    make = maker(name, foreach=foreach, **options_of(name)[option])
    ordinary, released = both(make, lambda net, o: train(net, o, range(8)))
    assert_same(released, ordinary)


@pytest.mark.slow
@six
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=["float64", "bfloat16"])
def test_dtypes(name: str, dtype: torch.dtype) -> None:
    ordinary, released = both(maker(name), lambda net, o: train(net, o, range(6)), dtype=dtype)
    assert_same(released, ordinary)


@pytest.mark.slow
@six
@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("nonfinite", ["skip", "propagate"])
def test_nonfinite_gradients(name: str, bad: float, nonfinite: str) -> None:
    """One layer's, at the first step of its life and later."""

    def run(net: Net, optimizer: LipOptimizer) -> Any:
        for weight, bad_steps in ((net.hidden[2].weight, (0, 1)), (net.hidden[0].weight, (3,))):
            calls = iter(range(100))
            weight.register_hook(
                lambda g, s=bad_steps, c=calls: (
                    g.index_fill(0, torch.tensor(2), bad) if next(c) in s else g
                )
            )
        return train(net, optimizer, range(6), lambda _: 1.0)

    ordinary, released = both(maker(name, nonfinite=nonfinite), run)
    assert_same(released, ordinary)
    if nonfinite == "skip":
        rates = released["rates"]
        assert [rates[f"hidden.{i}.weight"][-1] for i in range(4)] == [1, 0, 2, 0]


@pytest.mark.slow
@six
def test_resuming(name: str) -> None:
    """From and to either, within a training run and through a state_dict."""
    ordinary, _ = both(maker(name), lambda net, o: train(net, o, range(9), lambda _: 1.0))
    torch.manual_seed(0)
    net = Net()
    optimizer = maker(name)(net)
    train(net, optimizer, range(2), lambda _: 1.0)
    with release_gradients(optimizer):
        train(net, optimizer, range(2, 4), lambda _: 1.0)
        optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))  # in the middle
        train(net, optimizer, range(4, 6), lambda _: 1.0)
    other = maker(name)(net)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    with release_gradients(other):
        train(net, other, range(6, 8), lambda _: 1.0)
    train(net, other, range(8, 9), lambda _: 1.0)
    assert_same(result(net, other), ordinary)


def test_options_that_change_between_steps() -> None:
    def run(net: Net, optimizer: LipOptimizer) -> Any:
        train(net, optimizer, range(2))
        optimizer.param_groups[0] |= {"betas": (0.5, 0.9), "gamma": 0.5, "weight_decay": 0.3}
        train(net, optimizer, range(2, 4))
        optimizer.param_groups[1]["c"] = "theoretical"
        return train(net, optimizer, range(4, 6))

    assert_same(*both(maker("adamlip"), run))


@pytest.mark.parametrize("history", ["exact", "sketch"])
def test_options_of_the_members_that_change(history: str) -> None:
    """What is kept of the gradient, and whose the weight decay is."""
    now, then = {"history": history, "sketch_size": 32}, {"history": "sketch", "sketch_size": 32}
    then = then if history == "exact" else {"history": "exact"}

    def run(net: Net, optimizer: LipOptimizer) -> Any:
        train(net, optimizer, range(3))
        optimizer.param_groups[0] |= then
        train(net, optimizer, range(3, 6))
        optimizer.param_groups[0]["no_weight_decay"] = ["embed.weight", "expert.weight"]
        return train(net, optimizer, range(6, 9))

    assert_same(*both(maker("adamlip", **now), run))


@forms
def test_state_that_is_replaced(foreach: bool) -> None:
    """As by code that moves it to the host and back."""

    def run(net: Net, optimizer: LipOptimizer) -> Any:
        train(net, optimizer, range(3))
        for state in optimizer.state.values():
            state |= {key: value.clone() for key, value in state.items()}
            state["exp_avg"].zero_()
            state["lipschitz_scale"].fill_(0.5)
        return train(net, optimizer, range(3, 6))

    assert_same(*both(maker("adamlip", foreach=foreach), run))


def test_a_parameter_that_gets_other_strides() -> None:
    """As by `to(memory_format=...)`, or as a view of something larger, which must stay as it is."""

    def run(net: nn.Module, optimizer: LipOptimizer) -> Any:
        around = torch.full((6, 8), 7.0)
        for step in range(6):
            if step == 3:
                around[:, :5] = net[1].weight.data
                net[1].weight.data = around[:, :5]
                net[0].to(memory_format=torch.channels_last)
            optimizer.zero_grad()
            images = torch.full((2, 4, 3, 3), step + 1.0)
            net[1](net[0](images).mean((2, 3))).square().sum().backward()
            optimizer.step()
        assert (around[:, 5:] == 7).all()
        return result(net, optimizer)

    fused = [] if cpu.missing() else [{"fused": True}]
    for form in [*fused, {"foreach": True}]:
        results = []
        for released in (False, True):
            torch.manual_seed(0)
            net = nn.Sequential(nn.Conv2d(4, 5, 3, padding=1, bias=False), nn.Linear(5, 6))
            optimizer = AdamLip(net.parameters(), lr=0.01, **form)
            with release_gradients(optimizer) if released else nullcontext():
                results.append(run(net, optimizer))
        assert_same(*results)


def test_a_step_without_a_rate_or_a_gradient_counts_as_the_ordinary_one_does() -> None:
    """c="theoretical" counts a step if it has a rate or a gradient that is not zero."""

    def run(net: Net, optimizer: LipOptimizer) -> Any:
        counts = []
        for rate, factor in ((0.0, 0.0), (0.0, 1.0), (0.1, 0.0), (0.0, None), (0.1, None)):
            for group in optimizer.param_groups:
                group["lr"] = rate
            if factor is not None:
                (loss_of(net, 0) * factor).backward()
            optimizer.step()
            optimizer.zero_grad()
            counts.append(float(optimizer.param_groups[0]["lipschitz_step"]))
        return counts, result(net, optimizer)

    ordinary, released = both(maker("adamlip", c="theoretical"), run)
    assert_same(released, ordinary)
    assert released[0] == [0, 1, 2, 2, 3]


def test_closure_and_autocast() -> None:
    """Where backward is called from is not seen."""

    def with_closure(net: Net, optimizer: LipOptimizer) -> Any:
        def closure() -> Tensor:
            optimizer.zero_grad()
            loss = loss_of(net, 0)
            loss.backward()
            return loss

        losses = [optimizer.step(closure).item() for _ in range(3)]
        return losses, result(net, optimizer)

    def within_autocast(net: Net, optimizer: LipOptimizer) -> Any:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            for seed in range(3):
                optimizer.zero_grad()
                loss_of(net, seed).backward()
                with torch.autocast("cpu", enabled=False):
                    optimizer.step()
        return result(net, optimizer)

    for run in (with_closure, within_autocast):
        assert_same(*both(maker("adamlip"), run))


def test_two_gradients_in_one_memory() -> None:
    """As autograd makes them here; what is done with the first must not be seen in the second."""
    results = []
    for released in (False, True):
        a, b = (nn.Parameter(torch.linspace(-1.0, end, 6)) for end in (1.0, 2.0))
        optimizer = AdamLip([a, b], lr=0.1)
        with release_gradients(optimizer) if released else nullcontext():
            for factor in (1.0, math.nan, 2.0):
                optimizer.zero_grad()
                ((a.view(2, 3) + b.view(2, 3)) * factor).sin().sum().backward()
                if not released:
                    assert a.grad is not b.grad
                    assert a.grad.data_ptr() == b.grad.data_ptr()
                optimizer.step()
        results.append(snapshot(optimizer, {"a": a, "b": b}))
    assert_same(*results)


@pytest.mark.slow
def test_compiled_and_checkpointed_models() -> None:
    def compiled(net: Net, optimizer: LipOptimizer) -> Any:
        forward = torch.compile(net, backend="aot_eager")
        for _ in range(3):
            optimizer.zero_grad()
            forward(torch.arange(10), True).square().sum().backward()
            optimizer.step()
        return result(net, optimizer)

    def checkpointed(net: Net, optimizer: LipOptimizer) -> Any:
        for reentrant in (False, True):
            optimizer.zero_grad()
            x = net.embed(torch.arange(10)).detach().requires_grad_()
            for layer in net.hidden:
                x = torch.utils.checkpoint.checkpoint(layer, x, use_reentrant=reentrant)
            x.square().sum().backward()
            optimizer.step()
        return result(net, optimizer)

    for run in (compiled, checkpointed):
        assert_same(*both(maker("adamlip"), run))


def test_a_step_never_synchronises(no_looking: NoLookingAtNumbers) -> None:  # noqa: F811
    net = Net()
    optimizer = maker("adamlip", c="theoretical")(net)
    release_gradients(optimizer)
    train(net, optimizer, range(1))
    loss = loss_of(net, 2)
    with no_looking:
        loss.backward()
        optimizer.step()


# What is left to step(), and the handle


def test_step_takes_what_has_no_hook() -> None:
    """Made trainable or added later, assigned by hand, or there before the release."""

    def run(net: Net, optimizer: LipOptimizer) -> Any:
        train(net, optimizer, range(2))
        net.hidden[1].bias.requires_grad_(True)
        late = nn.Parameter(torch.ones(3))
        optimizer.add_param_group({"params": [("late", late)]})
        for seed in range(2, 5):
            (loss_of(net, seed) + late.square().sum()).backward()
            net.unused.weight.grad = torch.full((2, 2), float(seed))
            optimizer.step()
            if optimizer._release:
                assert all(p.grad is None for p in (late, *net.parameters()))
            optimizer.zero_grad()
        assert optimizer.state[late]["step"] == optimizer.state[net.unused.weight]["step"] == 3
        return result(net, optimizer)

    assert_same(*both(maker("adamlip"), run))


def test_gradients_are_gone_after_backward() -> None:
    net = Net()
    optimizer = maker("adamlip")(net)
    before = copy.deepcopy(net.state_dict())
    with release_gradients(optimizer) as release:
        loss_of(net, 0).backward()
        assert all(p.grad is None for p in net.parameters())
        assert not torch.equal(net.embed.weight, before["embed.weight"])
        stepped = result(net, optimizer)
        optimizer.zero_grad()
        optimizer.zero_grad(set_to_none=False)
        optimizer.step()
        assert_same(result(net, optimizer), stepped)
    release.remove()  # once more
    loss_of(net, 1).backward()
    assert net.embed.weight.grad is not None
    assert_same(result(net, optimizer), stepped)
    assert not any(p._post_accumulate_grad_hooks for p in net.parameters())
    with release_gradients(optimizer):  # it can come back
        pass


def test_a_model_with_released_gradients_can_be_freed() -> None:
    """Nobody keeps the handle; what hooks hold, the garbage collector cannot see."""
    net = Net()
    optimizer = maker("adamlip")(net)
    release_gradients(optimizer)
    train(net, optimizer, range(2))
    alive = [weakref.ref(x) for x in (net.embed.weight, optimizer)]
    del net, optimizer
    gc.collect()
    assert [x() for x in alive] == [None, None]


def test_a_copy_is_an_ordinary_one() -> None:
    net = Net()
    optimizer = maker("adamlip")(net)
    release_gradients(optimizer)
    train(net, optimizer, range(1))
    net, optimizer = copy.deepcopy((net, optimizer))
    loss_of(net, 1).backward()
    assert net.embed.weight.grad is not None
    optimizer.step()
    assert net.embed.weight.grad is not None


def bytes_waiting(cap: float, monkeypatch: pytest.MonkeyPatch) -> list[list[int]]:
    """The bytes of each gradient that is stepped with others, in the order of the steps."""
    net = deep()
    optimizer = AdamLip(net.parameters())
    steps = []
    step_layers = release_module.step_layers

    def see(optimizer: Any, plan: Any) -> Tensor:
        steps.append([param.grad.nbytes for param in plan.params])
        return step_layers(optimizer, plan)

    monkeypatch.setattr(release_module, "step_layers", see)
    release_gradients(optimizer, bucket_cap_mb=cap / 2**20)
    net(torch.randn(2, WIDTH)).square().sum().backward()
    return steps


def test_gradients_wait_until_there_are_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = 4 * WIDTH * WIDTH
    assert all(len(step) == 1 for step in bytes_waiting(0, monkeypatch))
    for cap in (1, weight, 3 * weight, SET, 10 * SET):
        steps = bytes_waiting(cap, monkeypatch)
        assert sum(map(sum, steps)) == SET
        assert all(cap <= sum(step) < cap + weight for step in steps[:-1])
    assert len(steps) == 1


def test_a_backward_that_fails_leaves_its_last_gradients_to_the_step() -> None:
    """What waited then is stepped as well, unless its gradient has been thrown away."""

    class Fails(torch.autograd.Function):
        @staticmethod
        def forward(_: Any, x: Tensor) -> Tensor:
            return x.clone()

        @staticmethod
        def backward(_: Any, grad: Tensor) -> Tensor:
            raise MemoryError("in backward")

    for throws_away in (False, True):
        first, last = (nn.Parameter(torch.ones(3)) for _ in range(2))
        optimizer = AdamLip([first, last], lr=0.1)
        release_gradients(optimizer)
        with pytest.raises(MemoryError):
            (Fails.apply(first * 2) * last).sum().backward()
        assert last.grad is not None
        if throws_away:
            optimizer.zero_grad()
        optimizer.step()
        assert first.grad is None
        assert last.grad is None
        assert torch.equal(first, torch.ones(3))
        assert torch.equal(last, torch.ones(3)) == throws_away
        (first * last).sum().backward()  # and it goes on
        optimizer.step()
        assert optimizer.state[first]["step"] == 1
        assert optimizer.state[last]["step"] == 2 - throws_away


# What it cannot do


def test_gradient_accumulation_is_refused() -> None:
    net = Net()
    optimizer = maker("adamlip")(net)
    release_gradients(optimizer)
    loss_of(net, 0).backward()
    stepped = result(net, optimizer)
    with pytest.raises(RuntimeError, match="excludes gradient accumulation"):
        loss_of(net, 1).backward()
    with pytest.raises(RuntimeError, match="has a gradient again"):
        optimizer.step()
    assert_same(result(net, optimizer), stepped)
    optimizer.zero_grad()
    optimizer.step()
    train(net, optimizer, range(1, 3))
    assert all(p.grad is None for p in net.parameters())


def test_a_sparse_gradient_is_refused() -> None:
    table = nn.Embedding(4, 2, sparse=True)
    release_gradients(AdamLip(table.parameters()))
    with pytest.raises(RuntimeError, match="AdamLip does not support sparse gradients"):
        table(torch.arange(2)).sum().backward()


def test_a_group_added_for_a_released_layer_is_refused() -> None:
    """Its other parameter would be taken for one without a gradient."""
    layer = nn.Linear(3, 2)
    optimizer = AdamLip([("fc.weight", layer.weight)], layers="module")
    release_gradients(optimizer)
    optimizer.add_param_group({"params": [("fc.bias", layer.bias)]})
    layer(torch.ones(1, 3)).sum().backward()
    with pytest.raises(ValueError, match="layer 'fc' of 2 parameters"):
        optimizer.step()


def test_one_parameter_per_layer_is_enough() -> None:
    """Whatever `layers` is called."""
    net = nn.Sequential(nn.Linear(2, 3, bias=False), nn.Linear(3, 2, bias=False))
    release_gradients(AdamLip(net.named_parameters(), layers="module"))


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"layers": "module"}, "layers='module' makes one layer 'hidden.0' of 2 parameters"),
        ({"layers": lambda name: "all"}, "<lambda>' makes one layer 'all' of"),
        ({"nonfinite": "raise"}, 'nonfinite="raise" .* choose nonfinite="skip"'),
        ({"capturable": True}, "capturable=True .* choose capturable=False"),
        ({"differentiable": True}, "differentiable=True .* choose differentiable=False"),
    ],
    ids=["module", "function", "raise", "capturable", "differentiable"],
)
def test_options_that_are_refused(options: dict[str, Any], match: str) -> None:
    net = Net()
    optimizer = maker("adamlip", **options)(net)
    with pytest.raises(ValueError, match=match):
        release_gradients(optimizer)
    assert_untouched(net, optimizer)


def test_an_option_that_is_refused_later() -> None:
    net = Net()
    optimizer = maker("adamlip")(net)
    release_gradients(optimizer)
    train(net, optimizer, range(2))
    before = result(net, optimizer)
    for group in optimizer.param_groups:
        group["nonfinite"] = "raise"
    with pytest.raises(ValueError, match='nonfinite="raise"'):
        loss_of(net, 2).backward()
    after = result(net, optimizer)
    assert_same(after["params"], before["params"])
    assert_same(after["state"]["state"], before["state"]["state"])


@pytest.mark.parametrize(
    "make",
    [
        lambda net: torch.optim.Adam(net.parameters()),
        lambda net: Lipschitz(torch.optim.Adam(net.parameters())),
        lambda net: type("Wrapper", (), {"optimizer": AdamLip(net.parameters())})(),
    ],
    ids=["torch", "Lipschitz", "wrapped"],
)
def test_optimizers_that_are_refused(make: Callable[[Net], Any]) -> None:
    net = Net()
    with pytest.raises(TypeError, match=r"optimizer (is|must be) .*one of the six"):
        release_gradients(make(net))
    assert_untouched(net)


@pytest.mark.parametrize("cap", [-1, math.nan, "25", None])
def test_caps_that_are_refused(cap: Any) -> None:
    net = Net()
    with pytest.raises(ValueError, match=f"bucket_cap_mb must be a number >= 0, got {cap!r}"):
        release_gradients(maker("adamlip")(net), bucket_cap_mb=cap)
    assert_untouched(net)


def test_a_parameter_is_released_once() -> None:
    net = Net()
    first = maker("adamlip")(net)
    release = release_gradients(first)
    for optimizer in (first, AdamLip([net.scale])):
        with pytest.raises(ValueError, match="released already"):
            release_gradients(optimizer)
    assert first._release is release
    release.remove()
    release_gradients(AdamLip([net.scale]))


@pytest.mark.parametrize("mark", ["_fsdp_flattened", "ds_id", "_hp_mapping", "model_parallel"])
def test_sharded_parameters_are_refused(mark: str) -> None:
    """Known by the marks that FSDP1, DeepSpeed and Megatron leave on them."""
    net = Net()
    optimizer = maker("adamlip")(net)
    setattr(net.scale, mark, True)
    with pytest.raises(NotImplementedError, match="whole parameters"):
        release_gradients(optimizer)
    assert_untouched(net, optimizer)


@pytest.mark.usefixtures("alone")
def test_dtensors_are_refused() -> None:
    mesh = init_device_mesh("cpu", (1,))
    param = nn.Parameter(DTensor.from_local(torch.ones(2), mesh))
    with pytest.raises(NotImplementedError, match="whole parameters"):
        release_gradients(AdamLip([param]))
    assert not param._post_accumulate_grad_hooks


@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize("first", [True, False], ids=["before", "after"])
def test_ddp_is_refused(first: bool) -> None:
    """Whether the model comes into it before the release or after. Its sum of the gradients comes
    after the hooks."""
    net = nn.Linear(3, 2)
    optimizer = AdamLip(net.parameters())
    if first:
        wrapped = nn.parallel.DistributedDataParallel(net)
        with pytest.raises(NotImplementedError, match="DistributedDataParallel"):
            release_gradients(optimizer)
        assert_untouched(net)
    else:
        release_gradients(optimizer)
        wrapped = nn.parallel.DistributedDataParallel(net)
        with pytest.raises(NotImplementedError, match="DistributedDataParallel"):
            wrapped(torch.ones(1, 3)).sum().backward()
    assert not optimizer.state


@pytest.mark.usefixtures("alone")
def test_another_models_ddp_is_none_of_ours() -> None:
    net = nn.Linear(3, 2)
    wrapped = nn.parallel.DistributedDataParallel(nn.Linear(3, 2))
    release = release_gradients(AdamLip(net.parameters()))  # which ends with its last reference
    net(torch.ones(1, 3)).sum().backward()
    assert all(p.grad is None for p in net.parameters())
    del wrapped, release


def assert_untouched(net: nn.Module, optimizer: LipOptimizer | None = None) -> None:
    assert not any(p._post_accumulate_grad_hooks for p in net.parameters())
    if optimizer is not None:
        assert optimizer._release is None
        assert not optimizer._optimizer_step_post_hooks


# Memory

DEPTH, WIDTH = 24, 64
SET = DEPTH * WIDTH * (WIDTH + 1) * 4  # bytes of all gradients


def deep() -> nn.Sequential:
    return nn.Sequential(*(nn.Linear(WIDTH, WIDTH) for _ in range(DEPTH)))


def peak_of_gradients_and_history(released: bool) -> int:
    """The most bytes that gradients and history have together, when a gradient is just there."""
    net, seen = deep(), []
    optimizer = AdamLip(net.parameters())

    def look(_: Tensor) -> None:
        history = [state["prev_grad"] for state in optimizer.state.values()]
        tensors = [*history, *(p.grad for p in net.parameters() if p.grad is not None)]
        storages = {x.untyped_storage().data_ptr(): x.untyped_storage() for x in tensors}
        seen.append(sum(x.nbytes() for x in storages.values()))

    for p in net.parameters():
        p.register_post_accumulate_grad_hook(look)
    with release_gradients(optimizer, bucket_cap_mb=0) if released else nullcontext():
        for _ in range(3):
            optimizer.zero_grad()
            net(torch.randn(2, WIDTH)).square().sum().backward()
            optimizer.step()
    return max(seen)


def peak_of_everything(released: bool) -> int:
    """The most bytes that a step after the first takes beyond what there is before it."""
    net = deep()
    optimizer = AdamLip(net.parameters(), foreach=False)

    def step() -> None:
        optimizer.zero_grad()
        net(torch.randn(2, WIDTH)).square().sum().backward()
        optimizer.step()

    with release_gradients(optimizer, bucket_cap_mb=0) if released else nullcontext():
        for _ in range(2):
            step()
        optimizer.zero_grad()
        with torch.profiler.profile(profile_memory=True) as profile:
            step()
    events = profile.profiler.kineto_results.events()
    changes = [e for e in events if e.name() == "[memory]"]
    now = most = 0
    for event in sorted(changes, key=lambda e: e.start_ns()):
        now += event.nbytes()
        most = max(most, now)
    return most


def test_gradients_and_history_are_one_set() -> None:
    """And the gradient or two that backward has just made; two sets without."""
    few = 2 * WIDTH * (WIDTH + 1) * 4
    assert peak_of_gradients_and_history(released=False) == 2 * SET
    assert SET < peak_of_gradients_and_history(released=True) <= SET + few


def test_a_step_takes_less_memory_than_its_gradients() -> None:
    """As the allocator sees it: nobody keeps a gradient that is not to be seen."""
    assert peak_of_everything(released=False) > SET
    assert peak_of_everything(released=True) < SET / 2
