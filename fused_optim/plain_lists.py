"""Steps of the optimizers that torch.optim lacks on lists of tensors, in its functional style."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from fused_optim import plain


def lion(
    params: list[Tensor],
    grads: list[Tensor],
    exp_avgs: list[Tensor],
    differentiable: bool = False,
    *,
    beta1: float,
    beta2: float,
    lr: float | Tensor,
    weight_decay: float,
    maximize: bool,
) -> None:
    group = {"betas": (beta1, beta2), **locals()}
    _step(plain.Lion, params, grads, group, exp_avg=exp_avgs)


def ademamix(
    params: list[Tensor],
    grads: list[Tensor],
    exp_avg_fasts: list[Tensor],
    exp_avg_slows: list[Tensor],
    exp_avg_sqs: list[Tensor],
    state_steps: list[Tensor],
    capturable: bool = False,
    differentiable: bool = False,
    *,
    beta1: float,
    beta2: float,
    beta3: float,
    alpha: float,
    alpha_warmup: float,
    beta3_warmup: float,
    lr: float | Tensor,
    weight_decay: float,
    eps: float,
    maximize: bool,
) -> None:
    group = {"betas": (beta1, beta2, beta3), **locals()}
    _step(
        plain.AdEMAMix,
        params,
        grads,
        group,
        exp_avg_fast=exp_avg_fasts,
        exp_avg_slow=exp_avg_slows,
        exp_avg_sq=exp_avg_sqs,
        step=state_steps,
    )


def adamw_schedule_free(
    params: list[Tensor],
    grads: list[Tensor],
    zs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    lr_maxs: list[Tensor],
    weight_sums: list[Tensor],
    state_steps: list[Tensor],
    capturable: bool = False,
    differentiable: bool = False,
    *,
    beta1: float,
    beta2: float,
    lr: float | Tensor,
    weight_decay: float,
    eps: float,
    warmup_steps: int,
    r: float,
    weight_lr_power: float,
    maximize: bool,
) -> None:
    group = {"betas": (beta1, beta2), **locals()}
    _step(
        plain.AdamWScheduleFree,
        params,
        grads,
        group,
        z=zs,
        exp_avg_sq=exp_avg_sqs,
        lr_max=lr_maxs,
        weight_sum=weight_sums,
        step=state_steps,
    )


def _step(
    optimizer: Any,
    params: list[Tensor],
    grads: list[Tensor],
    group: dict[str, Any],
    **states: list[Tensor],
) -> None:
    for param, grad, *tensors in zip(params, grads, *states.values()):
        state = dict(zip(states, tensors))
        optimizer._update(param, -grad if group["maximize"] else grad, state, group)
