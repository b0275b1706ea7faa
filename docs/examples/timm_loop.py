"""timm: its model, optimizer, schedule and scaler round the loss, as in its train.py, where this is ``train_loss_fn``.

timm's CheckpointSaver knows nothing of the criterion: save ``criterion.state_dict()`` beside its files, or the moving average starts
from nothing after a restart. torchvision's reference scripts are the same: add it to their ``checkpoint`` dictionary.

python -m docs.examples.timm_loop
"""

from __future__ import annotations

import timm
import torch
import torch.nn.functional as F
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.utils import AverageMeter, NativeScaler
from torch import Tensor

from ldmi_fast import DMILoss

CLASSES = 3


def stripes(count: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Images [N, 3, 32, 32] with stripes in one of three directions; noisy labels; the true ones."""
    generator = torch.Generator().manual_seed(seed)
    truth = torch.randint(CLASSES, (count,), generator=generator)
    line = torch.linspace(0, 12, 32)
    patterns = torch.stack([line.sin().expand(32, 32), line.sin().expand(32, 32).T, (line + line[:, None]).sin()])
    images = patterns[truth][:, None] + 0.3 * torch.randn(count, 3, 32, 32, generator=generator)
    noisy = torch.where(torch.rand(count, generator=generator) < 0.4, (truth + 1) % CLASSES, truth)
    return images, noisy, truth


def main(epochs: int = 6) -> tuple[DMILoss, float]:
    """Train; returns the criterion and the accuracy on true labels."""
    torch.manual_seed(0)
    images, noisy, _ = stripes(600)
    images_test, _, truth = stripes(300, seed=1)
    model = timm.create_model("test_resnet", pretrained=False, num_classes=CLASSES)
    optimizer = create_optimizer_v2(model, opt="adamw", lr=2e-3)
    scheduler, _ = create_scheduler_v2(optimizer, sched="cosine", num_epochs=epochs)
    scaler, meter = NativeScaler(device="cpu"), AverageMeter()
    criterion = DMILoss.recommended(CLASSES, 60)
    for epoch in range(epochs):
        if epoch == epochs // 3:  # the average begins with what the warmed-up model predicts
            criterion.calibrate(zip(images.split(60), noisy.split(60), strict=True), model)
        train_loss_fn = F.cross_entropy if epoch < epochs // 3 else criterion
        model.train()
        for index in torch.randperm(len(images)).split(60):
            loss = train_loss_fn(model(images[index]), noisy[index])
            optimizer.zero_grad()
            scaler(loss, optimizer, clip_grad=5.0, parameters=model.parameters())
            meter.update(loss.item(), len(index))
        scheduler.step(epoch + 1)
    model.eval()
    with torch.no_grad():
        return criterion, (model(images_test).argmax(1) == truth).double().mean().item()


if __name__ == "__main__":
    print(f"right on {main()[1]:.1%} of the true labels")
