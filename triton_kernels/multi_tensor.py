"""The one kernel: load -> compute type -> rule -> store, for any number of tensors.

A launch steps all tensors that share a device, the dtypes of their streams and the set of their
states. What differs between them comes from tables in device memory:

tensors  int64 [n_tensors, 2 + n_streams]: numel, negative if some stream is not aligned to 16 bytes
         or not; the row of `hypers`; the address of each stream
chunks   int32 [n_chunks, 2]: which tensor, and which CHUNK elements of it, one program takes
hypers   float64 [n_rows, ROW]: the rule's hypers, the variant's bits, the sign of the grad, and the
         weight of the EMA
"""

from __future__ import annotations

import triton
import triton.language as tl

from .rules import divide, lerp

# The columns of `hypers`: at most so many hypers, then what every rule has.
MAX_HYPERS = tl.constexpr(8)
VARIANT = tl.constexpr(8)
GRAD_SIGN = tl.constexpr(9)
EMA_WEIGHT = tl.constexpr(10)
ROW = tl.constexpr(11)
# The columns of `tensors`.
NUMEL = tl.constexpr(0)
HYPERS_ROW = tl.constexpr(1)
STREAMS = tl.constexpr(2)
# What a step leaves in the grad, as csrc/kernel.h has it.
KEPT = tl.constexpr(0)
UNSCALED = tl.constexpr(1)
CLIPPED = tl.constexpr(2)
ZEROED = tl.constexpr(3)


@triton.jit
def decode(value, COMPUTE: tl.constexpr, INTERPRETED: tl.constexpr):
    if INTERPRETED and value.dtype == tl.bfloat16:
        # The interpreter's own cast is wrong for subnormals (Triton 3.6 and 3.9).
        bits = value.to(tl.uint16, bitcast=True).to(tl.uint32) << 16
        value = bits.to(tl.float32, bitcast=True)
    return value.to(COMPUTE)


@triton.jit
def encode(value, DTYPE: tl.constexpr, INTERPRETED: tl.constexpr):
    if INTERPRETED and DTYPE == tl.bfloat16:
        # To nearest even with NaN kept: the interpreter's own cast truncates.
        bits = value.to(tl.uint32, bitcast=True)
        rounded = bits + 0x7FFF + ((bits >> 16) & 1)
        bits = tl.where(value != value, bits | 0x400000, rounded) >> 16
        value = bits.to(tl.uint16).to(tl.bfloat16, bitcast=True)
    return value.to(DTYPE)


@triton.jit
def load(address, mask, COMPUTE: tl.constexpr, INTERPRETED: tl.constexpr):
    return decode(tl.load(address, mask=mask), COMPUTE, INTERPRETED)


@triton.jit
def store(address, value, mask, INTERPRETED: tl.constexpr):
    tl.store(address, encode(value, address.dtype.element_ty, INTERPRETED), mask=mask)


@triton.jit
def zero(address, mask, BLOCK: tl.constexpr):
    tl.store(address, tl.zeros([BLOCK], address.dtype.element_ty), mask=mask)


@triton.jit
def update_block(
    streams,
    index,
    mask,
    hypers,
    variant,
    grad_sign,
    grad_scale,
    clip,
    ema_weight,
    RULE: tl.constexpr,
    OPTIONS: tl.constexpr,
    DTYPES: tl.constexpr,
    COMPUTE: tl.constexpr,
    GRAD_WRITE: tl.constexpr,
    BLOCK: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    EMA: tl.constexpr = len(DTYPES) - 1
    param = load(streams[0] + index, mask, COMPUTE, INTERPRETED)
    grad = load(streams[1] + index, mask, COMPUTE, INTERPRETED)
    states = ()
    for s in tl.static_range(2, EMA):
        if DTYPES[s] is not None:
            states = states + (load(streams[s] + index, mask, COMPUTE, INTERPRETED),)
        else:
            states = states + (grad,)
    if DTYPES[EMA] is not None:
        ema = load(streams[EMA] + index, mask, COMPUTE, INTERPRETED)
    if GRAD_WRITE == UNSCALED:
        grad = divide(grad, grad_scale)
        store(streams[1] + index, grad, mask, INTERPRETED)
    if clip is not None:
        if GRAD_WRITE == CLIPPED:
            store(streams[1] + index, clip * grad, mask, INTERPRETED)
        grad = grad_sign * clip * grad
    else:
        grad = grad_sign * grad
    if GRAD_WRITE == ZEROED:
        zero(streams[1] + index, mask, BLOCK)
    param, states = RULE(param, grad, states, hypers, variant, OPTIONS)
    stored = encode(param, DTYPES[0], INTERPRETED)
    tl.store(streams[0] + index, stored, mask=mask)
    for s in tl.static_range(2, EMA):
        if DTYPES[s] is not None:
            store(streams[s] + index, states[s - 2], mask, INTERPRETED)
    if DTYPES[EMA] is not None:
        param = decode(stored, COMPUTE, INTERPRETED)
        # An average of what is not finite would keep that: the first one copies.
        ema = tl.where(ema_weight == 1, param, lerp(ema, param, ema_weight))
        store(streams[EMA] + index, ema, mask, INTERPRETED)


@triton.jit
def zero_chunk(tensor, begin, DTYPES: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr):
    numel = tl.abs(tl.load(tensor + NUMEL))
    grad = tl.load(tensor + STREAMS + 1).to(tl.pointer_type(DTYPES[1]))
    for start in range(0, CHUNK, BLOCK):
        index = begin + start + tl.arange(0, BLOCK)
        zero(grad + index, index < numel, BLOCK)


@triton.jit(do_not_specialize_on_alignment=["grad_scale", "found_inf", "clip"])
def multi_tensor(
    tensors,
    chunks,
    hypers,
    grad_scale,
    found_inf,
    clip,
    RULE: tl.constexpr,
    OPTIONS: tl.constexpr,
    N_HYPERS: tl.constexpr,
    DTYPES: tl.constexpr,
    COMPUTE: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
    GRAD_WRITE: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """Step the tensors, unless found_inf.

    Grads are divided by grad_scale, and multiplied by clip, which is to unscale too unless GRAD_WRITE
    is UNSCALED.
    """
    program = tl.program_id(0).to(tl.int64)
    if found_inf is not None and GRAD_WRITE != ZEROED:
        if tl.load(found_inf) != 0:
            return
    tensor = tensors + tl.load(chunks + 2 * program).to(tl.int64) * (STREAMS + len(DTYPES))
    begin = tl.load(chunks + 2 * program + 1).to(tl.int64) * CHUNK
    if found_inf is not None and GRAD_WRITE == ZEROED:
        if tl.load(found_inf) != 0:
            zero_chunk(tensor, begin, DTYPES, CHUNK, BLOCK)
            return
    numel = tl.load(tensor + NUMEL)
    row = hypers + tl.load(tensor + HYPERS_ROW) * ROW
    rule_hypers = ()
    for i in tl.static_range(N_HYPERS):
        rule_hypers = rule_hypers + (tl.load(row + i).to(COMPUTE),)
    variant = tl.load(row + VARIANT).to(tl.int32)
    grad_sign = tl.load(row + GRAD_SIGN).to(COMPUTE)
    ema_weight = tl.load(row + EMA_WEIGHT).to(COMPUTE)
    if GRAD_WRITE == UNSCALED:
        scale = tl.load(grad_scale).to(COMPUTE)
    else:
        scale = None
    if clip is not None:
        factor = tl.load(clip).to(COMPUTE)
    else:
        factor = None
    streams = ()
    aligned = ()
    for s in tl.static_range(len(DTYPES)):
        if DTYPES[s] is not None:
            address = tl.load(tensor + STREAMS + s).to(tl.pointer_type(DTYPES[s]))
            streams = streams + (address,)
            aligned = aligned + (tl.multiple_of(address, 16),)
        else:
            streams = streams + (streams[0],)
            aligned = aligned + (aligned[0],)
    for start in range(0, CHUNK, BLOCK):
        first = begin + start
        index = first + tl.arange(0, BLOCK)
        # A mask would split the accesses, so a whole block goes without one.
        if first + BLOCK <= numel:
            update_block(
                aligned,
                index,
                None,
                rule_hypers,
                variant,
                grad_sign,
                scale,
                factor,
                ema_weight,
                RULE,
                OPTIONS,
                DTYPES,
                COMPUTE,
                GRAD_WRITE,
                BLOCK,
                INTERPRETED,
            )
        elif first < tl.abs(numel):
            update_block(
                streams,
                index,
                index < tl.abs(numel),
                rule_hypers,
                variant,
                grad_sign,
                scale,
                factor,
                ema_weight,
                RULE,
                OPTIONS,
                DTYPES,
                COMPUTE,
                GRAD_WRITE,
                BLOCK,
                INTERPRETED,
            )
