"""AdamW. The arithmetic stands in csrc/rules.h."""

from __future__ import annotations

from typing import Any

import torch

from fused_optim.optimizer import FusedOptimizer


class AdamW(FusedOptimizer, torch.optim.AdamW):
    """AdamW on fused kernels; a drop-in for :class:`torch.optim.AdamW`.

    Like :class:`Adam`, but weight decay multiplies param by ``1 - lr * weight_decay`` before the
    update and never enters the moments.

    Args:
        params: iterable of parameters, named parameters or param groups.
        lr: learning rate, >= 0, a float or a tensor with one element (default: 1e-3).
        betas: decay rates of the two moments, each in [0, 1) (default: (0.9, 0.999)).
        eps: added to the denominator, >= 0 (default: 1e-8).
        weight_decay: >= 0 (default: 1e-2).
        amsgrad, maximize, foreach, capturable, differentiable, fused: as in :class:`Adam`.

    Raises:
        ValueError: an argument outside its range, with torch.optim's text.

    Reference:
        Loshchilov, Hutter 2019, "Decoupled weight decay regularization", algorithm 2.

    Difference from torch.optim:
        None but rounding, as in :class:`Adam`.

    Example:
        >>> param = torch.nn.Parameter(torch.tensor([1.0, -2.0]))
        >>> optimizer = fused_optim.AdamW([param], lr=0.1, weight_decay=0.5)
        >>> param.square().sum().backward()
        >>> optimizer.step()
        >>> [round(value, 3) for value in param.tolist()]
        [0.85, -1.8]
    """

    _rule = "adam"
    _stock = torch.optim.AdamW

    def _refuse_sparse(self, group: dict[str, Any]) -> str | None:
        return "Adam does not support sparse gradients, please consider SparseAdam instead"
