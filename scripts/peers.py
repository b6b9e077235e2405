"""The rows of the benchmarks: our optimizers in all their forms, and those of others.

A row is divided by a reference that was measured beside it: torch's fused SGD for AdaLip, LARS and
whatever else keeps one running average at most of the gradient itself, and torch's fused Adam for
the rest. All those with a momentum have 0.9.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from hf_adalip import Lipschitz, get_optimizer_info

Named = list[tuple[str, nn.Parameter]]

ADAM, SGD = "Adam fused", "SGD fused"
LR = 1e-4
FORMS: dict[str, dict[str, Any]] = {
    "loop": {"foreach": False},
    "foreach": {"foreach": True},
    "fused": {"fused": True},
}
HISTORIES: dict[str, dict[str, Any]] = {
    "": {},
    "bfloat16": {"history": torch.bfloat16},
    "sketch": {"history": "sketch"},
}


@dataclass(frozen=True)
class Row:
    """An optimizer to measure.

    Args:
        name: of the row; references are found by it.
        reference: the name of the row that it is divided by.
        words: values of state for each parameter, rounded up; for what fits into memory.
        make: from named parameters.
        package: that has to be installed, under the name that it is imported by.
        cuda: whether it is for a GPU only.
    """

    name: str
    reference: str
    words: int
    make: Callable[[Named], Optimizer]
    package: str = "torch"
    cuda: bool = False

    def missing(self, device: torch.device) -> str | None:
        """Why it cannot run here."""
        if importlib.util.find_spec(self.package) is None:
            return f"not installed: pip install {self.package}"
        return "for a GPU" if self.cuda and device.type != "cuda" else None


def _ours(name: str, arguments: dict[str, Any]) -> Callable[[Named], Optimizer]:
    return lambda named: get_optimizer_info(name).create(named, **arguments)


def _lipschitz(form: str, layers: str) -> Callable[[Named], Optimizer]:
    def make(named: Named) -> Optimizer:
        base = torch.optim.Adam(named, lr=LR, **FORMS[form])
        options: dict[str, Any] = {"fused": True} if form == "fused" else {}
        return Lipschitz(base, layers=layers, **options)

    return make


def _theirs(module: str, name: str, arguments: dict[str, Any]) -> Callable[[Named], Optimizer]:
    def make(named: Named) -> Optimizer:
        cls = getattr(importlib.import_module(module), name)
        optimizer: Optimizer = cls([param for _, param in named], **arguments)
        if hasattr(optimizer, "train"):  # schedulefree's two modes
            optimizer.train()
        return optimizer

    return make


def _all_ours(layers: str) -> Iterator[Row]:
    words = {"adalip": 2, "rmslip": 2, "adamlip": 3, "adalipu": 1, "rmslipu": 2, "adamlipu": 2}
    for name, size in words.items():
        info = get_optimizer_info(name)
        sgd = info.base is torch.optim.SGD
        momentum = {"momentum": 0.9} if sgd else {}
        # With momentum, AdaLipU computes the previous update again, as AdamLipU does.
        histories = {"": {}} if name in ("adalipu", "adamlipu") else HISTORIES
        for form, flags in FORMS.items():
            for history, kept in histories.items():
                arguments = {"lr": LR, "layers": layers, **momentum, **flags, **kept}
                label = " ".join(filter(None, (info.optimizer_class.__name__, form, history)))
                yield Row(label, SGD if sgd else ADAM, size, _ours(name, arguments))
    for form in FORMS:
        yield Row(f"Lipschitz(Adam) {form}", ADAM, 3, _lipschitz(form, layers))


def _all_theirs() -> Iterator[Row]:
    for name, reference, words, forms, arguments in (
        ("SGD", SGD, 1, ("foreach", "fused"), {"momentum": 0.9}),
        ("RMSprop", ADAM, 1, ("foreach",), {}),
        ("Adam", ADAM, 2, ("loop", "foreach", "fused"), {}),
        ("AdamW", ADAM, 2, ("foreach", "fused"), {}),
    ):
        for form in forms:
            make = _theirs("torch.optim", name, {"lr": LR, **arguments, **FORMS[form]})
            yield Row(f"{name} {form}", reference, words, make)
    lr = {"lr": LR}
    # Adan and DiffGrad remember the last gradient, SGDSaI has a learning rate for each tensor.
    for module, name, reference, words, arguments in (
        ("timm.optim", "Lamb", ADAM, 2, lr),
        ("timm.optim", "Lars", SGD, 1, {**lr, "momentum": 0.9}),
        ("timm.optim", "Adan", ADAM, 4, lr),
        ("schedulefree", "AdamWScheduleFree", ADAM, 2, lr),
        ("prodigyopt", "Prodigy", ADAM, 4, {}),
        ("pytorch_optimizer", "DiffGrad", ADAM, 3, lr),
        ("pytorch_optimizer", "SGDSaI", SGD, 1, lr),
        ("bitsandbytes.optim", "AdamW", ADAM, 2, lr),
        ("bitsandbytes.optim", "AdamW8bit", ADAM, 1, lr),
    ):
        package = module.split(".")[0]
        make = _theirs(module, name, arguments)
        yield Row(f"{package} {name}", reference, words, make, package, package == "bitsandbytes")


def all_rows(layers: str) -> list[Row]:
    return [*_all_theirs(), *_all_ours(layers)]


def select(
    parser: argparse.ArgumentParser, rows: Sequence[Row], patterns: Sequence[str]
) -> list[Row]:
    """Those that one of the patterns is for, whatever the case.

    Ends the program if there are none.
    """
    found = [row for row in rows if any(fnmatchcase(row.name.lower(), p.lower()) for p in patterns)]
    if not found:
        names = ", ".join(row.name for row in rows)
        parser.error(f"--only {' '.join(patterns)} is for none of {names}")
    return found
