"""How far a correct implementation may lie from exact arithmetic: running error analysis.

Each number carries a bound on the error of what a machine computes in its place (Wilkinson; Higham,
"Accuracy and Stability of Numerical Algorithms", section 3.3). An operation propagates the errors
of its operands and adds the one rounding it makes itself, half an eps of its result. So nothing is
tuned: the roundings are counted by running torch.optim's own sequence of operations.

In the form |ours - stock| <= k * eps * A, where A takes the absolute value of every term: each
result met on the way is at most the A of its term, so the bound here is that one with every term at
its own size. k counts roundings of half an eps; those of one step, with the one that brings each
hyperparameter to the compute type:

    state                                        param, on top of the states it reads
    momentum_buffer   3 (+3 with weight decay)   SGD 3, nesterov 3 more
    exp_avg, grad_avg 4 (+3)                     Adam 9, decoupled weight decay 2 more
    square averages   4 (+6: grad is squared)    RMSprop 7, centered 2 more through the variance
    sum               2 (+6)                     Adagrad 7

Both implementations obey the bound, so they lie within the sum of their bounds of each other. A fused
multiply-add or a shorter sequence of operations only leaves roundings out.

The square root is where a relative view breaks: in centered RMSprop the variance is a difference.
Its error is carried through the root by |sqrt(x') - sqrt(x)| = |x' - x| / (sqrt(x') + sqrt(x));
where the interval round the variance reaches 0, the bound is infinite and says so.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray

Array = NDArray[np.float64]


@dataclass(frozen=True, order=True)
class Rounding:
    """Rounding to nearest changes x by at most max(unit * |x|, tiny)."""

    unit: float
    tiny: float

    @staticmethod
    def to(dtype: torch.dtype) -> Rounding:
        info = torch.finfo(dtype)
        return Rounding(info.eps / 2, info.tiny * info.eps / 2)


FLOAT32, DOUBLE = Rounding.to(torch.float32), Rounding.to(torch.float64)


@dataclass(frozen=True)
class Bounded:
    """An exact value, the error bound of its computed twin, and how operations on it round.

    jumped: where a sign on the way may be the opposite one, so that the error is no rounding.
    """

    value: Array
    error: Array
    rounding: Rounding
    jumped: NDArray[np.bool_] | bool = False

    def __neg__(self) -> Bounded:
        return Bounded(-self.value, self.error, self.rounding, self.jumped)

    def __abs__(self) -> Bounded:
        return Bounded(np.abs(self.value), self.error, self.rounding, self.jumped)

    def __add__(self, other: Bounded | float) -> Bounded:
        other = self._lift(other)
        return self._result(other, self.value + other.value, self.error + other.error)

    def __sub__(self, other: Bounded | float) -> Bounded:
        return self + -self._lift(other)

    def __rsub__(self, other: float) -> Bounded:
        return self._lift(other) - self

    def __mul__(self, other: Bounded | float) -> Bounded:
        other = self._lift(other)
        error = (
            np.abs(self.value) * other.error
            + np.abs(other.value) * self.error
            + self.error * other.error
        )
        return self._result(other, self.value * other.value, error)

    def __truediv__(self, other: Bounded | float) -> Bounded:
        other = self._lift(other)
        nearest_zero = np.abs(other.value) - other.error
        with np.errstate(divide="ignore", invalid="ignore"):
            value = self.value / other.value
            error = (self.error + np.abs(value) * other.error) / nearest_zero
        return self._result(other, value, np.where(nearest_zero > 0, error, np.inf))

    def sqrt(self) -> Bounded:
        with np.errstate(divide="ignore", invalid="ignore"):
            value = np.sqrt(self.value)
            error = self.error / (value + np.sqrt(self.value - self.error))
        error = np.where(self.value > self.error, error, np.inf)
        return self._result(self, value, error)

    def maximum(self, other: Bounded) -> Bounded:
        """No rounding: the result is one of the two."""
        return self._one_of(other, np.maximum(self.value, other.value))

    def minimum(self, other: Bounded) -> Bounded:
        """No rounding: the result is one of the two."""
        return self._one_of(other, np.minimum(self.value, other.value))

    def _one_of(self, other: Bounded, value: Array) -> Bounded:
        return Bounded(
            value,
            np.maximum(self.error, other.error),
            self.rounding,
            self.jumped | other.jumped,
        )

    def sign(self) -> Bounded:
        """Exact, unless 0 is within the error: then it may be anything from -1 to 1."""
        value = np.sign(self.value)
        jumped = (np.abs(self.value) <= self.error) & (self.error > 0)
        error = np.where(jumped, 1.0 + np.abs(value), 0.0)
        return Bounded(value, error, self.rounding, self.jumped | jumped)

    def rounded(self, by: Rounding, then: Rounding | None = None) -> Bounded:
        """Rounded once, and operated on with `then` (as before if None) from here."""
        size = np.abs(self.value) + self.error
        extra = np.where(size > 0, np.maximum(by.unit * size, by.tiny), 0.0)
        return Bounded(self.value, self.error + extra, then or self.rounding, self.jumped)

    def _lift(self, other: Bounded | float) -> Bounded:
        return other if isinstance(other, Bounded) else exact(other, self.rounding)

    def _result(self, other: Bounded, value: Array, error: Array) -> Bounded:
        rounding = max(self.rounding, other.rounding)
        return Bounded(value, error, rounding, self.jumped | other.jumped).rounded(rounding)


def exact(value: ArrayLike, rounding: Rounding) -> Bounded:
    value = np.asarray(value, dtype=np.float64)
    return Bounded(value, np.zeros_like(value), rounding)


@dataclass(frozen=True)
class Machine:
    """Where an implementation rounds.

    A step computes in `compute` and keeps params and state in `storage`. torch.optim's for-loop
    also writes every intermediate tensor to storage (`stores_every_result`); a kernel keeps it in a
    register. `scalar` rounds the arithmetic on lr, which is a float32 tensor in some cases.
    """

    compute: Rounding
    storage: Rounding
    scalar: Rounding
    stores_every_result: bool

    @staticmethod
    def of(dtype: torch.dtype, tensor_dtype: torch.dtype, stores_every_result: bool) -> Machine:
        compute = torch.float64 if dtype == torch.float64 else torch.float32
        return Machine(
            Rounding.to(compute),
            Rounding.to(dtype),
            Rounding.to(tensor_dtype),
            # Storing a number in the type it was computed in is no rounding.
            stores_every_result and dtype != compute,
        )

    def stored(self, values: ArrayLike) -> Bounded:
        """Values as they lie in storage: exact, whatever has happened before."""
        return exact(values, self.compute)

    def number(self, value: float) -> Bounded:
        """A hyperparameter that is a Python float."""
        return exact(value, Rounding.to(torch.float64))

    def lr(self, value: float) -> Bounded:
        return exact(value, self.scalar)

    def hyper(self, number: Bounded) -> Bounded:
        """A finished number as the element loop receives it."""
        return number.rounded(self.compute, then=self.compute)

    def result(self, value: Bounded) -> Bounded:
        """The end of one tensor operation of torch.optim's for-loop."""
        return value.rounded(self.storage) if self.stores_every_result else value

    def store(self, value: Bounded) -> Bounded:
        """A param or a state, written back."""
        return value if self.storage == self.compute else value.rounded(self.storage)

    def add(self, term: Bounded, scale: Bounded, other: Bounded) -> Bounded:
        """torch.add(term, other, alpha=scale): in 16 bits it also rounds alpha and the product."""
        scale = self.result(self.hyper(scale))
        return term + self.result(scale * other)

    def root_plus_eps(self, variance: Bounded, correction: Bounded | None, eps: float) -> Bounded:
        """sqrt(variance) / correction + eps, as three tensor operations."""
        denom = self.result(variance.sqrt())
        if correction is not None:
            denom = self.result(denom / self.hyper(correction))
        return self.result(denom + self.result(self.hyper(self.number(eps))))

    def lerp(self, start: Bounded, end: Bounded, weight: Bounded | float) -> Bounded:
        """torch.lerp: measured from the nearer end."""
        weight = weight if isinstance(weight, Bounded) else self.number(weight)
        if np.all(weight.value < 0.5):
            return start + self.hyper(weight) * (end - start)
        return end - (1.0 - self.hyper(weight)) * (end - start)

    def bias_correction(self, beta: float, step: int) -> Bounded:
        """1 - beta^step in double; a power by multiplication makes at most `step` roundings."""
        double = Rounding.to(torch.float64)
        power = beta**step
        return 1 - Bounded(np.asarray(power), np.asarray(step * double.unit * power), double)


State = dict[str, Bounded]


def sgd(
    on: Machine,
    param: Bounded,
    grad: Bounded,
    state: State,
    step: int,
    *,
    lr: float,
    momentum: float,
    dampening: float,
    weight_decay: float,
    nesterov: bool,
    maximize: bool,
    **_: Any,
) -> tuple[Bounded, State]:
    grad = _effective_grad(on, param, grad, maximize, weight_decay)
    after = {}
    if momentum != 0:
        if "momentum_buffer" in state:
            decayed = on.result(state["momentum_buffer"] * on.hyper(on.number(momentum)))
            buffer = on.store(on.add(decayed, on.number(1 - dampening), grad))
        else:
            buffer = on.store(grad)
        after["momentum_buffer"] = buffer
        grad = on.result(on.add(grad, on.number(momentum), buffer)) if nesterov else buffer
    return on.store(on.add(param, -on.lr(lr), grad)), after


def lion(
    on: Machine,
    param: Bounded,
    grad: Bounded,
    state: State,
    step: int,
    *,
    lr: float,
    betas: tuple[float, float],
    weight_decay: float,
    maximize: bool,
    **_: Any,
) -> tuple[Bounded, State]:
    if maximize:
        grad = -grad
    if weight_decay != 0:
        param = on.result(param * on.hyper(1.0 - on.lr(lr) * weight_decay))
    exp_avg = state.get("exp_avg", on.stored(0.0))

    def moved(beta: float) -> Bounded:
        return on.result(
            on.add(on.result(exp_avg * on.hyper(on.number(beta))), on.number(1 - beta), grad)
        )

    step_size = on.result(on.hyper(on.lr(lr)) * moved(betas[0]).sign())
    return on.store(param - step_size), {"exp_avg": on.store(moved(betas[1]))}


def asgd(
    on: Machine,
    param: Bounded,
    grad: Bounded,
    state: State,
    step: int,
    *,
    lr: float,
    lambd: float,
    alpha: float,
    t0: float,
    weight_decay: float,
    maximize: bool,
    **_: Any,
) -> tuple[Bounded, State]:
    eta = _number(state["eta"]) if "eta" in state else on.lr(lr).rounded(FLOAT32, then=DOUBLE)
    mu = _number(state["mu"]) if "mu" in state else on.number(1.0)
    ax = state.get("ax", on.stored(0.0))
    grad = _effective_grad(on, param, grad, maximize, weight_decay)
    param = on.result(param * on.hyper(1.0 - eta * lambd))
    param = on.store(on.add(param, -eta, grad))
    if np.any(mu.value != 1):
        param_in_ax = on.result(on.result(param - ax) * on.hyper(mu))
        ax = on.store(ax + param_in_ax)
    else:
        ax = param
    decay = on.lr(lr) * lambd * float(step) + 1.0
    # A power multiplies the relative error of its base; its own is within a few units.
    grown = decay.value**alpha
    error = grown * (alpha * decay.error / decay.value + 64 * DOUBLE.unit)
    after = {
        "ax": ax,
        "eta": (on.lr(lr) / Bounded(grown, error, DOUBLE)).rounded(FLOAT32),
        "mu": on.number(1 / max(1, step - t0)).rounded(FLOAT32),
    }
    return param, after


def adagrad(
    on: Machine,
    param: Bounded,
    grad: Bounded,
    state: State,
    step: int,
    *,
    lr: float,
    lr_decay: float,
    eps: float,
    weight_decay: float,
    initial_accumulator_value: float,
    maximize: bool,
    **_: Any,
) -> tuple[Bounded, State]:
    grad = _effective_grad(on, param, grad, maximize, weight_decay)
    before = state.get("sum", on.stored(initial_accumulator_value))
    total = on.store(before + grad * grad)
    decayed_lr = on.hyper(on.lr(lr) / (on.number(step - 1) * lr_decay + 1.0))
    denom = on.root_plus_eps(total, None, eps)
    return on.store(param - decayed_lr * grad / denom), {"sum": total}


def adadelta(
    on: Machine,
    param: Bounded,
    grad: Bounded,
    state: State,
    step: int,
    *,
    lr: float,
    rho: float,
    eps: float,
    weight_decay: float,
    maximize: bool,
    **_: Any,
) -> tuple[Bounded, State]:
    grad = _effective_grad(on, param, grad, maximize, weight_decay)
    zero = on.stored(0.0)
    square_avg = _decayed_square(on, state.get("square_avg", zero), grad, rho)
    acc_delta = state.get("acc_delta", zero)

    def root(average: Bounded) -> Bounded:
        return on.result(on.result(average + on.result(on.hyper(on.number(eps)))).sqrt())

    delta = on.result(on.result(root(acc_delta) / root(square_avg)) * grad)
    after = {"square_avg": square_avg, "acc_delta": _decayed_square(on, acc_delta, delta, rho)}
    return on.store(on.add(param, -on.lr(lr), delta)), after


def rmsprop(
    on: Machine,
    param: Bounded,
    grad: Bounded,
    state: State,
    step: int,
    *,
    lr: float,
    alpha: float,
    eps: float,
    weight_decay: float,
    momentum: float,
    centered: bool,
    maximize: bool,
    **_: Any,
) -> tuple[Bounded, State]:
    grad = _effective_grad(on, param, grad, maximize, weight_decay)
    zero = on.stored(0.0)
    square_avg = _decayed_square(on, state.get("square_avg", zero), grad, alpha)
    after = {"square_avg": square_avg}
    variance = square_avg
    if centered:
        after["grad_avg"] = on.store(on.lerp(state.get("grad_avg", zero), grad, 1 - alpha))
        variance = on.result(square_avg - after["grad_avg"] * after["grad_avg"])
    denom = on.root_plus_eps(variance, None, eps)
    if momentum > 0:
        decayed = state.get("momentum_buffer", zero) * on.hyper(on.number(momentum))
        after["momentum_buffer"] = on.store(on.result(decayed) + grad / denom)
        return on.store(on.add(param, -on.lr(lr), after["momentum_buffer"])), after
    return on.store(param - on.hyper(on.lr(lr)) * grad / denom), after


def rprop(
    on: Machine,
    param: Bounded,
    grad: Bounded,
    state: State,
    step: int,
    *,
    lr: float,
    etas: tuple[float, float],
    step_sizes: tuple[float, float],
    maximize: bool,
    **_: Any,
) -> tuple[Bounded, State]:
    if maximize:
        grad = -grad
    change = on.result(grad * state.get("prev", on.stored(0.0))).sign()
    down, up = (on.result(on.hyper(on.number(eta))) for eta in etas)
    rounding_error = np.maximum(down.error, up.error)
    factor = Bounded(
        np.select([change.value > 0, change.value < 0], [up.value, down.value], 1.0),
        np.where(change.jumped, up.value - down.value, 0.0) + rounding_error,
        on.compute,
        change.jumped,
    )
    step_size = state.get("step_size", on.store(on.hyper(on.lr(lr)))) * factor
    smallest, largest = (on.hyper(on.number(size)) for size in step_sizes)
    step_size = on.store(on.result(step_size).maximum(smallest).minimum(largest))
    turned = change.value < 0
    prev = Bounded(
        np.where(turned, 0.0, grad.value),
        np.where(change.jumped, np.abs(grad.value), 0.0),
        on.compute,
        change.jumped,
    )
    after = {"prev": prev, "step_size": step_size}
    return on.store(param - prev.sign() * step_size), after


def adamax(
    on: Machine,
    param: Bounded,
    grad: Bounded,
    state: State,
    step: int,
    *,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    maximize: bool,
    **_: Any,
) -> tuple[Bounded, State]:
    beta1, beta2 = betas
    grad = _effective_grad(on, param, grad, maximize, weight_decay)
    zero = on.stored(0.0)
    exp_avg = on.store(on.lerp(state.get("exp_avg", zero), grad, 1 - beta1))
    decayed = on.result(state.get("exp_inf", zero) * on.hyper(on.number(beta2)))
    size = on.result(abs(grad) + on.result(on.hyper(on.number(eps))))
    exp_inf = on.store(decayed.maximum(size))
    step_size = on.hyper(on.lr(lr) / on.bias_correction(beta1, step))
    after = {"exp_avg": exp_avg, "exp_inf": exp_inf}
    return on.store(param - step_size * exp_avg / exp_inf), after


def adam(
    on: Machine,
    param: Bounded,
    grad: Bounded,
    state: State,
    step: int,
    *,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    amsgrad: bool,
    maximize: bool,
    decoupled_weight_decay: bool,
    **_: Any,
) -> tuple[Bounded, State]:
    beta1, beta2 = betas
    param, grad = _decayed(on, param, grad, maximize, lr, weight_decay, decoupled_weight_decay)
    exp_avg, exp_avg_sq = _moments(on, state, grad, betas)
    after = {"exp_avg": exp_avg, "exp_avg_sq": exp_avg_sq}
    if amsgrad:
        before = state.get("max_exp_avg_sq", on.stored(0.0))
        after["max_exp_avg_sq"] = before.maximum(exp_avg_sq)
    second_moment = after.get("max_exp_avg_sq", exp_avg_sq)
    denom = on.root_plus_eps(second_moment, on.bias_correction(beta2, step).sqrt(), eps)
    step_size = on.hyper(on.lr(lr) / on.bias_correction(beta1, step))
    return on.store(param - step_size * exp_avg / denom), after


def radam(
    on: Machine,
    param: Bounded,
    grad: Bounded,
    state: State,
    step: int,
    *,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    decoupled_weight_decay: bool,
    maximize: bool,
    **_: Any,
) -> tuple[Bounded, State]:
    beta1, beta2 = betas
    param, grad = _decayed(on, param, grad, maximize, lr, weight_decay, decoupled_weight_decay)
    exp_avg, exp_avg_sq = _moments(on, state, grad, betas)
    after = {"exp_avg": exp_avg, "exp_avg_sq": exp_avg_sq}
    correction2 = on.bias_correction(beta2, step)
    corrected = on.result(exp_avg / on.hyper(on.bias_correction(beta1, step)))
    update = on.result(corrected * on.hyper(on.lr(lr)))
    rho_inf = on.number(2.0) / (1.0 - on.number(beta2)) - 1.0
    rho = rho_inf - (1.0 - correction2) * (2.0 * step) / correction2
    if rho.value > 5:
        factors = (rho - 4.0) * (rho - 2.0) * rho_inf / ((rho_inf - 4.0) * (rho_inf - 2.0) * rho)
        denom = on.root_plus_eps(exp_avg_sq, None, eps)
        update = on.result(update * on.result(on.hyper(correction2.sqrt()) / denom))
        update = on.result(update * on.hyper(factors.sqrt()))
    return on.store(param - update), after


def nadam(
    on: Machine,
    param: Bounded,
    grad: Bounded,
    state: State,
    step: int,
    *,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    momentum_decay: float,
    decoupled_weight_decay: bool,
    maximize: bool,
    **_: Any,
) -> tuple[Bounded, State]:
    param, grad = _decayed(on, param, grad, maximize, lr, weight_decay, decoupled_weight_decay)
    exp_avg, exp_avg_sq = _moments(on, state, grad, betas)

    def mu_at(t: int) -> Bounded:
        power = 0.96 ** (t * momentum_decay)
        return (
            1.0 - Bounded(np.asarray(power), np.asarray(64 * DOUBLE.unit), DOUBLE) * 0.5
        ) * betas[0]

    mu, mu_next = mu_at(step), mu_at(step + 1)
    before = _number(state["mu_product"]) if "mu_product" in state else on.number(1.0)
    mu_product = (before * mu.rounded(FLOAT32, then=DOUBLE)).rounded(FLOAT32)
    denom = on.root_plus_eps(exp_avg_sq, on.bias_correction(betas[1], step).sqrt(), eps)
    grad_size = on.hyper(on.lr(lr) * (1.0 - mu) / (1.0 - mu_product))
    avg_size = on.hyper(on.lr(lr) * mu_next / (1.0 - mu_product * mu_next))
    param = on.result(param - grad_size * grad / denom)
    after = {"exp_avg": exp_avg, "exp_avg_sq": exp_avg_sq, "mu_product": mu_product}
    return on.store(param - avg_size * exp_avg / denom), after


def ademamix(
    on: Machine,
    param: Bounded,
    grad: Bounded,
    state: State,
    step: int,
    *,
    lr: float,
    betas: tuple[float, float, float],
    eps: float,
    weight_decay: float,
    alpha: float,
    alpha_warmup: float,
    beta3_warmup: float,
    maximize: bool,
    **_: Any,
) -> tuple[Bounded, State]:
    beta1, beta2, beta3 = betas
    param, grad = _decayed(on, param, grad, maximize, lr, weight_decay, True)
    old = on.number(beta3)
    if beta3_warmup > 0:
        half_lives = [-1 / np.log2(beta) if beta > 0 else 0.0 for beta in (beta1, beta3)]
        half_life = np.interp(step / beta3_warmup, (0, 1), half_lives)  # 1 counts for more
        old = Bounded(np.asarray(0.5 ** (1 / half_life)), np.asarray(64 * DOUBLE.unit), DOUBLE)
    mix = on.number(alpha)
    if step < alpha_warmup:
        mix = mix * (on.number(step) / on.number(alpha_warmup))
    zero = on.stored(0.0)
    fast = on.store(on.lerp(state.get("exp_avg_fast", zero), grad, 1 - beta1))
    slow = on.store(on.lerp(state.get("exp_avg_slow", zero), grad, 1.0 - old))
    square = _decayed_square(on, state.get("exp_avg_sq", zero), grad, beta2)
    denom = on.root_plus_eps(square, on.bias_correction(beta2, step).sqrt(), eps)
    corrected = on.result(fast / on.hyper(on.bias_correction(beta1, step)))
    direction = on.result(on.add(corrected, mix, slow))
    after = {"exp_avg_fast": fast, "exp_avg_slow": slow, "exp_avg_sq": square}
    return on.store(param - on.hyper(on.lr(lr)) * direction / denom), after


def adamw_schedule_free(
    on: Machine,
    param: Bounded,
    grad: Bounded,
    state: State,
    step: int,
    *,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    warmup_steps: float,
    r: float,
    weight_lr_power: float,
    maximize: bool,
    **_: Any,
) -> tuple[Bounded, State]:
    if maximize:
        grad = -grad
    beta1, beta2 = betas
    rate = on.number(lr)
    if step < warmup_steps:
        rate = rate * (on.number(step) / on.number(warmup_steps))
    lr_max = state["lr_max"].maximum(rate) if "lr_max" in state else rate
    # Two powers, each within 64 units and a relative error that it multiplies.
    weight = float(step) ** r * lr_max.value**weight_lr_power
    error = weight * (weight_lr_power * lr_max.error / lr_max.value + 130 * DOUBLE.unit)
    counted = Bounded(np.asarray(weight), np.asarray(error), DOUBLE)
    weight_sum = state["weight_sum"] + counted if "weight_sum" in state else counted
    share = counted / weight_sum
    z = state.get("z", param)
    exp_avg_sq = _decayed_square(on, state.get("exp_avg_sq", on.stored(0.0)), grad, beta2)
    corrected = on.result(exp_avg_sq / on.hyper(on.bias_correction(beta2, step)))
    denom = on.root_plus_eps(corrected, None, eps)
    direction = on.result(grad / denom)
    if weight_decay != 0:
        direction = on.result(on.add(direction, on.number(weight_decay), param))
    y_size = rate * (on.number(beta1) * (1.0 - share) - 1.0)
    towards_z = on.result(on.lerp(param, z, share))
    after = {
        "z": on.store(on.add(z, -rate, direction)),
        "exp_avg_sq": exp_avg_sq,
        "lr_max": lr_max,
        "weight_sum": weight_sum,
    }
    return on.store(on.add(towards_z, y_size, direction)), after


def _number(scalar: Bounded) -> Bounded:
    """A float32 among the states, as Python computes with it."""
    return Bounded(scalar.value, scalar.error, DOUBLE)


def _decayed(
    on: Machine,
    param: Bounded,
    grad: Bounded,
    maximize: bool,
    lr: float,
    weight_decay: float,
    decoupled: bool,
) -> tuple[Bounded, Bounded]:
    if not decoupled:
        return param, _effective_grad(on, param, grad, maximize, weight_decay)
    if weight_decay != 0:
        param = on.result(param * on.hyper(1.0 - on.lr(lr) * weight_decay))
    return param, -grad if maximize else grad


def _moments(
    on: Machine, state: State, grad: Bounded, betas: tuple[float, float]
) -> tuple[Bounded, Bounded]:
    zero = on.stored(0.0)
    exp_avg = on.store(on.lerp(state.get("exp_avg", zero), grad, 1 - betas[0]))
    return exp_avg, _decayed_square(on, state.get("exp_avg_sq", zero), grad, betas[1])


def _effective_grad(
    on: Machine, param: Bounded, grad: Bounded, maximize: bool, weight_decay: float
) -> Bounded:
    if maximize:
        grad = -grad
    if weight_decay != 0:
        grad = on.result(on.add(grad, on.number(weight_decay), param))
    return grad


def _decayed_square(on: Machine, average: Bounded, grad: Bounded, decay: float) -> Bounded:
    """average.mul_(decay).addcmul_(grad, grad, value=1 - decay)"""
    decayed = on.result(average * on.hyper(on.number(decay)))
    return on.store(decayed + on.hyper(on.number(1 - decay)) * grad * grad)


RECURRENCES: dict[str, Callable[..., tuple[Bounded, State]]] = {
    "SGD": sgd,
    "Lion": lion,
    "Adagrad": adagrad,
    "RMSprop": rmsprop,
    "Adam": adam,
    "AdamW": adam,
    "ASGD": asgd,
    "Adadelta": adadelta,
    "Rprop": rprop,
    "Adamax": adamax,
    "RAdam": radam,
    "NAdam": nadam,
    "AdEMAMix": ademamix,
    "AdamWScheduleFree": adamw_schedule_free,
}
