"""Accelerate: a loop of one's own, two batches to a step, and a checkpoint."""

import tempfile

import torch
from accelerate import Accelerator
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from fused_optim import AdamW

torch.manual_seed(0)
x = torch.randn(256, 8)
y = x.square().sum(dim=1, keepdim=True)
accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
model = nn.Sequential(nn.Linear(8, 64), nn.Tanh(), nn.Linear(64, 1))
model, optimizer, batches = accelerator.prepare(
    model, AdamW(model.parameters(), lr=1e-2), DataLoader(TensorDataset(x, y), batch_size=32)
)

for _epoch in range(20):
    for inputs, targets in batches:
        with accelerator.accumulate(model):
            loss = nn.functional.mse_loss(model(inputs), targets)
            accelerator.backward(loss)
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()

with tempfile.TemporaryDirectory() as folder:
    accelerator.save_state(folder)
    accelerator.load_state(folder)

# The wrapper has what torch.optim has; what is ours is in the optimizer itself.
print(f"loss {loss.item():.3f}, tensors by {optimizer.optimizer.last_step.tensors}")
