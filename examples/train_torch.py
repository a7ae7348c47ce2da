"""What PyTorch itself puts around an optimizer: a compiled step, schedules, GradScaler, averaged weights.

What torch.compile captures ends before step(), which calls a compiled kernel already. The backend "eager"
leaves out what takes longer than this example: to compile what was captured to C++.
"""

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import CosineAnnealingLR, LinearLR, OneCycleLR, SequentialLR
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from fused_optim import SGD, AdamW

torch.manual_seed(0)
x = torch.randn(256, 8)
y = x.square().sum(dim=1, keepdim=True)
model = nn.Sequential(nn.Linear(8, 64), nn.Tanh(), nn.Linear(64, 1))

# A whole step compiled; the schedule writes lr and momentum into the param groups.
optimizer = SGD(model.parameters(), lr=1e-2, momentum=0.9)
schedule = OneCycleLR(optimizer, 2e-2, total_steps=40, cycle_momentum=True)


@torch.compile(backend="eager")
def train_step(inputs: Tensor, targets: Tensor) -> Tensor:
    optimizer.zero_grad()
    loss = nn.functional.mse_loss(model(inputs), targets)
    loss.backward()
    optimizer.step()
    return loss.detach()


for inputs, targets in 5 * list(zip(x.split(32), y.split(32))):
    loss = train_step(inputs, targets)
    schedule.step()
print(f"compiled step: loss {loss.item():.3f}, tensors by {optimizer.last_step.tensors}")

# The model alone compiled, in mixed precision; a warmup before the schedule, and averages of the weights.
optimizer = AdamW(model.parameters(), lr=1e-2)
warmup = LinearLR(optimizer, 0.1, total_iters=10)
schedule = SequentialLR(optimizer, [warmup, CosineAnnealingLR(optimizer, 70)], milestones=[10])
averaged = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.95))
scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
compiled = torch.compile(model, backend="eager")

for inputs, targets in 10 * list(zip(x.split(32), y.split(32))):
    with torch.autocast("cpu", torch.float16):
        loss = nn.functional.mse_loss(compiled(inputs).float(), targets)
    scaler.scale(loss).backward()
    scaler.unscale_(optimizer)
    nn.utils.clip_grad_norm_(model.parameters(), 5.0)
    scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad()
    averaged.update_parameters(model)
    schedule.step()
with torch.no_grad():
    loss = nn.functional.mse_loss(averaged(x), y)
print(
    f"compiled model: loss of the averages {loss.item():.3f}, tensors by {optimizer.last_step.tensors}"
)
