"""What the paper prints: Tables 2 to 5 of §5, and the protocol behind them.

Source: G. Ioannou, T. Tagaris, A. Stafylopatis, "AdaLip: An Adaptive Learning Rate Method per Layer
for Stochastic Optimization", Neural Processing Letters, 2023.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

OPTIMIZERS = ("sgd", "adalip", "adam", "adamlip", "rmsprop", "rmslip")
"""The columns of Tables 2 to 4, and the rows of Table 5, in the paper's order."""

ACCURACY_ROWS = ("Max", "Median", "Mean", "Std")
EPOCH_ROWS = ("Mean", "Median", "Best")

Row = tuple[str, ...]


@dataclass(frozen=True)
class Benchmark:
    """One data set of §5. Values are strings, with the digits that the paper prints.

    `accuracy` and `epochs` have a row for each of ACCURACY_ROWS and EPOCH_ROWS, `test` has one
    value for each of OPTIMIZERS. The paper does not print `train_epochs`: they are those of the
    published experiments.
    """

    title: str
    data: str  # the name of the data set, without a user or a folder
    table: int
    curves: int  # the number of the figure with mean curves
    rates: int  # and of that with learning rates per layer
    train_samples: int
    train_epochs: int
    seeds: int
    threshold: float  # of the maximum peak, for the epochs of convergence
    accuracy: tuple[Row, ...]
    epochs: tuple[Row, ...]
    test: Row

    def printed(self) -> Mapping[str, tuple[Row, Row]]:
        """For each optimizer its columns of the table: accuracies and epochs of convergence."""
        return {
            name: (
                tuple(row[place] for row in self.accuracy),
                tuple(row[place] for row in self.epochs),
            )
            for place, name in enumerate(OPTIMIZERS)
        }


BENCHMARKS = {
    "mnist": Benchmark(
        title="MNIST",
        data="mnist",
        table=2,
        curves=2,
        rates=5,
        train_samples=60_000,
        train_epochs=15,
        seeds=25,
        threshold=0.98,
        accuracy=(
            ("1.0", "1.0", "0.999", "1.0", "1.0", "1.0"),
            ("0.976", "0.996", "0.999", "0.999", "1.0", "1.0"),
            ("0.663", "0.883", "0.999", "0.999", "1.0", "1.0"),
            ("0.422", "0.288", "0.001", "0.000", "0.000", "0.000"),
        ),
        epochs=(
            ("4.5", "3.1", "1.75", "1.5", "1.5", "1"),
            ("2.5", "1.5", "2", "1.5", "1.5", "1"),
            ("2", "1", "1", "1", "1", "1"),
        ),
        test=("0.9896", "0.9909", "0.9910", "0.9911", "0.9902", "0.9909"),
    ),
    "cifar10": Benchmark(
        title="CIFAR-10",
        data="cifar10",
        table=3,
        curves=3,
        rates=6,
        train_samples=50_000,
        train_epochs=30,
        seeds=25,
        threshold=0.95,
        accuracy=(
            ("0.945", "0.940", "0.978", "0.984", "0.975", "0.987"),
            ("0.756", "0.838", "0.971", "0.973", "0.968", "0.983"),
            ("0.614", "0.675", "0.816", "0.826", "0.910", "0.937"),
            ("0.346", "0.310", "0.299", "0.298", "0.120", "0.084"),
        ),
        epochs=(
            ("27.4", "27.6", "22", "22.571", "21.2", "20.6"),
            ("30", "29", "21", "22", "19", "17"),
            ("21", "22", "14", "14", "16", "15"),
        ),
        test=("0.6632", "0.6670", "0.7545", "0.7545", "0.7528", "0.7622"),
    ),
    "cifar100": Benchmark(
        title="CIFAR-100",
        data="cifar100",
        table=4,
        curves=4,
        rates=7,
        train_samples=50_000,
        train_epochs=70,
        seeds=10,
        threshold=0.95,
        accuracy=(
            ("0.965", "0.978", "0.966", "0.967", "0.956", "0.966"),
            ("0.935", "0.965", "0.956", "0.961", "0.953", "0.962"),
            ("0.928", "0.939", "0.952", "0.958", "0.945", "0.957"),
            ("0.034", "0.054", "0.015", "0.010", "0.016", "0.012"),
        ),
        epochs=(
            ("60", "53.66", "44.75", "42.5", "45.4", "41.6"),
            ("62.5", "49", "42.5", "40.5", "40", "38"),
            ("44", "41", "34", "34", "37", "34"),
        ),
        test=("0.5706", "0.5802", "0.5937", "0.5981", "0.5868", "0.5884"),
    ),
}


def benchmark_of(study: str) -> Benchmark | None:
    """The data set of §5 that a study of this name repeats, as in "paper_mnist", or None."""
    return BENCHMARKS.get(study.removeprefix("paper_")) if study.startswith("paper_") else None
