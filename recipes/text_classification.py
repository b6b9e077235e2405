# /// script
# requires-python = ">=3.10"
# dependencies = ["hf-adalip[recipes,trainer,peft]"]
#
# [tool.uv.sources]
# hf-adalip = { path = ".." }
# ///
"""Fine-tunes a pretrained encoder on sentences, or pairs of them, and their labels, with Trainer.

    accelerate launch recipes/text_classification.py --learning_rate 5e-5
    python recipes/text_classification.py --optim adamw_torch     # the optimizer to compare with
    python recipes/text_classification.py --dataset_name nyu-mll/glue --dataset_config_name sst2
    python recipes/text_classification.py --dataset_name nyu-mll/glue --dataset_config_name stsb
    python recipes/text_classification.py --dataset_name FOLDER   # of parquet, csv or json files
    python recipes/text_classification.py --lora_r 8              # trains a LoRA adapter only
    python recipes/text_classification.py --config options.yaml   # then --resume_from_checkpoint
                                                                  # latest, if it was stopped

Labels that are not whole numbers or names are regressed on. S is shared by the parameters of a
module, and stays between 0.1 and 10. All options of transformers.TrainingArguments are taken;
gradients are not clipped unless asked (--max_grad_norm).
"""

import dataclasses
import hashlib
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from math import isfinite
from pathlib import Path
from typing import Any

import numpy as np
from datasets import ClassLabel, Dataset, Features, Value
from safetensors import SafetensorError
from scipy.stats import pearsonr, spearmanr
from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef
from torch import nn

try:
    from transformers import (
        AutoModelForSequenceClassification,
        AutoTokenizer,
        DataCollatorWithPadding,
        EvalPrediction,
        Trainer,
        set_seed,
    )
except ImportError as error:
    raise ImportError(
        "this recipe needs transformers: pip install 'hf-adalip[recipes,trainer]'"
    ) from error

from hf_adalip.errors import DataError, UsageError
from hf_adalip.recipe.data import load_splits
from hf_adalip.recipe.options import check_bounds
from hf_adalip.recipe.trainer import (
    RecipeArguments,
    check_pretrained,
    exit_status,
    optimizer_kwargs,
    parse,
    run,
)

NAME = "text_classification"


@dataclass
class Arguments:
    model_name_or_path: str = field(
        default="sentence-transformers/all-MiniLM-L6-v2",
        metadata={"help": "Hub id or folder of an encoder and its tokenizer."},
    )
    dataset_name: str = field(
        default="cornell-movie-review-data/rotten_tomatoes",
        metadata={"help": "Hub id or folder of a dataset with a train split and another."},
    )
    dataset_config_name: str | None = field(
        default=None, metadata={"help": "Its configuration, such as sst2 of nyu-mll/glue."}
    )
    text_column_names: str | None = field(
        default=None, metadata={"help": "One column or two with a comma; default: all of strings."}
    )
    label_column_name: str = field(default="label", metadata={"help": "Classes or numbers."})
    validation_split_name: str | None = field(
        default=None,
        metadata={"help": "Default: the first whose name begins with validation, or else test."},
    )
    max_seq_length: int = field(default=128, metadata={"help": "Tokens to cut texts to."})
    max_train_samples: int | None = field(
        default=None, metadata={"help": "Train on so many texts only, always the same ones."}
    )
    max_eval_samples: int | None = field(
        default=None, metadata={"help": "Evaluate on so many texts only, always the same ones."}
    )
    lora_r: int | None = field(
        default=None,
        metadata={"help": "Train LoRA adapters of this rank and the new head only (needs peft)."},
    )
    lora_alpha: int | None = field(
        default=None, metadata={"help": "LoRA's scale is this over lora_r; default: 2 lora_r."}
    )


@dataclass
class TextData:
    """Texts with labels: the columns `texts` of both parts, and `labels`.

    `names` are the classes' names, None for numbers to regress on; `validation` is the dataset's
    `eval_split`.
    """

    train: Dataset
    validation: Dataset
    texts: list[str]
    names: list[str] | None
    eval_split: str

    def fingerprint(self) -> str:
        """16 hexadecimal digits of a sha256 over texts and labels of both parts."""
        digest = hashlib.sha256()
        for part in (self.train, self.validation):
            for column in (*self.texts, "labels"):
                digest.update(json.dumps(part[column][:]).encode())
        return digest.hexdigest()[:16]


def load_texts(args: Arguments) -> TextData:
    name = args.dataset_name
    splits = load_splits(name, args.dataset_config_name, "--dataset_name /path/to/a/copy")
    likely = [s for s in splits if s.startswith("validation")] + [s for s in splits if s == "test"]
    split = args.validation_split_name or next(iter(likely), "validation")
    for needed in ("train", split):
        if needed not in splits:
            raise DataError(f"{name} has no {needed} split; it has {', '.join(splits)}")
    if split == "train":
        raise UsageError("--validation_split_name train: it is trained on; choose another")
    features = splits["train"].features
    label = args.label_column_name
    dtypes = {key: getattr(kind, "dtype", "") for key, kind in features.items() if key != label}
    strings = [key for key, dtype in dtypes.items() if dtype in ("string", "large_string")]
    texts = args.text_column_names.split(",") if args.text_column_names else strings
    if missing := [column for column in (*texts, label) if column not in features]:
        raise DataError(f"{name} has no column {missing[0]!r}; it has {', '.join(features)}")
    if label in texts or len(set(texts)) < len(texts):
        raise UsageError(
            f"--text_column_names {args.text_column_names}: each column once, and not the labels' "
            f"({label})"
        )
    if wrong := [column for column in texts if column not in strings]:
        raise UsageError(
            f"--text_column_names {args.text_column_names}: {wrong[0]} of {name} is no text but "
            f"{features[wrong[0]]}; choose one or two of {', '.join(strings) or 'another dataset'}"
        )
    if not isinstance(features[label], Value | ClassLabel):
        raise DataError(
            f"{name}: {label} must be a class or a number, and is {features[label]}; choose "
            "another --label_column_name"
        )
    if len(texts) not in (1, 2):
        raise DataError(
            f"{name} has {len(texts)} columns of strings ({', '.join(texts)}); "
            "choose one or two with --text_column_names"
        )
    limits = {"train": args.max_train_samples, split: args.max_eval_samples}
    labelled = {key: _without_unlabelled(splits[key], label, f"{name}, {key}") for key in limits}
    parts = {key: _part(labelled[key], [*texts, label], limits[key]) for key in limits}
    for key, part in parts.items():
        for column in (*texts, label):
            _check_filled(part[column][:], f"{name}, {key}", column)
    names = _names(features, label, parts["train"])
    train, validation = (_labelled(parts[s], label, names, f"{name}, {s}") for s in limits)
    classes = None if names is None else list(map(str, names))
    return TextData(train, validation, texts, classes, split)


def _without_unlabelled(split: Dataset, label: str, where: str) -> Dataset:
    """Without the rows, as SNLI has them, whose -1 says that there is no class.

    A split that has no others, as GLUE's test splits, is left to be refused.
    """
    if not hasattr(split.features[label], "names"):
        return split
    kept = [i for i, value in enumerate(split[label]) if value != -1]
    if len(kept) in (0, len(split)):
        return split
    if os.environ.get("LOCAL_RANK", "0") == "0":
        rows = f"{len(split) - len(kept)} of {len(split)} rows"
        print(f"warning: {where}: {rows} have no label (-1) and are left out", file=sys.stderr)
    return split.select(kept)


def _part(split: Dataset, columns: list[str], limit: int | None) -> Dataset:
    if limit is not None and limit < len(split):
        split = split.shuffle(seed=0).select(range(limit))
    return split.select_columns(columns)


def _check_filled(values: list[Any], where: str, column: str) -> None:
    """Raises DataError for rows with no text, class or finite number there."""
    missing = sum(v is None or (isinstance(v, float) and not isfinite(v)) for v in values)
    if missing:
        raise DataError(
            f"{where}: {column} is missing or not finite in {missing} of {len(values)} rows; "
            "leave these out"
        )


def _names(features: Features, label: str, train: Dataset) -> list[Any] | None:
    """What stands in the column for class 0, 1, …; None for a column of real numbers."""
    kind = features[label]
    if hasattr(kind, "names"):
        return list(kind.names)
    if getattr(kind, "dtype", "").startswith("float"):
        return None
    return sorted(set(train[label]))


def _labelled(part: Dataset, label: str, names: list[Any] | None, where: str) -> Dataset:
    """The part with a column `labels` of class numbers from 0 on, or of float32."""
    found = part[label][:]
    if names is None:
        labels, kind = found, Value("float32")
    else:
        numbered = hasattr(part.features[label], "names")
        number = {value: value if numbered else i for i, value in enumerate(names)}
        number = {i: i for i in range(len(names))} if numbered else number
        if unknown := set(found) - set(number):
            raise DataError(f"{where}: no class of the train split for label {unknown.pop()!r}")
        labels, kind = [number[value] for value in found], Value("int64")
    return part.remove_columns(label).add_column("labels", labels, feature=kind)


def build_model(args: Arguments, names: list[str] | None) -> tuple[nn.Module, Any]:
    """The encoder with a new head, and its tokenizer."""
    known = {"problem_type": "regression", "num_labels": 1}
    if names is not None:
        known = {
            "problem_type": "single_label_classification",
            "num_labels": len(names),
            "id2label": dict(enumerate(names)),
            "label2id": {name: i for i, name in enumerate(names)},
        }
    try:
        tokenizer = AutoTokenizer.from_pretrained(args.model_name_or_path)
        model = AutoModelForSequenceClassification.from_pretrained(args.model_name_or_path, **known)
    except (OSError, ValueError, SafetensorError) as error:
        reason = " ".join(str(error).split())
        raise UsageError(f"--model_name_or_path {args.model_name_or_path}: {reason}") from error
    except RuntimeError as error:
        raise UsageError(
            f"--model_name_or_path {args.model_name_or_path}: its weights have other shapes, as "
            f"those of a head for other labels than these {known['num_labels']}; choose one "
            "without a head"
        ) from error
    if tokenizer.pad_token is None:  # of decoders
        tokenizer.pad_token = tokenizer.eos_token
        model.config.pad_token_id = tokenizer.pad_token_id
    if args.lora_r is not None:
        model = add_lora(model, args.lora_r, args.lora_alpha)
    return model, tokenizer


def add_lora(model: nn.Module, r: int, alpha: int) -> nn.Module:
    """Freezes the model but for its head, and adds adapters to its linear layers."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(task_type="SEQ_CLS", r=r, lora_alpha=alpha, target_modules="all-linear")
    return get_peft_model(model, config)


def check_length(args: Arguments, model: nn.Module, tokenizer: Any, *parts: Dataset) -> None:
    """Raises UsageError if a text has more tokens than the model has positions for."""
    limits = [tokenizer.model_max_length]  # of a tokenizer that does not say, 10^30
    if positions := getattr(model.config, "max_position_embeddings", None):
        for key, module in model.named_modules():
            first = getattr(module, "padding_idx", None)
            if key.endswith(".position_embeddings") and first is not None:
                positions -= first + 1  # RoBERTa begins to count after it
        limits.append(positions)
    longest = max(len(tokens) for part in parts for tokens in part["input_ids"])
    if longest > min(limits):
        raise UsageError(
            f"--max_seq_length {args.max_seq_length}: a text has {longest} tokens then, and "
            f"{args.model_name_or_path} takes {min(limits)}; choose {min(limits)} or fewer"
        )


def classification_metrics(prediction: EvalPrediction) -> dict[str, float]:
    answers, labels = np.argmax(prediction.predictions, axis=-1), prediction.label_ids
    average = "binary" if prediction.predictions.shape[-1] == 2 else "macro"
    return {
        "accuracy": accuracy_score(labels, answers),
        "f1": f1_score(labels, answers, average=average),
        "matthews_correlation": matthews_corrcoef(labels, answers),
    }


def regression_metrics(prediction: EvalPrediction) -> dict[str, float]:
    answers, labels = np.squeeze(prediction.predictions, axis=-1), prediction.label_ids
    return {
        "pearson": pearsonr(answers, labels).statistic,
        "spearmanr": spearmanr(answers, labels).statistic,
    }


def check(args: Arguments, training: RecipeArguments) -> None:
    check_pretrained("model_name_or_path", args.model_name_or_path, training)
    check_bounds(args, dict.fromkeys(("max_seq_length", "lora_r", "lora_alpha"), 1))
    if args.lora_alpha is not None and args.lora_r is None:
        raise UsageError("--lora_alpha needs --lora_r")
    if args.lora_r is not None:
        args.lora_alpha = args.lora_alpha or 2 * args.lora_r
        if find_spec("peft") is None:
            raise UsageError("--lora_r needs peft: pip install 'hf-adalip[peft]'")
        readme = Path(str(training.output_dir), "README.md")
        said = training.overwrite_output_dir or training.resume_from_checkpoint
        if readme.exists() and not said:
            raise UsageError(
                f"--lora_r: peft would write into {readme}; choose another --output_dir, or "
                "--overwrite_output_dir"
            )


def main(argv: Sequence[str]) -> dict[str, Any]:
    args, training = parse(
        NAME,
        Arguments,
        argv,
        __doc__,
        per_device_train_batch_size=32,
        per_device_eval_batch_size=64,
    )
    check(args, training)
    with training.main_process_first():  # the others find what it put in the cache
        data = load_texts(args)
    set_seed(training.seed)
    model, tokenizer = build_model(args, data.names)

    def tokenize(rows: dict[str, list[str]]) -> Any:
        texts = (rows[column] for column in data.texts)
        return tokenizer(*texts, truncation=True, max_length=args.max_seq_length)

    with training.main_process_first():
        train, validation = (
            part.map(tokenize, batched=True, remove_columns=data.texts, desc="tokenizing")
            for part in (data.train, data.validation)
        )
    check_length(args, model, tokenizer, train, validation)
    trainer = Trainer(
        model=model,
        args=training,
        train_dataset=train,
        eval_dataset=validation,
        processing_class=tokenizer,
        data_collator=DataCollatorWithPadding(tokenizer),
        compute_metrics=regression_metrics if data.names is None else classification_metrics,
        **optimizer_kwargs(training),
    )
    # the loss is a mean over the batch: Trainer must not take it for a sum over all processes' and
    # accumulated batches divided already, as it does for every model that takes **kwargs
    trainer.model_accepts_loss_kwargs = False
    settings = {"recipe": NAME, "task": "text-classification", **dataclasses.asdict(args)}
    settings |= {"eval_split": data.eval_split, "dataset_fingerprint": data.fingerprint()}
    return run(trainer, settings)


if __name__ == "__main__":
    sys.exit(exit_status(NAME, main, sys.argv[1:]))
