"""Times the optimizers beside torch.optim and other libraries."""
