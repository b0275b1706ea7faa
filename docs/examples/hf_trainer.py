"""Hugging Face Trainer: the loss as its compute_loss_func, and a callback that looks after the moving average.

``hf`` divides by the number of micro-batches of a step and by the number of processes, where the Trainer would add up and multiply.
With gradient_accumulation_steps > 1 each micro-batch is a batch of its own to the loss; momentum is what joins them. Over several
processes pass group="world" to the criterion: the loss is then that of all their samples together.

python -m docs.examples.hf_trainer
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers import Trainer, TrainingArguments
from transformers.modeling_outputs import SequenceClassifierOutput

from docs.examples.synthetic import CLASSES, accuracy, network, noisy_data
from ldmi_fast import DMILoss
from ldmi_fast.integrations import HFCallback, hf


class Classifier(nn.Module):
    """A model that answers as those of transformers do."""

    def __init__(self) -> None:
        super().__init__()
        self.model = network()

    def forward(self, x: Tensor, labels: Tensor | None = None) -> SequenceClassifierOutput:
        return SequenceClassifierOutput(logits=self.model(x))


class Rows(Dataset[dict[str, Tensor]]):
    """Samples as the Trainer wants them."""

    def __init__(self, x: Tensor, labels: Tensor) -> None:
        self.x, self.labels = x, labels

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"x": self.x[index], "labels": self.labels[index]}


def train(model: nn.Module, loss: Any, data: Rows, folder: str, epochs: int) -> Trainer:
    """One stage."""
    arguments = TrainingArguments(
        folder,
        num_train_epochs=epochs,
        per_device_train_batch_size=100,
        learning_rate=3e-3,
        lr_scheduler_type="constant",
        use_cpu=not torch.cuda.is_available(),
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
        logging_strategy="no",
    )
    callbacks = [HFCallback(loss)] if isinstance(loss, DMILoss) else []
    trainer = Trainer(model, arguments, train_dataset=data, compute_loss_func=hf(loss), callbacks=callbacks)
    trainer.train()
    return trainer


def main(folder: str = "trainer-results", epochs: int = 12) -> tuple[DMILoss, float]:
    """Train with cross entropy, then with L_DMI; returns the criterion and the accuracy on true labels."""
    x, noisy, _ = noisy_data(2000)
    x_test, _, truth = noisy_data(1000, seed=1)
    model, criterion = Classifier(), DMILoss.recommended(CLASSES, 100)
    train(model, F.cross_entropy, Rows(x, noisy), folder, epochs // 3)
    train(model, criterion, Rows(x, noisy), folder, epochs - epochs // 3)
    with torch.no_grad():
        return criterion, accuracy(model(x_test).logits, truth)


if __name__ == "__main__":
    print(f"right on {main()[1]:.1%} of the true labels")
