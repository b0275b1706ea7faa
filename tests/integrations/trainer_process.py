"""One rank of a Trainer, for a test: prints the norm of the gradient of one step on a batch of 80 samples over all ranks."""

from __future__ import annotations

import os
import sys
from typing import Any

import torch.distributed as dist
from transformers import TrainerCallback

from ldmi_fast import DMILoss
from tests.integrations.test_huggingface import trainer


class Norm(TrainerCallback):
    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        print(f"gradient {model.layer.weight.grad.norm().item():.8f}", flush=True)


def main(folder: str, average: str) -> None:
    size = int(os.environ["WORLD_SIZE"])
    if size == 1 and not dist.is_initialized():
        dist.init_process_group("gloo")
    run = trainer(
        folder,  # type: ignore[arg-type]
        DMILoss(4, group="world"),
        Norm(),
        per_device_train_batch_size=80 // size,
        max_steps=1,
        average_tokens_across_devices=average == "True",
        ddp_backend="gloo",
        logging_strategy="no",
    )
    run.model.dropout.p = 0.0
    run.train()
    dist.barrier()  # a rank that exits while a thread of gloo still holds a tensor is aborted
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
