"""Triton kernels of fused_optim for GPUs. Imported when first needed, by fused_optim.backends."""
