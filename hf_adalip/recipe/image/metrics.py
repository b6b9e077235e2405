"""Metrics that need no download: `evaluate.Metric` subclasses, to be used as instances.

Gather predictions with accelerate first (`gather_for_metrics` drops the duplicates that pad the
last batch), then add and compute on the main process only.
"""

from __future__ import annotations

from typing import Any

import numpy as np

try:
    import datasets
    import evaluate
except ImportError as error:
    raise ImportError(
        "hf_adalip.recipe.image.metrics needs evaluate and datasets: "
        "pip install 'hf-adalip[recipes]'"
    ) from error


class Accuracy(evaluate.Metric):  # type: ignore[misc]
    """The share of predictions that equal their reference.

        accuracy = Accuracy(keep_in_memory=True)
        accuracy.add_batch(predictions=[0, 1], references=[0, 2])
        accuracy.compute()  # {"accuracy": 0.5}

    Predictions and references are class numbers. `compute` without any raises ValueError.
    """

    def _info(self) -> Any:
        number = datasets.Value("int64")
        return evaluate.MetricInfo(
            description="The share of predictions that equal their reference.",
            citation="",
            inputs_description="predictions, references: class numbers (int).",
            features=datasets.Features({"predictions": number, "references": number}),
        )

    def _compute(self, *, predictions: Any, references: Any) -> dict[str, float]:
        if len(references) == 0:
            raise ValueError("accuracy of no predictions at all")
        return {"accuracy": float(np.mean(np.asarray(predictions) == np.asarray(references)))}
