"""What the recipes with transformers.Trainer share: options, resuming, Ctrl-C and results.

A recipe makes its model and data and a Trainer; the rest is here:

    args, training = parse("causal_lm", Arguments, RecipeArguments, argv, description=__doc__)
    ...
    trainer = Trainer(model=model, args=training, ..., **optimizer_kwargs(training))
    run(trainer, settings)

Importing it registers the optimizers with transformers.
"""

from ..run import exit_status
from .arguments import RecipeArguments, check_pretrained, optimizer_kwargs, parse
from .training import run

__all__ = [
    "RecipeArguments",
    "check_pretrained",
    "exit_status",
    "optimizer_kwargs",
    "parse",
    "run",
]
