"""The paper's networks."""

import pytest
import torch

from hf_adalip.models import MNISTNet


def test_mnist_net_is_table_6() -> None:
    shapes = {name: tuple(p.shape) for name, p in MNISTNet().named_parameters()}
    assert shapes == {
        "conv1.weight": (32, 1, 3, 3),
        "conv2.weight": (64, 32, 3, 3),
        "fc1.weight": (128, 64 * 12 * 12),
        "fc2.weight": (10, 128),
    }


@pytest.mark.parametrize(("channels", "size", "classes"), [(1, (28, 28), 10), (3, (8, 10), 7)])
def test_mnist_net_takes_images_of_any_size(
    channels: int, size: tuple[int, int], classes: int
) -> None:
    logits = MNISTNet(channels, size, classes)(torch.rand(2, channels, *size))
    assert logits.shape == (2, classes)
    assert (logits < 0).any()  # logits, not probabilities


def test_mnist_net_refuses_tiny_images() -> None:
    with pytest.raises(ValueError, match="at least 6x6 pixels"):
        MNISTNet(1, (5, 28))


def test_weights_are_glorot_uniform() -> None:
    model = MNISTNet()
    for weight, fans in ((model.conv2.weight, 9 * (32 + 64)), (model.fc1.weight, 9216 + 128)):
        bound = (6 / fans) ** 0.5
        assert weight.abs().max() <= bound
        assert weight.std().item() == pytest.approx(bound / 3**0.5, rel=0.02)
