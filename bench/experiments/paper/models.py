"""The paper's networks, one per set."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from bench.experiments.demo.model import fashion_cnn
from bench.experiments.paper.data.dataset import DataSet

WORD_DIMENSIONS, KERNELS, FILTERS = 128, (3, 4, 5), 100
PAD = 0


class WordCNN(nn.Module):
    """The paper's net for MR: (N, words), int64 -> (N, C).

    Random 128-d embeddings that are trained, 100 filters of 3, 4 and 5 words each, their largest value over the sentence,
    dropout, one linear layer. Padding is a zero vector that is never trained.
    """

    def __init__(self, vocabulary_size: int, num_classes: int, dropout: float = 0.5) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary_size, WORD_DIMENSIONS, padding_idx=PAD)
        self.convolutions = nn.ModuleList(nn.Conv1d(WORD_DIMENSIONS, FILTERS, size) for size in KERNELS)
        self.head = nn.Sequential(nn.Dropout(dropout), nn.Linear(FILTERS * len(KERNELS), num_classes))

    def forward(self, words: Tensor) -> Tensor:
        vectors = self.embedding(words).transpose(1, 2)
        return self.head(torch.cat([convolution(vectors).amax(dim=2).relu() for convolution in self.convolutions], dim=1))


def table_mlp(num_features: int, num_classes: int) -> nn.Module:
    """For Letter and the digits: (N, features) -> (N, C)."""
    return nn.Sequential(
        nn.Linear(num_features, 256), nn.ReLU(), nn.Dropout(0.2), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, num_classes)
    )


def cifar_resnet34(num_classes: int) -> nn.Module:
    """torchvision's ResNet-34 with CIFAR's stem: a 3 x 3 convolution of stride 1, and no pooling after it."""
    from torchvision.models import resnet34

    model = resnet34(num_classes=num_classes)
    model.conv1 = nn.Conv2d(3, 64, kernel_size=3, stride=1, padding=1, bias=False)
    nn.init.kaiming_normal_(model.conv1.weight, mode="fan_out", nonlinearity="relu")
    model.maxpool = nn.Identity()
    return model


def pets_vgg16(num_classes: int) -> nn.Module:
    """torchvision's VGG-16, from scratch."""
    from torchvision.models import vgg16

    return vgg16(num_classes=num_classes)


def build(data: DataSet) -> nn.Module:
    """The net for a set, by what its samples are; weights come from torch's global generator.

    Raises:
        ValueError: samples that no net is for.
    """
    if data.kind == "text":
        return WordCNN(data.vocabulary_size, data.num_classes)
    if data.kind == "table" and len(data.shape) == 1:
        return table_mlp(data.shape[0], data.num_classes)
    if data.kind == "image" and data.shape == (1, 28, 28):
        return fashion_cnn(data.num_classes)
    if data.kind == "image" and data.shape == (3, 32, 32):
        return cifar_resnet34(data.num_classes)
    if data.kind == "image" and data.shape[0] == 3 and min(data.shape[1:]) >= 32:
        return pets_vgg16(data.num_classes)
    raise ValueError(f"{data.name}: there is no net for {data.kind} samples of shape {data.shape}")
