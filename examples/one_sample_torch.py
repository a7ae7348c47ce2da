"""Full gradient descent on one sample."""

import torch
from torch.optim import SGD

torch.manual_seed(0)
x = torch.tensor([[1.5]])
y = torch.tensor([[4.0]])
model = torch.nn.Linear(1, 1)
optimizer = SGD(model.parameters(), lr=1e-3)

for _epoch in range(1000):
    loss = torch.nn.functional.mse_loss(model(x), y)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()

print(f"weight {model.weight.item():.7f}, bias {model.bias.item():.7f}, loss {loss.item():.3e}")
