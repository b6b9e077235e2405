# /// script
# requires-python = ">=3.10"
# dependencies = ["hf-adalip[recipes,trainer]"]
#
# [tool.uv.sources]
# hf-adalip = { path = ".." }
# ///
"""Trains a small language model from scratch on a text file, with Trainer.

    accelerate launch recipes/causal_lm.py --train_file input.txt
    python recipes/causal_lm.py --train_file input.txt --optim adamw_torch   # to compare with
    python recipes/causal_lm.py --train_file input.txt --model_type llama --hidden_size 256
    python recipes/causal_lm.py --train_file input.txt --tokenizer_name openai-community/gpt2
    python recipes/causal_lm.py --config options.yaml                        # then, if stopped,
                                                     # --resume_from_checkpoint latest

Tokens are the bytes of the text unless a tokenizer is named. The end of the file is held out for
evaluation; losses are means per token, in nats. S is shared by the parameters of a module, and
stays between 0.1 and 10. All options of transformers.TrainingArguments are taken; gradients are
not clipped unless asked (--max_grad_norm).
"""

import dataclasses
import hashlib
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

try:
    from transformers import (
        AutoConfig,
        AutoModelForCausalLM,
        AutoTokenizer,
        ByT5Tokenizer,
        PretrainedConfig,
        PreTrainedModel,
        PreTrainedTokenizerBase,
        Trainer,
        default_data_collator,
        set_seed,
    )
    from transformers.integrations import is_deepspeed_zero3_enabled
except ImportError as error:
    raise ImportError(
        "this recipe needs transformers: pip install 'hf-adalip[recipes,trainer]'"
    ) from error

from hf_adalip.errors import DataError, UsageError
from hf_adalip.recipe.options import check_bounds
from hf_adalip.recipe.trainer import (
    RecipeArguments,
    check_pretrained,
    exit_status,
    optimizer_kwargs,
    parse,
    run,
)

NAME = "causal_lm"


@dataclass
class Arguments:
    train_file: str = field(metadata={"help": "Text in UTF-8."})
    validation_split_percentage: float = field(
        default=10.0, metadata={"help": "Share of the text, its end, that is held out."}
    )
    tokenizer_name: str | None = field(
        default=None, metadata={"help": "Hub id or folder of a tokenizer; default: bytes."}
    )
    block_size: int = field(default=128, metadata={"help": "Tokens in a sequence."})
    model_type: str = field(
        default="gpt2", metadata={"help": "Architecture: gpt2, llama, or another of transformers."}
    )
    hidden_size: int = field(default=128, metadata={"help": "Width of the model."})
    num_hidden_layers: int = field(default=4, metadata={"help": "Blocks of the model."})
    num_attention_heads: int = field(default=4, metadata={"help": "Heads of a block."})
    config_overrides: str | None = field(
        default=None,
        metadata={"help": "Other values of its configuration: resid_pdrop=0,embd_pdrop=0"},
    )


def load_tokenizer(args: Arguments) -> PreTrainedTokenizerBase:
    if args.tokenizer_name is None:
        return ByT5Tokenizer(extra_ids=0)  # a token for each byte; needs no vocabulary
    try:
        return AutoTokenizer.from_pretrained(args.tokenizer_name)
    except (OSError, ValueError) as error:
        raise UsageError(f"--tokenizer_name: {' '.join(str(error).split())}") from error


def load_blocks(args: Arguments, tokenizer: PreTrainedTokenizerBase) -> tuple[Tensor, Tensor]:
    """The tokens to train and to evaluate on: int64 [blocks, block_size] each.

    What is left over at the end of either is not used.
    """
    try:
        text = Path(args.train_file).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"cannot read --train_file {args.train_file}: {error}") from error
    tokens = torch.tensor(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
    held_out = round(len(tokens) * args.validation_split_percentage / 100)
    parts = tokens[: len(tokens) - held_out], tokens[len(tokens) - held_out :]
    size = args.block_size
    if min(map(len, parts)) < size:
        raise DataError(
            f"{args.train_file} has {len(parts[0])} tokens to train on and {len(parts[1])} held "
            f"out; a block has {size}: choose a smaller --block_size"
        )
    train, validation = (part[: len(part) // size * size].view(-1, size) for part in parts)
    return train, validation


def fingerprint(*blocks: Tensor) -> str:
    """16 hexadecimal digits of a sha256 over shapes and tokens."""
    digest = hashlib.sha256()
    for part in blocks:
        digest.update(str(tuple(part.shape)).encode())
        digest.update(part.numpy().data)
    return digest.hexdigest()[:16]


def examples(blocks: Tensor) -> list[dict[str, Tensor]]:
    """For Trainer. The model shifts the labels itself, so that the first is never predicted; with
    one there, Trainer would count it, and GPT-2's mean loss be (block_size - 1) / block_size of
    what it is."""
    labels = blocks.clone()
    labels[:, 0] = -100
    return [{"input_ids": x, "labels": y} for x, y in zip(blocks, labels, strict=True)]


def build_model(args: Arguments, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    """The architecture in the sizes asked for, with random weights."""
    sizes = {
        "vocab_size": len(tokenizer),
        "max_position_embeddings": args.block_size,
        "hidden_size": args.hidden_size,
        "num_hidden_layers": args.num_hidden_layers,
        "num_attention_heads": args.num_attention_heads,
    }
    special = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id")}
    try:
        config = AutoConfig.for_model(args.model_type, **sizes, **special)
        if hasattr(config, "intermediate_size"):  # a default for billions of parameters
            config.intermediate_size = 4 * args.hidden_size
        if args.config_overrides:
            override(config, args.config_overrides)
        model = AutoModelForCausalLM.from_config(config)
    except Exception as error:  # each architecture has its own
        raise UsageError(f"no such model: {' '.join(str(error).split())}") from error
    if (size := config.get_text_config().vocab_size) < len(tokenizer):
        raise UsageError(
            f"--config_overrides {args.config_overrides}: vocab_size must be at least "
            f"{len(tokenizer)}, the tokens of the tokenizer, got {size}"
        )
    return model


def check_causal(model: PreTrainedModel, block: Tensor, args: Arguments) -> None:
    """Raises UsageError if the model takes no such block, or sees the tokens that it predicts."""
    if is_deepspeed_zero3_enabled():  # the weights are not here
        return
    blocks = block.repeat(2, 1)
    blocks[1, -1] = block[-1] == 0  # another token
    try:
        with torch.no_grad():
            a, b = model.eval()(input_ids=blocks).logits[:, :-1]
    except Exception as error:
        reason = " ".join(str(error).split())
        raise UsageError(
            f"--model_type {args.model_type} cannot take a block of {len(block)} tokens: {reason}; "
            "choose other sizes"
        ) from error
    if (a - b).abs().max() > 1e-5 * a.abs().max():  # rounding is less, BERTs were seen from 1e-4 on
        raise UsageError(
            f"--model_type {args.model_type} sees the tokens that it is to predict; choose a "
            "decoder, or give --config_overrides is_decoder=True to one that can be both"
        )


def override(config: PretrainedConfig, text: str) -> None:
    try:
        if bare := [part for part in text.split(",") if "=" not in part]:
            raise ValueError(f"{bare[0]!r} has no value")
        config.update_from_string(text)
    except (ValueError, TypeError) as error:
        takes = f"NAME=VALUE,NAME=VALUE with names of {type(config).__name__}"
        raise ValueError(f"{error} (--config_overrides takes {takes}, got {text})") from error


def check(args: Arguments, training: RecipeArguments) -> None:
    check_pretrained("tokenizer_name", args.tokenizer_name, training)
    sizes = ("hidden_size", "num_hidden_layers", "num_attention_heads")
    # the first token of a block is not predicted
    check_bounds(args, {"block_size": 2, **dict.fromkeys(sizes, 1)})
    if not 0 < args.validation_split_percentage < 100:
        value = args.validation_split_percentage
        raise UsageError(f"--validation_split_percentage must be between 0 and 100, got {value}")


def main(argv: Sequence[str]) -> dict[str, Any]:
    args, training = parse(
        *(NAME, Arguments, argv, __doc__),
        learning_rate=3e-4,  # S is highest in the first steps: 1e-3 was too much for embeddings
        lr_scheduler_type="cosine",
        warmup_steps=0.05,
        per_device_train_batch_size=32,
        per_device_eval_batch_size=32,
    )
    check(args, training)
    tokenizer = load_tokenizer(args)
    train, validation = load_blocks(args, tokenizer)
    set_seed(training.seed)
    model = build_model(args, tokenizer)
    check_causal(model, train[0], args)
    trainer = Trainer(
        model=model,
        args=training,
        train_dataset=examples(train),
        eval_dataset=examples(validation),
        processing_class=tokenizer,
        data_collator=default_data_collator,
        **optimizer_kwargs(training),
    )
    settings = {"recipe": NAME, "task": "text-generation", "dataset_name": args.train_file}
    settings |= dataclasses.asdict(args)
    return run(trainer, settings | {"dataset_fingerprint": fingerprint(train, validation)})


if __name__ == "__main__":
    sys.exit(exit_status(NAME, main, sys.argv[1:]))
