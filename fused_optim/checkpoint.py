"""state_dict() and back: averages, and states in formats."""

from __future__ import annotations

import contextlib
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fused_optim import averages, backends, options, sharding, storage, unsure

if TYPE_CHECKING:
    from fused_optim.optimizer import FusedOptimizer

Saved = dict[str, Any]
_KEPT = options.FORMATS + options.AVERAGING  # options of groups that torch.optim does not know


def save(optimizer: FusedOptimizer, stock_state_dict: Callable[[], Saved]) -> Saved:
    """See :meth:`FusedOptimizer.state_dict`."""
    with _without(optimizer, "_optimizer_state_dict_post_hooks") as hooks:
        with unsure.only_stepped(optimizer):
            saved = stock_state_dict()
        saved = _save_formats(optimizer, saved)
    kept = averages.save(optimizer.param_groups, optimizer._averages)
    if kept:
        saved["ema"] = kept
    for hook in hooks:
        result = hook(optimizer, saved)
        saved = saved if result is None else result
    return saved


def load(
    optimizer: FusedOptimizer, state_dict: Saved, stock_load_state_dict: Callable[[Saved], None]
) -> None:
    """See :meth:`FusedOptimizer.load_state_dict`."""
    groups = optimizer.param_groups
    with _without(optimizer, "_optimizer_load_state_dict_pre_hooks") as hooks:
        state_dict = state_dict.copy()
        for hook in hooks:
            result = hook(optimizer, state_dict)
            state_dict = state_dict if result is None else result
        matched = averages.match(state_dict, groups)
        state_dict = accept(state_dict)
        for saved_group in state_dict["param_groups"]:
            options.refuse_in_group(saved_group)
        converted = {}
        if backends.codec() is not None:
            for saved_group, group in zip(state_dict["param_groups"], groups):
                converted |= _convert_saved(optimizer, state_dict["state"], saved_group, group)
        before = [{key: group[key] for key in _KEPT if key in group} for group in groups]
        with _without(optimizer, "_optimizer_load_state_dict_post_hooks") as post_hooks:
            stock_load_state_dict(state_dict)
    for group, kept in zip(optimizer.param_groups, before):
        for key, value in kept.items():
            group.setdefault(key, value)
    for param, states in converted.items():
        # torch.optim has cast all states but step to the param's dtype.
        step = {key: value for key, value in optimizer.state[param].items() if key == "step"}
        optimizer.state[param] = {**states, **step}
    _restore_scalars(optimizer, state_dict)
    of_params = {id(p): g for g, p in averages.averaged_params(optimizer.param_groups)}
    optimizer._averages = {
        param: averages.load(param, of_params[id(param)], entry)
        for param, entry in matched
        if id(param) in of_params
    }
    for hook in post_hooks:
        hook(optimizer)


def _restore_scalars(optimizer: FusedOptimizer, state_dict: Saved) -> None:
    """Undo torch.optim's cast of numbers among the states to a 16-bit param's dtype and to its device."""
    scalars = optimizer._scalars() - {"step"}
    if not scalars:
        return
    indices = [index for group in state_dict["param_groups"] for index in group["params"]]
    params = [param for group in optimizer.param_groups for param in group["params"]]
    for index, param in zip(indices, params):
        states, saved = optimizer.state.get(param, {}), state_dict["state"].get(index, {})
        for key in scalars:
            loaded, value, step = states.get(key), saved.get(key), states.get("step")
            if (
                isinstance(loaded, Tensor)
                and isinstance(value, Tensor)
                and isinstance(step, Tensor)
            ):
                wide = torch.promote_types(loaded.dtype, torch.float32)
                if (loaded.dtype, loaded.device) != (wide, step.device):
                    states[key] = value.detach().to(step.device, wide, copy=True)


def save_for_stock(optimizer: FusedOptimizer) -> Saved:
    """See :meth:`FusedOptimizer.state_dict_for_stock`."""
    saved = accept(optimizer.state_dict())
    rule = optimizer._description()
    saved["state"] = {
        index: {
            key: value
            for key, value in storage.decode_states(states, rule["states"]).items()
            if key != "step" or rule["has_step"]
        }
        for index, states in saved["state"].items()
    }
    saved["state"] = {index: states for index, states in saved["state"].items() if states}
    saved["param_groups"] = [
        {key: value for key, value in group.items() if key not in options.FORMATS}
        for group in saved["param_groups"]
    ]
    return saved


@contextlib.contextmanager
def _without(optimizer: FusedOptimizer, hooks: str) -> Iterator[list[Callable[..., Any]]]:
    """Take hooks away for a while: the caller runs them itself, so that they see the averages."""
    registered = getattr(optimizer, hooks)
    setattr(optimizer, hooks, OrderedDict())
    try:
        yield list(registered.values())
    finally:
        setattr(optimizer, hooks, registered)


def _save_formats(optimizer: FusedOptimizer, saved: Saved) -> Saved:
    groups = optimizer.param_groups
    if not any(key in group for group in groups for key in options.FORMATS):
        return saved
    # Blocks of 64 elements lie elsewhere in other processes' parts.
    for_any = sharding.is_for_distributed_checkpoint()
    rule = optimizer._description()
    states = dict(saved["state"])
    for saved_group, group in zip(saved["param_groups"], groups):
        for index, param in zip(saved_group["params"], group["params"]):
            if (
                index in states
                and storage.applies(param, group)
                and (for_any or sharding.is_sharded(param))
            ):
                # States that the constructor made are not in the formats yet.
                converted = optimizer._convert_states(param, group, states[index])
                states[index] = {
                    key: value
                    for key, value in storage.decode_codes(converted, rule["states"]).items()
                    if value is not None
                }
    saved = {**saved, "state": states}
    if optimizer._has_some_params:  # ZeroRedundancyOptimizer loads it by torch.optim's own code
        return saved
    return refuse_stock(saved, rule)


def _convert_saved(
    optimizer: FusedOptimizer, saved: dict[Any, Any], saved_group: Saved, group: dict[str, Any]
) -> dict[Tensor, dict[str, Any]]:
    """Convert the saved states of this group's params to the formats that it will ask for."""
    options.check_formats({k: saved_group[k] for k in options.FORMATS if k in saved_group})
    names, scalars = optimizer._description()["states"], optimizer._scalars()
    wanted = {
        **{key: group[key] for key in options.FORMATS if key in group},
        **{key: value for key, value in saved_group.items() if key != "params"},
    }
    converted = {}
    for index, param in zip(saved_group["params"], group["params"]):
        states = saved.get(index)
        # An empty dict stays one: with a step count alone in it, it would be neither new nor complete.
        if not isinstance(states, dict) or not states or not storage.applies(param, wanted):
            continue
        check_saved(states, names, index, param)
        copies = {
            key: value.detach().to(param.device, copy=True)
            if isinstance(value, Tensor) and key not in scalars
            else value
            for key, value in states.items()
        }
        copies = optimizer._convert_states(param, wanted, copies)
        converted[param] = {key: value for key, value in copies.items() if value is not None}
    return converted


# torch.optim would load codes as if they were numbers. It can be stopped where it takes a `step` that is no
# tensor for a number; without one, where it counts the params of a group.
NOT_FOR_STOCK = "8-bit states of fused_optim: torch.optim loads what state_dict_for_stock() gives"
SAVED_STEP = "step_of_codes"


def refuse_stock(saved: dict[str, Any], rule: dict[str, Any]) -> dict[str, Any]:
    """Make torch.optim's load_state_dict refuse this state_dict if it holds codes.

    Args:
        rule: as in `storage.encode_states`.
    """
    scales = [f"{name}_scale" for name in rule["states"]]
    coded = {
        index
        for index, states in saved["state"].items()
        if isinstance(states, dict)
        and any(key in states for key in scales)
        and ("step" in states or not rule["has_step"])
    }
    if not rule["has_step"]:
        groups = [
            {**group, "params": [*group["params"], NOT_FOR_STOCK]}
            if coded.intersection(group["params"])
            else group
            for group in saved["param_groups"]
        ]
        return {**saved, "param_groups": groups}
    state = {
        index: {**states, "step": NOT_FOR_STOCK.encode(), SAVED_STEP: states["step"]}
        if index in coded
        else states
        for index, states in saved["state"].items()
    }
    return {**saved, "state": state}


def accept(saved: dict[str, Any]) -> dict[str, Any]:
    """Undo `refuse_stock`; any other state_dict comes back as it is."""
    groups = [
        {**group, "params": [index for index in group["params"] if index != NOT_FOR_STOCK]}
        for group in saved["param_groups"]
    ]
    state = {}
    for index, states in saved["state"].items():
        if isinstance(states, dict) and SAVED_STEP in states:
            states = dict(states)
            step = states.pop(SAVED_STEP)
            if isinstance(states.get("step"), bytes):  # else the program has put one there
                states["step"] = step
        state[index] = states
    return {**saved, "state": state, "param_groups": groups}


def check_saved(states: dict[str, Any], names: list[str], index: Any, param: Tensor) -> None:
    """Raise ValueError if saved states contradict themselves, or are not those of such a param."""
    if states.get(storage.REMAINDER) is not None:
        storage.check_remainder(states[storage.REMAINDER], param)
    for name in names:
        tensor, scale = states.get(name), states.get(f"{name}_scale")
        if not isinstance(tensor, Tensor):
            continue
        if tensor.shape != param.shape:
            raise ValueError(
                f"loaded state dict has '{name}' of shape {tuple(tensor.shape)} for param {index}, "
                f"which has shape {tuple(param.shape)}"
            )
        if tensor.dtype not in storage.OF_CODES:
            if scale is not None:
                raise ValueError(
                    f"loaded state dict has '{name}_scale' for param {index}, but '{name}' is "
                    f"{tensor.dtype}: torch.optim, say, has converted codes as if they were numbers"
                )
            continue
        if not isinstance(scale, Tensor) or not storage.is_scale_of(scale, tensor):
            found = (
                "none"
                if not isinstance(scale, Tensor)
                else f"{tuple(scale.shape)} of {scale.dtype}"
            )
            raise ValueError(
                f"loaded state dict has 8-bit '{name}' of shape {tuple(tensor.shape)} for param {index}, "
                f"which needs one bfloat16 scale for each {options.SCALE_BLOCK} elements, "
                f"but its '{name}_scale' is {found}"
            )


def master_params(optimizer: FusedOptimizer) -> list[Tensor]:
    """See :meth:`FusedOptimizer.master_params`."""
    return [
        storage.decode_param(param, optimizer.state.get(param, {}))
        if param.dtype in (torch.bfloat16, torch.float16)
        else param.detach().clone()
        for group in optimizer.param_groups
        for param in group["params"]
    ]


@torch.no_grad()
def load_master_params(optimizer: FusedOptimizer, values: Sequence[Tensor]) -> None:
    """See :meth:`FusedOptimizer.load_master_params`."""
    targets = [(group, param) for group in optimizer.param_groups for param in group["params"]]
    if len(values) != len(targets):
        raise ValueError(f"{len(values)} values for {len(targets)} params")
    for i, ((_, param), value) in enumerate(zip(targets, values)):
        if value.shape != param.shape:
            raise ValueError(
                f"value {i} has shape {tuple(value.shape)}, its param {tuple(param.shape)}"
            )
    for number, ((group, param), value) in enumerate(zip(targets, values)):
        write_master(optimizer, param, group, number, value)


def write_master(
    optimizer: FusedOptimizer, param: Tensor, group: dict[str, Any], number: int, value: Tensor
) -> None:
    """Write a float32 value to a param, the `number`-th of all, and to its remainder if it has one."""
    if storage.master_of(param, group) is None or not storage.applies(param, group):
        param.copy_(value)
        return
    key = (group.get("rounding_seed", 0), number, 0)
    stream, rest = storage.encode_param(param, group, value, key)
    param.copy_(stream)
    if rest is not None:
        states = optimizer.state.get(param, {})
        optimizer.state[param] = {**states, storage.REMAINDER: rest}
