"""The examples in docstrings run, and print what they say."""

import doctest
import importlib
from types import ModuleType

import pytest

MODULES = [
    "hf_adalip.experiments.reading",
    "hf_adalip.layers",
    "hf_adalip.monitor",
    "hf_adalip.optim.release",
    "hf_adalip.optim.variants",
    "hf_adalip.optim.wrapper",
    "hf_adalip.over",
    "hf_adalip.registry",
]
SIX = ["AdaLip", "RMSLip", "AdamLip", "AdaLipU", "RMSLipU", "AdamLipU"]


def examples(module: ModuleType) -> dict[str, doctest.DocTest]:
    found = doctest.DocTestFinder().find(module)
    return {test.name.removeprefix(f"{module.__name__}."): test for test in found if test.examples}


@pytest.mark.parametrize("name", MODULES)
def test_examples_run(name: str) -> None:
    tests = examples(importlib.import_module(name))
    assert tests
    runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS)
    report: list[str] = []
    for test in tests.values():
        runner.run(test, out=report.append)
    assert not runner.failures, "".join(report)


def test_each_of_the_six_has_one() -> None:
    assert set(SIX) <= set(examples(importlib.import_module("hf_adalip.optim.variants")))
