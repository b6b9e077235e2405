"""The kernels on the CPU: step.cpp, compiled on first use."""

from __future__ import annotations

import ctypes
import platform
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from ...rules import RULES
from ...signals import opmath_dtype
from . import Constants, KernelError, Spec, Tensors, build

_TYPES = {
    torch.float32: "float",
    torch.float64: "double",
    torch.bfloat16: "bfloat16",
    torch.float16: "float16",
    None: "void",
}

# bfloat16 is rounded by integer arithmetic; float32 waits for memory, whatever the vectors.
_WIDE_VECTORS = ("-mprefer-vector-width=512",) if platform.machine() in ("x86_64", "AMD64") else ()

_POINTER, _INT = ctypes.c_void_p, ctypes.c_int


def measure(spec: Spec, tensors: Tensors, numbers: Tensor, constants: Constants) -> Tensor:
    n = len(tensors.params)
    rows = numbers.new_empty(n, 3 + spec.sketch)
    library(spec).measure(
        n,
        tensors.rows.buffer_info()[0],
        numbers.data_ptr(),
        (ctypes.c_double * len(constants))(*constants),
        torch.get_num_threads(),
        rows.data_ptr(),
    )
    return rows


def advance(
    spec: Spec, tensors: Tensors, numbers: Tensor, constants: Constants, active: Tensor
) -> None:
    active = active.contiguous()
    library(spec).advance(
        len(tensors.params),
        tensors.rows.buffer_info()[0],
        numbers.data_ptr(),
        (ctypes.c_double * len(constants))(*constants),
        torch.get_num_threads(),
        active.data_ptr(),
    )


@cache
def missing() -> str | None:
    """What the kernels lack on this machine, or None; found out once, by looking for a compiler."""
    return build.missing()


def library(spec: Spec) -> ctypes.CDLL:
    """step.cpp for a Spec, compiled when first asked for, and kept on disk.

    Raises:
        KernelError: where it cannot be compiled.
    """
    made = _library(spec)
    if isinstance(made, KernelError):
        raise KernelError(*made.args) from made.__cause__
    return made


@cache
def _library(spec: Spec) -> ctypes.CDLL | KernelError:
    if lack := missing():
        return KernelError(f"fused=True on a CPU needs {lack}")
    source = "".join(f"#define {name} {value}\n" for name, value in _defined(spec).items())
    source += Path(__file__).with_name("step.cpp").read_text("utf-8")
    try:
        made = build.load(
            source, *(_WIDE_VECTORS if torch.bfloat16 in (spec.dtype, spec.history) else ())
        )
    except Exception as error:
        failed = KernelError(f"the kernels of the fused form cannot be had: {error}")
        failed.__cause__ = error
        return failed
    pointers = _POINTER, _POINTER, _POINTER
    made.measure.argtypes = made.advance.argtypes = ctypes.c_int64, *pointers, _INT, _POINTER
    made.measure.restype = made.advance.restype = None
    return made


def _defined(spec: Spec) -> dict[str, str]:
    flags = ("momentum", "nesterov", "eps_in_sqrt", "maximize", "coupled", "early", "stochastic")
    formula = RULES[spec.rule].cpp
    return {
        "COUNT": formula.moment_count,
        "MOMENTS": formula.moments,
        "DIRECTION": formula.direction,
        "SIGNAL": spec.signal,
        "PARAM": _TYPES[spec.dtype],
        "OPMATH": _TYPES[opmath_dtype(spec.dtype)],
        "HISTORY": _TYPES[spec.history],
        "HALF": str(int(torch.float16 in (spec.dtype, spec.history))),
        "SKETCH": str(spec.sketch),
    } | {flag.upper(): str(getattr(spec, flag)).lower() for flag in flags}
