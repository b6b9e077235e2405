"""Steps bfloat16 parameters with stochastic rounding, whole and sharded; run on ranks from the
tests. Every rank asserts that they are the same, bit for bit: S is held at 1, as the order in which
norms are added up is another."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Shard, distribute_tensor

from hf_adalip import AdamLip
from tests.distributed.engines import Net, leave
from tests.optim.cases import random_grads

FORMS = {"loop": {"foreach": False}, "foreach": {"foreach": True}, "fused": {"fused": True}}


def columns(net):
    """Parameters cut across their rows, so that a shard is no run of elements."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for module in net.modules():
        for name, p in list(module.named_parameters(recurse=False)):
            part = distribute_tensor(p.detach(), mesh, [Shard(p.dim() - 1)])
            setattr(module, name, nn.Parameter(part))


def check(shard, form):
    torch.manual_seed(0)
    net, sharded = (Net().bfloat16() for _ in range(2))
    sharded.load_state_dict(net.state_dict())
    shard(sharded)
    pairs = list(zip(net.parameters(), sharded.parameters(), strict=True))
    made = [
        AdamLip(x.named_parameters(), stochastic_rounding=True, scale_bounds=(1, 1), **FORMS[form])
        for x in (net, sharded)
    ]
    for step in range(3):
        grads = random_grads(dict(net.named_parameters()), step).values()
        for (p, part), grad in zip(pairs, grads, strict=True):
            p.grad = grad
            part.grad = distribute_tensor(grad, part.device_mesh, part.placements)
        for optimizer in made:
            optimizer.step()
    assert all(torch.equal(p, part.full_tensor()) for p, part in pairs), (shard, form)


def main():
    dist.init_process_group("gloo")
    for shard in (fully_shard, columns):
        for form in FORMS:
            check(shard, form)
    leave()
