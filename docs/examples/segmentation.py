"""Segmentation: every pixel is a sample; pixels labelled 255 are not looked at.

python -m docs.examples.segmentation
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldmi_fast import DMILoss

CLASSES = 3
VOID = 255


def scenes(count: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Images [N, 1, 16, 16] of three grey levels in blocks; noisy masks [N, 16, 16] (uint8) with void borders; the true ones."""
    generator = torch.Generator().manual_seed(seed)
    truth = torch.randint(CLASSES, (count, 4, 4), generator=generator).repeat_interleave(4, 1).repeat_interleave(4, 2)
    images = truth[:, None] - 1 + 0.3 * torch.randn(count, 1, 16, 16, generator=generator)
    flipped = torch.rand(truth.shape, generator=generator) < 0.4
    noisy = torch.where(flipped, (truth + 1) % CLASSES, truth).to(torch.uint8)
    for edge in (0, -1):
        noisy[:, edge], noisy[:, :, edge] = VOID, VOID
    return images, noisy, truth


def main(epochs: int = 12) -> tuple[float, float]:
    """Train; returns the pixel accuracy on true labels after cross entropy, and after L_DMI."""
    torch.manual_seed(0)
    images, noisy, _ = scenes(64)
    images_test, _, truth = scenes(32, seed=1)
    model = nn.Sequential(nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, CLASSES, 3, padding=1))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    criterion = DMILoss.recommended(CLASSES, 8 * 14 * 14, ignore_index=VOID)  # every pixel is a sample
    after = []
    for epoch in range(epochs):
        if epoch == epochs // 3:  # the average begins with what the warmed-up model predicts
            criterion.calibrate(zip(images.split(8), noisy.split(8), strict=True), model)
        for index in torch.randperm(len(images)).split(8):
            logits = model(images[index])  # [N, C, H, W]
            loss = (
                F.cross_entropy(logits, noisy[index].long(), ignore_index=VOID)
                if epoch < epochs // 3
                else criterion(logits, noisy[index])
            )
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        if epoch + 1 in (epochs // 3, epochs):
            with torch.no_grad():
                after.append((model(images_test).argmax(1) == truth).double().mean().item())
    return after[0], after[1]


if __name__ == "__main__":
    print("right on {:.1%} of the true labels after cross entropy, {:.1%} after L_DMI".format(*main()))
