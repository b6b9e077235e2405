"""The paper's networks."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from hf_adalip.recipe.image.models import CIFAR10Net, CIFAR100Net, MNISTNet

from .hub import TOKEN

NETS = [MNISTNet, CIFAR10Net, CIFAR100Net]


def shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(p.shape) for name, p in model.named_parameters()}


def test_mnist_net_is_table_6() -> None:
    assert shapes(MNISTNet()) == {
        "conv1.weight": (32, 1, 3, 3),
        "conv2.weight": (64, 32, 3, 3),
        "fc1.weight": (128, 64 * 12 * 12),
        "fc2.weight": (10, 128),
    }


def test_cifar10_net_is_table_7() -> None:
    assert shapes(CIFAR10Net()) == {
        "conv1.weight": (32, 3, 3, 3),
        "conv2.weight": (32, 32, 3, 3),
        "conv3.weight": (64, 32, 3, 3),
        "conv4.weight": (64, 64, 3, 3),
        "conv5.weight": (128, 64, 3, 3),
        "conv6.weight": (128, 128, 3, 3),
        "fc1.weight": (200, 128 * 2 * 2),
        "fc2.weight": (10, 200),
    }


def test_cifar100_net_is_table_8() -> None:
    widths = [3, 64, 128, 256, 256, 512, 512, 512, 512]
    expected: dict[str, tuple[int, ...]] = {}
    for i in range(8):
        expected[f"conv{i + 1}.weight"] = (widths[i + 1], widths[i], 3, 3)
        for name in ("conv{}.bias", "bn{}.weight", "bn{}.bias"):
            expected[name.format(i + 1)] = (widths[i + 1],)
    expected |= {"fc1.weight": (512, 512), "fc1.bias": (512,)}
    expected |= {"bn9.weight": (512,), "bn9.bias": (512,)}
    expected |= {"fc2.weight": (100, 512), "fc2.bias": (100,)}
    assert shapes(CIFAR100Net()) == expected


def test_cifar100_net_normalises_after_the_relu_and_drops_out_last() -> None:
    model, order = CIFAR100Net(), []
    for name, module in model.named_children():
        module.register_forward_hook(lambda _, inputs, out, name=name: order.append((name, inputs)))
    model(torch.rand(4, 3, 32, 32))
    names = [name for name, _ in order]
    pairs = [name for i in range(1, 9) for name in (f"conv{i}", f"bn{i}")]
    assert names == [*pairs, "fc1", "bn9", "dropout", "fc2"]
    assert all((x[0] >= 0).all() for name, x in order if name.startswith("bn"))
    sides = [x[0].shape[-1] for name, x in order if name.startswith("conv")]
    assert sides == [32, 16, 8, 8, 4, 4, 2, 2]  # of the images that each convolution gets
    (dropped,) = dict(order)["fc2"]
    assert 0.4 < (dropped == 0).float().mean() < 0.6


@pytest.mark.parametrize(
    ("net", "channels", "size", "classes"),
    [
        (MNISTNet, 1, (28, 28), 10),
        (MNISTNet, 3, (8, 10), 7),
        (CIFAR10Net, 3, (32, 32), 10),
        (CIFAR10Net, 1, (20, 28), 3),
        (CIFAR100Net, 3, (32, 32), 100),
        (CIFAR100Net, 1, (64, 40), 3),
    ],
)
def test_nets_take_images_of_any_size(
    net: type[nn.Module], channels: int, size: tuple[int, int], classes: int
) -> None:
    logits = net(channels, size, classes)(torch.rand(2, channels, *size))
    assert logits.shape == (2, classes)
    assert (logits < 0).any()  # logits, not probabilities


@pytest.mark.parametrize(("net", "least"), [(MNISTNet, 6), (CIFAR10Net, 20), (CIFAR100Net, 32)])
def test_nets_refuse_tiny_images(net: type[nn.Module], least: int) -> None:
    net(1, (least, least))(torch.rand(2, 1, least, least))
    with pytest.raises(ValueError, match=f"at least {least}x{least} pixels, got {least - 1}x64"):
        net(1, (least - 1, 64))


def test_weights_are_glorot_uniform() -> None:
    mnist, cifar10, cifar100 = MNISTNet(), CIFAR10Net(), CIFAR100Net()
    for weight, fans in (
        (mnist.conv2.weight, 9 * (32 + 64)),
        (mnist.fc1.weight, 9216 + 128),
        (cifar10.conv6.weight, 9 * 256),
        (cifar100.conv8.weight, 9 * 1024),
        (cifar100.fc1.weight, 1024),
    ):
        bound = (6 / fans) ** 0.5
        assert weight.abs().max() <= bound
        assert weight.std().item() == pytest.approx(bound / 3**0.5, rel=0.02)
    assert not cifar100.conv1.bias.any()
    assert not cifar100.fc2.bias.any()


@pytest.mark.parametrize("net", NETS)
def test_a_saved_net_comes_back(net: type[nn.Module], tmp_path: Path) -> None:
    model = net(2, image_size=(40, 36), num_classes=5)
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config == {**model.config, "image_size": [40, 36]}
    assert (config["in_channels"], config["num_classes"]) == (2, 5)
    again = net.from_pretrained(tmp_path)
    images = torch.rand(3, 2, 40, 36)
    assert torch.equal(model.eval()(images), again(images))
    assert "library_name: hf_adalip" in (tmp_path / "README.md").read_text()


@pytest.mark.parametrize("net", NETS)
@pytest.mark.usefixtures("loopback_hub")
def test_a_net_is_pushed_to_the_hub_and_had_from_there(net: Any) -> None:
    model = net(1, image_size=(40, 36), num_classes=5).eval()
    model.push_to_hub("me/net", token=TOKEN)
    again = net.from_pretrained("me/net")
    images = torch.rand(3, 1, 40, 36)
    assert torch.equal(model(images), again(images))


def test_weights_that_are_missing_are_an_error(tmp_path: Path) -> None:
    """huggingface_hub alone would leave them at random."""
    MNISTNet().save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    del weights["fc2.weight"]
    save_file(weights, tmp_path / "model.safetensors")
    with pytest.raises(RuntimeError, match=r"fc2\.weight"):
        MNISTNet.from_pretrained(tmp_path)
