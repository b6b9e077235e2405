"""A tiny Llama that transformers makes tensor parallel, against the whole one; run on ranks.

    torchrun --nproc-per-node 2 -m tests.distributed.llama MODEL OUTPUT.json OPTIMIZER...

MODEL is a folder of from_pretrained. Rank 0 writes the largest relative differences.
"""

from __future__ import annotations

import sys

import torch
import torch.distributed as dist
from transformers import LlamaForCausalLM

from hf_adalip import create_optimizer
from tests.distributed.engines import clip, difference, finish, whole

STEPS = 20


def train(model, name):
    # RMSProp, which corrects no bias, begins with steps of ten times its learning rate.
    lr = 1e-4 if name.startswith("rms") else 1e-3
    optimizer = create_optimizer(model, name, lr=lr, weight_decay=0.01)
    losses, norms = [], []
    for step in range(STEPS):
        generator = torch.Generator().manual_seed(step)
        tokens = torch.randint(0, 50, (4, 9), generator=generator)
        optimizer.zero_grad()
        loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        norms.append(clip(model.parameters(), 1.0))
        optimizer.step()
        losses.append(whole(loss.detach()).item())
    weights = {name: whole(p).detach() for name, p in model.named_parameters()}
    return weights, optimizer.layer_learning_rates(), losses, norms


def main():
    folder, path, *names = sys.argv[1:]
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    found = {}
    for name in names:
        split = LlamaForCausalLM.from_pretrained(folder, tp_plan="auto")
        sharded = sum(hasattr(p, "device_mesh") for p in split.parameters())
        weights, rates, losses, norms = train(split, name)
        everyone = [None] * dist.get_world_size()
        dist.all_gather_object(everyone, rates)
        if dist.get_rank() != 0:  # which would only train as rank 0 does
            continue
        expected = train(LlamaForCausalLM.from_pretrained(folder), name)
        found[name] = {
            "sharded": sharded,
            "S": max(abs(rates[k].scale / r.scale - 1) for k, r in expected[1].items()),
            "weights": max(
                ((weights[k] - w).norm() / w.norm()).item() for k, w in expected[0].items()
            ),
            "losses": difference(losses, expected[2]),
            "norms": difference(norms, expected[3]),
            "same_on_all_ranks": all(other == rates for other in everyone),
        }
    finish(path, found)


if __name__ == "__main__":
    main()
