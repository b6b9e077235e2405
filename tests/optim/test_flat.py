"""Flat tensors in the place of parameters, as DeepSpeed makes them; here on one process."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel

from hf_adalip import AdamLip
from tests.optim.cases import CLASSES, assert_same, named_params, six


@pytest.fixture
def group() -> Iterator[dist.ProcessGroup]:
    """Of one process."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield dist.group.WORLD
    dist.destroy_process_group()


def flatten(params: list[Tensor], group: dist.ProcessGroup) -> Tensor:
    """What ZeRO-1 and 2 do: the parameters become views of what the flat tensor is a copy of."""
    whole = torch.cat([p.detach().flatten() for p in params])
    start = 0
    for p in params:
        p.data = whole[start : start + p.numel()].view_as(p)
        here = SimpleNamespace(start=start, numel=p.numel())
        whole_p = SimpleNamespace(start=0, numel=p.numel())
        p._hp_mapping = SimpleNamespace(hp_fragment_address=here, lp_fragment_address=whole_p)
        p._dp_group = group
        start += p.numel()
    return whole.clone().requires_grad_()


@six
@pytest.mark.parametrize("count", [1, 4])
@pytest.mark.parametrize("foreach", [False, True], ids=["loop", "foreach"])
def test_a_flat_tensor_steps_as_its_parameters_do(
    name: str, count: int, foreach: bool, group: dist.ProcessGroup
) -> None:
    """Also one of a single parameter, which has its size."""
    named = dict(list(named_params().items())[:count])
    plain = {n: p.detach().clone().requires_grad_() for n, p in named.items()}
    flattened = CLASSES[name](named.items(), layers="module", foreach=foreach)
    whole = CLASSES[name](plain.items(), layers="module", foreach=foreach)
    flat = flatten(list(named.values()), group)
    flattened.param_groups[0]["params"] = [flat]
    for step in range(5):
        generator = torch.Generator().manual_seed(step)
        for p in plain.values():
            p.grad = torch.randn(p.shape, generator=generator)
        flat.grad = torch.cat([p.grad.flatten() for p in plain.values()])
        flattened.step()
        whole.step()
        flattened.load_state_dict(copy.deepcopy(flattened.state_dict()))
    assert_same(flat, torch.cat([p.detach().flatten() for p in plain.values()]))
    assert flattened.layer_learning_rates() == whole.layer_learning_rates()
    assert flattened.state[flat]["lipschitz_scale"].shape == (len(named),)


def test_a_wrong_map_is_refused(group: dist.ProcessGroup) -> None:
    params = named_params()
    optimizer = AdamLip(params.items())
    flat = flatten(list(params.values()), group)
    first, second, *_ = params.values()
    first._hp_mapping, second._hp_mapping = second._hp_mapping, first._hp_mapping
    optimizer.param_groups[0]["params"] = [flat]
    flat.grad = torch.ones_like(flat)
    before = flat.detach().clone()
    with pytest.raises(RuntimeError, match="round_robin_gradients"):
        optimizer.step()
    assert_same(flat, before)


def test_an_optimizer_whose_parameters_were_replaced_can_be_copied() -> None:
    params = named_params()
    optimizer = AdamLip(params.items())
    optimizer.param_groups[0]["params"] = [torch.zeros(50, requires_grad=True)]
    copied = copy.deepcopy(optimizer)
    assert copied.param_groups[0]["layer_names"] == list(params)


@pytest.mark.parametrize("when", ["before", "after"])
def test_fsdp1s_flat_parameters_are_refused(when: str, group: dist.ProcessGroup) -> None:
    net = nn.Linear(3, 2)
    optimizer = AdamLip(net.parameters())
    wrapped = FullyShardedDataParallel(net, device_id=torch.device("cpu"))
    wrapped(torch.ones(1, 3)).sum().backward()
    if when == "before":
        with pytest.raises(RuntimeError, match="use_orig_params"):
            optimizer.step()
    else:
        with pytest.raises(ValueError, match="use_orig_params"):
            AdamLip(wrapped.parameters())
