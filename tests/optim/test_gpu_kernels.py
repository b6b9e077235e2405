"""The Triton kernels against the loop form.

The same tests run in two places. On a CUDA device, where there is one. And on the CPU, by Triton's
interpreter: Triton looks at TRITON_INTERPRET when a kernel is defined, and half of it is replaced
then, so `test_in_the_interpreter` runs this file again, in a process of its own. What the
interpreter cannot show is whether the kernels compile: that is tested without a device too.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from hf_adalip.optim import signals
from hf_adalip.optim import step as loop
from hf_adalip.optim.batch import Batch
from hf_adalip.optim.forms.kernels import COLUMNS, Constants, Spec, Tensors, gpu, tables
from hf_adalip.optim.rounding import Draws
from hf_adalip.optim.rules import SGD, Adam, Lion, RMSprop, Rule
from hf_adalip.optim.sharding import Place
from hf_adalip.optim.signals import opmath_dtype

needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="Triton is not installed"
)
pytestmark = needs_triton

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = torch.device("cpu" if INTERPRETED else "cuda")

on_device = pytest.mark.skipif(
    not INTERPRETED and not torch.cuda.is_available(),
    reason="no CUDA device (the interpreter runs these in test_in_the_interpreter)",
)
on_cuda = pytest.mark.skipif(
    INTERPRETED or not torch.cuda.is_available(), reason="no CUDA device: nothing else shows it"
)
outside = pytest.mark.skipif(INTERPRETED, reason="not for the interpreter")

BLOCK = 64
SIZES = [0, 1, BLOCK - 1, BLOCK, BLOCK + 1, 3 * BLOCK + 5]

REAL = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
dtypes = pytest.mark.parametrize("dtype", REAL, ids=lambda d: str(d).removeprefix("torch."))


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "BLOCK", BLOCK)
    monkeypatch.setattr(gpu, "STEP", BLOCK // 4)


@pytest.fixture(autouse=True, scope="module")
def _interpreter() -> None:
    """What the interpreter needs to be exact and fast enough."""
    if not INTERPRETED:
        return
    import numpy as np
    import triton.language as tl
    from triton.runtime import interpreter

    # It cuts float32 to bfloat16, where GPUs round to nearest.
    cast = interpreter.InterpreterBuilder.cast_impl

    def rounding_cast(self: Any, source: Any, target: Any) -> Any:
        if source.dtype.scalar == tl.float32 and target.scalar == tl.bfloat16:
            rounded = torch.from_numpy(np.ascontiguousarray(source.data)).bfloat16()
            bits = rounded.view(torch.int16).numpy().view(np.uint16)
            return interpreter.TensorHandle(bits, tl.bfloat16)
        return cast(self, source, target)

    interpreter.InterpreterBuilder.cast_impl = rounding_cast
    for name in ("create_fp_trunc", "create_fp_ext"):
        setattr(interpreter.InterpreterBuilder, name, rounding_cast)

    # It looks through all of triton.language at every call; once for each module is enough here.
    patch = interpreter._patch_lang
    done: dict[int, Any] = {}

    class Stays:
        def restore(self) -> None: ...

    def patch_once(function: Any) -> Any:
        module = id(function.__globals__)
        if module not in done:
            done[module] = patch(function)
        return Stays()

    interpreter._patch_lang = patch_once


@pytest.mark.slow
@outside
def test_in_the_interpreter() -> None:
    """All tests of this file, in a process in which Triton is its interpreter."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__]
    environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=600)
    assert done.returncode == 0, done.stdout[-10_000:] + done.stderr[-2_000:]


# Cases


def _case(name: str, rule: Rule, updates: bool, **group: Any) -> tuple[str, Any, Any, Any]:
    signal = signals.Updates() if updates else signals.Gradients()
    return f"{name}{'-U' if updates else ''}", rule, signal, group


CASES = [
    case
    for updates in (False, True)
    for case in (
        _case("SGD", SGD(), updates, momentum=0.0, nesterov=False),
        _case("momentum", SGD(), updates, momentum=0.9, nesterov=False),
        _case("nesterov", SGD(), updates, momentum=0.9, nesterov=True),
        _case("momentum gone", SGD(), updates, momentum=0.0, nesterov=True),
        _case("RMSprop", RMSprop(), updates, alpha=0.99, eps=1e-8, eps_in_sqrt=False),
        _case("Adam", Adam(), updates, betas=(0.9, 0.999), eps=1e-8, eps_in_sqrt=False),
        _case("Lion", Lion(), updates, betas=(0.9, 0.99)),
    )
]
cases = pytest.mark.parametrize(
    ("rule", "signal", "group"), [case[1:] for case in CASES], ids=[case[0] for case in CASES]
)
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "decoupled": {"weight_decay": 0.1},
    "coupled": {"weight_decay": 0.1, "decoupled_weight_decay": False},
    "maximize": {"maximize": True, "weight_decay": 0.1, "decoupled_weight_decay": False},
    "eps in root": {"eps_in_sqrt": True, "eps": 1e-3},
}


@dataclass
class Work:
    """A batch of the loop form, and what the kernels are handed for it."""

    batch: Batch
    spec: Spec
    tensors: Tensors
    numbers: Tensor
    constants: Constants
    rates: Tensor
    history_rates: Tensor

    def measure(self) -> Tensor:
        return gpu.measure(self.spec, self.tensors, self.numbers, self.constants).cpu()

    def advance(self, active: Tensor | None = None) -> None:
        active = torch.ones(len(self.batch.params), dtype=torch.bool) if active is None else active
        gpu.advance(self.spec, self.tensors, self.numbers, self.constants, active.to(DEVICE))

    def pairs(self) -> Iterator[tuple[str, Tensor, Tensor]]:
        """Each tensor that a step writes: its name, the loop form's and the kernels'."""
        for i, (param, state) in enumerate(zip(self.batch.params, self.batch.states, strict=True)):
            yield f"param {i}", param, self.tensors.params[i].cpu()
            for name, moment in zip(
                self.batch.rule.state_keys(self.batch.group), self.tensors.moments, strict=True
            ):
                yield f"{name} {i}", state[name], moment[i].cpu()
            for name in self.batch.signal.history_keys(self.batch.rule, self.batch.group):
                yield f"{name} {i}", state[name], self.tensors.history[i].cpu()


def work(
    rule: Rule,
    signal: signals.Signal,
    group: dict[str, Any],
    dtype: torch.dtype = torch.float32,
    sizes: list[int] = SIZES,
    history: torch.dtype | None = None,
    misaligned: bool = False,
) -> Work:
    """Tensors as after some steps; the second of them has not taken any."""
    defaults = {"weight_decay": 0.0, "decoupled_weight_decay": True, "maximize": False}
    group = defaults | {"differentiable": False, "eps_in_sqrt": False} | group
    generator = torch.Generator().manual_seed(0)
    history = history or dtype

    def draw(name: str = "") -> list[Tensor]:
        made = [torch.randn(n, dtype=torch.float64, generator=generator) for n in sizes]
        made = [x * 0 if name and i == 1 else x for i, x in enumerate(made)]
        square = name in ("square_avg", "exp_avg_sq")
        stored = history if name.startswith("prev_") else dtype
        return [(x.square() if square else x).to(stored) for x in made]

    def placed(roles: list[Tensor]) -> list[Tensor]:
        return [_misaligned(x) if misaligned else x.clone().to(DEVICE) for x in roles]

    steps = torch.arange(len(sizes)).float() * 3 - 2
    steps = steps.clamp(min=1).to(opmath_dtype(dtype))
    moments, histories = rule.state_keys(group), signal.history_keys(rule, group)
    columns = {name: draw(name) for name in moments + histories}
    states = [{name: column[i] for name, column in columns.items()} for i in range(len(sizes))]
    for i, state in enumerate(states):
        state["prev_lr"] = torch.tensor(0.0 if i == 1 else 0.07, dtype=steps.dtype)
    lr = 0.05
    keys = rule.state_keys(group), signal.history_keys(rule, group)
    batch = Batch(rule, signal, group, [], draw(), draw(), states, steps, lr, *keys)
    wide = opmath_dtype(dtype)
    rates = torch.rand(len(sizes), generator=generator).to(wide)
    beta1, beta2 = group.get("betas", (group.get("alpha", 0.0), 0.0))
    decoupled = group["decoupled_weight_decay"]
    recomputes = signal.is_recomputed(rule, group)
    before = (steps - 1).clamp(min=1)
    prev_rate = torch.tensor(
        [s["prev_lr"] for s in states], dtype=wide
    ) / rule.inverse_bias_correction(before, group)

    def corrections(steps: Tensor) -> list[Tensor]:
        return list(Adam().bias_corrections(steps, {"betas": (beta1, beta2)}))

    numbers = [
        *(torch.full_like(steps, lr), *corrections(steps)),
        *(prev_rate, *corrections(before)),
        *(rates, rates, torch.full_like(steps, 1 - lr * group["weight_decay"] * decoupled), steps),
    ]
    spec = Spec(
        rule=type(rule).__name__,
        signal="recomputed" if recomputes else "update" if signal.of_updates else "gradient",
        dtype=dtype,
        history=history if histories else None,
        momentum=bool(group.get("momentum")),
        nesterov=bool(group.get("nesterov")),
        eps_in_sqrt=group["eps_in_sqrt"],
        maximize=group["maximize"],
        coupled=bool(group["weight_decay"] and not decoupled),
    )
    tensors = Tensors(
        params=placed(batch.params),
        grads=placed(batch.grads),
        moments=tuple(placed(columns[name]) for name in moments),
        history=placed([x for name in histories for x in columns[name]]),
        starts=[],
    )
    constants = Constants(
        *(group.get("momentum", 0.0), beta1, beta2, group.get("eps", 0.0), group["weight_decay"])
    )
    numbers_there = torch.stack(numbers, dim=1).to(wide).to(DEVICE)
    return Work(batch, spec, tensors, numbers_there, constants, rates, rates)


def _misaligned(x: Tensor) -> Tensor:
    """x at an address that is no multiple of 16."""
    return x.new_empty(x.numel() + 1).to(DEVICE)[1:].copy_(x)


def assert_close_norms(actual: Tensor, expected: Tensor) -> None:
    """To a few units in the last place of ‖x‖, from which x_{t-1} may take nearly all."""
    ulp = torch.finfo(expected.dtype).eps
    scale = expected.max(dim=1, keepdim=True).values
    assert ((actual - expected).abs() <= 8 * ulp * scale).all(), (actual, expected)


def assert_close_steps(made: Work) -> None:
    """To a few units in the last place; one in low precision, where rounding may tip over."""
    for name, expected, actual in made.pairs():
        assert actual.dtype == expected.dtype
        ulp = torch.finfo(expected.dtype).eps
        close = (8 if expected.dtype in (torch.float64, torch.float32) else 1.01) * ulp
        torch.testing.assert_close(
            actual, expected, rtol=close, atol=close, msg=lambda m, n=name: f"{n}: {m}"
        )


def assert_equals_loop(made: Work) -> None:
    assert_close_norms(made.measure(), loop.measure(made.batch))
    loop.advance(
        *(made.batch, made.rates, made.history_rates),
        torch.ones(len(made.batch.params), dtype=torch.bool),
    )
    made.advance()
    assert_close_steps(made)


# Equality with the loop form


@on_device
@cases
@dtypes
def test_equals_loop(
    rule: Rule, signal: signals.Signal, group: dict[str, Any], dtype: torch.dtype
) -> None:
    assert_equals_loop(work(rule, signal, group, dtype))


@on_device
@cases
@pytest.mark.parametrize("option", list(OPTIONS)[1:])
def test_options(rule: Rule, signal: signals.Signal, group: dict[str, Any], option: str) -> None:
    assert_equals_loop(work(rule, signal, group | OPTIONS[option], sizes=[5, 1, BLOCK]))


@on_device
@cases
@pytest.mark.parametrize(
    ("dtype", "history"),
    [(torch.float32, torch.bfloat16), (torch.bfloat16, torch.float32)],
    ids=["narrow", "wide"],
)
def test_history_of_another_dtype(
    rule: Rule,
    signal: signals.Signal,
    group: dict[str, Any],
    dtype: torch.dtype,
    history: torch.dtype,
) -> None:
    assert_equals_loop(work(rule, signal, group, dtype, [5, 1, BLOCK], history))


STARTS = [0, 2**32 - 3, 2**33 + 5, 7, 2**32 - 70, 1]


def stochastic(made: Work) -> Work:
    """The same with stochastic rounding, of tensors that begin anywhere in their parameters."""
    made.spec = replace(made.spec, stochastic=True)
    made.tensors.seeds = [31 * i + 2**32 - 7 for i in range(len(made.batch.params))]
    made.tensors.starts = STARTS[: len(made.batch.params)]
    of = zip(made.tensors.seeds, made.tensors.starts, strict=True)
    made.batch.draws = [Draws(seed, Place((), ()), start) for seed, start in of]
    return made


@on_device
@cases
def test_stochastic_rounding(rule: Rule, signal: signals.Signal, group: dict[str, Any]) -> None:
    assert_equals_loop(stochastic(work(rule, signal, group, torch.bfloat16)))


@on_device
@pytest.mark.parametrize("option", ["plain", "decoupled"])
def test_stochastic_rounding_has_the_same_bits(option: str) -> None:
    """Where all that comes before has: the bits of SGD and Lion are those of the loop."""
    for rule, group in (
        (SGD(), {"momentum": 0.9, "nesterov": False}),
        (Lion(), {"betas": (0.9, 0.99)}),
    ):
        made = stochastic(work(rule, signals.Gradients(), group | OPTIONS[option], torch.bfloat16))
        before = [p.clone() for p in made.batch.params]
        made.batch.params[2][:3] = torch.tensor([torch.inf, -torch.inf, torch.nan])
        made.tensors.params[2][:3] = made.batch.params[2][:3]
        everyone = torch.ones(len(SIZES), dtype=torch.bool)
        loop.advance(made.batch, made.rates, made.history_rates, everyone)
        made.advance()
        for name, expected, actual in made.pairs():
            torch.testing.assert_close(actual, expected, rtol=0, atol=0, equal_nan=True, msg=name)
        assert not torch.equal(before[5], made.batch.params[5])


@on_device
@cases
def test_misaligned_memory(rule: Rule, signal: signals.Signal, group: dict[str, Any]) -> None:
    assert_equals_loop(work(rule, signal, group, sizes=[5, 1, BLOCK], misaligned=True))


@on_device
@cases
def test_no_tensors(rule: Rule, signal: signals.Signal, group: dict[str, Any]) -> None:
    for sizes in ([], [0], [0, 0]):
        made = work(rule, signal, group, sizes=sizes)
        assert torch.equal(made.measure(), torch.zeros(len(sizes), 3))
        made.advance()


@on_device
def test_nothing_beyond_the_end_is_counted_or_written() -> None:
    """ε = 0 makes 0/0 of what a program reads beyond the end."""
    made = work(Adam(), signals.Updates(), {"betas": (0.9, 0.999), "eps": 0.0}, sizes=[3, 5])
    made.tensors.moments[1][1].fill_(1.0)
    memory = torch.full((7,), 7.0, device=DEVICE)
    memory[1:4] = made.tensors.params[0]
    made.tensors.params[0] = memory[1:4]
    assert made.measure().isfinite().all()
    made.advance()
    assert memory[[0, 4, 5, 6]].tolist() == [7.0] * 4
    assert memory[1:4].isfinite().all()


# What is not finite


@on_device
@cases
def test_what_does_not_go_is_neither_read_nor_written(
    rule: Rule, signal: signals.Signal, group: dict[str, Any]
) -> None:
    """Its tensors have no memory here: a read would be a fault. But its history becomes zero."""
    made, without = (work(rule, signal, group, sizes=[3, 2 * BLOCK + 7, BLOCK]) for _ in range(2))
    for history in made.tensors.history:
        history += 1
    lists = [made.tensors.params, made.tensors.grads, *made.tensors.moments]
    taken = [(role, role[1]) for role in lists if role]
    for role, tensor in taken:
        role[1] = tensor.to("meta")
    made.advance(torch.tensor([True, False, True]))
    for role, tensor in taken:
        role[1] = tensor
    without.advance()
    for (name, before, ours), (_, _, stepped) in zip(made.pairs(), without.pairs(), strict=True):
        if name.endswith(" 1"):
            assert torch.equal(ours, before * (not name.startswith("prev_"))), name
        else:
            assert torch.equal(ours, stepped), name


@on_device
@cases
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_nonfinite(rule: Rule, signal: signals.Signal, group: dict[str, Any], bad: float) -> None:
    """Norms of that tensor are not finite; and what is not active only forgets its history."""
    made = work(rule, signal, group, sizes=[3, 1, 70])
    clean = made.measure()
    made.tensors.grads[2][69] = bad
    norms = made.measure()
    assert not norms[2, 0].isfinite()
    assert torch.equal(norms[:2], clean[:2])
    before = [x.clone() * (not name.startswith("prev_")) for name, _, x in made.pairs()]
    made.advance(torch.tensor([False, False, False]))
    assert all(torch.equal(x, y) for x, (_, _, y) in zip(before, made.pairs(), strict=True))


# Sums


@on_device
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_sums_of_many_chunks(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """More chunks than are added side by side, and the same however they are batched."""
    monkeypatch.setattr(gpu, "BLOCK", 8)
    monkeypatch.setattr(gpu, "STEP", 4)
    monkeypatch.setattr(gpu, "ROWS", 64)
    made = work(SGD(), signals.Gradients(), {"momentum": 0.0}, dtype, [7, 8 * 150 + 3, 20])
    norms = made.measure()
    assert_close_norms(norms, loop.measure(made.batch))
    params, grads, history = made.tensors.params, made.tensors.grads, made.tensors.history
    one = Tensors(params[1:2], grads[1:2], (), history[1:2], [])
    alone = gpu.measure(made.spec, one, made.numbers[1:2], made.constants)
    assert torch.equal(alone.cpu(), norms[1:2])


# Sketches


def _mix(x: int) -> int:
    x = ((x ^ (x >> 16)) * 0x85EBCA6B) % 2**32
    x = ((x ^ (x >> 13)) * 0xC2B2AE35) % 2**32
    return x ^ (x >> 16)


def sketch(x: Tensor, k: int, start: int = 0) -> Tensor:
    """Element by element, as kernels/__init__.py has it."""
    result = [0.0] * k
    for i, value in enumerate(x.double().tolist(), start):
        negative = _mix((i // 32 + 0x9E3779B9) % 2**32) >> (i % 32) & 1
        result[(i + _mix((i // k + 2 * 0x9E3779B9) % 2**32)) % k] += -value if negative else value
    return torch.tensor(result, dtype=torch.float64)


@on_device
@cases
@pytest.mark.parametrize("k", [32, 64])
def test_sketch(
    rule: Rule,
    signal: signals.Signal,
    group: dict[str, Any],
    k: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(gpu, "SKETCHED_BLOCKS", 2)
    monkeypatch.setattr(gpu, "_SLICE", 32)
    made = work(rule, signal, group, sizes=[0, 1, 31, 64, 65, 200])
    starts = [5, 0, 7, 64, 2**33 + 63, 100]
    exact = loop.measure(made.batch)
    # Where x is an update, it is had by sketching the tensors with a history of zeros.
    spec = replace(made.spec, history=None, sketch=k)
    tensors = replace(made.tensors, starts=starts, history=[])
    rows = gpu.measure(spec, tensors, made.numbers, made.constants).cpu()
    assert_close_norms(rows[:, :2], exact[:, :2])
    assert not rows[:, 2].any()
    for i, (param, grad) in enumerate(zip(made.batch.params, made.batch.grads, strict=True)):
        x = loop._gradient(param, grad, made.batch.group)
        if signal.of_updates:
            new = rule.moments(x, made.batch.states[i], made.batch.group)
            corrections = loop._corrections(made.batch, made.batch.steps)
            x = -0.05 * rule.direction(new, corrections[i], made.batch.group)
        expected = sketch(x, k, starts[i])
        torch.testing.assert_close(
            rows[i, 3:].double(), expected, rtol=1e-6, atol=1e-6 * x.norm().item()
        )


@on_device
def test_sketches_of_parts_add_up() -> None:
    group = {"momentum": 0.0}
    made = work(SGD(), signals.Gradients(), group, torch.float64, [300])
    (whole,) = made.tensors.grads
    cuts = [(0, 0), (0, 17), (17, 100), (100, 300)]

    def sketches(starts: list[int], grads: list[Tensor]) -> Tensor:
        numbers = made.numbers.expand(len(grads), -1).contiguous()
        spec = replace(made.spec, history=None, sketch=64)
        tensors = Tensors(grads, grads, (), [], starts)
        return gpu.measure(spec, tensors, numbers, made.constants)[:, 3:]

    parts = sketches([a for a, _ in cuts], [whole[a:b] for a, b in cuts])
    torch.testing.assert_close(parts.sum(0), sketches([0], [whole])[0], rtol=1e-12, atol=1e-12)


# Compilation, without a device


class NoDevice:
    """A driver of no device, for whose kind kernels are compiled."""

    arch = 90

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", self.arch, 32)

    def get_current_device(self) -> int:
        return self.arch  # by which Triton keeps kernels apart

    def get_current_stream(self, device: object = None) -> int:
        return 0


@dataclass
class Compiler:
    driver: NoDevice
    kernels: list[Any]


@pytest.fixture
def compiler(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> Compiler:
    """What would be launched is compiled instead."""
    from triton.runtime import driver
    from triton.runtime.jit import JITFunction

    result = Compiler(NoDevice(), [])
    run = JITFunction.run

    def compile_only(self: Any, *args: Any, **options: Any) -> Any:
        kernel = run(self, *args, **options | {"warmup": True})
        result.kernels.append(kernel)
        return kernel

    active = "_active" if hasattr(driver, "_active") else "active"
    monkeypatch.setattr(driver, active, result.driver)
    monkeypatch.setattr(JITFunction, "run", compile_only)
    monkeypatch.setattr(gpu, "BLOCK", 4096)
    monkeypatch.setattr(gpu, "STEP", 1024)
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path_factory.mktemp("triton")))
    monkeypatch.setattr(sys.modules[__name__], "DEVICE", torch.device("cpu"))
    return result


@pytest.mark.slow
@outside
@cases
@pytest.mark.parametrize("arch", [80, 90])
def test_compiles(
    rule: Rule,
    signal: signals.Signal,
    group: dict[str, Any],
    arch: int,
    compiler: Compiler,
) -> None:
    """To machine code, with vectors of 16 bytes, and nothing contracted."""
    compiler.driver.arch = arch
    made = work(rule, signal, group)
    made.measure()
    made.advance()
    measured, _, advanced = compiler.kernels
    roles = 2 + len(made.tensors.moments) + bool(made.tensors.history)
    reads = len(made.tensors.moments) + 1 if signal.of_updates else 1
    reads += bool(made.tensors.history)
    for kernel, least in ((measured, reads), (advanced, roles)):
        ptx = kernel.asm["ptx"]
        assert len(kernel.asm["cubin"]) > 0
        assert ptx.count("ld.global.v4") >= least
        assert "fma.rn.f32" not in ptx
    assert "st.global.v4" in advanced.asm["ptx"]


@pytest.mark.slow
@outside
@dtypes
def test_compiles_for_every_dtype(dtype: torch.dtype, compiler: Compiler) -> None:
    group = {"betas": (0.9, 0.999), "eps": 1e-8}
    made = work(Adam(), signals.Updates(), group, dtype)
    made.measure()
    made.advance()
    spec = replace(made.spec, history=None, sketch=4096)
    tensors = replace(made.tensors, history=[], starts=[0] * len(SIZES))
    gpu.measure(spec, tensors, made.numbers, made.constants)
    if dtype == torch.bfloat16:
        stochastic(made).advance()
    assert len(compiler.kernels) == (7 if dtype == torch.bfloat16 else 6)
    for kernel in compiler.kernels:
        assert len(kernel.asm["cubin"]) > 0
        assert "fma.rn" not in kernel.asm["ptx"]


@outside
def test_nothing_is_compiled_again(compiler: Compiler) -> None:
    """For other numbers, other tensors, another number of them, masks at any address."""
    group = {"betas": (0.9, 0.999), "eps": 1e-8}
    found = set()
    for sizes, change in (([5], {}), ([16, 1, 4096], {"betas": (0.0, 0.5), "eps": 0.0})):
        made = work(Adam(), signals.Gradients(), group | change, sizes=sizes)
        for at in (0, 1, 16):
            made.measure()
            made.advance(torch.ones(64, dtype=torch.bool)[at : at + len(sizes)])
        found |= {id(kernel) for kernel in compiler.kernels}
    assert len(found) == 3  # measure, add, advance


# Tables


@pytest.fixture
def no_tables(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tables, "_TABLES", {})
    monkeypatch.setattr(tables, "_CAPTURED", set())


CPU = torch.device("cpu")


def table(*content: int) -> Tensor:
    return tables.on_device(content, CPU, lambda: torch.tensor(content))


@pytest.mark.usefixtures("no_tables")
def test_tables_are_made_once_per_content() -> None:
    first = table(1, 2)
    assert table(1, 2) is first
    assert table(1, 3).tolist() == [1, 3]
    for i in range(3000):
        table(i)
        assert table(1, 2) is first  # used last, so kept
    assert len(tables._TABLES) <= 1024
    assert table(5).tolist() == [5]


@pytest.mark.usefixtures("no_tables")
def test_tables_are_for_many_threads() -> None:
    """As the backward hooks of several devices: each finds its own, whatever others drop."""
    with ThreadPoolExecutor(8) as pool:
        made = list(pool.map(lambda i: (i % 2000, table(i % 2000)), range(20_000)))
    assert all(x.tolist() == [i] for i, x in made)


@pytest.mark.usefixtures("no_tables")
def test_tables_of_another_stream_are_not_trusted(monkeypatch: pytest.MonkeyPatch) -> None:
    first = table(1, 2)
    monkeypatch.setattr(tables, "_stream", lambda device: 1)
    assert table(1, 2) is not first


@pytest.mark.usefixtures("no_tables")
def test_tables_in_a_capture(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of the warm-up are read; a new content takes the place of an old one, for good."""
    old, spare = table(1, 2), table(3, 4)
    monkeypatch.setattr(tables, "_capturing", lambda device: True)
    assert table(1, 2) is old
    new = table(5, 6)
    assert new is spare
    assert table(5, 6) is new
    with pytest.raises(RuntimeError, match="before the capture"):
        table(7, 8)
    monkeypatch.setattr(tables, "_capturing", lambda device: False)
    for i in range(3000):
        table(i, i)
    assert {id(t.device) for t in tables._CAPTURED} == {id(old), id(new)}
    assert (old.tolist(), new.tolist()) == ([1, 2], [5, 6])
    assert table(5, 6) is not new  # which holds nothing until the graph is replayed


# What only a CUDA device shows


@on_cuda
def test_missing_nothing() -> None:
    assert gpu.missing(DEVICE) is None


@on_cuda
def test_nothing_waits_for_the_device() -> None:
    group = {"betas": (0.9, 0.999), "eps": 1e-8}
    made = work(Adam(), signals.Gradients(), group)
    active = torch.ones(len(SIZES), dtype=torch.bool, device=DEVICE)

    def step() -> None:
        gpu.measure(made.spec, made.tensors, made.numbers, made.constants)
        gpu.advance(made.spec, made.tensors, made.numbers, made.constants, active)

    step()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
        made.tensors.grads[3] = made.tensors.grads[3].clone()
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@on_cuda
@cases
def test_cuda_graph(rule: Rule, signal: signals.Signal, group: dict[str, Any]) -> None:
    """A graph whose gradients are its own, replayed, against eager steps."""
    graphed, eager = (work(rule, signal, group) for _ in range(2))
    sources = [g.clone() for g in graphed.tensors.grads]
    active = torch.ones(len(SIZES), dtype=torch.bool, device=DEVICE)

    def step(made: Work) -> Tensor:
        made.tensors.grads[:] = [source * 2 for source in sources]
        norms = gpu.measure(made.spec, made.tensors, made.numbers, made.constants)
        gpu.advance(made.spec, made.tensors, made.numbers, made.constants, active)
        return norms

    for made in (graphed, eager):
        step(made)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        norms = step(graphed)
    for _ in range(3):
        for source in sources:
            source.mul_(-0.5)
        graph.replay()
        expected = step(eager)
        assert torch.equal(norms, expected)
    for (name, _, ours), (_, _, theirs) in zip(graphed.pairs(), eager.pairs(), strict=True):
        assert torch.equal(ours, theirs), name


@on_cuda
def test_more_than_2_to_the_31_elements(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "BLOCK", 4096)
    monkeypatch.setattr(gpu, "STEP", 1024)
    size = 2**31 + 4099
    if torch.cuda.mem_get_info()[0] < 8 * size:
        pytest.skip("too little free memory on the device")
    p, g = (torch.zeros(size, dtype=torch.bfloat16, device=DEVICE) for _ in range(2))
    g[0], g[-1] = 3.0, 4.0
    spec = Spec("SGD", "gradient", torch.bfloat16, None)
    numbers = torch.tensor([[1.0] * len(COLUMNS)], device=DEVICE)
    constants, tensors = Constants(0.0, 0.0, 0.0, 0.0, 0.0), Tensors([p], [g], (), [], [])
    assert gpu.measure(spec, tensors, numbers, constants)[0, 0].item() == 5.0
    gpu.advance(spec, tensors, numbers, constants, torch.ones(1, dtype=torch.bool, device=DEVICE))
    assert (p[0].item(), p[-1].item(), p[1:-1].any().item()) == (-3.0, -4.0, False)


def test_tables_are_made_on_the_host_whatever_the_default_device() -> None:
    x, cpu = torch.ones(3), torch.device("cpu")
    tables._TABLES.clear()
    with torch.device("meta"):
        batch = gpu._batch(Tensors([x], [x], (), [], []), cpu, 0)
        spec = Spec(rule="SGD", signal="gradient", dtype=x.dtype, history=None)
        constants = gpu._constants(spec, Constants(0.0, 0.0, 0.0, 0.0, 0.0), x)
    assert batch.table.device == batch.owner.device == constants.device == cpu
