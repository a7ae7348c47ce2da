"""timm: its factory of optimizers makes ours, with its groups and its decay of learning rates by layer.

timm takes an optimizer by a name, and finds the class in a registry. A script that cannot be changed:
python -m fused_optim run train.py
"""

import timm
import torch
from timm.optim import OptimInfo, OptimizerRegistry, create_optimizer_v2
from torch import nn

import fused_optim

torch.manual_seed(0)
images = torch.randn(16, 3, 32, 32)
labels = torch.arange(16) % 4
model = timm.create_model(
    "vit_tiny_patch16_224",
    img_size=32,
    patch_size=8,
    embed_dim=32,
    depth=2,
    num_heads=2,
    num_classes=4,
)

registry = OptimizerRegistry()
registry.register(OptimInfo("fusedadamw", fused_optim.AdamW, has_betas=True))
optimizer = registry.create_optimizer(
    model, "fusedadamw", lr=1e-3, weight_decay=0.05, layer_decay=0.75, max_grad_norm=1.0
)
for _step in range(20):
    loss = nn.functional.cross_entropy(model(images), labels)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
print(f"loss {loss.item():.3f}, tensors by {optimizer.last_step.tensors}")

# The same by name: torch.optim's classes, which timm's own registry holds, make ours meanwhile.
with fused_optim.patched(max_grad_norm=1.0):
    optimizer = create_optimizer_v2(model, "adamw", lr=1e-3, weight_decay=0.05)
print(f"create_optimizer_v2 has made a {type(optimizer)}")
