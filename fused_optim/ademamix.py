"""AdEMAMix. The arithmetic stands in csrc/rules.h."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from fused_optim import plain
from fused_optim.optimizer import FusedOptimizer
from fused_optim.options import KernelOptions

if TYPE_CHECKING:
    from torch.optim.optimizer import ParamsT
    from typing_extensions import Unpack


class AdEMAMix(FusedOptimizer, plain.AdEMAMix):
    """AdEMAMix on fused kernels: AdamW with a second momentum that remembers ten thousand steps.

    With grad the gradient (negated if maximize), at step t::

        param        = (1 - lr * weight_decay) * param
        exp_avg_fast = lerp(exp_avg_fast, grad, 1 - beta1)
        exp_avg_slow = lerp(exp_avg_slow, grad, 1 - beta3(t))
        exp_avg_sq   = beta2 * exp_avg_sq + (1 - beta2) * grad**2
        direction    = exp_avg_fast / (1 - beta1**t) + alpha(t) * exp_avg_slow
        param       -= lr * direction / (sqrt(exp_avg_sq / (1 - beta2**t)) + eps)

    alpha(t) grows from 0 to alpha in alpha_warmup steps; beta3(t) from beta1 to beta3 in beta3_warmup
    steps, in which its half-life, ``log(1/2) / log(beta3(t))``, grows evenly.

    Args:
        params: iterable of parameters, named parameters or param groups.
        lr: learning rate, >= 0, a float or a tensor with one element (default: 1e-3).
        betas: decay rates of the fast average, of the squares, and of the slow average, each in [0, 1)
            (default: (0.9, 0.999, 0.9999)).
        eps: added to the denominator, >= 0 (default: 1e-8).
        weight_decay: >= 0, decoupled as in AdamW (default: 0).
        alpha: weight of the slow average, >= 0 (default: 5).
        alpha_warmup, beta3_warmup: in steps, >= 0; None: 0 (default: None). The authors take all
            steps of a training: without it, its beginning may diverge.
        maximize, foreach, capturable, differentiable: as in torch.optim. foreach is accepted without
            effect; differentiable takes the stock path.
        options: :class:`OnePassOptions`, for clipping, skipping, averaging and zeroing in the step;
            :class:`FormatOptions`, for smaller states and for bfloat16 and float16 params.
            exp_avg_slow stays as it is in all formats.

    Raises:
        ValueError: an argument outside its range.

    Reference:
        Pagliardini, Ablin, Grangier 2024, "The AdEMAMix optimizer: better, faster, older", algorithm 1.

    Difference from torch.optim:
        It has no AdEMAMix. What no kernel serves is stepped by plain PyTorch code of this package. The states
        have the names of the authors' code, whose checkpoints it loads.

    Example:
        >>> param = torch.nn.Parameter(torch.tensor([1.0, -2.0]))
        >>> optimizer = fused_optim.AdEMAMix([param], lr=0.1)
        >>> param.square().sum().backward()
        >>> optimizer.step()
        >>> [round(value, 3) for value in param.tolist()]
        [0.9, -1.9]
    """

    _rule = "ademamix"
    _stock = plain.AdEMAMix
    _sparse_refusal = "AdEMAMix does not support sparse gradients"

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float, float] = (0.9, 0.999, 0.9999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        alpha: float = 5.0,
        alpha_warmup: int | None = None,
        beta3_warmup: int | None = None,
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
            alpha=alpha,
            alpha_warmup=alpha_warmup,
            beta3_warmup=beta3_warmup,
            maximize=maximize,
            foreach=foreach,
            capturable=capturable,
            differentiable=differentiable,
        )
