"""The optimizers that torch.optim lacks, in its style: what a tensor that no kernel serves is stepped by."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.optim.optimizer import (
    Optimizer,
    _get_capturable_supported_devices,
    _get_scalar_dtype,
    _use_grad_for_differentiable,
)

from fused_optim.tracing import check_graph_capture

if TYPE_CHECKING:
    from torch.optim.optimizer import ParamsT


class _Plain(Optimizer):
    """One tensor after the other."""

    @abstractmethod
    def _init_group(
        self,
        group: dict[str, Any],
        params: list[Tensor],
        grads: list[Tensor],
        states: list[dict[str, Tensor]],
    ) -> None:
        """Append those that have a grad, and make first states."""

    @staticmethod
    @abstractmethod
    def _update(
        param: Tensor, grad: Tensor, state: dict[str, Tensor], group: dict[str, Any]
    ) -> None: ...

    @_use_grad_for_differentiable
    def step(self, closure: Any = None) -> Any:
        """Perform a single optimization step."""
        check_graph_capture(self)
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            params: list[Tensor] = []
            grads: list[Tensor] = []
            states: list[dict[str, Tensor]] = []
            self._init_group(group, params, grads, states)
            for param, grad, state in zip(params, grads, states):
                self._update(param, -grad if group["maximize"] else grad, state, group)
        return loss


class Lion(_Plain):
    """Chen et al. 2023, algorithm 2. fused_optim.Lion says what it is."""

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-4,
        betas: tuple[float, float] = (0.9, 0.99),
        weight_decay: float = 0.0,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
        differentiable: bool = False,
    ) -> None:
        _check_lr(lr)
        _check_betas(betas, "two")
        _check_not_negative(weight_decay=weight_decay)
        defaults = {
            "lr": lr,
            "betas": betas,
            "weight_decay": weight_decay,
            "maximize": maximize,
            "foreach": foreach,
            "differentiable": differentiable,
        }
        super().__init__(params, defaults)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        # A checkpoint of another library's Lion has lr, betas and weight_decay alone.
        for group in self.param_groups:
            group.setdefault("maximize", False)
            group.setdefault("foreach", None)
            group.setdefault("differentiable", False)

    def _init_group(
        self,
        group: dict[str, Any],
        params: list[Tensor],
        grads: list[Tensor],
        states: list[dict[str, Tensor]],
    ) -> None:
        for param, grad in _with_grads(group, "Lion"):
            state = self.state[param]
            if "exp_avg" not in state:
                state["exp_avg"] = _zeros(param)
            params.append(param)
            grads.append(grad)
            states.append(state)

    @staticmethod
    def _update(
        param: Tensor, grad: Tensor, state: dict[str, Tensor], group: dict[str, Any]
    ) -> None:
        lr, beta1, beta2 = map(_without_dimensions, (group["lr"], *group["betas"]))
        param, grad, exp_avg = map(_real, (param, grad, state["exp_avg"]))
        if group["weight_decay"] != 0:
            param.mul_(1 - lr * group["weight_decay"])
        direction = exp_avg.mul(beta1).add_(grad, alpha=1 - beta1).sign_()
        param.sub_(lr * direction)
        exp_avg.mul_(beta2).add_(grad, alpha=1 - beta2)


class AdEMAMix(_Plain):
    """Pagliardini, Ablin, Grangier 2024, algorithm 1. fused_optim.AdEMAMix says what it is."""

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
    ) -> None:
        alpha_warmup, beta3_warmup = alpha_warmup or 0, beta3_warmup or 0
        _check_lr(lr)
        _check_betas(betas, "three")
        _check_not_negative(
            epsilon=eps,
            weight_decay=weight_decay,
            alpha=alpha,
            alpha_warmup=alpha_warmup,
            beta3_warmup=beta3_warmup,
        )
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "alpha": alpha,
            "alpha_warmup": alpha_warmup,
            "beta3_warmup": beta3_warmup,
            "maximize": maximize,
            "foreach": foreach,
            "capturable": capturable,
            "differentiable": differentiable,
        }
        super().__init__(params, defaults)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        # A checkpoint of the authors' class has None for no warm-up, steps that are ints, and no fast
        # average where beta1 is 0.
        for group in self.param_groups:
            group.setdefault("maximize", False)
            group.setdefault("foreach", None)
            group.setdefault("capturable", False)
            group.setdefault("differentiable", False)
            for key in ("alpha_warmup", "beta3_warmup"):
                group[key] = group.get(key) or 0
            for param in group["params"]:
                state = self.state.get(param, {})
                step = state.get("step")
                if step is not None and not isinstance(step, Tensor):
                    state["step"] = _count(param, group).fill_(step)
                if "exp_avg_fast" in state and state["exp_avg_fast"] is None:
                    state["exp_avg_fast"] = _zeros(param)

    def _init_group(
        self,
        group: dict[str, Any],
        params: list[Tensor],
        grads: list[Tensor],
        states: list[dict[str, Tensor]],
    ) -> None:
        for param, grad in _with_grads(group, "AdEMAMix"):
            state = self.state[param]
            if not state:
                state["step"] = _count(param, group)
                for key in ("exp_avg_fast", "exp_avg_slow", "exp_avg_sq"):
                    state[key] = _zeros(param)
            params.append(param)
            grads.append(grad)
            states.append(state)

    @staticmethod
    def _update(
        param: Tensor, grad: Tensor, state: dict[str, Tensor], group: dict[str, Any]
    ) -> None:
        lr, beta1, beta2, beta3 = map(_without_dimensions, (group["lr"], *group["betas"]))
        param, grad, fast, slow, square = map(
            _real, (param, grad, *(state[f"exp_avg_{key}"] for key in ("fast", "slow", "sq")))
        )
        step = _counted(state["step"], param, group)
        alpha = _share(step, group["alpha_warmup"]) * group["alpha"]
        if group["beta3_warmup"]:
            share = _share(step, group["beta3_warmup"])
            half_life = (1 - share) * _half_life(beta1) + share * _half_life(beta3)
            beta3 = 0.5 ** (1 / half_life) if isinstance(half_life, Tensor) or half_life else 0.0
        if group["weight_decay"] != 0:
            param.mul_(1 - lr * group["weight_decay"])
        fast.lerp_(grad, 1 - beta1)
        slow.lerp_(grad, _as(slow, 1 - beta3))
        square.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
        denom = (square.sqrt() / (1 - beta2**step) ** 0.5).add_(group["eps"])
        direction = (fast / (1 - beta1**step)).add_(slow * alpha)
        if isinstance(lr, Tensor):
            param.sub_(direction.mul_(lr).div_(denom))
        else:
            param.addcdiv_(direction, denom, value=-lr)


class AdamWScheduleFree(_Plain):
    """Defazio et al. 2024, algorithm 1. fused_optim.AdamWScheduleFree says what it is."""

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
    ) -> None:
        _check_lr(lr)
        _check_betas(betas, "two")
        if betas[0] == 0:
            raise ValueError(f"Invalid beta parameter at index 0: {betas[0]}, must be more than 0")
        _check_not_negative(
            epsilon=eps,
            weight_decay=weight_decay,
            warmup_steps=warmup_steps,
            r=r,
            weight_lr_power=weight_lr_power,
        )
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "warmup_steps": warmup_steps,
            "r": r,
            "weight_lr_power": weight_lr_power,
            "train_mode": True,
            "maximize": maximize,
            "foreach": foreach,
            "capturable": capturable,
            "differentiable": differentiable,
        }
        super().__init__(params, defaults)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        for group in self.param_groups:
            group.setdefault("maximize", False)
            group.setdefault("capturable", False)
            group.setdefault("differentiable", False)
            # The authors' class counts once for all params of a group.
            k = group.pop("k", -1)
            lr_max, weight_sum = group.pop("lr_max", -1.0), group.pop("weight_sum", 0.0)
            group.pop("scheduled_lr", None)
            for param in group["params"] if k >= 0 else ():
                if "z" in self.state.get(param, {}):
                    self.state[param] |= {
                        "step": _count(param, group).fill_(k),
                        "lr_max": _number(param, group, lr_max),
                        "weight_sum": _number(param, group, weight_sum),
                    }

    def _init_group(
        self,
        group: dict[str, Any],
        params: list[Tensor],
        grads: list[Tensor],
        states: list[dict[str, Tensor]],
    ) -> None:
        for param, grad in _with_grads(group, "AdamWScheduleFree"):
            state = self.state[param]
            if not state:
                state["step"] = _count(param, group)
                state["lr_max"] = _number(param, group, -1.0)
                state["weight_sum"] = _number(param, group, 0.0)
                state["z"] = param.detach().clone(memory_format=torch.preserve_format)
                state["exp_avg_sq"] = _zeros(param)
            params.append(param)
            grads.append(grad)
            states.append(state)

    @staticmethod
    def _update(
        param: Tensor, grad: Tensor, state: dict[str, Tensor], group: dict[str, Any]
    ) -> None:
        lr, beta1, beta2 = map(_without_dimensions, (group["lr"], *group["betas"]))
        step = _counted(state["step"], param, group)
        lr_max, weight_sum = state["lr_max"], state["weight_sum"]
        if isinstance(lr, Tensor) and not (group["capturable"] or group["differentiable"]):
            lr = lr.item()
        lr = _share(step, group["warmup_steps"]) * lr
        with torch.no_grad():
            if group["capturable"]:
                lr_max.copy_(lr_max.clamp(min=lr))
                weight = step ** group["r"] * lr_max ** group["weight_lr_power"]
                weight_sum += weight
                z_weight = (weight / weight_sum).nan_to_num(nan=0.0)
            else:
                lr_max.fill_(max(float(lr), lr_max.item()))
                weight = step ** group["r"] * lr_max.item() ** group["weight_lr_power"]
                weight_sum += weight
                z_weight = weight / weight_sum.item() if weight_sum != 0 else 0.0
        param, grad, z, exp_avg_sq = map(_real, (param, grad, state["z"], state["exp_avg_sq"]))
        exp_avg_sq.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
        denom = (exp_avg_sq / (1 - beta2**step)).sqrt() + group["eps"]
        direction = grad / denom
        if group["weight_decay"] != 0:
            direction.add_(param, alpha=group["weight_decay"])
        param.lerp_(z.to(param.dtype), _as(param, z_weight))
        _move(param, direction, lr * (beta1 * (1 - z_weight) - 1))
        _move(z, direction, -lr)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load the state; lr_max and weight_sum stay float64, where torch.optim would round them."""
        super().load_state_dict(state_dict)
        saved = [
            state_dict["state"].get(i, {}) for g in state_dict["param_groups"] for i in g["params"]
        ]
        groups = [(group, param) for group in self.param_groups for param in group["params"]]
        for states, (group, param) in zip(saved, groups):
            for key in {"lr_max", "weight_sum"} & states.keys():
                self.state[param][key] = _number(param, group, float(states[key]))

    def step(self, closure: Any = None) -> Any:
        """Perform a single optimization step."""
        if not all(group["train_mode"] for group in self.param_groups):
            raise RuntimeError(f"step() {IN_EVAL_MODE}")
        return super().step(closure)

    @torch.no_grad()
    def train(self) -> None:
        """Let the params be y, where grads are taken."""
        self._go(True, lambda beta1: 1 - beta1)

    @torch.no_grad()
    def eval(self) -> None:
        """Let the params be x, the average that the training is for."""
        self._go(False, lambda beta1: 1 - 1 / beta1)

    def _go(self, train_mode: bool, weight: Callable[[float], float]) -> None:
        number = -1
        for group in self.param_groups:
            for param in group["params"]:
                number += 1
                if group["train_mode"] != train_mode and "z" in self.state.get(param, {}):
                    self._lerp(param, group, number, weight(float(group["betas"][0])))
            group["train_mode"] = train_mode

    def _lerp(self, param: Tensor, group: dict[str, Any], number: int, weight: float) -> None:
        """Move the param, the `number`-th of all, towards z."""
        param.lerp_(self.state[param]["z"].to(param.dtype), weight)


IN_EVAL_MODE = "in eval mode: call the optimizer's train() first"


def _move(tensor: Tensor, direction: Tensor, size: Any) -> None:
    if isinstance(size, Tensor):
        tensor.add_(direction * size)
    else:
        tensor.add_(direction, alpha=size)


def _number(param: Tensor, group: dict[str, Any], value: float) -> Tensor:
    """In float64, as Python's: millions of steps add up in it."""
    device = param.device if group["capturable"] else "cpu"
    return torch.full((), value, dtype=torch.float64, device=device)


def _half_life(beta: float) -> float:
    """In steps: beta**half_life == 1 / 2."""
    return -1 / math.log2(beta) if beta > 0 else 0.0


def _count(param: Tensor, group: dict[str, Any]) -> Tensor:
    device = param.device if group["capturable"] else "cpu"
    return torch.zeros((), dtype=_get_scalar_dtype(), device=device)


def _counted(step: Tensor, param: Tensor, group: dict[str, Any]) -> Any:
    """One step more: a number, unless no device may be waited for."""
    if group["capturable"]:
        devices = _get_capturable_supported_devices()
        if param.device.type not in devices or step.device != param.device:
            raise AssertionError(
                f"If capturable=True, params and state_steps must be on supported devices: {devices}."
            )
    elif step == -1:
        raise ZeroDivisionError("step is -1: its bias correction is 0")
    step += 1
    return step if group["capturable"] else step.item()


def _share(step: Any, warmup: float) -> Any:
    """How much of a warm-up is over."""
    if isinstance(step, Tensor) and warmup:
        return (step / warmup).clamp(max=1.0)
    return step / warmup if step < warmup else 1.0


def _as(like: Tensor, number: Any) -> Any:
    return number.to(like.dtype) if isinstance(number, Tensor) else number


def _check_lr(lr: float | Tensor) -> None:
    if isinstance(lr, Tensor) and lr.numel() != 1:
        raise ValueError("Tensor lr must be 1-element")
    if not lr >= 0.0:
        raise ValueError(f"Invalid learning rate: {lr}")


def _check_betas(betas: Sequence[float], number: str) -> None:
    if len(betas) != {"two": 2, "three": 3}[number]:
        raise ValueError(f"Invalid betas: {betas}, must be {number} numbers in [0, 1)")
    for i, beta in enumerate(betas):
        if not 0.0 <= beta < 1.0:
            raise ValueError(f"Invalid beta parameter at index {i}: {beta}")


def _check_not_negative(**values: float) -> None:
    for name, value in values.items():
        if not value >= 0.0:
            raise ValueError(f"Invalid {name} value: {value}")


def _with_grads(group: dict[str, Any], name: str) -> list[tuple[Tensor, Tensor]]:
    found = [(param, param.grad) for param in group["params"] if param.grad is not None]
    if any(grad.is_sparse for _, grad in found):
        raise RuntimeError(f"{name} does not support sparse gradients")
    return found


def _zeros(param: Tensor) -> Tensor:
    return torch.zeros_like(param, memory_format=torch.preserve_format)


def _real(tensor: Tensor) -> Tensor:
    return torch.view_as_real(tensor) if torch.is_complex(tensor) else tensor


def _without_dimensions(number: Any) -> Any:
    return number.squeeze() if isinstance(number, Tensor) else number
