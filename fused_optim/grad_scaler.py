"""GradScaler whose look for Inf is the optimizer's own reading of the grads."""

from __future__ import annotations

from typing import Any

import torch

from fused_optim.optimizer import FusedOptimizer


class GradScaler(torch.amp.GradScaler):
    """:class:`torch.amp.GradScaler` that does not read the grads before step() reads them.

    torch's own reads and writes all grads once more to look for Inf and NaN. This one leaves that to the
    optimizers that can do it while they take the norm: those of this package that were built with
    ``fused=True`` or an option of :class:`OnePassOptions`. With others it does what torch's does, and so
    it does if ``unscale_()`` is called.

    Args, Raises: as torch.amp.GradScaler's, but for the default of device: "cuda" or, without CUDA, "cpu",
    where torch's warns and switches itself off.

    Example:
        >>> param = torch.nn.Parameter(torch.tensor([1.0, -2.0]))
        >>> optimizer = fused_optim.AdamW([param], lr=0.1, max_grad_norm=1.0)
        >>> scaler = fused_optim.GradScaler("cpu", init_scale=1024.0)
        >>> scaler.scale(param.square().sum()).backward()
        >>> scaler.step(optimizer)
        >>> scaler.update()
        >>> round(optimizer.grad_norm.item(), 3)
        4.472
    """

    def __init__(
        self,
        device: str | None = None,
        init_scale: float = 2.0**16,
        growth_factor: float = 2.0,
        backoff_factor: float = 0.5,
        growth_interval: int = 2000,
        enabled: bool = True,
    ) -> None:
        if device is None:
            device = "cuda" if torch.cuda.is_available() else "cpu"
        super().__init__(
            device, init_scale, growth_factor, backoff_factor, growth_interval, enabled
        )

    def step(self, optimizer: torch.optim.Optimizer, *args: Any, **kwargs: Any) -> float | None:
        """As torch.amp.GradScaler's."""
        try:
            return super().step(optimizer, *args, **kwargs)
        finally:  # a step that raised may not have taken it
            optimizer.__dict__.pop("_found_inf_to_report", None)

    def _check_inf_per_device(self, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
        leaves_it = getattr(optimizer, "_step_supports_amp_scaling", False)
        if not (isinstance(optimizer, FusedOptimizer) and leaves_it):
            return super()._check_inf_per_device(optimizer)
        scale, _ = self._check_scale_growth_tracker("_check_inf_per_device")
        found_inf = torch.zeros((), dtype=torch.float32, device=scale.device)
        found: dict[Any, Any] = {scale.device: found_inf}
        self._per_optimizer_states[id(optimizer)]["found_inf_per_device"] = found
        optimizer._found_inf_to_report = found_inf  # step() writes it, update() reads it
        return found
