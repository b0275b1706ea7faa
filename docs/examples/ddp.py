"""Plain DistributedDataParallel: group="world" makes the loss that of all ranks' samples together.

torchrun --nproc-per-node 2 -m docs.examples.ddp
"""

from __future__ import annotations

import os
import sys
from datetime import timedelta

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel

from docs.examples.synthetic import CLASSES, accuracy, network, noisy_data
from ldmi_fast import DMILoss


def main(checkpoint: str | None = None, epochs: int = 12) -> float:
    """Train; returns the accuracy on true labels. ``checkpoint``: a file that rank 0 writes the model and the average to."""
    on_gpu = torch.cuda.is_available()
    # how long a rank waits for one that raised or died, before it raises too
    dist.init_process_group("nccl" if on_gpu else "gloo", timeout=timedelta(minutes=5))
    rank, size = dist.get_rank(), dist.get_world_size()
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if on_gpu else torch.device("cpu")
    torch.set_num_threads(1)
    x, noisy, _ = noisy_data(2000)
    x, noisy = x[rank::size].to(device), noisy[rank::size].to(device)
    x_test, _, truth = noisy_data(1000, seed=1)
    model = DistributedDataParallel(network().to(device))
    criterion = DMILoss.recommended(CLASSES, 100, group="world").to(device)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    generator = torch.Generator().manual_seed(rank)
    for epoch in range(epochs):
        if epoch == epochs // 3:  # the average begins with what the warmed-up model predicts; each rank passes over its part
            criterion.calibrate([(x, noisy)], model.module)
        loss_of = F.cross_entropy if epoch < epochs // 3 else criterion
        for index in torch.randperm(len(x), generator=generator).split(100 // size):
            optimizer.zero_grad()
            loss_of(model(x[index]), noisy[index]).backward()
            optimizer.step()
    if checkpoint is not None and rank == 0:
        torch.save({"model": model.module.state_dict(), "criterion": criterion.state_dict()}, checkpoint)
    with torch.no_grad():
        right = accuracy(model(x_test.to(device)).cpu(), truth)
    # A rank that ends while a thread of gloo still waits for the interpreter, to drop the last tensor that it reduced, is aborted
    # ("terminate called without an active exception"): here the main thread waits, and the interpreter is free.
    dist.barrier()
    dist.destroy_process_group()
    return right


if __name__ == "__main__":
    right = main(*sys.argv[1:2])
    if os.environ["RANK"] == "0":
        print(f"right on {right:.1%} of the true labels")
