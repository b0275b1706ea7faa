"""The paper's networks: shapes, which set gets which, and what must not change their result."""

from __future__ import annotations

from typing import Any, cast

import pytest
import torch
from torch import nn

from bench.experiments.paper.data import DataSet, Split
from bench.experiments.paper.data.dataset import Kind
from bench.experiments.paper.models import WordCNN, build


def data_set(kind: Kind, x: torch.Tensor, num_classes: int, vocabulary_size: int = 0) -> DataSet:
    labels = torch.arange(len(x)) % num_classes
    split = Split(x, labels, labels)
    return DataSet("made up", tuple(map(str, range(num_classes))), split, split, split, kind, "here", vocabulary_size)


@pytest.mark.parametrize(
    ("kind", "x", "classes", "vocabulary", "parameters"),
    [
        ("image", torch.randn(4, 1, 28, 28), 2, 0, 14_274),
        ("table", torch.randn(4, 16), 26, 0, 76_826),
        ("text", torch.randint(0, 50, (4, 64)), 2, 50, 50 * 128 + (3 + 4 + 5) * 100 * 128 + 300 + 602),
        ("image", torch.randn(4, 3, 32, 32), 10, 0, 21_282_122),
    ],
    ids=["fashion", "table", "text", "cifar10"],
)
def test_build(kind: Kind, x: torch.Tensor, classes: int, vocabulary: int, parameters: int) -> None:
    if parameters > 10**7:
        pytest.importorskip("torchvision", reason="ResNet is torchvision's")
    model = build(data_set(kind, x, classes, vocabulary))
    assert sum(parameter.numel() for parameter in model.parameters()) == parameters
    out = model(x)
    assert out.shape == (4, classes)
    out.logsumexp(dim=1).sum().backward()
    assert all(parameter.grad is not None and parameter.grad.isfinite().all() for parameter in model.parameters())


def test_pets_get_vgg16() -> None:
    torchvision = pytest.importorskip("torchvision", reason="VGG is torchvision's")
    with torch.device("meta"):  # 134 million weights, which this test does not need
        model = build(data_set("image", torch.empty(2, 3, 150, 150), 2))
        assert isinstance(model, torchvision.models.VGG)
        assert model(torch.empty(2, 3, 150, 150)).shape == (2, 2)


def test_cifar_stem_keeps_the_resolution() -> None:
    pytest.importorskip("torchvision", reason="ResNet is torchvision's")
    model = cast("Any", build(data_set("image", torch.randn(2, 3, 32, 32), 10)))
    assert model.maxpool(model.conv1(torch.randn(1, 3, 32, 32))).shape == (1, 64, 32, 32)


def test_word_cnn_does_not_train_padding_and_sees_word_order() -> None:
    torch.manual_seed(0)
    model = WordCNN(30, 2).eval()
    words = torch.randint(2, 30, (3, 20))
    words[:, 12:] = 0
    model(words).square().sum().backward()
    assert model.embedding.weight[0].abs().max() == 0
    assert model.embedding.weight.grad is not None
    assert model.embedding.weight.grad[0].abs().max() == 0
    assert model.embedding.weight.grad[words[0, :12]].abs().sum() > 0
    longer = nn.functional.pad(words, (0, 7))
    torch.testing.assert_close(model(longer), model(words))
    assert not torch.allclose(model(words.flip(1)), model(words))


def test_no_net() -> None:
    with pytest.raises(ValueError, match=r"made up: there is no net for image samples of shape \(2, 8, 8\)"):
        build(data_set("image", torch.randn(2, 2, 8, 8), 2))
