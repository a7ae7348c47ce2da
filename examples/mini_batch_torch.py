"""Mini-batch gradient descent: a line through 100 random samples."""

import torch
from torch.optim import SGD

torch.manual_seed(0)
x = torch.randn(100, 1)
y = 2 * x + 1 + 0.1 * torch.randn(100, 1)
model = torch.nn.Linear(1, 1)
optimizer = SGD(model.parameters(), lr=0.05)

for _epoch in range(50):
    for batch in torch.randperm(100).split(10):
        loss = torch.nn.functional.mse_loss(model(x[batch]), y[batch])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

print(f"weight {model.weight.item():.7f}, bias {model.bias.item():.7f}, loss {loss.item():.3e}")
