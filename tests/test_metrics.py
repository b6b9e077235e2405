"""Metrics without downloads."""

import subprocess
import sys

import evaluate
import pytest

from hf_adalip.recipe.image.metrics import Accuracy


def test_accuracy_over_batches() -> None:
    accuracy = Accuracy(keep_in_memory=True)
    accuracy.add_batch(predictions=[0, 1, 2], references=[0, 1, 1])
    accuracy.add(prediction=5, reference=5)
    assert accuracy.compute() == {"accuracy": 0.75}


def test_accuracy_starts_anew_after_compute() -> None:
    accuracy = Accuracy(keep_in_memory=True)
    for wrong in (0, 1):
        accuracy.add_batch(predictions=[wrong], references=[0])
        assert accuracy.compute() == {"accuracy": 1.0 - wrong}


def test_accuracy_in_one_call_and_on_disk(tmp_path: object) -> None:
    accuracy = Accuracy(cache_dir=str(tmp_path))
    assert accuracy.compute(predictions=[1, 1], references=[1, 0]) == {"accuracy": 0.5}


def test_accuracy_combines() -> None:
    class Errors(Accuracy):
        def _compute(self, *, predictions: list[int], references: list[int]) -> dict[str, float]:
            share = super()._compute(predictions=predictions, references=references)["accuracy"]
            return {"errors": 1.0 - share}

    both = evaluate.combine([Accuracy(), Errors()])
    both.add_batch(predictions=[1, 1, 1, 0], references=[1, 0, 0, 0])
    assert both.compute() == {"accuracy": 0.5, "errors": 0.5}


def test_accuracy_of_nothing() -> None:
    with pytest.raises(ValueError, match="no predictions"):
        Accuracy(keep_in_memory=True).compute(predictions=[], references=[])


@pytest.mark.slow
def test_the_package_itself_imports_none_of_this() -> None:
    code = (
        "import sys, hf_adalip;"
        "print({'accelerate', 'datasets', 'evaluate', 'transformers'} & set(sys.modules))"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "set()"
