"""The base optimizers, a file each: the formula in every form that computes it.

A rule says how its moments follow g_t, and what it multiplies with its learning rate and
subtracts. Its loop form is the truth that the foreach, C++ and Triton forms beside it are tested
against. Triton takes functions from source files alone: `triton.py` has those of all rules.
"""

from __future__ import annotations

from .adam import Adam
from .lion import Lion
from .rmsprop import RMSprop
from .rule import CppRule, Group, Moments, Numbers, Rule, TensorLists
from .sgd import SGD

RULES: dict[str, Rule] = {rule.name: rule for rule in (SGD(), RMSprop(), Adam(), Lion())}

__all__ = [
    "RULES",
    "SGD",
    "Adam",
    "CppRule",
    "Group",
    "Lion",
    "Moments",
    "Numbers",
    "RMSprop",
    "Rule",
    "TensorLists",
]
