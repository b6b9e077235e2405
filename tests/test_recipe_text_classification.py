"""recipes/text_classification.py as a user runs it: a tiny encoder and data made here."""

import importlib.util
import json
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState, GradientState

pytest.importorskip("transformers")

from datasets import ClassLabel, Dataset, Features, List, Value
from safetensors.torch import load_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import (
    AutoModelForSequenceClassification,
    BertConfig,
    BertModel,
    EvalPrediction,
    PreTrainedTokenizerFast,
    RobertaConfig,
    RobertaModel,
)

from hf_adalip import AdamLip
from hf_adalip.errors import DataError, UsageError
from hf_adalip.monitor import layerwise
from hf_adalip.recipe.trainer import exit_status, training
from tests.distributed.ranks import run as run_on_ranks

pytestmark = pytest.mark.slow

SCRIPT = Path(__file__).parents[1] / "recipes" / "text_classification.py"
spec = importlib.util.spec_from_file_location("recipe_text_classification", SCRIPT)
assert spec is not None
assert spec.loader is not None
recipe_module = importlib.util.module_from_spec(spec)
sys.modules[spec.name] = recipe_module  # where its dataclasses are looked up
spec.loader.exec_module(recipe_module)

WORDS = ["[PAD]", "[UNK]", "good", "bad", "film", "book", "a", "the"]


@pytest.fixture(autouse=True)
def _fresh_accelerate() -> Iterator[None]:
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("encoder")
    words = Tokenizer(WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="[UNK]"))
    words.pre_tokenizer = Whitespace()
    PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="[PAD]", unk_token="[UNK]"
    ).save_pretrained(folder)
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 32}
    config = BertConfig(vocab_size=len(WORDS), num_hidden_layers=1, **sizes)
    BertModel(config).save_pretrained(folder)
    return folder


REVIEWS = Features({"text": Value("string"), "label": ClassLabel(names=["neg", "pos"])})


def reviews(size: int) -> Dataset:
    """Sentences of which one word decides."""
    texts = [f"{'a' if i % 3 else 'the'} {'good' if i % 2 else 'bad'} film" for i in range(size)]
    return Dataset.from_dict(
        {"text": texts, "label": [i % 2 for i in range(size)]}, features=REVIEWS
    )


def write(folder: Path, **splits: Dataset) -> Path:
    for name, split in splits.items():
        split.to_parquet(folder / "data" / f"{name}-00000-of-00001.parquet")
    return folder


@pytest.fixture(scope="module")
def films(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("films")
    return write(folder, train=reviews(64), validation=reviews(16), test=reviews(8))


def options(encoder: Path, data: Path, folder: Path, *more: str) -> list[str]:
    given = {"model_name_or_path": encoder, "dataset_name": data, "output_dir": folder}
    small = ["--use_cpu", "--disable_tqdm=true", "--per_device_train_batch_size=8"]
    return [*(f"--{key}={value}" for key, value in given.items()), *small, *more]


def recipe(argv: list[str]) -> int:
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    return exit_status("text_classification", recipe_module.main, argv)


def results(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "all_results.json").read_text())
    return found


def load(data: Path, **arguments: Any) -> Any:
    return recipe_module.load_texts(recipe_module.Arguments(dataset_name=str(data), **arguments))


@pytest.fixture
def trainers(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The Trainers that the recipe makes."""
    seen: list[Any] = []

    def run(trainer: Any, settings: Any) -> Any:
        seen.append(trainer)
        return training.run(trainer, settings)

    monkeypatch.setattr(recipe_module, "run", run)
    return seen


TRAINED = ["--learning_rate=1e-2", "--num_train_epochs=4", "--save_strategy=no"]


@pytest.mark.parametrize("optim", ["adamlip", "adamw_torch"])
def test_sentences_are_learned(
    optim: str, encoder: Path, films: Path, tmp_path: Path, trainers: list[Any]
) -> None:
    folder = tmp_path / "out"
    assert recipe(options(encoder, films, folder, *TRAINED, f"--optim={optim}")) == 0
    found = results(folder)
    assert found["eval_accuracy"] == found["eval_f1"] == found["eval_matthews_correlation"] == 1.0
    assert [entry["step"] for entry in found["epochs"]] == [8, 16, 24, 32]
    assert (found["train_samples"], found["eval_samples"]) == (64, 16)  # of validation, not test
    assert found["eval_split"] == "validation"
    model = AutoModelForSequenceClassification.from_pretrained(folder)
    assert model.config.id2label == {0: "neg", 1: "pos"}
    good, bad = torch.tensor([[6, 2, 4]]), torch.tensor([[6, 3, 4]])
    with torch.no_grad():
        assert [model(input_ids=x).logits.argmax().item() for x in (good, bad)] == [1, 0]
    optimizer = layerwise(trainers[0].optimizer)
    assert (optimizer is None) == (optim == "adamw_torch")
    if optimizer is not None:
        assert isinstance(optimizer, AdamLip)
        assert optimizer.layers == "module"
        assert optimizer.param_groups[0]["scale_bounds"] == (0.1, 10.0)
        rates = optimizer.layer_learning_rates()
        assert "bert.encoder.layer.0.attention.self.query" in rates
        assert "lipschitz_scale/median" in trainers[0].state.log_history[0]


def test_pairs_in_csv_with_names_for_labels(encoder: Path, tmp_path: Path) -> None:
    """GLUE's layout but for the format: two columns of strings."""
    data = tmp_path / "pairs"
    data.mkdir()
    things = ("film", "book")
    rows = [f"a good {x},a bad {y},{'same' if x == y else 'other'}" for x in things for y in things]
    head = "premise,hypothesis,label"
    (data / "train.csv").write_text("\n".join([head, *rows * 4]))
    (data / "validation.csv").write_text("\n".join([head, *rows]))
    found = load(data)
    assert found.texts == ["premise", "hypothesis"]
    assert found.names == ["other", "same"]
    assert found.train["labels"][:4] == [1, 0, 0, 1]
    out = tmp_path / "out"
    more = ["--max_steps=2", "--save_strategy=no", "--logging_steps=1"]
    assert recipe(options(encoder, data, out, *more)) == 0
    assert results(out)["eval_samples"] == 4


def test_numbers_are_regressed_on(encoder: Path, tmp_path: Path) -> None:
    part = reviews(64).cast_column("label", Value("float32"))
    data = write(tmp_path / "scores", train=part, validation=part.select(range(16)))
    more = [*TRAINED, "--num_train_epochs=10"]
    assert recipe(options(encoder, data, tmp_path / "out", *more)) == 0
    found = results(tmp_path / "out")
    assert found["eval_pearson"] > 0.9
    assert found["eval_loss"] < 0.1  # a mean square; 0.25 for one who always says 0.5
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["problem_type"] == "regression"


def test_metrics() -> None:
    logits = np.array([[2.0, 1.0], [0.0, 1.0], [0.0, 3.0], [0.0, 5.0]])
    found = recipe_module.classification_metrics(EvalPrediction(logits, np.array([0, 1, 1, 0])))
    # 2 true, 1 false positives, 1 true, 0 false negatives
    expected = {"accuracy": 3 / 4, "f1": 4 / 5, "matthews_correlation": 1 / np.sqrt(3)}
    assert found == pytest.approx(expected)
    scores = np.array([[1.0], [2.0], [4.0]])
    found = recipe_module.regression_metrics(EvalPrediction(scores, np.array([1.0, 3.0, 2.0])))
    assert found == pytest.approx({"pearson": 1 / np.sqrt(28 / 3), "spearmanr": 0.5})


def test_labels_of_every_kind(tmp_path: Path) -> None:
    for kind, labels, names in (
        (Value("int64"), [3, 7, 3, 7], ["3", "7"]),
        (Value("string"), ["b", "a", "b", "a"], ["a", "b"]),
        (ClassLabel(names=["x", "y", "z"]), [2, 0, 2, 0], ["x", "y", "z"]),
        (Value("float64"), [0.5, 1.5, 0.5, 1.5], None),
    ):
        features = Features({"text": Value("string"), "label": kind})
        part = Dataset.from_dict({"text": list("wxyz"), "label": labels}, features=features)
        dtype = kind.dtype.replace("/", "")
        found = load(write(tmp_path / dtype / str(kind)[:5], train=part, validation=part))
        assert found.names == names
        whole = {"3": 0, "7": 1} if kind == Value("int64") else {"a": 0, "b": 1}
        expected = [whole.get(str(x), x) for x in labels]
        assert found.train["labels"][:] == expected


def test_the_same_samples_whatever_the_seed(films: Path) -> None:
    some, same = (load(films, max_train_samples=10) for _ in range(2))
    assert len(some.train) == 10
    assert some.fingerprint() == same.fingerprint() != load(films).fingerprint()


def test_a_label_changes_the_fingerprint(films: Path, tmp_path: Path) -> None:
    part = reviews(64)
    rows = part.to_dict() | {"label": [1 - part["label"][0], *part["label"][1:]]}
    changed = Dataset.from_dict(rows, features=REVIEWS)
    data = write(tmp_path, train=changed, validation=reviews(16))
    assert load(data).fingerprint() != load(films).fingerprint()


def test_rows_without_a_label_are_left_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """SNLI's -1, where its annotators did not agree."""
    rows = reviews(8).to_dict() | {"label": [-1, 1, 0, 1, -1, 1, 0, 1]}
    part = Dataset.from_dict(rows, features=REVIEWS)
    found = load(write(tmp_path / "a", train=part, validation=reviews(4)), max_train_samples=6)
    assert sorted(found.train["labels"][:]) == [0, 0, 1, 1, 1, 1]
    assert len(found.validation) == 4
    message = capsys.readouterr().err
    assert "train: 2 of 8 rows have no label (-1) and are left out" in message
    assert "validation: " not in message


def test_splits_and_columns_are_found_or_refused(films: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="there is no folder /no/such/folder"):
        load(Path("/no/such/folder"))
    with pytest.raises(DataError, match="has no dev split; it has train, validation, test"):
        load(films, validation_split_name="dev")
    mnli = write(tmp_path / "c", train=reviews(8), validation_matched=reviews(4), test=reviews(2))
    assert len(load(mnli).validation) == 4
    with pytest.raises(DataError, match="no column 'review'; it has text, label"):
        load(films, text_column_names="review")
    with pytest.raises(DataError, match="no column 'stars'; it has text, label"):
        load(films, label_column_name="stars")
    unlabelled = reviews(8).to_dict() | {"label": [-1] * 8}  # GLUE's test splits
    hidden = Dataset.from_dict(unlabelled, features=REVIEWS)
    with pytest.raises(DataError, match="no class of the train split for label -1"):
        load(write(tmp_path / "a", train=reviews(8), test=hidden))
    three = reviews(8).add_column("title", ["a"] * 8).add_column("author", ["b"] * 8)
    with pytest.raises(DataError, match=r"has 3 columns of strings \(text, title, author\)"):
        load(write(tmp_path / "b", train=three, test=three))


@pytest.mark.parametrize(
    ("kind", "labels", "message"),
    [
        (
            Value("float32"),
            [0.0, float("nan"), None, 1.0],
            "label is missing or not finite in 2 of 4 rows",
        ),
        (Value("string"), ["a", None, "b", "a"], "label is missing or not finite in 1 of 4 rows"),
        (
            ClassLabel(names=["a", "b"]),
            [0, None, 1, 0],
            "label is missing or not finite in 1 of 4 rows",
        ),
        (List(Value("int64")), [[0], [1], [0], [1]], "label must be a class or a number, and is L"),
    ],
)
def test_labels_that_are_none(kind: Any, labels: list[Any], message: str, tmp_path: Path) -> None:
    features = Features({"text": Value("string"), "label": kind})
    part = Dataset.from_dict({"text": list("wxyz"), "label": labels}, features=features)
    with pytest.raises(DataError, match=message):
        load(write(tmp_path, train=part, validation=part))


def test_texts_that_are_none(films: Path, tmp_path: Path) -> None:
    rows = reviews(4).to_dict()
    part = Dataset.from_dict(rows | {"text": ["a", None, "b", "c"]}, features=REVIEWS)
    part = part.add_column("stars", [1, 2, 3, 4])
    data = write(tmp_path, train=part, validation=part)
    with pytest.raises(DataError, match="train: text is missing or not finite in 1 of 4 rows"):
        load(data)
    for names, message in (
        ("stars", "stars of .* is no text but .*int64.*; choose one or two of text"),
        ("text,text", "text,text: each column once"),
        ("text,label", r"text,label: each column once, and not the labels' \(label\)"),
    ):
        with pytest.raises(UsageError, match=message):
            load(data, text_column_names=names)
    with pytest.raises(UsageError, match="--validation_split_name train: it is trained on"):
        load(films, validation_split_name="train")


def test_a_text_that_is_longer_than_the_model_takes(
    encoder: Path, films: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sizes = {"hidden_size": 8, "num_attention_heads": 1, "num_hidden_layers": 1}
    config = RobertaConfig(vocab_size=len(WORDS), pad_token_id=1, **sizes)
    for takes, refused in ((3, False), (2, True)):
        config.max_position_embeddings = 2 + takes  # which are counted from 2
        folder = tmp_path / f"takes{takes}"
        shutil.copytree(encoder, folder)
        RobertaModel(config).save_pretrained(folder)
        more = ["--max_steps=1", "--save_strategy=no"]
        assert recipe(options(folder, films, tmp_path / f"out{takes}", *more)) == 2 * refused
    message = f"--max_seq_length 128: a text has 3 tokens then, and {folder} takes 2; choose 2"
    assert message in capsys.readouterr().err


def test_weights_that_are_of_another_model_or_torn(
    encoder: Path, films: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "encoder"
    shutil.copytree(encoder, folder)
    model = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=3)
    model.save_pretrained(folder)
    assert recipe(options(folder, films, tmp_path / "out")) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert f"{folder}: its weights have other shapes, as those of a head for other labels" in line
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-9])
    assert recipe(options(folder, films, tmp_path / "out")) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith(f"text_classification: error: --model_name_or_path {folder}: ")


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ("--lora_alpha=3", "--lora_alpha needs --lora_r"),
        ("--lora_r=0", "--lora_r must be at least 1, got 0"),
        ("--max_seq_length=0", "--max_seq_length must be at least 1, got 0"),
        ("--max_train_samples=0", "--max_train_samples must be at least 1, got 0"),
        ("--model_name_or_path=/no/such/model", "--model_name_or_path: "),
        ("--model_name_or_path=no/such/model", "there is no folder no/such/model"),
    ],
)
def test_bad_options_are_one_line(
    more: str,
    message: str,
    encoder: Path,
    films: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert recipe(options(encoder, films, tmp_path / "out", more)) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith("text_classification: error: ")
    assert message in line
    assert not (tmp_path / "out").exists()


def test_the_model_that_is_fine_tuned_is_not_replaced(
    encoder: Path, films: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    shutil.copytree(encoder, out)
    assert recipe(options(out, films, out, "--overwrite_output_dir")) == 2
    message = f"--model_name_or_path {out} is in the --output_dir, whose files the run replaces"
    assert message in capsys.readouterr().err
    assert {path.name for path in encoder.iterdir()} == {path.name for path in out.iterdir()}


def test_lora_without_peft_says_what_to_install(
    encoder: Path,
    films: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(recipe_module, "find_spec", lambda name: None)
    assert recipe(options(encoder, films, tmp_path / "out", "--lora_r=2")) == 2
    assert "--lora_r needs peft: pip install 'hf-adalip[peft]'" in capsys.readouterr().err


def test_peft_does_not_write_into_a_readme_of_the_user(
    encoder: Path, films: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("peft", reason="LoRA needs peft")
    readme = tmp_path / "README.md"
    readme.write_text("mine")
    assert recipe(options(encoder, films, tmp_path, "--lora_r=2")) == 2
    assert f"--lora_r: peft would write into {readme}" in capsys.readouterr().err
    assert readme.read_text() == "mine"


def test_the_optimizer_sees_what_lora_trains_and_resumes(
    encoder: Path, films: Path, tmp_path: Path, trainers: list[Any]
) -> None:
    pytest.importorskip("peft", reason="LoRA needs peft")
    more = ["--lora_r=2", "--learning_rate=1e-2", "--num_train_epochs=1", "--save_strategy=steps"]
    more += ["--save_steps=5"]
    a, b = tmp_path / "a", tmp_path / "b"
    assert recipe(options(encoder, films, a, *more)) == 0
    optimizer = layerwise(trainers[0].optimizer)
    assert optimizer is not None
    (group,) = optimizer.param_groups
    trained = {name for name, p in trainers[0].model.named_parameters() if p.requires_grad}
    assert set(group["param_names"]) == trained
    assert all("lora_" in name or "classifier" in name for name in trained)
    assert set(group["params"]) == set(optimizer.state)
    found = results(a)
    assert found["trainable_parameters"] == sum(p.numel() for p in group["params"])
    assert found["trainable_parameters"] < found["parameters"] / 3
    assert found["lora_alpha"] == 4
    base = dict(BertModel.from_pretrained(encoder).named_parameters())
    for name, parameter in trainers[0].model.named_parameters():
        if not parameter.requires_grad and "classifier" not in name:
            original = name.split("bert.", 1)[1].replace(".base_layer", "")
            assert torch.equal(parameter, base[original])

    resumed = f"--resume_from_checkpoint={a / 'checkpoint-5'}"
    assert recipe(options(encoder, films, b, *more, resumed)) == 0
    adapters = [load_file(folder / "adapter_model.safetensors") for folder in (a, b)]
    assert adapters[0].keys() == adapters[1].keys()
    assert all(torch.equal(adapters[0][name], adapters[1][name]) for name in adapters[0])
    rates = [json.loads((folder / "layer_learning_rates.json").read_text()) for folder in (a, b)]
    assert rates[0] == rates[1]
    assert any("lora_A" in name for name in rates[0]["scale"])


@pytest.fixture(scope="module")
def without_dropout(encoder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("without") / "dropout"
    shutil.copytree(encoder, folder)
    config = json.loads((folder / "config.json").read_text())
    config |= {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize("how", ["accumulated", "two processes"])
def test_a_batch_is_the_same_however_it_is_split(
    how: str, without_dropout: Path, films: Path, tmp_path: Path
) -> None:
    """Trainer would multiply the loss by the processes, and add the accumulated ones up."""
    argv = options(without_dropout, films, tmp_path / "whole", "--save_strategy=no")
    once = ["--num_train_epochs=1", "--optim_args=scale_bounds=none"]
    assert recipe([*argv, *once, "--per_device_train_batch_size=16"]) == 0
    split = options(without_dropout, films, tmp_path / "split", "--save_strategy=no", *once)
    if how == "accumulated":
        assert recipe([*split, "--gradient_accumulation_steps=2"]) == 0
    else:
        run_on_ranks(2, str(SCRIPT), *split)
    expected, found = results(tmp_path / "whole"), results(tmp_path / "split")
    for key in ("step", "eval_accuracy"):
        assert found[key] == expected[key]
    for key in ("train_loss", "eval_loss"):
        assert found[key] == pytest.approx(expected[key], rel=1e-5), key
    weights = [load_file(tmp_path / run / "model.safetensors") for run in ("whole", "split")]
    for key, value in weights[0].items():
        torch.testing.assert_close(weights[1][key], value, rtol=1e-4, atol=1e-5, msg=key)


def test_a_token_is_refused_as_an_option(
    encoder: Path, films: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert recipe(options(encoder, films, tmp_path / "run", "--hub_token=hf_secret")) == 2
    error = capsys.readouterr().err
    assert "set HF_TOKEN instead" in error
    assert "hf_secret" not in error
    assert not (tmp_path / "run").exists()
