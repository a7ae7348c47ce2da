"""Schedule-free AdamW. The arithmetic stands in csrc/rules.h."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fused_optim import checkpoint, plain, storage
from fused_optim.optimizer import FusedOptimizer
from fused_optim.options import KernelOptions

if TYPE_CHECKING:
    from torch.optim.optimizer import ParamsT
    from typing_extensions import Unpack


class AdamWScheduleFree(FusedOptimizer, plain.AdamWScheduleFree):
    """Schedule-free AdamW on fused kernels; a drop-in for ``schedulefree.AdamWScheduleFree``.

    With grad the gradient (negated if maximize), at step t::

        lr_t        = lr * min(t / warmup_steps, 1)
        lr_max      = max(lr_max, lr_t)
        weight_sum += t**r * lr_max**weight_lr_power
        c           = t**r * lr_max**weight_lr_power / weight_sum
        exp_avg_sq  = beta2 * exp_avg_sq + (1 - beta2) * grad**2
        direction   = grad / (sqrt(exp_avg_sq / (1 - beta2**t)) + eps) + weight_decay * param
        param       = lerp(param, z, c) + lr_t * (beta1 * (1 - c) - 1) * direction
        z          -= lr_t * direction

    It needs no schedule of the learning rate. While it trains, the params are where grads are taken.
    ``eval()`` makes them the average that the training is for, and ``train()`` takes them back: call them
    where ``model.eval()`` and ``model.train()`` are called, and ``eval()`` before weights are saved.

    Args:
        params: iterable of parameters, named parameters or param groups.
        lr: learning rate, >= 0, a float or a tensor with one element (default: 2.5e-3).
        betas: weight of the average in the params, in (0, 1), and decay rate of the squares, in [0, 1)
            (default: (0.9, 0.999)).
        eps: added to the denominator, >= 0 (default: 1e-8).
        weight_decay: >= 0, decoupled as in AdamW (default: 0).
        warmup_steps: in which the learning rate grows from 0 (default: 0).
        r: the t-th step counts ``t**r`` in the average, >= 0 (default: 0).
        weight_lr_power: and the learning rate to this power, >= 0 (default: 2).
        maximize, foreach, capturable, differentiable: as in torch.optim. foreach is accepted without
            effect; differentiable takes the stock path.
        options: :class:`OnePassOptions`, for clipping, skipping, averaging and zeroing in the step;
            :class:`FormatOptions`, for smaller states and for bfloat16 and float16 params. z stays as it
            is in all formats.

    Raises:
        ValueError: an argument outside its range.
        RuntimeError: step() in eval mode.

    Reference:
        Defazio et al. 2024, "The road less scheduled", algorithm 1.

    Difference from schedulefree:
        None but rounding where all params of a group have grads in each step: ``step``, ``lr_max`` and
        ``weight_sum`` are counted for each param, as torch.optim does. A new optimizer is in train mode.
        Grads are left as they are. It loads the package's checkpoints. What no kernel serves is stepped
        by plain PyTorch code of this package.

    Example:
        >>> param = torch.nn.Parameter(torch.tensor([1.0, -2.0]))
        >>> optimizer = fused_optim.AdamWScheduleFree([param], lr=0.1)
        >>> param.square().sum().backward()
        >>> optimizer.step()
        >>> optimizer.eval()
        >>> [round(value, 3) for value in param.tolist()]
        [0.9, -1.9]
    """

    _rule = "adamw_schedule_free"
    _stock = plain.AdamWScheduleFree
    _sparse_refusal = "AdamWScheduleFree does not support sparse gradients"

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 0.0025,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        warmup_steps: int = 0,
        r: float = 0.0,
        weight_lr_power: float = 2.0,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
        capturable: bool = False,
        differentiable: bool = False,
        **options: Unpack[KernelOptions],
    ) -> None:
        self._take_options(options)
        super().__init__(
            params,
            lr=lr,
            betas=betas,
            eps=eps,
            weight_decay=weight_decay,
            warmup_steps=warmup_steps,
            r=r,
            weight_lr_power=weight_lr_power,
            maximize=maximize,
            foreach=foreach,
            capturable=capturable,
            differentiable=differentiable,
        )

    def __setstate__(self, state: Mapping[str, Any]) -> None:
        super().__setstate__(state)
        self._refuse_steps_in_eval_mode()

    @torch.no_grad()
    def train(self) -> None:
        """Make the params what a step moves. In train mode already: nothing."""
        super().train()
        self._refuse_steps_in_eval_mode()

    @torch.no_grad()
    def eval(self) -> None:
        """Make the params the average of the training, for evaluation. In eval mode already: nothing."""
        super().eval()
        self._refuse_steps_in_eval_mode()

    def _refuse_steps_in_eval_mode(self) -> None:
        trains = all(group["train_mode"] for group in self.param_groups)
        self._why_no_step = None if trains else plain.IN_EVAL_MODE

    def _lerp(self, param: Tensor, group: dict[str, Any], number: int, weight: float) -> None:
        if not storage.applies(param, group):
            super()._lerp(param, group, number, weight)
            return
        states = self.state[param]
        values = storage.decode_param(param, states).lerp_(states["z"].float(), weight)
        checkpoint.write_master(self, param, group, number, values)

    def _convert_first(
        self, param: Tensor, group: dict[str, Any], states: dict[str, Any], first: dict[str, float]
    ) -> dict[str, Any]:
        converted = super()._convert_first(param, group, states, first)
        converted["z"].copy_(storage.decode_param(param, states))
        return converted
