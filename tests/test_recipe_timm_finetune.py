"""recipes/timm_finetune.py: what it makes of timm's models, weights, groups, mixing and average."""

import importlib.util
import inspect
import json
import os
import pickle
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import huggingface_hub
import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from accelerate.state import AcceleratorState, GradientState
from PIL import Image
from safetensors.torch import load_file, save_file
from timm.data import Mixup
from torch import nn

from hf_adalip import AdamLip
from hf_adalip.errors import DataError
from hf_adalip.recipe.checkpoints import MANIFEST, write_manifest
from hf_adalip.recipe.image import loop, training
from hf_adalip.recipe.image.data import load_image_dataset
from hf_adalip.recipe.image.options import optimizer_arguments, parse
from hf_adalip.recipe.image.training import main
from hf_adalip.registry import create_optimizer
from tests.distributed.ranks import kill_when, start
from tests.distributed.ranks import run as run_on_ranks

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "recipes" / "timm_finetune.py"
spec = importlib.util.spec_from_file_location("recipe_timm_finetune", SCRIPT)
assert spec is not None
assert spec.loader is not None
finetune = importlib.util.module_from_spec(spec)
spec.loader.exec_module(finetune)

BASE = ["--dataset_name=digits", "--cpu", "--no-pretrained", "--model=test_resnet"]
# 135 images in batches of 16: 8 and one of 7, which is odd; 5 steps to an epoch
EVERYTHING = [
    *(*BASE, "--max_train_samples=135", "--max_eval_samples=60", "--num_train_epochs=2"),
    *("--per_device_train_batch_size=16", "--gradient_accumulation_steps=2"),
    *("--learning_rate=3e-3", "--weight_decay=0.05", "--layer_decay=0.8", "--max_grad_norm=1"),
    *("--mixup=0.4", "--cutmix=1", "--smoothing=0.1", "--drop=0.2", "--drop_path=0.1"),
    *("--model_ema_decay=0.9", "--model_ema_warmup"),
    "--checkpointing_steps=1",
]
SHORT = [*BASE, "--max_train_samples=96", "--max_eval_samples=60", "--num_train_epochs=1"]


@pytest.fixture(autouse=True)
def _fresh_accelerate() -> Iterator[None]:
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


def recipe(*options: str, of: training.Recipe = finetune.RECIPE) -> int:
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    return main(of, options)


def build(*options: str, shape: tuple[int, int, int] = (3, 32, 32), classes: int = 7) -> nn.Module:
    args = parse(finetune.RECIPE, options)
    model: nn.Module = finetune.build_model(args, shape, classes)
    return model


def results(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "all_results.json").read_text())
    return found


def numbers(folder: Path) -> dict[str, Any]:
    """Everything in the results but times, and the rates and weights."""
    found = {k: v for k, v in results(folder).items() if k not in ("seconds", "command")}
    for entry in found["epochs"]:
        entry.pop("seconds")
    found["rates"] = json.loads((folder / "layer_learning_rates.json").read_text())
    found["weights"] = (folder / "model.safetensors").read_bytes()
    return found


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with every option, that nobody stopped: 10 steps, a checkpoint after each."""
    folder = tmp_path_factory.mktemp("whole") / "out"
    assert recipe(*EVERYTHING, f"--output_dir={folder}") == 0
    return folder


@pytest.mark.parametrize("step", [1, 5, 8])  # first, end of an epoch, amid the second
def test_average_mixing_dropout_and_schedule_resume(whole: Path, tmp_path: Path, step: int) -> None:
    out = f"--output_dir={tmp_path / 'out'}"
    assert recipe(*EVERYTHING, out, f"--resume_from_checkpoint={whole / f'step_{step}'}") == 0
    assert numbers(tmp_path / "out") == numbers(whole)
    assert results(whole)["step"] == 10


def test_timm_makes_the_model_again_from_the_folder(whole: Path) -> None:
    """As it would from the Hub; the card then says that the library is timm."""
    model = timm.create_model(f"local-dir:{whole}", pretrained=True).eval()
    assert model.num_classes == 10
    weights = load_file(whole / "model.safetensors")
    assert model.state_dict().keys() == weights.keys()
    assert all(torch.equal(x, weights[name]) for name, x in model.state_dict().items())
    assert model.pretrained_cfg["input_size"] == (1, 8, 8)
    trained = build("--no-pretrained", "--model=test_resnet", shape=(1, 8, 8), classes=10).eval()
    trained.load_state_dict(weights)
    mean, std = (torch.tensor(model.pretrained_cfg[k])[:, None, None] for k in ("mean", "std"))
    images = torch.rand(2, 1, 8, 8)
    torch.testing.assert_close(model((images - mean) / std), trained(images))


def test_killed_and_resumed(whole: Path, tmp_path: Path) -> None:
    folder = tmp_path / "out"
    process = start(str(SCRIPT), *EVERYTHING, f"--output_dir={folder}")
    kill_when((folder / "step_3").exists, process)
    assert not (folder / "all_results.json").exists()
    assert recipe(*EVERYTHING, f"--output_dir={folder}", "--resume_from_checkpoint=latest") == 0
    assert numbers(folder) == numbers(whole)


@pytest.mark.parametrize("changed", ["--mixup=0.5", "--layer_decay=0.7", "--model_ema_decay=0.99"])
def test_its_own_options_are_part_of_what_is_resumed(
    whole: Path, tmp_path: Path, changed: str, capsys: pytest.CaptureFixture[str]
) -> None:
    resumed = f"--resume_from_checkpoint={whole / 'step_1'}"
    assert recipe(*EVERYTHING, f"--output_dir={tmp_path / 'out'}", resumed, changed) == 2
    name, value = changed.lstrip("-").split("=")
    assert f"is of a different run: {name} was" in (message := capsys.readouterr().err)
    assert f"is {value}" in message


class Malicious:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.path}",)


def test_a_checkpoint_with_code_in_it_is_refused(
    whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    step, ran = tmp_path / "out" / "step_1", tmp_path / "ran"
    settings = json.loads((shutil.copytree(whole / "step_1", step) / MANIFEST).read_text())
    torch.save(Malicious(ran), step / "custom_checkpoint_0.pkl")
    (step / MANIFEST).unlink()
    write_manifest(step, 1, settings["settings"])
    out = f"--output_dir={tmp_path / 'out'}"
    assert recipe(*EVERYTHING, out, "--resume_from_checkpoint=latest") == 2
    message = capsys.readouterr().err
    assert "custom_checkpoint_0.pkl has more in it than tensors and numbers" in message
    assert not ran.exists()


TWO_RANKS = """
import importlib.util, os, sys
from safetensors.torch import save_file
from hf_adalip.recipe.image.training import train

spec = importlib.util.spec_from_file_location("recipe", sys.argv[1])
finetune = importlib.util.module_from_spec(spec)
spec.loader.exec_module(finetune)
run = train(finetune.RECIPE, sys.argv[3:])
average = {name: x.clone() for name, x in run.average.module.state_dict().items()}
save_file(average, f"{sys.argv[2]}/average{os.environ['RANK']}.safetensors")
"""


def test_two_ranks_keep_one_average_and_resume(tmp_path: Path) -> None:
    (tmp_path / "two.py").write_text(TWO_RANKS)

    def run(out: str, *options: str) -> dict[str, Any]:
        script = [str(tmp_path / "two.py"), str(SCRIPT), str(tmp_path), *EVERYTHING]
        run_on_ranks(2, *script, f"--output_dir={tmp_path / out}", *options)
        ranks = [(tmp_path / f"average{rank}.safetensors").read_bytes() for rank in (0, 1)]
        assert ranks[0] == ranks[1]
        return numbers(tmp_path / out)

    a = run("a", "--checkpointing_steps=2")
    assert run("b", f"--resume_from_checkpoint={tmp_path / 'a' / 'step_2'}") == a
    assert a["num_processes"] == 2


def weights(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: x.clone() for name, x in model.state_dict().items()}


@pytest.mark.parametrize(
    ("model", "head"),
    [("test_resnet", "fc."), ("test_convnext", "head.fc."), ("test_vit", "head.")],
)
def test_a_checkpoint_fills_everything_but_another_classifier(
    model: str, head: str, tmp_path: Path
) -> None:
    saved = weights(build("--no-pretrained", f"--model={model}"))
    save_file(saved, tmp_path / "model.safetensors")
    torch.save({"state_dict": saved, "epoch": 3}, tmp_path / "saved.pth")
    for place in (tmp_path, tmp_path / "saved.pth"):
        same, other = (
            weights(build(f"--model={model}", f"--checkpoint={place}", classes=classes))
            for classes in (7, 5)
        )
        assert same.keys() == other.keys() == saved.keys()
        for name, tensor in saved.items():
            assert torch.equal(same[name], tensor)
            assert (other[name].shape == tensor.shape) != name.startswith(head)
            assert name.startswith(head) or torch.equal(other[name], tensor)


def test_a_checkpoint_for_other_sizes_and_colours(tmp_path: Path) -> None:
    """timm resamples position embeddings, and adds up the colours for grey images."""
    saved = weights(build("--no-pretrained", "--model=test_vit"))
    save_file(saved, tmp_path / "model.safetensors")
    found = weights(build("--model=test_vit", f"--checkpoint={tmp_path}", shape=(1, 64, 64)))
    assert found["pos_embed"].shape[1] == 1 + (64 // 16) ** 2
    assert saved["pos_embed"].shape[1] == 1 + (32 // 16) ** 2
    summed = saved["patch_embed.proj.weight"].sum(1, keepdim=True)
    torch.testing.assert_close(found["patch_embed.proj.weight"], summed)


def test_what_is_no_checkpoint_of_the_model(tmp_path: Path) -> None:
    saved = weights(build("--no-pretrained", "--model=test_resnet"))
    cases = {
        "fewer": {k: v for k, v in saved.items() if k != "layer1.0.conv1.weight"},
        "more": saved | {"layer9.weight": torch.ones(1)},
        "shapes": saved | {"layer1.0.conv1.weight": torch.ones(3, 3)},
    }
    messages = {
        "fewer": "it lacks layer1.0.conv1.weight",
        "more": "it also has layer9.weight",
        "shapes": r"--checkpoint .* does not fit .*size mismatch for layer1.0.conv1.weight",
    }
    for name, tensors in cases.items():
        save_file(tensors, tmp_path / f"{name}.safetensors")
        with pytest.raises(ValueError, match=messages[name]):
            build("--model=test_resnet", f"--checkpoint={tmp_path / name}.safetensors", classes=5)
    with pytest.raises(ValueError, match="is of another model than test_vit"):
        build("--model=test_vit", f"--checkpoint={tmp_path / 'more.safetensors'}")
    save_file(weights(build("--no-pretrained", "--model=test_vit")), tmp_path / "vit.safetensors")
    with pytest.raises(ValueError, match=r"--checkpoint .* is of another model than test_resnet"):
        build("--model=test_resnet", f"--checkpoint={tmp_path / 'vit.safetensors'}", classes=5)
    for options in ("--model=vgg11 --drop_path=0.1", "--model=inception_v3"):
        with pytest.raises(ValueError, match=f"--model: cannot make {options.split()[0][8:]}"):
            build(*options.split(), f"--checkpoint={tmp_path / 'vit.safetensors'}", shape=(3, 8, 8))
    (tmp_path / "text").write_text("root:x:0:0:root:/root:/bin/bash")
    with pytest.raises(
        ValueError, match=r"cannot read .*text: it is no whole safetensors or torch"
    ):
        build(f"--checkpoint={tmp_path / 'text'}")
    with pytest.raises(ValueError, match="there is no file /no/such"):
        build("--checkpoint=/no/such")
    (tmp_path / "bad.pth").write_bytes(pickle.dumps(Malicious(tmp_path / "ran")))
    torch.save({"state_dict": saved, "more": Malicious(tmp_path / "ran")}, tmp_path / "worse.pth")
    for name in ("bad.pth", "worse.pth"):
        with pytest.raises(
            ValueError, match=f"--checkpoint: cannot read .*{name}: it is no whole safetensors or"
        ):
            build("--model=test_resnet", f"--checkpoint={tmp_path / name}")
    assert not (tmp_path / "ran").exists()


def test_the_weights_to_start_from_are_not_overwritten(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert recipe(*SHORT, "--max_train_steps=1", f"--output_dir={out}") == 0
    before = (out / "model.safetensors").read_bytes()
    options = (f"--checkpoint={out}", f"--output_dir={out}", "--overwrite_output_dir")
    assert recipe(*SHORT, *options) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert f"--checkpoint {out} is in the --output_dir that --overwrite_output_dir" in line
    assert (out / "model.safetensors").read_bytes() == before


@pytest.mark.parametrize("channels", [1, 3])
def test_images_are_normalised_and_names_stay_timms(channels: int) -> None:
    model = build("--no-pretrained", "--model=test_efficientnet", shape=(channels, 32, 32)).eval()
    plain = timm.create_model("test_efficientnet", num_classes=7, in_chans=channels).eval()
    plain.load_state_dict(model.state_dict())
    images = torch.rand(4, channels, 32, 32)
    mean, std = (torch.tensor(plain.pretrained_cfg[key]) for key in ("mean", "std"))
    if channels == 1:
        mean, std = mean.mean(), std.mean()
    normalised = (images - mean.reshape(-1, 1, 1)) / std.reshape(-1, 1, 1)
    torch.testing.assert_close(model(images), plain(normalised))


@pytest.mark.parametrize("optim", ["adamlip", "adamw", "lip-nadam"])
def test_layer_decay_is_a_rate_for_each_depth(optim: str) -> None:
    """timm numbers test_vit's six blocks 1-6, after the embeddings and before norm and head."""
    options = (f"--optim={optim}", "--layer_decay=0.5", "--learning_rate=0.1")
    args = parse(finetune.RECIPE, [*options, "--weight_decay=0.05"])
    arguments = optimizer_arguments(args, finetune.RECIPE)
    model = build("--no-pretrained", "--model=test_vit")
    groups = finetune.layer_decayed(0.5, model, arguments)
    optimizer = create_optimizer(groups, optim, **arguments)
    found = {
        name: (group["lr"], group["weight_decay"])
        for group in optimizer.param_groups
        for name in group["param_names"]
    }
    assert found.keys() == dict(model.named_parameters()).keys()
    assert found["head.weight"] == (0.1, 0.05)
    assert found["head.bias"] == (0.1, 0.0)
    assert found["norm.weight"] == (pytest.approx(0.05), 0.0)  # one with the last block
    for block in range(6):
        rate = pytest.approx(0.1 * 0.5 ** (6 - block))
        assert found[f"blocks.{block}.attn.qkv.weight"] == (rate, 0.05)
        assert found[f"blocks.{block}.attn.qkv.bias"] == (rate, 0.0)
    assert found["patch_embed.proj.weight"] == (pytest.approx(0.1 * 0.5**7), 0.05)
    assert found["pos_embed"][1] == 0.0  # in the model's no_weight_decay()
    if optim != "adamw":
        model(torch.rand(2, 3, 32, 32)).sum().backward()
        optimizer.step()
        rates = optimizer.layer_learning_rates()
        assert rates["blocks.2.attn.qkv"].lr == pytest.approx(0.1 * 0.5**4)  # weight and bias


def test_head_only(tmp_path: Path) -> None:
    """All but the classifier stays as it was bit for bit, batch statistics too."""
    out = tmp_path / "out"
    start = weights(build(*BASE, shape=(1, 8, 8), classes=10))
    save_file(start, tmp_path / "start.safetensors")
    options = ("--head_only", f"--checkpoint={tmp_path / 'start.safetensors'}", "--drop=0.5")
    assert recipe(*SHORT, *options, f"--output_dir={out}") == 0
    trained = load_file(out / "model.safetensors")
    changed = {name for name, x in start.items() if not torch.equal(x, trained[name])}
    assert changed == {"fc.weight", "fc.bias"}
    assert list(json.loads((out / "layer_learning_rates.json").read_text())["scale"]) == ["fc"]


@pytest.mark.parametrize(("precision", "rel"), [("no", 1e-5), ("bf16", 1e-2)])
def test_the_average_is_timms_and_is_what_is_evaluated(
    precision: str, rel: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first step is copied; then a += (1 - decay)(w - a), for batch statistics too."""
    expected: dict[str, torch.Tensor] = {}
    after_step = training.Training._after_step

    def average(run: training.Training, *args: Any) -> None:
        for name, x in run.model.state_dict().items():
            before = expected.get(name, x)
            expected[name] = before + 0.25 * (x - before) if x.is_floating_point() else x.clone()
        after_step(run, *args)

    monkeypatch.setattr(training.Training, "_after_step", average)
    out = tmp_path / "out"
    options = ("--model_ema_decay=0.75", f"--mixed_precision={precision}", "--learning_rate=1e-2")
    assert recipe(*SHORT, *options, "--per_device_train_batch_size=16", f"--output_dir={out}") == 0
    found = load_file(out / "model.safetensors")
    for name, x in found.items():
        torch.testing.assert_close(x, expected[name], rtol=1e-5, atol=1e-6)
    model = build(*BASE, shape=(1, 8, 8), classes=10).eval()
    model.load_state_dict(found)
    data = load_image_dataset("digits", max_eval_samples=60).test
    with torch.no_grad():
        loss = F.cross_entropy(model(data.images / 255.0), data.labels)
    assert results(out)["eval_loss"] == pytest.approx(loss.item(), rel=rel)


def test_no_average_of_weights_that_are_spread(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(loop, "WHOLE_ON_EVERY_PROCESS", ())
    assert recipe(*SHORT, "--model_ema_decay=0.9", f"--output_dir={tmp_path / 'out'}") == 2
    assert "no moving average of the weights can be kept under" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("count", [1, 6, 7])
def test_mixing_is_timms_and_spares_the_odd_one(count: int) -> None:
    images, labels = torch.rand(count, 3, 8, 8), torch.arange(count) % 5
    pairs = count // 2 * 2
    mix = Mixup(0.4, 1.0, label_smoothing=0.1, num_classes=5)
    plain = torch.full((count, 5), 0.02).scatter(1, labels[:, None], 0.92)
    seen = set()
    for seed in range(8 if pairs else 1):
        np.random.seed(seed)  # noqa: NPY002 (timm's)
        found, targets = finetune.Mix(0.4, 1.0, 0.1, 5)(images.clone(), labels, torch.empty(0))
        torch.testing.assert_close(found[pairs:], images[pairs:], rtol=0, atol=0)
        torch.testing.assert_close(targets[pairs:], plain[pairs:])
        torch.testing.assert_close(targets.sum(1), torch.ones(count))
        if pairs:
            np.random.seed(seed)  # noqa: NPY002
            wanted = mix(images[:pairs].clone(), labels[:pairs])
            torch.testing.assert_close((found[:pairs], targets[:pairs]), wanted, rtol=0, atol=0)
            seen.add(found[0].sum().item())
    assert len(seen) == (8 if pairs else 0)


def test_smoothing_alone_is_cross_entropys() -> None:
    logits, labels = torch.randn(6, 5), torch.arange(6) % 5
    _, targets = finetune.Mix(0.0, 0.0, 0.2, 5)(torch.rand(6, 1, 4, 4), labels, logits)
    wanted = F.cross_entropy(logits, labels, label_smoothing=0.2)
    torch.testing.assert_close(F.cross_entropy(logits, targets), wanted)


def test_the_defaults_are_safe_and_adamw_is_one_flag_away(tmp_path: Path) -> None:
    for optim in ("adamlip", "adamw"):
        options = (f"--optim={optim}", f"--output_dir={tmp_path / optim}")
        assert recipe(*SHORT, "--weight_decay=0.05", *options) == 0
    ours, torchs = (results(tmp_path / optim) for optim in ("adamlip", "adamw"))
    bounds = inspect.signature(AdamLip).parameters["scale_bounds"].default
    own = {"layers": "module", "scale_bounds": list(bounds)}
    assert ours["optimizer_arguments"] == torchs["optimizer_arguments"] | own
    assert torchs["optimizer_arguments"] == {"lr": 1e-4, "weight_decay": 0.05}
    different = {key for key in ours if ours[key] != torchs[key]}
    assert {"optimizer", "optimizer_arguments"} <= different
    same = {"learning_rate", "dataset_fingerprint", "seed", "parameters", "versions", "model"}
    assert not same & different
    assert ours["versions"]["timm"] == timm.__version__


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images on disk, a folder for each class, of several sizes and modes."""
    folder = tmp_path_factory.mktemp("pictures")
    random = np.random.default_rng(0)
    for split in ("train", "test"):
        for kind, colour in (("dark", 60), ("light", 200)):
            (folder / split / kind).mkdir(parents=True)
            for i, (mode, size) in enumerate([("RGB", (40, 30)), ("L", (20, 50)), ("P", (33, 33))]):
                pixels = random.integers(colour - 50, colour + 50, (*size[::-1], 3), dtype=np.uint8)
                Image.fromarray(pixels).convert(mode).save(folder / split / kind / f"{i}.png")
    return folder


def test_any_images_in_a_folder(pictures: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"must have one size and mode.*--image_size makes them so"):
        load_image_dataset(str(pictures))
    data = load_image_dataset(str(pictures), image_size=32)
    assert data.image_shape == (3, 32, 32)
    assert data.num_classes == 2
    picture = Image.open(pictures / "train" / "dark" / "0.png")
    wanted = np.asarray(picture.resize((32, 32), Image.Resampling.BICUBIC, box=(5, 0, 35, 30)))
    assert torch.equal(data.train.images[0], torch.from_numpy(wanted.copy()).permute(2, 0, 1))
    options = (f"--dataset_name={pictures}", "--image_size=32", "--model=test_vit")
    assert recipe(*BASE, *options, f"--output_dir={tmp_path / 'out'}") == 0
    assert results(tmp_path / "out")["train_samples"] == 6


@pytest.mark.parametrize(("size", "head", "status"), [(32, 0, 2), (64, 0, 0), (32, 1, 0)])
def test_a_last_image_alone_where_a_channel_has_one_value(
    size: int, head: int, status: int, pictures: Path, tmp_path: Path, capsys: Any
) -> None:
    """resnet18 ends in 1x1 maps for 32x32 pixels; frozen, batch normalisation takes one, too."""
    options = [f"--dataset_name={pictures}", f"--image_size={size}", "--model=resnet18"]
    options += ["--per_device_train_batch_size=5", *(["--head_only"] if head else [])]
    assert recipe(*BASE, *options, f"--output_dir={tmp_path / 'out'}") == status
    message = "--per_device_train_batch_size 5 makes a batch of one of 6 images"
    assert (message in capsys.readouterr().err) == (status == 2)


def test_a_config_file_has_its_own_options_too(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("model: test_vit\nmixup: 0.3\npretrained: false\n")
    args = parse(finetune.RECIPE, [f"--config={tmp_path / 'config.yaml'}", "--mixup=0.5"])
    assert (args.model, args.mixup, args.pretrained) == ("test_vit", 0.5, False)


def test_without_the_network_it_says_what_else_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    assert recipe(*SHORT, "--pretrained", f"--output_dir={tmp_path / 'out'}") == 2
    message = capsys.readouterr().err
    assert "cannot make test_resnet for images of 8x8 pixels from timm's weights" in message
    assert "give --checkpoint, or --no-pretrained to start from scratch" in message


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--model=resnet1d", "--model: timm has no resnet1d; near are"),
        ("--model=test_resnet.no_tag", "Invalid pretrained tag (no_tag)"),
        ("--model=ftp:resnet18", "ftp:resnet18 is no name of timm's and not hf-hub:USER/NAME"),
        ("--model=inception_v3", "cannot make inception_v3 for images of 8x8 pixels"),
        ("--model=vgg11 --drop_path=0.1", "unexpected keyword argument 'drop_path_rate'"),
        ("--layer_decay=1.5", "--layer_decay must be a number between 0 and 1, got 1.5"),
        ("--layer_decay=0.5 --head_only", "--layer_decay has nothing to act on"),
        ("--layer_decay=0.5 --optim=adadelta", "--layer_decay needs a --learning_rate"),
        ("--drop=1", "--drop must be a number between 0 and 1"),
        ("--mixup=0", "--mixup must be a positive number, got 0"),
        ("--cutmix=nan", "--cutmix must be a positive number, got nan"),
        ("--smoothing=1", "--smoothing must be from 0 to below 1"),
        ("--model_ema_decay=1", "--model_ema_decay must be a number between 0 and 1"),
        ("--model_ema_warmup", "--model_ema_warmup needs --model_ema_decay"),
        ("--max_grad_norm=0", "--max_grad_norm must be a positive number, got 0"),
        ("--image_size=0", "--image_size must be at least 1, got 0"),
        ("--image_size=16", "--image_size 16: the digits are arrays of 8x8 numbers"),
        ("--checkpoint=/no/such", "--checkpoint: there is no file /no/such"),
    ],
)
def test_bad_options_are_one_line_and_touch_nothing(
    options: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert recipe(*SHORT, f"--output_dir={tmp_path / 'out'}", *options.split()) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith("timm_finetune: error: ")
    assert message in line
    assert not (tmp_path / "out").exists()
