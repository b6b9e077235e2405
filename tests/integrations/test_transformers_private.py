"""docs/upstream.md: what hf_adalip uses of transformers beyond its public API is as expected."""

import dataclasses
import inspect
import os
import re
import shutil
import subprocess
import sys
import textwrap
from importlib.metadata import version
from pathlib import Path

import pytest

pytest.importorskip("transformers")

import transformers
from transformers import Trainer, modelcard, trainer_optimizer
from transformers.training_args import OptimizerNames

ROOT = Path(__file__).parents[2]

SIGNATURES = [
    (Trainer.get_optimizer_cls_and_kwargs, "args, model", "register, by _OPTIMIZER_HANDLERS"),
    (trainer_optimizer.is_optimizer_factory, "optimizer_cls_or_factory", "ModelOptimizer"),
    (modelcard.extract_hyperparameters_from_trainer, "trainer", "_true_hyperparameters"),
    (Trainer.create_optimizer, "self, model", "trainer_kwargs and the doctor"),
    (Trainer.log, "self, logs, start_time", "attach"),
    (Trainer.training_step, "self, model, inputs, num_items_in_batch", "attach"),
]


def told(what: str, expected: object, found: object, used_by: str) -> str:
    return (
        f"transformers {transformers.__version__}: {what} is {found}, and hf_adalip expects "
        f"{expected}. It is used by {used_by} in hf_adalip/integrations/trainer.py: adapt that, "
        "this test, docs/upstream.md, and the versions in trainer._NEEDS"
    )


@pytest.mark.parametrize(
    ("function", "expected", "used_by"), SIGNATURES, ids=lambda x: getattr(x, "__qualname__", "")
)
def test_signatures(function, expected, used_by):
    found = ", ".join(inspect.signature(function).parameters)
    assert found == expected, told(function.__qualname__, f"({expected})", f"({found})", used_by)


def test_a_handler_takes_a_context_with_what_is_read():
    found = {field.name for field in dataclasses.fields(trainer_optimizer.OptimizerContext)}
    expected = {"args", "adam_kwargs", "optim_args"}
    assert expected <= found, told("OptimizerContext", f"with {expected}", found, "_handler")
    handlers = trainer_optimizer._OPTIMIZER_HANDLERS
    assert isinstance(handlers, dict), told("_OPTIMIZER_HANDLERS", dict, type(handlers), "register")
    for name in (OptimizerNames.ADAMW_TORCH, OptimizerNames.SGD):
        found = list(inspect.signature(handlers[name]).parameters)
        assert len(found) == 1, told(f"the handler of {name}", "(context)", found, "_handler")


def test_trainer_finds_handlers_in_the_table(tmp_path, monkeypatch):
    answer = (object, {"lr": 0.5})
    monkeypatch.setitem(
        trainer_optimizer._OPTIMIZER_HANDLERS, OptimizerNames.SGD, lambda context: answer
    )
    args = transformers.TrainingArguments(str(tmp_path), optim="sgd", report_to=[], use_cpu=True)
    found = Trainer.get_optimizer_cls_and_kwargs(args)
    expected = "to come from _OPTIMIZER_HANDLERS"
    assert found == answer, told("Trainer's optimizer", expected, found, "register")


def test_names_are_an_enum_of_strings_whose_tables_can_be_added_to():
    tables = {"_member_map_": dict, "_member_names_": list, "_value2member_map_": dict}
    assert issubclass(OptimizerNames, str)
    for name, kind in tables.items():
        found = type(getattr(OptimizerNames, name, None))
        assert found is kind, told(f"OptimizerNames.{name}", kind, found, "_add_member")


@pytest.mark.slow
@pytest.mark.skipif(
    not version("transformers").startswith("5.24."), reason="the patch is for transformers 5.24"
)
@pytest.mark.skipif(shutil.which("patch") is None, reason="needs the command patch")
def test_the_patch_of_the_documentation_lets_a_package_register_a_name(tmp_path):
    installed = Path(transformers.__file__).parent
    text = (ROOT / "docs" / "upstream.md").read_text(encoding="utf-8")
    diff = re.search(r"^```diff\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)[1]
    patched = tmp_path / "src" / "transformers"
    patched.mkdir(parents=True)
    changed = re.findall(r"^\+\+\+ b/src/transformers/(\S+)$", diff, re.MULTILINE)
    for path in installed.iterdir():
        if path.name in changed:
            shutil.copy(path, patched)
        elif path.name != "__pycache__":
            (patched / path.name).symlink_to(path)
    subprocess.run(["patch", "-p1"], input=diff, text=True, cwd=tmp_path, check=True)
    plugin = tmp_path / "src" / "plugin-1.0.dist-info"
    plugin.mkdir()
    (plugin / "METADATA").write_text("Metadata-Version: 2.1\nName: plugin\nVersion: 1.0\n")
    (plugin / "entry_points.txt").write_text(
        "[transformers.optimizers]\nmine-lip = plugin:handler\nsgd = plugin:never\n"
    )
    (tmp_path / "src" / "plugin.py").write_text(
        textwrap.dedent("""
        import hf_adalip

        def handler(context):
            return hf_adalip.AdamLip, {"lr": context.args.learning_rate}
        """)
    )
    code = """
    import sys, torch
    from transformers import HfArgumentParser, Trainer, TrainingArguments, trainer_optimizer

    parser = HfArgumentParser(TrainingArguments)
    (args,) = parser.parse_args_into_dataclasses(
        ["--output_dir", "out", "--optim", "mine-lip", "--learning_rate", "0.5", "--use_cpu"]
    )
    assert "plugin" not in sys.modules
    trainer = Trainer(torch.nn.Linear(2, 2), args)
    optimizer = trainer.create_optimizer()
    assert type(optimizer).__name__ == "AdamLip" and optimizer.param_groups[0]["lr"] == 0.5
    torch.save(args, "args.bin")
    assert torch.load("args.bin", weights_only=False).optim.value == "mine-lip"
    sgd = TrainingArguments("out", optim="sgd", use_cpu=True)
    assert Trainer.get_optimizer_cls_and_kwargs(sgd)[0] is torch.optim.SGD
    try:
        TrainingArguments("out", optim="other")
    except ValueError as error:
        assert "mine-lip" in str(error)
    else:
        raise AssertionError
    """
    path = os.pathsep.join([str(tmp_path / "src"), str(ROOT)])
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": path, "HF_HUB_OFFLINE": "1"},
        check=False,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
