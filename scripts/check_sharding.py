"""Is S on this cluster, under this configuration, what it is on one process?

    accelerate launch --config_file mine.yaml scripts/check_sharding.py
    torchrun --nproc-per-node 2 scripts/check_sharding.py --cpu                 # no cluster at hand
    torchrun --nproc-per-node 2 scripts/check_sharding.py --cpu --engine fsdp2  # see --engine

Trains a small network under your accelerate configuration, its ranks sharing every batch, and
again on each rank alone, unwrapped, in float32, on the whole batches, from the same seed. Compares
S of every layer, all parameters together, and between the ranks S, A and the norms, which have
to be equal bit for bit. Counts the collectives that our step adds to a training step. The first
line says what was really run, which is not always what the configuration asked for: accelerate,
for one, turns FSDP on a CPU into DDP without a word.

The network has shapes that divide by nothing, a norm, a tensor that is empty on all ranks but one,
a layer that is not used, and parameters with and without weight decay (all without where they
would be two groups that an engine does not allow: FSDP1 without use_orig_params; lip-NAME under
ZeRO with layers="module"). Gradient accumulation and DeepSpeed's clipping are those of the
configuration; steps that a loss scaler leaves out are left out alone as well.

Bounds for the largest relative difference of a layer's S, and for that of the parameters, the norm
of the difference over their norm:
{bounds}
In float32 only the order of summation differs (1e-6 at most was seen; shards that are not summed
make 1e-1). bf16 and fp16 round gradients to 8 and 11 bits, and S, which is made of differences of
gradients, follows more coarsely (around 1e-2 was seen, of S and of parameters); there, equality
between the ranks is the sharper check.

Exit status: 0 if all is well; 1 if a bound is exceeded, ranks differ, something raises, or the
engine or the precision is not what was asked for.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Iterable
from datetime import timedelta
from types import SimpleNamespace
from typing import Any, TypeVar

import accelerate
import torch
from accelerate import Accelerator, DistributedDataParallelKwargs, InitProcessGroupKwargs
from accelerate.utils import gather_object
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor.debug import CommDebugMode
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from hf_adalip import create_optimizer
from hf_adalip.version import __version__

# precision: S, parameters
BOUNDS = {"float32": (1e-5, 1e-5), "bf16": (5e-2, 5e-2), "fp16": (5e-2, 5e-2)}
ROWS = 4  # of a micro-batch on a rank

Make = Callable[[nn.Module], Optimizer]
T = TypeVar("T")


class EngineError(Exception):
    """Something raised on a rank, and all ranks left it together."""


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.linear = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.tanh(self.linear(self.norm(x)))


class Net(nn.Module):
    config = SimpleNamespace(hidden_size=13)  # from which accelerate fills DeepSpeed's "auto"

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(7, 13)
        self.block = Block(13)
        self.gain = nn.Parameter(torch.ones(1, 13))
        self.last = nn.Linear(13, 3, bias=False)
        self.unused = nn.Linear(3, 3)

    def no_weight_decay(self) -> set[str]:
        return {"unused.*"}  # it would be decayed by engines that deliver zeros for it, only

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.gain * self.block(torch.tanh(self.first(x))))


def new_net() -> Net:
    torch.manual_seed(0)
    return Net()


def batch(step: int, rows: int, device: torch.device) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(rows, 7, generator=generator)
    y = torch.randint(0, 3, (rows,), generator=generator)
    return x.to(device), y.to(device)


def loss_of(net: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    dtype = next(net.parameters()).dtype  # DeepSpeed leaves it to us to cast what goes in
    return nn.functional.cross_entropy(net(x.to(dtype)).float(), y)


def together(function: Callable[[], T]) -> T:
    """Calls it; if it raises on one rank, all raise, who would otherwise wait for that one."""
    try:
        result, error = function(), None
    except Exception as raised:
        result, error = None, f"{type(raised).__name__}: {raised}"
    if errors := [e for e in gather_object([error]) if e]:
        raise EngineError(" ".join(errors[0].split()))
    return result


def prepare(accelerator: Accelerator, engine: str | None, make: Make) -> tuple[Any, Any, Any]:
    """The network under the engine, our optimizer, and what the training loop is to step."""
    net: Any = new_net()
    if engine is None:
        if plugin := accelerator.state.deepspeed_plugin:
            plugin.deepspeed_config.pop("scheduler", None)  # the learning rate is to be constant
            if plugin.get_value("train_micro_batch_size_per_gpu") in (None, "auto"):
                plugin.deepspeed_config["train_micro_batch_size_per_gpu"] = ROWS
        optimizer = make(net)
        net, stepped = accelerator.prepare(net, optimizer)
        return net, optimizer, stepped
    net = net.to(accelerator.device)
    if engine == "fsdp2":  # makes new parameters
        fully_shard(net.block)
        optimizer = make(fully_shard(net))
        return net, optimizer, optimizer
    optimizer = make(net)
    if engine == "ddp":
        return DistributedDataParallel(net, find_unused_parameters=True), optimizer, optimizer
    device = accelerator.device
    device = torch.device("cpu") if device.type == "cpu" else device  # without an index
    options = {"use_orig_params": True, "device_id": device}
    net.block = FullyShardedDataParallel(net.block, **options)
    return FullyShardedDataParallel(net, **options), optimizer, optimizer


def is_deepspeed(net: nn.Module) -> bool:
    return type(net).__name__ == "DeepSpeedEngine"


def describe(accelerator: Accelerator, net: Any) -> tuple[str, str]:
    """The engine and the precision that there really are."""
    net = getattr(net, "_orig_mod", net)  # of torch.compile
    mixed = accelerator.mixed_precision
    precision = "float32" if mixed == "no" else mixed
    if is_deepspeed(net):
        if net.bfloat16_enabled() or net.fp16_enabled():
            precision = "bf16" if net.bfloat16_enabled() else "fp16"
        return f"DeepSpeed ZeRO-{net.zero_optimization_stage()}", precision
    if fsdp1 := FullyShardedDataParallel.fsdp_modules(net):
        how = f"{fsdp1[0].sharding_strategy.name}, use_orig_params={fsdp1[0]._use_orig_params}"
        return f"FSDP1 ({how})", precision
    for param in net.parameters():
        if hasattr(param, "placements"):
            mesh = " x ".join(map(str, param.device_mesh.shape))
            return f"FSDP2 ({param.placements} on a mesh of {mesh})", precision
    return "DDP" if isinstance(net, DistributedDataParallel) else "no engine", precision


def asks_for(engine: str) -> bool:
    """What `accelerate launch` tells of its configuration."""
    return os.environ.get(f"ACCELERATE_USE_{engine}", "").lower() == "true"


def asked_for(engine: str | None, ranks: int) -> tuple[str, str]:
    """What arguments and configuration want, beginning as `describe` does."""
    mixed = os.environ.get("ACCELERATE_MIXED_PRECISION", "no").lower()
    precision = "float32" if mixed == "no" else mixed
    if engine is not None:
        return engine.upper(), precision
    if asks_for("DEEPSPEED"):
        return "DeepSpeed", precision
    if asks_for("FSDP"):
        return f"FSDP{os.environ.get('FSDP_VERSION', '1')}", precision
    return "DDP" if ranks > 1 else "no engine", precision


def whole_parameters(net: Any) -> list[Tensor]:
    """On every rank, in the order of the model."""
    if FullyShardedDataParallel.fsdp_modules(net):
        with FullyShardedDataParallel.summon_full_params(net):
            return [p.detach().clone() for p in net.parameters()]
    if is_deepspeed(net):
        import deepspeed

        with deepspeed.zero.GatheredParameters(list(net.parameters())):
            return [p.detach().clone() for p in net.parameters()]
    params = [p.detach() for p in net.parameters()]
    return [p.full_tensor() if hasattr(p, "full_tensor") else p for p in params]


def flat(params: Iterable[Tensor]) -> Tensor:
    return torch.cat([p.detach().float().flatten() for p in params])


def count_collectives(optimizer: Optimizer, counts: list[int]) -> None:
    """Adds those of step() to the last of `counts`, whoever calls it: an engine may, and twice."""
    step = optimizer.step

    def counted(*args: Any, **kwargs: Any) -> Any:
        with CommDebugMode() as seen:
            result = step(*args, **kwargs)
        if counts:  # DeepSpeed takes a first step of its own, to have the state
            counts[-1] = max(counts[-1], 0) + seen.get_total_counts()
        return result

    optimizer.step = counted  # type: ignore[method-assign]


def train(accelerator: Accelerator, net: Any, stepped: Any, counts: list[int], steps: int) -> None:
    """On this rank's rows. A count stays -1 where a loss scaler leaves the step out."""
    parts, rank = accelerator.gradient_accumulation_steps, accelerator.process_index
    ranks = accelerator.num_processes

    def step(t: int) -> None:
        x, y = batch(t, ROWS * ranks * parts, accelerator.device)
        for part in range(parts):
            mine = slice((part * ranks + rank) * ROWS, (part * ranks + rank + 1) * ROWS)
            with accelerator.accumulate(net):
                accelerator.backward(loss_of(net, x[mine], y[mine]))  # DeepSpeed steps in here
                if accelerator.sync_gradients:
                    stepped.step()
                    stepped.zero_grad()

    for t in range(steps):
        counts.append(-1)
        together(lambda t=t: step(t))  # type: ignore[misc]


def train_alone(accelerator: Accelerator, make: Make, taken: list[bool]) -> tuple[nn.Module, Any]:
    """Unwrapped, on the whole batches."""
    net = new_net().to(accelerator.device)
    optimizer = make(net)
    plugin = accelerator.state.deepspeed_plugin
    clip = plugin.deepspeed_config.get("gradient_clipping", 0.0) if plugin else 0.0
    rows = ROWS * accelerator.num_processes * accelerator.gradient_accumulation_steps
    for t in [t for t, took in enumerate(taken) if took]:
        optimizer.zero_grad()
        loss_of(net, *batch(t, rows, accelerator.device)).backward()
        if clip:
            nn.utils.clip_grad_norm_(net.parameters(), clip)
        optimizer.step()
    return net, optimizer


def check(
    accelerator: Accelerator, args: argparse.Namespace, make: Make, bounds: tuple[float, float]
) -> tuple[bool, str]:
    """Trains both ways; whether they agree, and a line about it."""
    counts: list[int] = []

    def make_counted(net: nn.Module) -> Optimizer:
        optimizer = make(net)
        count_collectives(optimizer, counts)
        return optimizer

    net, optimizer, stepped = together(lambda: prepare(accelerator, args.engine, make_counted))
    train(accelerator, net, stepped, counts, args.steps)
    found, rates = together(lambda: (whole_parameters(net), optimizer.layer_learning_rates()))
    taken = [count >= 0 for count in counts]
    alone, reference = train_alone(accelerator, make, taken)

    # A rank may not know of a layer that it has no part of. Of the unused layer, engines deliver
    # zeros or nothing: its S is to stay the 1 it was.
    everyone = gather_object([(taken, rates)])
    known = {layer: rate for _, some in everyone for layer, rate in some.items()}
    equal = all(t == taken and some.items() <= known.items() for t, some in everyone)
    expected = {layer: rate.scale for layer, rate in reference.layer_learning_rates().items()}
    if lost := expected.keys() - known.keys():
        raise EngineError(f"no S for {', '.join(sorted(lost))}")
    ratios = [rate.scale / expected.get(layer, 1.0) - 1 for layer, rate in known.items()]
    scale = torch.tensor(ratios).abs().max().item()  # Python's would lose a NaN
    end = flat(alone.parameters())
    parameters = ((flat(found) - end).norm() / end.norm()).item()
    good = scale <= bounds[0] and parameters <= bounds[1] and equal and any(taken)
    seen = sorted({count for count in counts if count >= 0})
    line = f"{scale:8.1e} {parameters:10.1e} {'equal' if equal else 'DIFFER':>7} "
    line += f"{'-'.join(map(str, dict.fromkeys(seen[:1] + seen[-1:]))):>11} "
    line += "ok" if good else "FAILED"
    return good, line + f" ({sum(taken)} of {len(taken)} steps taken)" * (not all(taken))


def run(accelerator: Accelerator, args: argparse.Namespace) -> bool:
    say, ranks = accelerator.print, accelerator.num_processes
    fsdp = getattr(accelerator.state, "fsdp_plugin", None)
    flat_fsdp = fsdp is not None and fsdp.fsdp_version == 1 and not fsdp.use_orig_params
    zero = accelerator.state.deepspeed_plugin
    groups_apart = zero is not None and zero.zero_stage > 0  # stepped one after the other

    def maker(name: str, layers: str) -> Make:
        split = name.startswith("lip-")  # into two groups, with and without weight decay
        decay = 0.0 if flat_fsdp or (groups_apart and split and layers == "module") else 0.01
        return lambda net: create_optimizer(
            net, name, lr=args.lr, weight_decay=decay, layers=layers
        )

    try:
        make = maker(args.optim[0], args.layers[0])
        net, _, _ = together(lambda: prepare(accelerator, args.engine, make))
    except EngineError as failed:
        say(f"FAILED to set up the engine: {failed}")
        return False
    engine, precision = describe(accelerator, net)
    accelerator.free_memory()
    say(
        f"{engine}, {precision}, {ranks} rank{'s' * (ranks > 1)}, {accelerator.device.type}; "
        f"torch {torch.__version__}, accelerate {accelerate.__version__}, hf_adalip {__version__}"
    )
    if precision not in BOUNDS:
        say(f"FAILED: there are no bounds for {precision}")
        return False
    ok = True
    for wanted, got in zip(asked_for(args.engine, ranks), (engine, precision), strict=True):
        if not got.startswith(wanted):
            say(f"WARNING: {wanted} was asked for, but this is {got}")
            ok = False
    bounds = BOUNDS[precision]
    say(f"bounds: S {bounds[0]:g}, parameters {bounds[1]:g}; {args.steps} steps")
    say(f"{'optimizer':12} {'layers':7} {'S':>8} {'parameters':>10} {'ranks':>7} collectives")
    for name in args.optim:
        for layers in args.layers:
            try:
                good, line = check(accelerator, args, maker(name, layers), bounds)
            except EngineError as failed:
                good, line = False, f"FAILED: {failed}"
            accelerator.free_memory()
            say(f"{name:12} {layers:7} {line}")
            ok = ok and good
    say("ok" if ok else "FAILED")
    return ok


def main() -> int:
    bounds = "\n".join(f"  {key:8}  {s:g} and {p:g}" for key, (s, p) in BOUNDS.items())
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").format(bounds=bounds),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--optim", nargs="+", default=["adamlip"], help="names (adamlip)")
    choices = ("module", "tensor")
    parser.add_argument("--layers", nargs="+", default=["module"], choices=choices, help="(module)")
    parser.add_argument("--steps", type=int, default=20, help="(20)")
    parser.add_argument("--lr", type=float, default=1e-2, help="(0.01)")
    parser.add_argument(
        "--cpu",
        action="store_true",
        help="on the CPU; leave it out for DeepSpeed, which goes there by itself without a GPU",
    )
    parser.add_argument(
        "--engine",
        choices=("ddp", "fsdp1", "fsdp2"),
        help="set up torch's own, in float32, instead of what the configuration says: accelerate "
        "has no FSDP on a CPU",
    )
    args = parser.parse_args()
    os.environ["FSDP_TRANSFORMER_CLS_TO_WRAP"] = "Block"  # the configuration names your model's
    # A rank that raises within a collective should not keep the others for long.
    group: dict[str, Any] = {"timeout": timedelta(minutes=5)}
    if asks_for("DEEPSPEED") and not args.cpu and not torch.accelerator.is_available():
        group["backend"] = "gloo"  # without it accelerate takes every rank for the only one
    accelerator = Accelerator(
        cpu=args.cpu,
        mixed_precision="no" if args.engine else None,
        kwargs_handlers=[
            DistributedDataParallelKwargs(find_unused_parameters=True),
            InitProcessGroupKwargs(**group),
        ],
    )
    torch.set_float32_matmul_precision("highest")  # TF32 would blur the comparison
    ok = run(accelerator, args)
    accelerator.wait_for_everyone()
    accelerator.end_training()
    return 0 if ok else 1


if __name__ == "__main__":
    sys.exit(main())
