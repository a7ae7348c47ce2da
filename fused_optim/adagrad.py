"""Adagrad. The arithmetic stands in csrc/rules.h."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.optim.optimizer import _get_scalar_dtype

from fused_optim.optimizer import FusedOptimizer
from fused_optim.options import KernelOptions

if TYPE_CHECKING:
    from torch.optim.optimizer import ParamsT
    from typing_extensions import Unpack


class Adagrad(FusedOptimizer, torch.optim.Adagrad):
    """Adagrad on fused kernels; a drop-in for :class:`torch.optim.Adagrad`.

    With grad the gradient (negated if maximize) plus ``weight_decay * param``, at step t::

        sum   += grad**2
        param -= lr / (1 + (t - 1) * lr_decay) * grad / (sqrt(sum) + eps)

    Args:
        params: iterable of parameters, named parameters or param groups.
        lr: learning rate, >= 0, a float or a tensor with one element (default: 1e-2).
        lr_decay: >= 0 (default: 0).
        weight_decay: >= 0 (default: 0).
        initial_accumulator_value: where sum starts, >= 0 (default: 0).
        eps: added after the square root, >= 0 (default: 1e-10).
        foreach, maximize, differentiable, fused: as in torch.optim. foreach is accepted without
            effect; fused=True lets GradScaler leave unscaling to the step; differentiable takes the
            stock path.
        options: :class:`OnePassOptions`, for clipping, skipping, averaging and zeroing in the step;
            :class:`FormatOptions`, for smaller states and for bfloat16 and float16 params.

    Raises:
        ValueError: an argument outside its range, with torch.optim's text where it has one.

    Reference:
        Duchi, Hazan, Singer 2011, "Adaptive subgradient methods for online learning and stochastic
        optimization", figure 1 with the diagonal matrix.

    Difference from torch.optim:
        None.

    Example:
        >>> param = torch.nn.Parameter(torch.tensor([1.0, -2.0]))
        >>> optimizer = fused_optim.Adagrad([param], lr=0.1)
        >>> param.square().sum().backward()
        >>> optimizer.step()
        >>> [round(value, 3) for value in param.tolist()]
        [0.9, -1.9]
    """

    _rule = "adagrad"
    _stock = torch.optim.Adagrad

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-2,
        lr_decay: float = 0,
        weight_decay: float = 0,
        initial_accumulator_value: float = 0,
        eps: float = 1e-10,
        foreach: bool | None = None,
        *,
        maximize: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        **options: Unpack[KernelOptions],
    ) -> None:
        self._take_options(options)
        super().__init__(
            params,
            lr=lr,
            lr_decay=lr_decay,
            weight_decay=weight_decay,
            initial_accumulator_value=initial_accumulator_value,
            eps=eps,
            foreach=foreach,
            maximize=maximize,
            differentiable=differentiable,
            fused=fused,
        )
        if fused:  # before torch 2.13 torch.optim's constructor leaves it out
            self._step_supports_amp_scaling = True

    def _init_group(
        self,
        group: dict[str, Any],
        params_with_grad: list[Tensor],
        grads: list[Tensor],
        state_sums: list[Tensor],
        state_steps: list[Tensor],
    ) -> tuple[bool, bool]:
        # Before torch 2.13 torch.optim makes states in its constructor alone.
        for param in group["params"]:
            if param.grad is not None and not self.state[param]:
                self.state[param].update(self._create_state(param, group))
        return super()._init_group(group, params_with_grad, grads, state_sums, state_steps)

    def _create_state(self, param: Tensor, group: dict[str, Any]) -> dict[str, Tensor]:
        """As torch 2.13's own code makes them where there are none."""
        on_device = bool(group.get("fused")) and param.device.type != "cpu"
        step = torch.zeros(
            (),
            dtype=_get_scalar_dtype(is_fused=on_device),
            device=param.device if on_device else "cpu",
        )
        initial = self.defaults["initial_accumulator_value"]
        if param.is_complex():
            initial = complex(initial, initial)
        return {"step": step, "sum": torch.full_like(param, initial)}

    def _convert_states(
        self, param: Tensor, group: dict[str, Any], states: dict[str, Any]
    ) -> dict[str, Any]:
        if states.get("step") == 0 and isinstance(states.get("sum"), Tensor):
            return self._convert_first(param, group, states, self._first_values(group))
        return super()._convert_states(param, group, states)

    def _refuse_sparse(self, group: dict[str, Any]) -> str | None:
        if group["weight_decay"] != 0:
            return "weight_decay option is not compatible with sparse gradients"
        return None
