"""Runs torch.optim's own code where no kernel serves: on grads and states that it understands."""

from __future__ import annotations

import contextlib
import copy
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import _device_dtype_check_for_fused

from fused_optim import backends, clipping, options, sharding, storage, tracing

if TYPE_CHECKING:
    from fused_optim.optimizer import FusedOptimizer
    from fused_optim.step import Groups

Fallbacks = list[tuple[int, int, str]]  # (group index, param index, reason)
# (param, its grad, the values that the step leaves in it; None: zeros)
Left = list[tuple[Tensor, Tensor, Tensor | None]]


def positions(groups: Groups) -> Iterator[tuple[Tensor, int, int]]:
    """(param, group, index) of each param: as the optimizer has them, where the groups are copies."""
    for g, group in enumerate(groups):
        of_group, indices, _ = group.get("_origin") or (g, range(len(group["params"])), 0)
        for param, i in zip(group["params"], indices):
            yield param, of_group, i


def refuse_cpu_params(groups: Groups) -> None:
    for param, g, i in positions(groups):
        if param.grad is not None and param.device.type == "cpu":
            raise RuntimeError(
                f"FUSED_OPTIM_BACKEND=triton, but param {i} of group {g} is on the CPU, "
                "which Triton serves only with TRITON_INTERPRET=1"
            )


def step(optimizer: FusedOptimizer, fallbacks: Fallbacks, clip: float | Tensor) -> Left:
    """Run torch.optim's non-fused step for these params alone.

    Args:
        clip: multiplies the grads; a tensor lies on the grads' device, and nothing waits for it.

    Returns:
        The values that `write` puts into the grads, once no kernel reads them any more.
    """
    if backends.forced() in ("cpu", "triton"):
        g, i, reason = fallbacks[0]
        raise RuntimeError(
            f"FUSED_OPTIM_BACKEND={backends.forced()}, but param {i} of group {g} needs stock: "
            f"{reason}"
        )
    chosen: dict[int, list[Tensor]] = {}
    numbers: dict[int, list[int]] = {}
    for g, i, _ in fallbacks:
        group = optimizer.param_groups[g]
        param = group["params"][i]
        _refuse_odd(optimizer, param, group)
        chosen.setdefault(g, []).append(param)
        numbers.setdefault(g, []).append(storage.first_number(optimizer.param_groups, g) + i)
    if len(fallbacks) > 1 and _share_memory_in_other_formats(optimizer, fallbacks):
        # Each sees what the one before it has written.
        return [left for one in fallbacks for left in step(optimizer, [one], clip)]
    if optimizer._unsure:
        (name, *_) = optimizer._description()["states"]
        for param in (param for params in chosen.values() for param in params):
            optimizer._unsure.hand_over(optimizer.state.get(param, {}), name)
    kernels = backends.codec()
    may_raise = (kernels.ODD_OPTIONS, kernels.ODD_STATE, kernels.ODD_STEP) if kernels else ()
    odd = {g: why for g, _, why in fallbacks if why in may_raise}
    groups = [
        {**optimizer.param_groups[g], "params": params, "foreach": False, "fused": False}
        for g, params in chosen.items()
    ]
    with (
        _in_place_of(optimizer, groups) as grad_scale,
        _stand_in_grads(optimizer, groups, grad_scale, clip) as left,
        _in_float32(optimizer, groups, list(numbers.values())),
    ):
        for g, group in zip(chosen, groups):
            if g in odd:
                _rehearse(optimizer, g, group, odd[g])
        _stock_step(optimizer)
    return left


def _refuse_odd(optimizer: FusedOptimizer, param: Tensor, group: dict[str, Any]) -> None:
    """Raise stock's errors before it writes; warn of devices that no kernel serves."""
    if param.device.type != "cpu":
        if param.is_meta and group.get("fused"):
            _device_dtype_check_for_fused(param)
        backends.warn_unless_served(param.device)
    assert param.grad is not None
    refusal = optimizer._refuse_sparse(group) if param.grad.is_sparse else None
    if refusal is not None:
        raise RuntimeError(refusal)


def _stock_step(optimizer: FusedOptimizer) -> None:
    step: Callable[..., Any] = optimizer._stock.step
    # Stock's step may be wrapped by the profiler hook, which would fire all hooks again.
    if getattr(step, "hooked", False):
        step = step.__wrapped__  # type: ignore[attr-defined]
    step(optimizer)


@contextlib.contextmanager
def _in_place_of(optimizer: FusedOptimizer, groups: Groups) -> Iterator[Tensor | None]:
    """Give the optimizer these groups and no GradScaler, for a while; yield the grad scale."""
    whole = optimizer.param_groups
    scaling = {
        key: optimizer.__dict__.pop(key)
        for key in ("grad_scale", "found_inf")
        if key in optimizer.__dict__
    }
    optimizer.param_groups = groups
    try:
        yield scaling.get("grad_scale")
    finally:
        optimizer.param_groups = whole
        optimizer.__dict__.update(scaling)


def _rehearse(optimizer: FusedOptimizer, g: int, group: dict[str, Any], why: str) -> None:
    """Run the stock step on copies: it may raise when it has written half of them."""
    groups, state = optimizer.param_groups, optimizer.state
    copies = {p: nn.Parameter(p.detach().clone(), p.requires_grad) for p in group["params"]}
    for param, twin in copies.items():
        put(twin, param.grad)
    optimizer.param_groups = [{**group, "params": list(copies.values())}]
    optimizer.state = defaultdict(dict)
    for param, twin in copies.items():
        optimizer.state[twin] = {
            key: value.clone() if isinstance(value, Tensor) else copy.deepcopy(value)
            for key, value in state.get(param, {}).items()
        }
    try:
        _stock_step(optimizer)
    except Exception as error:
        keys = [key.partition(".")[0] for key in optimizer._description()["options"]]
        odd = ", ".join(f"{k}={group.get(k)!r}" for k in dict.fromkeys([*keys, "maximize"]))
        kernels = backends.codec()
        if kernels and why != kernels.ODD_OPTIONS:
            odd = why
        raise type(error)(f"param group {g} ({odd}): {error}") from error
    finally:
        optimizer.param_groups, optimizer.state = groups, state


@contextlib.contextmanager
def _stand_in_grads(
    optimizer: FusedOptimizer, groups: Groups, grad_scale: Tensor | None, clip: float | Tensor
) -> Iterator[Left]:
    """Replace the grads of these groups' params by unscaled and clipped copies, for a while.

    Yields the values that `write` puts into the grads later: a kernel may still read the same grad
    for another param.
    """
    one_pass = optimizer._clipping or clipping.OFF
    originals = [(p, p.grad) for group in groups for p in group["params"] if p.grad is not None]
    clips = isinstance(clip, Tensor) or clip != 1.0
    left: Left = []
    try:
        with torch.no_grad():
            for param, grad in originals:
                unscaled = grad if grad_scale is None else grad / grad_scale.to(grad.device)
                clipped = _times(unscaled, clip) if clips else unscaled
                if clipped is not grad:
                    put(param, clipped)
                leaves = clipped if one_pass.write_clipped_grads else unscaled
                if one_pass.zero_grads:
                    left.append((param, grad, None))
                elif leaves is not grad:
                    left.append((param, grad, leaves))
        yield left
    finally:
        for param, grad in originals:
            if param.grad is not grad:
                put(param, grad)


@torch.no_grad()
def write(left: Left) -> None:
    """Write what `step` leaves in the grads."""
    for param, grad, value in left:
        if value is None:
            grad.zero_()
        elif _overlaps(grad):
            # Elements that share memory, of an expanded grad, cannot be written one by one.
            put(param, value)
        else:
            grad.copy_(value)


def _overlaps(grad: Tensor) -> bool:
    strided = grad.layout == torch.strided
    return strided and any(n > 1 and s == 0 for n, s in zip(grad.shape, grad.stride()))


def put(param: Tensor, grad: Tensor) -> None:
    """``param.grad = grad``, which refuses another dtype than the param's; setting ``grad.data`` does not."""
    dtype = param.grad_dtype if param.is_leaf else param.dtype
    if dtype is None or dtype == grad.dtype:
        param.grad = grad
        return
    values = grad.data
    grad.data = values.to(dtype)
    param.grad = grad
    grad.data = values


def _times(grad: Tensor, coefficient: float | Tensor) -> Tensor:
    if not isinstance(coefficient, Tensor):
        return grad * coefficient
    # As by a number, which torch does not round to 16 bits before it multiplies.
    wide = torch.promote_types(grad.dtype, torch.float32)
    return (grad.to(wide) * coefficient.to(wide)).to(grad.dtype)


def _share_memory_in_other_formats(optimizer: FusedOptimizer, fallbacks: Fallbacks) -> bool:
    seen = set()
    for g, i, _ in fallbacks:
        group = optimizer.param_groups[g]
        param = group["params"][i]
        if storage.applies(param, group):
            memory = sharding.part_of(param).untyped_storage().data_ptr()
            if memory in seen:
                return True
            seen.add(memory)
    return False


@contextlib.contextmanager
def _in_float32(
    optimizer: FusedOptimizer, groups: Groups, numbers: Sequence[Sequence[int]]
) -> Iterator[None]:
    """Replace params and states in other formats by float32 ones, for a while.

    If torch.optim's step ends well, its results are encoded and written back.

    Args:
        groups: copies of param groups with some of their params, into which the others are put.
        numbers: the number of each of these params among all params.
    """
    replaced: list[tuple[Tensor, dict[str, Any], int, Tensor]] = []
    in_formats = any(key in group for group in groups for key in options.FORMATS)
    rule = optimizer._description() if in_formats else {}
    try:
        for group, group_numbers in zip(groups, numbers):
            params = group["params"]
            for i, (param, number) in enumerate(zip(params, group_numbers)):
                if not storage.applies(param, group):
                    continue
                tracing.refuse_formats()
                states = optimizer.state.get(param, {})
                stand_in = nn.Parameter(storage.decode_param(param, states))
                stand_in.grad = param.grad.to(torch.float32)
                decoded = storage.decode_states(states, rule["states"])
                if not rule["has_step"]:
                    decoded.pop("step", None)
                if decoded:
                    optimizer.state[stand_in] = {
                        key: value.clone() if isinstance(value, Tensor) else value
                        for key, value in decoded.items()
                    }
                group["params"] = [*group["params"][:i], stand_in, *group["params"][i + 1 :]]
                replaced.append((param, group, number, stand_in))
        yield
        # Nothing is written before all of it is there.
        for param, stream, entry in [_encoded(optimizer, *one, rule) for one in replaced]:
            with torch.no_grad():
                param.copy_(stream)
            optimizer.state[param] = entry
    finally:
        for _, _, _, stand_in in replaced:
            optimizer.state.pop(stand_in, None)


def _encoded(
    optimizer: FusedOptimizer,
    param: Tensor,
    group: dict[str, Any],
    number: int,
    stand_in: Tensor,
    rule: dict[str, Any],
) -> tuple[Tensor, Tensor, dict[str, Any]]:
    """Encode the stand-in that torch.optim has stepped: (param, its new values, its states)."""
    states = {**optimizer.state.get(param, {}), **optimizer.state.get(stand_in, {})}
    for name in rule["states"]:
        states.pop(f"{name}_scale", None)
    if not rule["has_step"] and storage.counts_steps(param, group):
        states["step"] = states.get("step", torch.tensor(0.0, device="cpu")) + 1
    step = int(states["step"]) if "step" in states else 0
    key = (group.get("rounding_seed", 0), number, step)
    # As on a kernel: with random bits where the format has some.
    stream, rest = storage.encode_param(param, group, stand_in.detach(), key)
    states = storage.encode_states(param, group, states, rule, key)
    states[storage.REMAINDER] = rest
    return param, stream, {key: value for key, value in states.items() if value is not None}
