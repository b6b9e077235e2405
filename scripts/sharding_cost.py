"""What S costs on a sharded engine: its all-reduce beside the traffic of the gradients.

    python scripts/sharding_cost.py             # a model of cost, for networks of known shapes
    python scripts/sharding_cost.py --measure   # what 1, 2 and 4 gloo processes take here

A step of one of the six sums the squared norms of all sharded tensors in one all-reduce for each
process group: of three float32 for a tensor (g; x and its change, where x is what S follows, the
gradient or the update), before tensors are added up to layers. `Lipschitz` sends two numbers for
a tensor; with signal="update" it takes two all-reduces, of one and of two. The size depends on
neither parameters nor ranks.

The model, for N ranks, a latency of `base` to start a collective and of `alpha` for each of its
hops, and `beta` bytes/s to and from a rank:

    all-reduce of m bytes       base + 2·log2(N)·alpha + 2·m/beta                (tree), or
                                base + 2·(N-1)·alpha + 2·(N-1)/N·m/beta          (ring), the faster
    gradients, P parameters     2·(N-1)/N·P·bytes/beta

The second is the least that a reduce-scatter of gradients and an all-gather of parameters take:
no latency, and one all-gather where FSDP has two. Nothing is overlapped; in a training step most
of the gradients' traffic is, and the all-reduce of S is not, as the step needs its result. The
defaults are 7 us and 5 us, what NCCL's own tuning (src/graph/tuning.cc, protocol LL) has for
starting a collective and for a hop of a tree over the network, and 50 GB/s, one 400 Gb/s adapter
for each GPU. A slower network makes the share of S smaller.
"""

from __future__ import annotations

import argparse
import math
import os
import random
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard

from hf_adalip import AdamLip

COLUMNS = 3
RANKS = (2, 8, 64, 256, 1024)


def resnet50() -> list[int]:
    """Elements of every tensor."""
    convolutions = [3 * 64 * 49]
    channels = 64
    for planes, blocks in ((64, 3), (128, 4), (256, 6), (512, 3)):
        for block in range(blocks):
            convolutions += [channels * planes, 9 * planes * planes, 4 * planes * planes]
            if block == 0:
                convolutions.append(4 * channels * planes)
            channels = 4 * planes
    widths = [64]
    for planes, blocks in ((64, 3), (128, 4), (256, 6), (512, 3)):
        widths += [planes, planes, 4 * planes] * blocks + [4 * planes]
    return convolutions + 2 * widths + [2048 * 1000, 1000]


def bert(width: int = 768, layers: int = 12, vocabulary: int = 30522) -> list[int]:
    linear = [width * width, width]
    block = 4 * linear + 2 * [width, width] + [4 * width * width, 4 * width, 4 * width**2, width]
    return [vocabulary * width, 512 * width, 2 * width, width, width] + layers * block + linear


def llama(width: int, layers: int, inner: int, key_value: int, vocabulary: int) -> list[int]:
    attention = [width * width, width * key_value, width * key_value, width * width]
    block = [*attention, *(3 * [width * inner]), width, width]
    return [vocabulary * width, *(layers * block), width, vocabulary * width]


NETWORKS = {
    "ResNet-50": resnet50(),
    "BERT-base": bert(),
    "Llama-like 0.5B": llama(1024, 24, 4096, 512, 32000),
    "Llama-like 7B": llama(4096, 32, 11008, 4096, 32000),
    "Llama-like 70B": llama(8192, 80, 28672, 1024, 32000),
}


def all_reduce_time(size: float, ranks: int, base: float, alpha: float, beta: float) -> float:
    tree = 2 * math.ceil(math.log2(ranks)) * alpha + 2 * size / beta
    ring = 2 * (ranks - 1) * alpha + 2 * (ranks - 1) / ranks * size / beta
    return base + min(tree, ring)


def model(args: argparse.Namespace) -> None:
    base, alpha, beta = args.base * 1e-6, args.alpha * 1e-6, args.beta * 1e9
    print(f"base {args.base:g} us, alpha {args.alpha:g} us, beta {args.beta:g} GB/s,", end=" ")
    print(f"gradients of {args.bytes} bytes: time of S's all-reduce, and its share of theirs")
    print("| network | tensors | parameters | S | gradients |", end="")
    print("".join(f" N = {n} |" for n in RANKS) + "\n" + "|---" * (5 + len(RANKS)) + "|")
    for name, tensors in NETWORKS.items():
        size, traffic = 4 * COLUMNS * len(tensors), args.bytes * sum(tensors)
        row = f"| {name} | {len(tensors)} | {sum(tensors) / 1e6:.1f} M | {size / 1e3:.1f} kB "
        row += f"| {traffic / 1e6:.0f} MB |"
        for n in RANKS:
            own = all_reduce_time(size, n, base, alpha, beta)
            share = own / (2 * (n - 1) / n * traffic / beta)
            row += f" {own * 1e6:.0f} us, {100 * share:.2g} % |"
        print(row)


class Stack(nn.Module):
    """Linear layers, sharded eight together."""

    def __init__(self, tensors: int, width: int) -> None:
        super().__init__()
        linears = [nn.Linear(width, width) for _ in range(tensors // 2)]
        self.parts = nn.ModuleList(
            nn.Sequential(*linears[i : i + 8]) for i in range(0, len(linears), 8)
        )


def worker(rank: int, ranks: int, store: str, args: argparse.Namespace, output: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{store}", rank=rank, world_size=ranks)
    net = Stack(args.tensors, args.width)
    for part in net.parts:
        fully_shard(part)
    net = fully_shard(net)
    params = list(net.parameters())
    for param in params:
        param.grad = torch.randn_like(param)
    optimizer = AdamLip(net.named_parameters(), lr=1e-4)
    everything = sum(p.numel() for p in params)
    shard = torch.zeros(math.ceil(everything / ranks))
    whole = torch.zeros(len(shard) * ranks)
    norms = torch.zeros(len(params), COLUMNS)
    sent: list[int] = []
    real = dist.all_reduce

    def counted(tensor: Tensor, **options: Any) -> Any:
        sent.append(tensor.numel() * tensor.element_size())
        return real(tensor, **options)

    def unreduced() -> None:
        dist.all_reduce = lambda *args, **options: None  # S is wrong then, and its time right
        optimizer.step()
        dist.all_reduce = real

    def gradients() -> None:
        dist.reduce_scatter_tensor(shard, whole)
        dist.all_gather_into_tensor(whole, shard)

    dist.all_reduce = counted
    optimizer.step()
    dist.all_reduce = real
    work: dict[str, Callable[[], Any]] = {
        "all_reduce": lambda: real(norms),
        "step": optimizer.step,
        "unreduced": unreduced,
        "gradients": gradients,
    }
    times: dict[str, list[float]] = {name: [] for name in work}
    for repetition in range(args.repetitions + 3):
        # Interleaved, as the machine may be busy meanwhile, and in every order, as what runs
        # before leaves the caches cold or warm.
        for name in random.Random(repetition).sample(list(work), len(work)):
            dist.barrier()
            start = time.perf_counter()
            work[name]()
            if repetition >= 3:
                times[name].append(time.perf_counter() - start)
    if rank == 0:
        t = {name: 1e3 * statistics.median(values) for name, values in times.items()}
        row = f"| {ranks} | {len(sent)} | {sum(sent)} | {t['all_reduce']:.2f} ms |"
        row += f" {t['gradients']:.2f} ms | {t['step']:.2f} ms | {t['unreduced']:.2f} ms |"
        row += f" {t['all_reduce'] / t['gradients']:.3f} | {t['step'] / t['unreduced']:.3f} |"
        Path(output).write_text(row)
    dist.barrier()
    dist.destroy_process_group()
    os._exit(0)  # gloo's threads now and then abort a process that ends by itself


def measure(args: argparse.Namespace) -> None:
    elements = args.tensors // 2 * (args.width**2 + args.width)
    print(f"torch {torch.__version__}, gloo, one thread for each process, {os.cpu_count()} CPUs;")
    print(f"fully_shard, AdamLip, {args.tensors} tensors, {elements / 1e6:.2f} M parameters in")
    print(f"float32; medians of {args.repetitions} interleaved repetitions")
    print("| ranks | all-reduces a step | bytes | all-reduce | gradients | step", end=" ")
    print("| step without | all-reduce / gradients | step / without |\n" + "|---" * 9 + "|")
    for ranks in (1, 2, 4):
        with tempfile.TemporaryDirectory() as folder:
            store, output = f"{folder}/store", f"{folder}/row"
            mp.spawn(worker, (ranks, store, args, output), nprocs=ranks)
            print(Path(output).read_text(), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--base", type=float, default=7.0, help="us (7)")
    parser.add_argument("--alpha", type=float, default=5.0, help="us (5)")
    parser.add_argument("--beta", type=float, default=50.0, help="GB/s (50)")
    parser.add_argument("--bytes", type=int, default=2, help="of a gradient's element (2: bf16)")
    parser.add_argument("--measure", action="store_true", help="on gloo processes here")
    parser.add_argument("--tensors", type=int, default=200, help="--measure: even (200)")
    parser.add_argument("--width", type=int, default=128, help="--measure: of a layer (128)")
    parser.add_argument("--repetitions", type=int, default=30, help="--measure: (30)")
    args = parser.parse_args()
    (measure if args.measure else model)(args)


if __name__ == "__main__":
    main()
