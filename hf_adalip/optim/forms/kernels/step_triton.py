"""The passes over memory of a fused step, as Triton kernels (see kernels/__init__.py):

    measure   reads what the signal x_t needs, and sums g², x² and (x - x_prev)² of each chunk
    sketch    the same where no history is read, with a sketch of x_t for each chunk
    add       adds up what the chunks of each tensor gave, in the order of memory
    advance   reads gradient, parameter and moments once, and writes these and the history once

A launch is for all tensors of a batch: a program takes one chunk, a table says whose chunk it is,
and a record says where that tensor lies. What is compiled in is in capitals; every number comes
from the device's memory, so that none recompiles anything when it changes.

Rounding: arithmetic is in the dtype of `constants`, each operation rounded to nearest (roots and
divisions too, and nothing is contracted to fma: gpu.py compiles with enable_fp_fusion=False), so
that a tie of û_t with u_{t-1} stays one. It differs from the loop form's in dividing by a bias
correction, which is a multiplication with its reciprocal here, and in the order in which squares
are added.
"""

import triton
import triton.language as tl

from ...rules.triton import direction, moments, root

# A record of a tensor: pointers, then its size, the index of its first element in the whole
# parameter, its seed, and its first chunk, which the following record ends.
PARAM = tl.constexpr(0)
GRAD = tl.constexpr(1)
FIRST_MOMENT = tl.constexpr(2)
SECOND_MOMENT = tl.constexpr(3)
HISTORY = tl.constexpr(4)
SIZE = tl.constexpr(5)
START = tl.constexpr(6)
SEED = tl.constexpr(7)  # for stochastic rounding
CHUNK = tl.constexpr(8)
RECORD = tl.constexpr(9)

# A row of `numbers`: kernels/__init__.py's COLUMNS.
LR = tl.constexpr(0)
CORRECTIONS = tl.constexpr(1)  # of t: two
PREV_RATE = tl.constexpr(3)
PREV_CORRECTIONS = tl.constexpr(4)  # of t-1: two
RATE = tl.constexpr(6)
HISTORY_RATE = tl.constexpr(7)
DECAY = tl.constexpr(8)
STEP_NUMBER = tl.constexpr(9)
NUMBERS = tl.constexpr(10)

# The constants of a group, after those of rules/triton.py.
WEIGHT_DECAY = tl.constexpr(7)
SIGN = tl.constexpr(8)  # of the gradient: -1 to maximize

GOLDEN = tl.constexpr(0x9E3779B9)
SIGNS = tl.constexpr(0x9E3779B9)  # of the sketch's two hashes, with seed 0
TURNS = tl.constexpr(0x3C6EF372)

# Pointers into larger tensors need not be aligned: no kernel is specialized for those that are.
_POINTERS = ["table", "numbers", "constants", "owner", "active", "sums", "sketches", "parts", "out"]


# Parameters stand in lines by kind, not one by one.
# fmt: off

# Memory. ACCESS is "vectors" (of 16 bytes: all is there and aligned), "plain" or "masked".


@triton.jit
def _pointer(record, ROLE: tl.constexpr, offset, DTYPE: tl.constexpr, ACCESS: tl.constexpr):
    pointer = tl.load(record + ROLE).to(tl.pointer_type(DTYPE)) + offset
    if ACCESS == "vectors":  # which the compiler cannot know of a pointer from memory
        pointer = tl.multiple_of(pointer, 16)
    return pointer


@triton.jit
def _load(record, ROLE: tl.constexpr, offset, at, mask, DTYPE: tl.constexpr, ACCESS: tl.constexpr):
    pointers = _pointer(record, ROLE, offset, DTYPE, ACCESS) + at
    if ACCESS == "masked":
        return tl.load(pointers, mask=mask, other=0.0)
    else:
        return tl.load(pointers)


@triton.jit
def _store(
    record, ROLE: tl.constexpr, offset, at, mask, value, DTYPE: tl.constexpr, ACCESS: tl.constexpr
):
    pointers = _pointer(record, ROLE, offset, DTYPE, ACCESS) + at
    if ACCESS == "masked":
        tl.store(pointers, value.to(DTYPE), mask=mask)
    else:
        tl.store(pointers, value.to(DTYPE))


@triton.jit
def _gradient(
    record, constants, offset, at, mask,
    COUPLED: tl.constexpr, DTYPE: tl.constexpr, ACCESS: tl.constexpr,
):
    opmath = constants.dtype.element_ty
    grad = _load(record, GRAD, offset, at, mask, DTYPE, ACCESS).to(opmath)
    grad = grad * tl.load(constants + SIGN)
    if COUPLED:
        param = _load(record, PARAM, offset, at, mask, DTYPE, ACCESS).to(opmath)
        grad = grad + tl.load(constants + WEIGHT_DECAY) * param
    return grad


@triton.jit
def _moments(
    grad, record, offset, at, mask,
    RULE: tl.constexpr, DTYPE: tl.constexpr, ACCESS: tl.constexpr,
):
    """Those of step t-1; where a rule has fewer, the gradient stands in, unused."""
    first = grad
    second = grad
    if RULE != "plain":
        first = _load(record, FIRST_MOMENT, offset, at, mask, DTYPE, ACCESS).to(grad.dtype)
    if RULE == "Adam":
        second = _load(record, SECOND_MOMENT, offset, at, mask, DTYPE, ACCESS).to(grad.dtype)
    return first, second


# Measuring


@triton.jit
def _signals(
    record, row, constants, offset, at, mask,
    RULE: tl.constexpr, SIGNAL: tl.constexpr, COUPLED: tl.constexpr, DTYPE: tl.constexpr,
    HISTORY_DTYPE: tl.constexpr, ACCESS: tl.constexpr,
):
    """g_t, x_t and x_t - x_{t-1}, zero where nothing is."""
    grad = _gradient(record, constants, offset, at, mask, COUPLED, DTYPE, ACCESS)
    now = grad
    before = tl.zeros_like(grad)
    if SIGNAL != "gradient":
        old1, old2 = _moments(grad, record, offset, at, mask, RULE, DTYPE, ACCESS)
        new1, new2 = moments(grad, old1, old2, constants, RULE)
        now = direction(grad, new1, new2, constants, row + CORRECTIONS, RULE)
        now = now * -tl.load(row + LR)
        if SIGNAL == "recomputed":
            before = direction(grad, old1, old2, constants, row + PREV_CORRECTIONS, RULE)
            rate = tl.load(row + PREV_RATE)
            before = tl.where(rate == 0.0, 0.0, before * -rate)
    if HISTORY_DTYPE is not None:
        before = _load(record, HISTORY, offset, at, mask, HISTORY_DTYPE, ACCESS).to(grad.dtype)
    change = now - before
    if ACCESS == "masked":  # with ε = 0, the direction beyond the end is 0/0
        now = tl.where(mask, now, 0.0)
        change = tl.where(mask, change, 0.0)
    return grad, now, change


@triton.jit(do_not_specialize=_POINTERS)
def measure(
    table, numbers, constants, owner,
    sums,  # [chunks, 3]
    RULE: tl.constexpr, SIGNAL: tl.constexpr, COUPLED: tl.constexpr, DTYPE: tl.constexpr,
    HISTORY_DTYPE: tl.constexpr, ACCESS: tl.constexpr, BLOCK: tl.constexpr, STEP: tl.constexpr,
):
    chunk = tl.program_id(0).to(tl.int64)
    tensor = tl.load(owner + chunk).to(tl.int64)
    record = table + tensor * RECORD
    row = numbers + tensor * NUMBERS
    offset = (chunk - tl.load(record + CHUNK)) * BLOCK
    left = tl.load(record + SIZE) - offset
    at = tl.arange(0, STEP)
    size = tl.zeros([STEP], constants.dtype.element_ty)
    now = size
    change = size
    if left >= BLOCK:
        for step in range(0, BLOCK, STEP):
            g, x, dx = _signals(
                record, row, constants, offset + step, at, at < left,
                RULE, SIGNAL, COUPLED, DTYPE, HISTORY_DTYPE, ACCESS,
            )
            size += g * g
            now += x * x
            change += dx * dx
    else:
        for last in range(0, left, STEP):
            g, x, dx = _signals(
                record, row, constants, offset + last, at, at < left - last,
                RULE, SIGNAL, COUPLED, DTYPE, HISTORY_DTYPE, "masked",
            )
            size += g * g
            now += x * x
            change += dx * dx
    tl.store(sums + chunk * 3, tl.sum(size))
    tl.store(sums + chunk * 3 + 1, tl.sum(now))
    tl.store(sums + chunk * 3 + 2, tl.sum(change))


@triton.jit(do_not_specialize=_POINTERS)
def add(
    table,
    parts,  # [chunks, PER, WIDTH]
    out,  # [tensors, WIDTH]
    PER: tl.constexpr, WIDTH: tl.constexpr, ROOT: tl.constexpr, ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    tensor = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    record = table + tensor * RECORD
    end = tl.load(record + RECORD + CHUNK) * PER
    total = tl.zeros([ROWS, COLUMNS], parts.dtype.element_ty)
    for begin in range(tl.load(record + CHUNK) * PER, end, ROWS):
        part = begin + tl.arange(0, ROWS)
        inside = (part < end)[:, None] & (column < WIDTH)[None, :]
        places = part[:, None] * WIDTH + column[None, :]
        total += tl.load(parts + places, mask=inside, other=0.0)
    result = tl.sum(total, axis=0)
    if ROOT:
        result = root(result)
    tl.store(out + tensor * WIDTH + column, result, mask=column < WIDTH)


# Sketching


@triton.jit
def _mix(x):
    """A bijection of 32-bit numbers whose every output bit depends on every input bit, in int64."""
    x = x & 0xFFFFFFFF
    x = ((x ^ (x >> 16)) * 0x85EBCA6B) & 0xFFFFFFFF
    x = ((x ^ (x >> 13)) * 0xC2B2AE35) & 0xFFFFFFFF
    return x ^ (x >> 16)


@triton.jit(do_not_specialize=_POINTERS)
def sketch(
    table, numbers, constants, owner,
    sums,  # [chunks, WIDTH // SLICE, 3]
    sketches,  # [chunks, WIDTH]
    RULE: tl.constexpr, SIGNAL: tl.constexpr, COUPLED: tl.constexpr, DTYPE: tl.constexpr,
    WIDTH: tl.constexpr, SLICE: tl.constexpr, BLOCKS: tl.constexpr,
):
    """A chunk is BLOCKS blocks of WIDTH elements, each of which is turned as one and added. A
    program has a SLICE of the sketch, and reads of each block what comes there: consecutive
    elements, but for one break. So nothing is added atomically."""
    chunk = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1)
    tensor = tl.load(owner + chunk).to(tl.int64)
    record = table + tensor * RECORD
    row = numbers + tensor * NUMBERS
    start = tl.load(record + START)
    end = start + tl.load(record + SIZE)
    bucket = part * SLICE + tl.arange(0, SLICE)
    begin = start // WIDTH * WIDTH + (chunk - tl.load(record + CHUNK)) * (BLOCKS * WIDTH)
    total = tl.zeros([SLICE], constants.dtype.element_ty)
    size = total
    now = total
    for first in range(begin, tl.minimum(begin + BLOCKS * WIDTH, end), WIDTH):
        # In int64, whatever the loop's type is.
        block = begin * 0 + first
        turn = _mix(block // WIDTH + TURNS).to(tl.int32)
        at = (bucket - turn) & (WIDTH - 1)
        index = block + at
        inside = (index >= start) & (index < end)
        grad, x, _ = _signals(
            record, row, constants, block - start, at, inside,
            RULE, SIGNAL, COUPLED, DTYPE, None, "masked",
        )
        negative = (_mix(index // 32 + SIGNS) >> (index & 31)) & 1
        total += tl.where(negative == 1, -x, x)
        size += grad * grad
        now += x * x
    place = (chunk * (WIDTH // SLICE) + part) * 3
    tl.store(sums + place, tl.sum(size))
    tl.store(sums + place + 1, tl.sum(now))
    tl.store(sums + place + 2, tl.sum(now))
    tl.store(sketches + chunk * WIDTH + bucket, total)


# Advancing


@triton.jit
def _rounded(value, record, row, index):
    """float32 to a neighbouring bfloat16, in float32; what is not finite stays as it is."""
    seed = tl.load(record + SEED)
    key = _mix(seed + tl.load(row + STEP_NUMBER).to(tl.int64) * GOLDEN)
    noise = _mix(_mix(index + seed) ^ (key + (index >> 32) * GOLDEN)) & 0xFFFF
    bits = value.to(tl.int32, bitcast=True)
    finite = (bits & 0x7F800000) != 0x7F800000
    bits = tl.where(finite, (bits + noise.to(tl.int32)) & -0x10000, bits)
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def _advance(
    record, row, constants, offset, at, mask,
    RULE: tl.constexpr, SIGNAL: tl.constexpr, COUPLED: tl.constexpr, DTYPE: tl.constexpr,
    HISTORY_DTYPE: tl.constexpr, STOCHASTIC: tl.constexpr, ACCESS: tl.constexpr,
):
    grad = _gradient(record, constants, offset, at, mask, COUPLED, DTYPE, ACCESS)
    first, second = _moments(grad, record, offset, at, mask, RULE, DTYPE, ACCESS)
    first, second = moments(grad, first, second, constants, RULE)
    d = direction(grad, first, second, constants, row + CORRECTIONS, RULE)
    param = _load(record, PARAM, offset, at, mask, DTYPE, ACCESS).to(grad.dtype)
    param = param * tl.load(row + DECAY) - d * tl.load(row + RATE)
    if STOCHASTIC:
        param = _rounded(param, record, row, tl.load(record + START) + offset + at)
    if RULE != "plain":
        _store(record, FIRST_MOMENT, offset, at, mask, first, DTYPE, ACCESS)
    if RULE == "Adam":
        _store(record, SECOND_MOMENT, offset, at, mask, second, DTYPE, ACCESS)
    if HISTORY_DTYPE is not None:
        now = grad
        if SIGNAL != "gradient":
            now = d * -tl.load(row + HISTORY_RATE)
        _store(record, HISTORY, offset, at, mask, now, HISTORY_DTYPE, ACCESS)
    _store(record, PARAM, offset, at, mask, param, DTYPE, ACCESS)


@triton.jit(do_not_specialize=_POINTERS)
def advance(
    table, numbers, constants, owner, active,
    RULE: tl.constexpr, SIGNAL: tl.constexpr, COUPLED: tl.constexpr, DTYPE: tl.constexpr,
    HISTORY_DTYPE: tl.constexpr, STOCHASTIC: tl.constexpr, ACCESS: tl.constexpr,
    BLOCK: tl.constexpr, STEP: tl.constexpr,
):
    chunk = tl.program_id(0).to(tl.int64)
    tensor = tl.load(owner + chunk).to(tl.int64)
    record = table + tensor * RECORD
    row = numbers + tensor * NUMBERS
    offset = (chunk - tl.load(record + CHUNK)) * BLOCK
    left = tl.load(record + SIZE) - offset
    at = tl.arange(0, STEP)
    if tl.load(active + tensor):
        if left >= BLOCK:
            for step in range(0, BLOCK, STEP):
                _advance(
                    record, row, constants, offset + step, at, at < left,
                    RULE, SIGNAL, COUPLED, DTYPE, HISTORY_DTYPE, STOCHASTIC, ACCESS,
                )
        else:
            for last in range(0, left, STEP):
                _advance(
                    record, row, constants, offset + last, at, at < left - last,
                    RULE, SIGNAL, COUPLED, DTYPE, HISTORY_DTYPE, STOCHASTIC, "masked",
                )
    elif HISTORY_DTYPE is not None:
        for last in range(0, tl.minimum(left, BLOCK), STEP):
            zeros = tl.zeros([STEP], constants.dtype.element_ty)
            mask = at < left - last
            _store(record, HISTORY, offset + last, at, mask, zeros, HISTORY_DTYPE, "masked")
