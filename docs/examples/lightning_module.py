"""PyTorch Lightning: the criterion as a submodule, so that its moving average moves with the model and into the checkpoint.

python -m docs.examples.lightning_module
"""

from __future__ import annotations

import lightning
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from docs.examples.synthetic import CLASSES, accuracy, network, noisy_data
from ldmi_fast import DMILoss
from ldmi_fast.metrics import DMI

BATCH = 100


class NoisyLabels(lightning.LightningModule):
    """Cross entropy for the first epochs, then L_DMI."""

    def __init__(self, warm_up: int) -> None:
        super().__init__()
        self.warm_up = warm_up
        self.model = network()
        # group="world" under a distributed strategy: the loss of all ranks' samples together
        self.criterion = DMILoss.recommended(CLASSES, BATCH)
        self.score = DMI(CLASSES)

    def on_train_epoch_start(self) -> None:
        if self.current_epoch == self.warm_up:  # the average begins with what the warmed-up model predicts
            self.criterion.calibrate(self.trainer.train_dataloader, self.model)

    def training_step(self, batch: tuple[Tensor, Tensor], index: int) -> Tensor:
        x, noisy = batch
        loss = F.cross_entropy if self.current_epoch < self.warm_up else self.criterion
        return loss(self.model(x), noisy)

    def validation_step(self, batch: tuple[Tensor, Tensor], index: int) -> None:
        x, noisy = batch
        self.score.update(self.model(x), noisy)
        # Larger is better, on noisy labels too. The mean of the batches' losses would be no score: it depends on their size.
        self.log("dmi", self.score)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=3e-3)


def main(folder: str = "lightning-results", epochs: int = 12) -> tuple[NoisyLabels, float]:
    """Train; returns the module and its accuracy on true labels."""
    x, noisy, _ = noisy_data(2000)
    x_test, noisy_test, truth = noisy_data(1000, seed=1)
    module = NoisyLabels(warm_up=epochs // 3)
    trainer = lightning.Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        default_root_dir=folder,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[lightning.pytorch.callbacks.ModelCheckpoint(folder, monitor="dmi", mode="max", filename="best")],
    )
    trainer.fit(
        module,
        DataLoader(TensorDataset(x, noisy), batch_size=BATCH, shuffle=True),
        DataLoader(TensorDataset(x_test, noisy_test), batch_size=500),
    )
    with torch.no_grad():
        return module, accuracy(module.model(x_test), truth)


if __name__ == "__main__":
    print(f"right on {main()[1]:.1%} of the true labels")
