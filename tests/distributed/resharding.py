"""Saves a training state sharded over some ranks, or goes on from it; run by torchrun.

    torchrun --nproc-per-node 2 -m tests.distributed.resharding save FOLDER OPTIMIZER
    torchrun --nproc-per-node 4 -m tests.distributed.resharding load FOLDER OPTIMIZER

Both train to the same step; rank 0 writes the whole parameters and S to FOLDER.MODE.RANKS.pt.
"""

from __future__ import annotations

import sys

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    get_optimizer_state_dict,
    get_state_dict,
    set_state_dict,
)

from hf_adalip import create_optimizer
from tests.distributed.engines import Net, batch, data_parallel_share, whole, wrap

SAVED, END = 6, 12


def main():
    mode, folder, name = sys.argv[1:]
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    torch.manual_seed(0)
    net, _ = wrap("fsdp2", Net())
    optimizer = create_optimizer(net, name, lr=1e-2, weight_decay=0.01, c="theoretical")
    share = data_parallel_share("fsdp2")

    def train(start, end):
        for step in range(start, end):
            x, y = batch(step)
            optimizer.zero_grad()
            nn.functional.cross_entropy(net(x[share]), y[share]).backward()
            optimizer.step()

    if mode == "save":
        # Makes the state by a step with zero gradients and lr = 0, which is to move nothing.
        get_optimizer_state_dict(net, optimizer)
        train(0, SAVED)
        model, state = get_state_dict(net, optimizer)
        dcp.save({"model": model, "optimizer": state}, checkpoint_id=folder)
    else:
        model, state = get_state_dict(net, optimizer)
        dcp.load({"model": model, "optimizer": state}, checkpoint_id=folder)
        set_state_dict(net, optimizer, model_state_dict=model, optim_state_dict=state)
    train(SAVED, END)
    parameters = [whole(p).detach() for p in net.parameters()]
    scales = {layer: rate.scale for layer, rate in optimizer.layer_learning_rates().items()}
    if dist.get_rank() == 0:
        torch.save((parameters, scales), f"{folder}.{mode}.{dist.get_world_size()}.pt")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
