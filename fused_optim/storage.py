"""Storage formats of states and params: chosen by param groups, converted from and to float32.

The kernels read and write these formats themselves (csrc/formats.h); this is for first states,
checkpoints, and tensors that torch.optim's code steps.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from fused_optim import backends, sharding, tracing
from fused_optim.options import SCALE_BLOCK, state_dtype_of

REMAINDER = "param_remainder"
_FIRST_STATE = 2  # the stream of a rule's first state, csrc/kernel.h
_PARAM = 0
CONVERTING = 2**64 - 1  # in place of the param's number in the random bits' key

States = dict[str, Any]


def applies(param: Tensor, group: dict[str, Any]) -> bool:
    """Return True if the group has options of formats, and they concern this param."""
    return (
        ("state_dtype" in group or "master" in group)
        and type(sharding.part_of(param)) in (Tensor, nn.Parameter)
        and param.layout == torch.strided
        and param.dtype in (torch.float32, torch.bfloat16, torch.float16)
        and param.numel() > 0
    )


@dataclass(frozen=True)
class Format:
    """How one stream is stored: the names are those of csrc/kernel.h."""

    storage: str
    dtype: torch.dtype


PLAIN_FLOAT32 = Format("plain", torch.float32)
OF_CODES = {torch.int8: "signed8", torch.uint8: "root8"}
SPLITS = {"split8": torch.int8, "split16": torch.int16}


def n_scales(stream: Tensor) -> int:
    return (stream.numel() + SCALE_BLOCK - 1) // SCALE_BLOCK


def of_state(param: Tensor, group: dict[str, Any], kind: str) -> Format:
    """How a state of this param is stored.

    Args:
        kind: what the state is like, see csrc/kernel.h.
    """
    codec = backends.codec()
    assert codec is not None
    storage, dtype = codec.storage_of(
        _name(state_dtype_of(group)), kind, _name(param.dtype), param.numel()
    )
    return Format(storage, getattr(torch, dtype))


def _name(dtype: torch.dtype | str | None) -> str:
    return "" if dtype is None else str(dtype).removeprefix("torch.")


def ignores_master(params: Any, options: dict[str, Any]) -> bool:
    """Return True if the options ask for a master that none of these params can have."""
    dtypes = {param.dtype for param in params if isinstance(param, Tensor)}
    return (
        options.get("master") is not None
        and bool(dtypes)
        and dtypes <= {torch.float32, torch.float64}
    )


def master_of(param: Tensor, group: dict[str, Any]) -> str | None:
    return None if param.dtype == torch.float32 else group.get("master")


def counts_steps(param: Tensor, group: dict[str, Any]) -> bool:
    """Return True if random bits need a step that the rule itself does not count."""
    return master_of(param, group) in ("stochastic", "split8")


def new_scalar(scalar: Tensor, value: float, param: Tensor, group: dict[str, Any]) -> Tensor:
    """Make step, say, as torch.optim would for the param, from one made on meta without fused."""
    if group.get("fused") and param.device.type != "cpu":
        return torch.full((), value, dtype=torch.float32, device=param.device)
    return torch.full_like(scalar, value, device=param.device) if scalar.is_meta else scalar


def _like(param: Tensor, dtype: torch.dtype, device: Any = "cpu") -> Tensor:
    return torch.empty_like(param, dtype=dtype, device=device, requires_grad=False)


def on_meta(param: Tensor) -> Tensor:
    """Copy this process's part of a param and its grad to the meta device, without values.

    A param without a grad gets one like itself.
    """

    def twin(tensor: Tensor) -> Tensor:
        part = sharding.part_of(tensor)
        return torch.empty_strided(part.shape, part.stride(), dtype=part.dtype, device="meta")

    like, grad = twin(param), param.grad
    like_grad = twin(param if grad is None or grad.layout != torch.strided else grad)
    if like_grad.dtype != like.dtype:
        like.grad_dtype = None
    like.grad = like_grad
    return like


def _transcode(
    packs: bool,
    format: Format,
    stream: Tensor,
    extra: Tensor | None,
    values: Tensor,
    key: tuple,
    first: int = 0,
) -> None:
    tracing.refuse_formats()
    codec = backends.codec()
    assert codec is not None
    codec.transcode(
        packs,
        format.storage,
        _name(stream.dtype),
        stream=stream.data_ptr(),
        extra=0 if extra is None else extra.data_ptr(),
        values=values.data_ptr(),
        numel=stream.numel(),
        key=key,
        num_threads=backends.num_threads(),
        offset=first,
    )


def decode(format: Format, stream: Tensor, extra: Tensor | None) -> Tensor:
    """Decode a stream to float32, on the CPU; extra: the scales, or the remainder of a param."""
    if stream.layout != torch.strided:  # a momentum like a sparse grad
        stream = stream.to_dense()
    if format.storage in ("plain", "stochastic"):
        return stream.detach().to("cpu", torch.float32)
    # Dense and in the order of the memory, whatever the caller's tensor is.
    dense = _like(stream, stream.dtype).copy_(stream.detach())
    values = _like(stream, torch.float32)
    if extra is not None:
        is_param = format.storage in ("split8", "split16")
        extra = (
            _like(stream, extra.dtype) if is_param else extra.new_empty(extra.shape, device="cpu")
        ).copy_(extra)
        _transcode(
            False, format, dense, extra, values, (0, 0, _PARAM if is_param else _FIRST_STATE, 0)
        )
    return values


def encode(
    format: Format, like: Tensor, values: Tensor, key: tuple[int, int, int, int], first: int = 0
) -> tuple[Tensor, Tensor | None]:
    """Encode values: (stream, its scales or remainder), laid out like a tensor, on its device.

    Args:
        key: (seed, number of the param, stream, step), for the random bits.
        first: index of the first element in the whole param, for the random bits.
    """
    if values.shape != like.shape:
        raise ValueError(f"values of shape {tuple(values.shape)} for {tuple(like.shape)}")
    if values.layout != torch.strided:
        values = values.to_dense()
    if format.storage == "plain":
        return _like(like, format.dtype, like.device).copy_(values), None
    stream = _like(like, format.dtype)
    values = _like(like, torch.float32).copy_(values)
    extra = None
    if format.storage in ("signed8", "root8"):
        extra = torch.empty(n_scales(stream), dtype=torch.bfloat16, device="cpu")
    elif format.storage in SPLITS:
        extra = _like(like, SPLITS[format.storage])
    _transcode(True, format, stream, extra, values, key, first)
    return stream.to(like.device), None if extra is None else extra.to(like.device)


def _zeros(format: Format, values: Tensor, like: Tensor) -> tuple[Tensor, Tensor | None]:
    """Encode zeros, in the layout of `values` if their format and shape fit already."""
    is_kept = format.storage == "plain" and (values.dtype, values.shape) == (
        format.dtype,
        like.shape,
    )
    stream = _like(values if is_kept else like, format.dtype, like.device).zero_()
    if format.storage not in ("signed8", "root8"):
        return stream, None
    n_groups = n_scales(stream)
    return stream, torch.zeros(n_groups, dtype=torch.bfloat16, device=like.device)


def decode_codes(states: States, names: list[str]) -> States:
    """Decode 8-bit states to float32 and drop their scales."""
    coded = [name for name in names if states.get(f"{name}_scale") is not None]
    scales = [f"{name}_scale" for name in coded]
    decoded = decode_states({key: states[key] for key in coded + scales}, coded)
    return {key: value for key, value in {**states, **decoded}.items() if key not in scales}


def decode_states(states: States, names: list[str]) -> States:
    """Decode 8-bit and 16-bit states to float32; drop scales and the remainder."""
    decoded = {key: value for key, value in states.items() if not _is_extra(key, names)}
    for name in names:
        value, scale = states.get(name), states.get(f"{name}_scale")
        if not isinstance(value, Tensor):
            continue
        part = sharding.part_of(value)
        if scale is not None and value.dtype in OF_CODES:
            values = decode(Format(OF_CODES[value.dtype], value.dtype), part, scale)
        elif value.dtype in (torch.bfloat16, torch.float16):
            values = decode(PLAIN_FLOAT32, part, None)
        else:
            continue
        decoded[name] = sharding.rebuilt(values.to(part.device), value)
    return decoded


def _is_extra(key: str, names: list[str]) -> bool:
    return key == REMAINDER or any(key == f"{name}_scale" for name in names)


def decode_param(param: Tensor, states: States) -> Tensor:
    """Decode a param, with its remainder if it has one, to a new float32 tensor on its device."""
    rest = states.get(REMAINDER)
    if rest is None or param.dtype == torch.float32:
        return param.detach().to(torch.float32, copy=True)
    check_remainder(rest, param)
    storage = "split8" if rest.dtype == torch.int8 else "split16"
    part, rest = sharding.part_of(param), sharding.part_of(rest)
    values = decode(Format(storage, param.dtype), part, rest).to(part.device)
    return sharding.rebuilt(values, param)


def check_remainder(rest: Any, param: Tensor) -> None:
    if isinstance(rest, Tensor) and rest.shape == param.shape and rest.dtype in SPLITS.values():
        return
    found = f"{tuple(rest.shape)} of {rest.dtype}" if isinstance(rest, Tensor) else repr(rest)
    raise ValueError(
        f"{REMAINDER} must be of torch.int8 or torch.int16 and of the param's shape, "
        f"{tuple(param.shape)}, but is {found}"
    )


@torch.no_grad()
def encode_param(
    param: Tensor, group: dict[str, Any], values: Tensor, key: tuple[int, int, int]
) -> tuple[Tensor, Tensor | None]:
    """Encode float32 values as a param and its remainder, if it has one."""
    seed, number, step = key
    format = Format(master_of(param, group) or "plain", param.dtype)
    part, values = sharding.part_of(param), sharding.part_of(sharding.sharded_like(values, param))
    first = sharding.place_of(param)[1]
    stream, rest = encode(format, part, values, (seed, number, _PARAM, step), first)
    stream = sharding.rebuilt(stream, param)
    return stream, None if rest is None else sharding.rebuilt(rest, param)


# The largest code in a block that the kernels have written. The scale is rounded up by less than 2**-7:
# 126 / (1 + 2**-7) - 0.5 > 124, 253 / (1 + 2**-7) - 1 > 250.
_LARGEST = {torch.int8: (124, 125, 126), torch.uint8: (250, 251, 252, 253)}


@torch.no_grad()
def restore_codes(values: Tensor, stream: Tensor, scales: Tensor) -> None:
    """Re-encode decoded 8-bit states to the codes they came from, so that a checkpoint loses nothing.

    Rounding to 8 bits is not idempotent: a block's largest code need not be the largest that there is, and
    the scale made of it would then be another one. Blocks that no codes stand for exactly are left alone.

    Args:
        values: float32, in the shape of the stream.
        stream: int8 codes, or uint8 ones of square roots, dense.
        scales: bfloat16, one for each 64 elements in the order of the memory.
    """
    if stream.numel() == 0:
        return
    flat = _in_memory_order(stream)
    ordered = torch.empty_like(stream, dtype=torch.float32).copy_(values)
    n = flat.numel()
    groups = functional.pad(_in_memory_order(ordered), (0, -n % SCALE_BLOCK)).view(-1, SCALE_BLOCK)
    is_square = stream.dtype == torch.uint8
    roots = groups.sqrt() if is_square else groups
    largest = roots.abs().amax(dim=1, keepdim=True)
    codes = functional.pad(flat, (0, -n % SCALE_BLOCK)).view(-1, SCALE_BLOCK)
    for code in _LARGEST[stream.dtype]:
        scale = (largest / code).to(torch.bfloat16)
        size = scale.float()
        found = (roots / size).round()
        decoded = found * size
        if is_square:
            decoded = decoded * decoded
        # 0 * inf and 0 / 0 are NaN, which equals nothing: such groups stay as they are.
        exact = (decoded == groups).all(dim=1) & (found.abs().amax(dim=1) == code)
        codes[exact] = found[exact].to(stream.dtype)
        scales[exact] = scale[exact, 0]
    flat.copy_(codes.view(-1)[:n])


def _in_memory_order(dense: Tensor) -> Tensor:
    return torch.as_strided(dense, (dense.numel(),), (1,))


@torch.no_grad()
def encode_states(
    param: Tensor,
    group: dict[str, Any],
    states: States,
    rule: dict[str, Any],
    key: tuple[int, int, int] | None,
) -> States:
    """Convert states to the formats that the group asks for; None: there is no such state any more.

    A state that fits already is kept as it is.

    Args:
        rule: its description from csrc/rules.h (backends.codec().rules()).
        key: (seed, number of the param, step) of the random bits. None: the states become zeros;
            the given ones may be on the meta device.
    """
    names = rule["states"]
    converted: States = dict(states)
    for s, name in enumerate(names):
        tensor, scale_key = states.get(name), f"{name}_scale"
        if not isinstance(tensor, Tensor):
            continue
        wanted = of_state(param, group, rule["kinds"][s])
        scale = states.get(scale_key)
        if key is None:
            stream, scale = _zeros(wanted, sharding.part_of(tensor), sharding.part_of(param))
            converted[name] = sharding.rebuilt(stream, param)
        elif not _fits(tensor, scale, wanted, param):
            values = decode_states({name: tensor, scale_key: scale}, [name])[name]
            if values.layout != torch.strided:
                values = values.to_dense()
            values = sharding.part_of(sharding.sharded_like(values, param))
            seed, number, step = key
            of_stream = seed, number, _FIRST_STATE + s, step
            part, first = sharding.part_of(param), sharding.place_of(param)[1]
            stream, scale = encode(wanted, part, values, of_stream, first)
            if scale is not None and number == CONVERTING:
                restore_codes(values, stream, scale)
            converted[name] = sharding.rebuilt(stream, param)
        if scale is not None or scale_key in states:
            converted[scale_key] = scale
    _convert_remainder(param, group, states, converted)
    if counts_steps(param, group) and "step" not in converted:
        converted["step"] = torch.tensor(0.0, dtype=torch.float32, device="cpu")
    return converted


def _fits(tensor: Tensor, scale: Tensor | None, wanted: Format, param: Tensor) -> bool:
    if tensor.shape != param.shape or not sharding.is_sharded_like(tensor, param):
        return False
    tensor, param = sharding.part_of(tensor), sharding.part_of(param)
    like = _like(param, wanted.dtype, "meta")
    if tensor.dtype != wanted.dtype or tensor.shape != param.shape or tensor.device != param.device:
        return False
    if wanted.storage == "plain":
        return scale is None
    if not _lies_like(tensor, like) or (scale is None) != (wanted.storage == "stochastic"):
        return False
    return scale is None or is_scale_of(scale, tensor)


def _lies_like(a: Tensor, b: Tensor) -> bool:
    return all(n <= 1 or s == t for n, s, t in zip(a.shape, a.stride(), b.stride()))


def is_scale_of(scale: Tensor, stream: Tensor) -> bool:
    n_groups = n_scales(sharding.part_of(stream))
    return scale.dtype == torch.bfloat16 and scale.shape == (n_groups,) and scale.is_contiguous()


def _convert_remainder(
    param: Tensor, group: dict[str, Any], states: States, converted: States
) -> None:
    master, rest = master_of(param, group), states.get(REMAINDER)
    if master not in SPLITS:
        if REMAINDER in states:
            converted[REMAINDER] = None
        return
    dtype = SPLITS[master]
    whole, param = param, sharding.part_of(param)
    if rest is None:
        zeros = _like(param, dtype, param.device).zero_()
        converted[REMAINDER] = sharding.rebuilt(zeros, whole)
        return
    check_remainder(rest, whole)
    rest = converted[REMAINDER] = sharding.sharded_like(rest, whole)
    rest = sharding.part_of(rest)
    if rest.dtype == dtype and _lies_like(rest, _like(param, dtype, "meta")):
        return
    wide = rest.to(torch.int32)
    if rest.dtype != dtype:
        # One unit of the 8 bits in units of the 16 bits. The param stays: there is no carry.
        unit = torch.full_like(wide, 256)
        if param.dtype == torch.float16:
            size = param.detach().abs()
            unit[(size > 2.0**-14) | ((size == 2.0**-14) & (wide >= 0))] = 32
        if dtype == torch.int8:
            wide = torch.div(wide + unit // 2, unit, rounding_mode="floor").clamp(-128, 127)
        else:
            wide = wide * unit
    converted[REMAINDER] = sharding.rebuilt(_like(param, dtype, param.device).copy_(wide), whole)


def first_number(groups: list[dict[str, Any]], g: int) -> int:
    """Number of a group's first param among the params of all groups."""
    return sum(len(group["params"]) for group in groups[:g])
