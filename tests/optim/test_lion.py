"""LionLip: Lion, which is not of the paper, under the paper's S."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from hf_adalip import LionLip, create_optimizer
from tests.optim.cases import Named, assert_same, named_params, random_grads, set_grads, snapshot
from tests.optim.cases import train as random_steps
from tests.reference import Reference

FORMS: dict[str, dict[str, bool]] = {
    "loop": {"foreach": False},
    "foreach": {"foreach": True},
    "fused": {"fused": True},
}
OPTIONS: dict[str, dict[str, Any]] = {
    "defaults": {},
    "unbounded": {"scale_bounds": None},
    "theoretical": {"c": "theoretical", "scale_bounds": None},
    "betas": {"betas": (0.8, 0.95), "gamma": 0.3},
    "no first moment": {"betas": (0.0, 0.9)},
    "no memory": {"betas": (0.9, 0.0)},
    "decoupled": {"weight_decay": 0.1},
    "L2": {"weight_decay": 0.1, "decoupled_weight_decay": False},
    "maximize": {"maximize": True},
}
forms = pytest.mark.parametrize("form", FORMS)


def lionlip(params: Named, form: str = "loop", **options: Any) -> LionLip:
    return LionLip(list(params.items()), **{"lr": 0.05} | FORMS[form] | options)


@pytest.mark.usefixtures("float64")
@forms
@pytest.mark.parametrize("layers", ["tensor", "module"])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=list(OPTIONS))
def test_equals_the_reference(form: str, layers: str, options: dict[str, Any]) -> None:
    params = named_params(dtype=torch.float64)
    optimizer = lionlip(params, form, layers=layers, **options)
    options = {"betas": (0.9, 0.99)} | options
    if layers == "module":
        options["layer_of"] = lambda name: name.rpartition(".")[0]
    reference = Reference("lion", **options)
    w = {name: p.detach().numpy().copy() for name, p in params.items()}
    for seed in range(8):
        grads: dict[str, Any] = {n: g.numpy() for n, g in random_grads(params, seed).items()}
        if seed == 3:
            grads["b.weight"] = np.zeros_like(grads["b.weight"])
        if seed == 5:
            grads["a.bias"] = None
        set_grads(params, grads)
        optimizer.step()
        w = reference.step(w, grads, 0.05)
    for name, p in params.items():
        np.testing.assert_allclose(p.detach().numpy(), w[name], rtol=1e-11, err_msg=name)
    scales = {name: rate.scale for name, rate in optimizer.layer_learning_rates().items()}
    assert scales == pytest.approx(reference.S, rel=1e-11)


@forms
def test_is_timms_lion_where_s_is_one(form: str) -> None:
    timm_optim = pytest.importorskip("timm.optim")
    ours, theirs = (named_params(dtype=torch.float64) for _ in range(2))
    optimizer = lionlip(ours, form, scale_bounds=(1.0, 1.0), weight_decay=0.1)
    lion = timm_optim.Lion(list(theirs.values()), lr=0.05, weight_decay=0.1)
    random_steps(optimizer, ours, range(20))
    random_steps(lion, theirs, range(20))
    for name, p in ours.items():
        torch.testing.assert_close(p, theirs[name], rtol=1e-12, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("form", ["foreach", "fused"])
def test_forms_move_alike(form: str, dtype: torch.dtype) -> None:
    """To the rounding of what is added up in the averages, and of S."""
    shapes = {"m.0": (1,), "m.1": (33,), "m.2": (40, 125)}
    loop, other = (named_params(shapes, dtype) for _ in range(2))
    one, two = lionlip(loop), lionlip(other, form)
    for seed in range(4):
        random_steps(one, loop, [seed])
        random_steps(two, other, [seed])
    eps = torch.finfo(dtype).eps
    for name, p in loop.items():
        torch.testing.assert_close(other[name], p, rtol=4 * eps, atol=4 * eps * 0.05)
        averages = (o.state[x]["exp_avg"] for o, x in ((two, other[name]), (one, p)))
        torch.testing.assert_close(*averages, rtol=2 * eps, atol=2 * eps * 0.04)


@forms
@pytest.mark.slow
def test_a_history_may_be_a_sketch_or_a_dtype(form: str) -> None:
    for history in ("bfloat16", "sketch"):
        params = named_params({"m.0": (80, 125)}, torch.float32)
        optimizer = lionlip(params, form, history=history, sketch_size=32)
        random_steps(optimizer, params, range(3))
        assert 0.3 < optimizer.layer_learning_rates()["m.0"].scale < 1.5


@pytest.mark.parametrize("form", ["loop", "foreach"])
def test_complex_is_its_real_view(form: str) -> None:
    z = torch.randn(4, 3, dtype=torch.complex64).requires_grad_()
    x = torch.view_as_real(z.detach().clone()).requires_grad_()
    complex_, real = lionlip({"m.p": z}, form), lionlip({"m.p": x}, form)
    for _ in range(5):
        z.grad = torch.randn(4, 3, dtype=torch.complex64)
        x.grad = torch.view_as_real(z.grad).clone()
        complex_.step()
        real.step()
    assert torch.equal(torch.view_as_real(z.detach()), x.detach())


@forms
def test_goes_on_from_a_state_dict(form: str) -> None:
    def both(params: Named, optimizer: LionLip) -> Any:
        random_steps(optimizer, params, range(3, 6))
        return snapshot(optimizer, params)

    params = named_params(dtype=torch.float32)
    optimizer = lionlip(params, form)
    random_steps(optimizer, params, range(3))
    others: dict[str, Tensor] = {n: p.detach().clone().requires_grad_() for n, p in params.items()}
    again = lionlip(others, form, lr=1.0)
    again.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert_same(both(others, again), both(params, optimizer))


def test_by_name() -> None:
    optimizer = create_optimizer(torch.nn.Linear(4, 2), "lionlip", weight_decay=0.1)
    assert type(optimizer) is LionLip
    assert optimizer.param_groups[0]["betas"] == (0.9, 0.99)
    with pytest.raises(TypeError, match="lionlip has no argument 'eps'"):
        create_optimizer(torch.nn.Linear(4, 2), "lionlip", eps=1e-8)
