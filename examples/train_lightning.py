"""Lightning: configure_optimizers returns our optimizer, with a schedule and averaged weights."""

import lightning
import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LRScheduler, OneCycleLR
from torch.utils.data import DataLoader, TensorDataset

from fused_optim import AdamW


class Squares(lightning.LightningModule):
    """The sum of the squares of eight numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(8, 64), nn.Tanh(), nn.Linear(64, 1))

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        x, y = batch
        return nn.functional.mse_loss(self.net(x), y)

    def configure_optimizers(self) -> tuple[list[AdamW], list[dict[str, LRScheduler | str]]]:
        optimizer = AdamW(self.parameters(), lr=1e-2, ema_decay=0.98)
        schedule = OneCycleLR(optimizer, 1e-2, total_steps=self.trainer.estimated_stepping_batches)
        return [optimizer], [{"scheduler": schedule, "interval": "step"}]


torch.manual_seed(0)
x = torch.randn(256, 8)
data = TensorDataset(x, x.square().sum(dim=1, keepdim=True))
module = Squares()
trainer = lightning.Trainer(
    accelerator="cpu",
    max_epochs=20,
    gradient_clip_val=1.0,
    enable_checkpointing=False,
    enable_progress_bar=False,
    logger=False,
)
trainer.fit(module, DataLoader(data, batch_size=32))

optimizer = module.optimizers()
with optimizer.swapped_ema(), torch.no_grad():
    loss = module.training_step(data.tensors, 0)
print(f"loss of the averages {loss:.3f}, tensors by {optimizer.last_step.tensors}")
