"""Hugging Face Accelerate: prepare the criterion's device, pass group="world" when there are several processes.

torchrun --nproc-per-node 2 -m docs.examples.accelerate_loop      # accelerate launch --cpu would start one process
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch.utils.data import DataLoader, TensorDataset

from docs.examples.synthetic import CLASSES, accuracy, network, noisy_data
from ldmi_fast import DMILoss


def main(folder: str | None = None, epochs: int = 12) -> tuple[DMILoss, float]:
    """Train; returns the criterion and the accuracy on true labels. ``folder``: for a checkpoint with the average in it."""
    accelerator = Accelerator(cpu=not torch.cuda.is_available())
    x, noisy, _ = noisy_data(2000)
    x_test, _, truth = noisy_data(1000, seed=1)
    model = network()
    # the joint of all processes' samples; the gradient has the factor that the averaging of DDP takes out again
    group = "world" if accelerator.num_processes > 1 else None
    criterion = DMILoss.recommended(CLASSES, 100, group=group).to(accelerator.device)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    loader = DataLoader(TensorDataset(x, noisy), batch_size=100 // accelerator.num_processes, shuffle=True)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    accelerator.register_for_checkpointing(criterion)  # it has a state_dict: the average
    for epoch in range(epochs):
        if epoch == epochs // 3:  # the average begins with what the warmed-up model predicts
            criterion.calibrate(loader, accelerator.unwrap_model(model))
        loss_of = F.cross_entropy if epoch < epochs // 3 else criterion
        for features, labels in loader:
            optimizer.zero_grad()
            accelerator.backward(loss_of(model(features), labels))
            optimizer.step()
    if folder is not None:
        accelerator.save_state(folder)
    with torch.no_grad():
        return criterion, accuracy(model(x_test.to(accelerator.device)).cpu(), truth)


if __name__ == "__main__":
    right = main()[1]
    Accelerator(cpu=not torch.cuda.is_available()).print(f"right on {right:.1%} of the true labels")
