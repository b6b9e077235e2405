"""What a published run says of itself: its model card, and its results as the Hub reads them."""

from __future__ import annotations

import math
import re
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml  # type: ignore[import-untyped]
from huggingface_hub import EvalResult, EvalResultEntry, ModelCard, ModelCardData
from huggingface_hub import eval_result_entries_to_yaml as to_yaml
from torch import nn

from ..registry import create_optimizer, describe_optimizer

_BOOKKEEPING = re.compile(r"eval_(.*_)?(runtime|samples|per_second|time|size)")
_OF_THE_PLACE = {  # options that say where a run writes, not what it computes
    *("output_dir", "overwrite_output_dir", "resume_from_checkpoint", "push_to_hub"),
    *("hub_model_id", "hub_token", "hub_private_repo", "hub_strategy"),
}
_ARCHITECTURES = {
    "ForSequenceClassification": "text-classification",
    "ForCausalLM": "text-generation",
    "LMHeadModel": "text-generation",
    "ForImageClassification": "image-classification",
}


def find_task(results: Mapping[str, Any], config: Mapping[str, Any]) -> str | None:
    """The Hub's name of what the model does: as the run says, or by its transformers class."""
    (architecture, *_) = config.get("architectures") or [""]
    known = (name for end, name in _ARCHITECTURES.items() if architecture.endswith(end))
    return results.get("task") or next(known, None)


def metrics(results: Mapping[str, Any]) -> dict[str, float]:
    """The final values of what was evaluated ("accuracy", "loss"), without what is not finite."""
    return {
        key.removeprefix("eval_"): value
        for key, value in results.items()
        if key.startswith("eval_") and not _BOOKKEEPING.fullmatch(key)
        if isinstance(value, (int, float)) and math.isfinite(value)
    }


def _limits(results: Mapping[str, Any]) -> list[str]:
    """The options that left a part of the dataset out."""
    names = ("max_train_samples", "max_eval_samples")
    return [f"--{name} {results[name]}" for name in names if results.get(name) is not None]


def repeat_arguments(command: str) -> list[str]:
    """The arguments of a command line, without those that say where the run writes.

    Raises:
        ValueError: if they are in a file.
    """
    kept, dropping = [], False
    for word in shlex.split(command)[1:]:
        if word.partition("=")[0] == "--config":
            raise ValueError("its command reads options from a file: put them in, in its place")
        if word.startswith("--"):
            dropping = word[2:].partition("=")[0].replace("-", "_") in _OF_THE_PLACE
        if not dropping:
            kept.append(word)
    return kept


def eval_results(results: Mapping[str, Any], url: str) -> str | None:
    """The run's first metric that is no loss as `.eval_results/*.yaml`.

    That format has one number for a task of a dataset, which must be one of the Hub, and all of
    it: None if it is not, or if there is no such metric.
    """
    scores = [(name, value) for name, value in metrics(results).items() if name != "loss"]
    data = results["dataset_name"]
    if not scores or data not in results.get("on_hub", ()) or _limits(results):
        return None
    (name, value), *_ = scores
    entry = EvalResultEntry(
        dataset_id=data,
        task_id=results.get("dataset_config_name") or "default",
        value=value,
        source_url=url,
        notes=f"{name} of {results['optimizer']}, lr {_learning_rate(results)}, "
        f"seed {results['seed']}, by this repository's train.py",
    )
    return str(yaml.safe_dump(to_yaml([entry]), sort_keys=False))


def model_card(
    repo_id: str,
    results: Mapping[str, Any],
    task: str,
    library: str,
    pictures: Mapping[str, tuple[str, str]],
    url: str,
) -> str:
    """The text of README.md, metadata included.

    Args:
        repo_id: USER/NAME.
        results: the run's; see `hub` for what has to be there.
        task: the Hub's name of what the model does.
        library: that loads the model.
        pictures: files in the repository, each with a heading and what it shows.
        url: of train.py.

    Raises:
        TypeError, ValueError: if no such optimizer can be made.
    """
    name, found, data = repo_id.split("/")[1], metrics(results), results["dataset_name"]
    optimizer = create_optimizer(
        nn.Linear(2, 2, bias=False), results["optimizer"], **results["optimizer_arguments"]
    )
    base, on_hub = results.get("model_name_or_path"), results.get("on_hub", ())
    limits = _limits(results)
    meta = ModelCardData(
        base_model=base if base in on_hub else None,
        datasets=[data] if data in on_hub else None,
        library_name=library,
        pipeline_tag=task,
        metrics=[key for key in found if key != "loss"] or None,
        tags=["hf_adalip", results["optimizer"]],
        model_name=name,
        # the Hub compares those of one dataset, which here a part of it would be taken for
        eval_results=None
        if limits and data in on_hub
        else [
            EvalResult(
                task_type=task,
                dataset_type=data if data in on_hub else Path(data).name,
                dataset_name=Path(data).name,
                dataset_config=results.get("dataset_config_name"),
                metric_type=key,
                metric_value=value,
            )
            for key, value in found.items()
        ]
        or None,
    )
    hyperparameters = {**optimizer.param_groups[0], **getattr(optimizer, "hyperparameters", {})}
    training = {
        "optimizer": describe_optimizer(optimizer),
        "learning rate": _learning_rate(results),
        "γ": hyperparameters.get("gamma"),
        "c": hyperparameters.get("c"),
        "layers": getattr(optimizer, "layers", None),
        "schedule": results.get("lr_scheduler_type"),
        "weight decay": results.get("weight_decay"),
        "seed": results["seed"],
        "data": f"{data}, fingerprint {results.get('dataset_fingerprint', 'not recorded')}",
        "evaluated on its split": results.get("eval_split"),
        "images or texts to train on, to evaluate on": _joined(
            results, "train_samples", "eval_samples"
        ),
        "batch, accumulation, processes": _joined(
            results, "per_device_train_batch_size", "gradient_accumulation_steps", "num_processes"
        ),
        "epochs, optimizer steps": _joined(results, "epoch", "step"),
        "precision": results.get("mixed_precision"),
        "engine": _engine(results),
        "device": results.get("device"),
    }
    evaluated = {f"eval_{key}": f"{value:.6g}" for key, value in found.items()}
    sections = [
        f"# {name}",
        f"Trained with `{results['optimizer']}` of hf_adalip. All of the run's numbers are in "
        "`all_results.json`.",
        "## Results",
        f"Of the checkpoint of step {results['best_step']}, which was the best:"
        if results.get("best_step")
        else "At the end of the run, not the best of its epochs:",
        _table(evaluated) if evaluated else "None that is a finite number.",
        *([f"On a part of the data: {', '.join(limits)}."] if limits else []),
        "## Training",
        _table({key: value for key, value in training.items() if value is not None}),
        "## Versions",
        _table(results["versions"]),
        "## Repeat this run",
        "`train.py` is the script that ran, with its dependencies at the versions above:",
        *_repeat(results, name, url),
    ]
    if elsewhere := [f"`{name}`" for name in (data, base) if name and name not in on_hub]:
        sections.append(f"Not on the Hub: {', '.join(elsewhere)}.")
    for picture, (heading, words) in pictures.items():
        sections += [f"## {heading}", f"![{words}]({picture})"]
    return str(ModelCard(f"---\n{meta.to_yaml()}\n---\n\n" + "\n\n".join(sections) + "\n"))


def _repeat(results: Mapping[str, Any], name: str, url: str) -> list[str]:
    arguments = repeat_arguments(results["command"])
    command = shlex.join([*arguments, "--output_dir", name])
    precision, setting = results.get("mixed_precision") or "no", ""
    said = ("--mixed_precision", f"--{precision}")
    if precision != "no" and not any(word.partition("=")[0] in said for word in arguments):
        setting = f"ACCELERATE_MIXED_PRECISION={precision} "  # it was accelerate's
    if (processes := results.get("num_processes", 1)) == 1:
        also = [] if setting else ["`hf jobs uv run` takes the same."]
        return [f"```bash\n{setting}uv run {url} {command}\n```", *also]
    engine = _engine(results)
    under = f" under {engine}, which needs its configuration file of accelerate," if engine else ""
    return [
        f"```bash\ncurl -LO {url}\nuv sync --script train.py\n"
        f'{setting}"$(uv python find --script train.py)" -m torch.distributed.run '
        f"--nproc-per-node {processes} train.py {command}\n```",
        f"It ran in {processes} processes{under} with `torchrun` as here or `accelerate launch`.",
    ]


def _engine(results: Mapping[str, Any]) -> str | None:
    """What spread the model over processes, if anything did."""
    engine = results.get("engine")
    return None if engine in ("none", "DDP") else engine


def _learning_rate(results: Mapping[str, Any]) -> str:
    rate = results.get("secant_rate")
    return f"{rate:.3g} at the end, found" if rate else f"{results['learning_rate']:g}"


def _joined(results: Mapping[str, Any], *keys: str) -> str | None:
    known = [str(results[key]) for key in keys if key in results]
    return ", ".join(known) if len(known) == len(keys) else None


def _table(rows: Mapping[str, Any]) -> str:
    lines = [f"| {key} | {str(value).replace('|', chr(92) + '|')} |" for key, value in rows.items()]
    return "\n".join(["| | |", "|---|---|", *lines])
