"""recipes/configs/: accelerate reads all of each, and recipes/mnist.py trains with it.

Real processes, on the CPU with gloo: the same training as one process with the whole batches, and
resumed bit for bit. FSDP2 and HSDP need accelerate's choice of the device overridden, as
recipe_and_resume.py says.
"""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import (
    _validate_launch_command,
    launch_command_parser,
)
from accelerate.state import AcceleratorState, GradientState
from accelerate.utils import DistributedType
from accelerate.utils.launch import prepare_deepspeed_cmd_env, prepare_multi_gpu_env
from safetensors.torch import load_file

from hf_adalip.errors import UsageError
from hf_adalip.recipe.image import engines
from hf_adalip.recipe.image.data import load_image_dataset
from hf_adalip.recipe.image.options import TrainingArguments, parse
from tests.distributed.ranks import run as run_on_ranks

ROOT = Path(__file__).parents[1]
CONFIGS = ROOT / "recipes" / "configs"
RECIPE = str(ROOT / "recipes" / "mnist.py")
ROWS = 128  # of all processes, to a step
OPTIONS = (
    "--dataset_name=digits",
    "--max_train_samples=330",  # 2 steps of ROWS, and one of fewer
    "--num_train_epochs=2",
    "--checkpointing_steps=epoch",
    "--lr_scheduler_type=linear",
    "--max_grad_norm=0.5",
)
PROCESSES = {
    "single": 1,
    "multi_gpu": 2,
    "fsdp2": 2,
    "hsdp": 4,
    "deepspeed_zero2": 2,
    "deepspeed_zero3": 2,
}
ENGINES = {
    "single": "none",
    "multi_gpu": "DDP",
    "fsdp2": "FSDP2",
    "hsdp": "FSDP2",
    "deepspeed_zero2": "DeepSpeed ZeRO-2",
    "deepspeed_zero3": "DeepSpeed ZeRO-3",
}
LAUNCHED = ("single", "multi_gpu")
"""By `accelerate launch` itself, which imports everything in each process."""

needs_deepspeed = pytest.mark.skipif(
    importlib.util.find_spec("deepspeed") is None,
    reason='needs DeepSpeed: pip install "hf-adalip[deepspeed]"',
)
EACH = [
    pytest.param(name, marks=needs_deepspeed if "deepspeed" in name else ())
    for name in PROCESSES
    if name != "single"
]


def environment(name):
    """What `accelerate launch` on a machine with GPUs hands its processes."""
    parser = launch_command_parser()
    args = parser.parse_args(["--config_file", str(CONFIGS / f"{name}.yaml"), RECIPE])
    args, defaults, _ = _validate_launch_command(args)
    args.deepspeed_fields_from_accelerate_config = ",".join(defaults.deepspeed_config)
    return args, (
        prepare_deepspeed_cmd_env(args)[1] if args.use_deepspeed else prepare_multi_gpu_env(args)
    )


@pytest.mark.parametrize("name", PROCESSES)
def test_accelerate_knows_every_key(name):
    """A key that it does not know, of a nested table, it would take without a word."""
    path = CONFIGS / f"{name}.yaml"
    load_config_from_file(str(path))  # refuses unknown keys of the first level
    known = vars(launch_command_parser().parse_args([RECIPE]))
    for table in yaml.safe_load(path.read_text()).values():
        for key in table if isinstance(table, dict) else ():
            assert key in known, key


def test_what_the_configurations_come_to():
    _, fsdp = environment("fsdp2")
    assert (fsdp["ACCELERATE_USE_FSDP"], fsdp["FSDP_VERSION"]) == ("true", "2")
    assert fsdp["FSDP_RESHARD_AFTER_FORWARD"] == "true"
    assert fsdp["FSDP_STATE_DICT_TYPE"] == "SHARDED_STATE_DICT"
    assert "ACCELERATE_USE_PARALLELISM_CONFIG" not in fsdp
    _, hsdp = environment("hsdp")
    sizes = [hsdp[f"PARALLELISM_CONFIG_DP_{kind}_SIZE"] for kind in ("REPLICATE", "SHARD")]
    assert sizes == ["2", "2"]
    args, _ = environment("multi_gpu")
    assert args.multi_gpu
    for stage in ("2", "3"):
        _, zero = environment(f"deepspeed_zero{stage}")
        assert zero["ACCELERATE_USE_DEEPSPEED"] == "true"
        assert zero["ACCELERATE_DEEPSPEED_ZERO_STAGE"] == stage
        assert zero["ACCELERATE_GRADIENT_ACCUMULATION_STEPS"] == "auto"
        assert zero["ACCELERATE_GRADIENT_CLIPPING"] == "auto"


def launch(name, *arguments):
    """recipe_and_resume.py under a configuration: started by accelerate, or as it would be."""
    script = str(ROOT / "tests" / "recipe_and_resume.py")
    if name not in LAUNCHED:
        args, variables = environment(name)
        run_on_ranks(args.num_processes, script, *arguments, env=variables)
        return
    launcher = (sys.executable, "-m", "accelerate.commands.launch", "--main_process_port=0")
    done = subprocess.run(
        [*launcher, f"--config_file={CONFIGS / name}.yaml", script, *arguments],
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=400,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]


def found_in(folder):
    results = json.loads((folder / "all_results.json").read_text())
    rates = json.loads((folder / "layer_learning_rates.json").read_text())
    return results, rates, load_file(folder / "model.safetensors")


def train_and_resume(name, folder, recipe=RECIPE, options=OPTIONS):
    parts = 1 if name == "single" else 2
    launch(
        name,
        str(folder),
        recipe,
        *options,
        # those of several processes in two parts, of which the last step has the images for one
        # and a bit
        f"--gradient_accumulation_steps={parts}",
        f"--per_device_train_batch_size={ROWS // parts // PROCESSES[name]}",
    )
    whole, resumed = found_in(folder / "whole"), found_in(folder / "resumed")
    assert whole[0]["engine"] == ENGINES[name]
    assert whole[0]["num_processes"] == PROCESSES[name]
    assert resumed[1] == whole[1]
    assert all((resumed[2][key] == value).all() for key, value in whole[2].items())
    losses = [[epoch["eval_loss"] for epoch in run[0]["epochs"]] for run in (whole, resumed)]
    assert losses[0] == losses[1]
    return whole


@pytest.fixture(scope="module")
def single(tmp_path_factory):
    """The same training in one process: batches of all processes' rows."""
    return train_and_resume("single", tmp_path_factory.mktemp("single"))


@pytest.mark.slow
@pytest.mark.parametrize("name", EACH)
def test_the_recipe_trains_as_in_one_process_and_resumes(name, single, tmp_path):
    results, rates, weights = train_and_resume(name, tmp_path)
    expected, expected_rates, expected_weights = single
    for key in ("step", "parameters", "eval_accuracy", "nonfinite_steps"):
        assert results[key] == expected[key], key
    for key in ("train_loss", "eval_loss"):
        assert results[key] == pytest.approx(expected[key], rel=1e-5), key
    assert rates["steps"] == expected_rates["steps"]
    for table in ("scale", "lr"):
        for layer, values in expected_rates[table].items():
            assert rates[table][layer] == pytest.approx(values, rel=1e-4), (table, layer)
    assert weights.keys() == expected_weights.keys()
    for key, value in expected_weights.items():
        assert (weights[key] - value).norm() < 1e-4 * value.norm(), key


@pytest.mark.slow
@pytest.mark.parametrize("name", ["fsdp2", pytest.param("deepspeed_zero2", marks=needs_deepspeed)])
def test_batch_statistics_are_those_of_one_process(name, tmp_path):
    """What is evaluated is what is saved, and what a resumed run goes on from."""
    pytest.importorskip("timm")
    recipe = str(ROOT / "recipes" / "timm_finetune.py")
    options = (*OPTIONS, "--no-pretrained", "--model=test_resnet", "--max_eval_samples=60")
    results, _, weights = train_and_resume(name, tmp_path, recipe, options)
    spec = importlib.util.spec_from_file_location("recipe_timm_finetune", recipe)
    finetune = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(finetune)
    args = parse(finetune.RECIPE, options)
    model = finetune.build_model(args, (1, 8, 8), 10).eval()
    model.load_state_dict(weights)
    data = load_image_dataset("digits", max_eval_samples=60).test
    with torch.no_grad():
        loss = F.cross_entropy(model(data.images / 255.0), data.labels)
    assert results["eval_loss"] == pytest.approx(loss.item(), rel=1e-5)


def deepspeed_with(config, **options):
    """What becomes of DeepSpeed's configuration with these options of the recipe."""
    config = {"zero_optimization": {"stage": 3}, "gradient_accumulation_steps": "auto"} | config
    plugin = SimpleNamespace(deepspeed_config=config, zero_stage=3)
    state = SimpleNamespace(deepspeed_plugin=plugin)
    accelerator = SimpleNamespace(distributed_type=DistributedType.DEEPSPEED, state=state)
    engines.check_engine(accelerator, TrainingArguments(**options))
    return config


def test_deepspeed_clips_and_accumulates_as_the_recipe_says():
    """Where accelerate would make 1.0 of auto, and take its own number of batches to a step."""
    auto = {"gradient_clipping": "auto"}
    assert deepspeed_with(auto)["gradient_clipping"] == 0.0
    assert deepspeed_with(auto, max_grad_norm=0.5)["gradient_clipping"] == 0.5
    assert deepspeed_with({"gradient_clipping": 2.0})["gradient_clipping"] == 2.0
    assert deepspeed_with({})["zero_optimization"]["stage3_gather_16bit_weights_on_model_save"]
    with pytest.raises(UsageError, match=r"--max_grad_norm 0.5 would lose to .* 2\.0"):
        deepspeed_with({"gradient_clipping": 2.0}, max_grad_norm=0.5)
    with pytest.raises(UsageError, match="--gradient_accumulation_steps 4 would lose"):
        deepspeed_with({"gradient_accumulation_steps": 1}, gradient_accumulation_steps=4)
    deepspeed_with({"gradient_accumulation_steps": 4}, gradient_accumulation_steps=4)


@pytest.mark.parametrize(
    ("kind", "precision", "said"),
    [
        (DistributedType.FSDP, "no", "under FSDP1, .* fsdp_version: 2"),
        (DistributedType.MULTI_GPU, "fp16", "with fp16, .* use bf16"),
    ],
)
def test_what_secant_cannot_measure_under_is_said_before_training(kind, precision, said):
    args = TrainingArguments(optim="secant-adamw")
    with pytest.raises(UsageError, match="--optim secant-adamw cannot measure under DeepSpeed"):
        deepspeed_with({}, optim="secant-adamw")
    state = SimpleNamespace(fsdp_plugin=SimpleNamespace(fsdp_version=1))
    accelerator = SimpleNamespace(
        distributed_type=kind, state=state, mixed_precision=precision, num_processes=2
    )
    with pytest.raises(UsageError, match=said):
        engines.check_engine(accelerator, args)
    accelerator.mixed_precision, state.fsdp_plugin.fsdp_version = "bf16", 2
    engines.check_engine(accelerator, args)


@pytest.mark.slow
def test_secant_measures_while_fsdp2_accumulates(tmp_path):
    """The recipe has those gradients reduced that are measured, and resumes bit for bit."""
    options = [*OPTIONS, "--optim=secant-adamw", "--gradient_accumulation_steps=2"]
    launch("fsdp2", str(tmp_path), RECIPE, *options, "--per_device_train_batch_size=16")
    whole, resumed = (
        json.loads((tmp_path / name / "all_results.json").read_text())
        for name in ("whole", "resumed")
    )
    assert whole["engine"] == "FSDP2"
    assert whole["secant_rate"] == resumed["secant_rate"] > 0
    assert whole["eval_loss"] == resumed["eval_loss"]
    assert len(json.loads((tmp_path / "whole" / "secant.json").read_text())["step"]) > 3


@pytest.fixture
def fresh_accelerate():
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


@pytest.mark.usefixtures("fresh_accelerate")
@pytest.mark.parametrize(
    ("engine", "options", "told"),
    [
        ("FSDP", [], "has FSDP, but it would train with NO: it has FSDP on GPUs only"),
        ("DEEPSPEED", ["--cpu"], "--cpu: accelerate would leave out the DeepSpeed"),
    ],
)
def test_an_engine_that_accelerate_would_leave_out_is_refused(
    engine, options, told, tmp_path, monkeypatch, capsys
):
    monkeypatch.setenv(f"ACCELERATE_USE_{engine}", "true")
    spec = importlib.util.spec_from_file_location("recipe_mnist", RECIPE)
    mnist = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(mnist)
    assert mnist.main(mnist.RECIPE, (*OPTIONS, *options, f"--output_dir={tmp_path}")) == 2
    assert told in capsys.readouterr().err
