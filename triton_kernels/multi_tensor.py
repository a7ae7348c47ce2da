"""The one kernel: load -> compute type -> rule -> store, for any number of tensors.

A launch steps all tensors that share a device, the dtypes of their streams and the set of their
states. What differs between them comes from tables in device memory:

tensors  int64 [n_tensors, 2 + n_streams]: numel, negative if some stream is not aligned to 16 bytes
         or not; the row of `hypers`; the address of each stream
chunks   int32 [n_chunks, 2]: which tensor, and which CHUNK elements of it, one program takes
hypers   float64 [n_rows, ROW]: the rule's hypers, the variant's bits and the sign of the grad
"""

from __future__ import annotations

import triton
import triton.language as tl

from .rules import divide

# The columns of `hypers`: at most so many hypers, then the variant, then the sign of the grad.
MAX_HYPERS = tl.constexpr(8)
VARIANT = tl.constexpr(8)
GRAD_SIGN = tl.constexpr(9)
ROW = tl.constexpr(10)
# The columns of `tensors`.
NUMEL = tl.constexpr(0)
HYPERS_ROW = tl.constexpr(1)
STREAMS = tl.constexpr(2)


@triton.jit
def load(address, mask, COMPUTE: tl.constexpr, INTERPRETED: tl.constexpr):
    value = tl.load(address, mask=mask)
    if INTERPRETED and value.dtype == tl.bfloat16:
        # The interpreter's own cast is wrong for subnormals (Triton 3.6 and 3.9).
        bits = value.to(tl.uint16, bitcast=True).to(tl.uint32) << 16
        value = bits.to(tl.float32, bitcast=True)
    return value.to(COMPUTE)


@triton.jit
def store(address, value, mask, INTERPRETED: tl.constexpr):
    dtype: tl.constexpr = address.dtype.element_ty
    if INTERPRETED and dtype == tl.bfloat16:
        # To nearest even with NaN kept: the interpreter's own cast truncates.
        bits = value.to(tl.uint32, bitcast=True)
        rounded = bits + 0x7FFF + ((bits >> 16) & 1)
        bits = tl.where(value != value, bits | 0x400000, rounded) >> 16
        value = bits.to(tl.uint16).to(tl.bfloat16, bitcast=True)
    tl.store(address, value.to(dtype), mask=mask)


@triton.jit
def update_block(
    streams,
    index,
    mask,
    hypers,
    variant,
    grad_sign,
    grad_scale,
    RULE: tl.constexpr,
    OPTIONS: tl.constexpr,
    DTYPES: tl.constexpr,
    COMPUTE: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    param = load(streams[0] + index, mask, COMPUTE, INTERPRETED)
    grad = load(streams[1] + index, mask, COMPUTE, INTERPRETED)
    states = ()
    for s in tl.static_range(2, len(DTYPES)):
        if DTYPES[s] is not None:
            states = states + (load(streams[s] + index, mask, COMPUTE, INTERPRETED),)
        else:
            states = states + (grad,)
    if grad_scale is not None:
        grad = divide(grad, grad_scale)
        store(streams[1] + index, grad, mask, INTERPRETED)
    param, states = RULE(param, grad_sign * grad, states, hypers, variant, OPTIONS)
    store(streams[0] + index, param, mask, INTERPRETED)
    for s in tl.static_range(2, len(DTYPES)):
        if DTYPES[s] is not None:
            store(streams[s] + index, states[s - 2], mask, INTERPRETED)


@triton.jit(do_not_specialize_on_alignment=["grad_scale", "found_inf"])
def multi_tensor(
    tensors,
    chunks,
    hypers,
    grad_scale,
    found_inf,
    RULE: tl.constexpr,
    OPTIONS: tl.constexpr,
    N_HYPERS: tl.constexpr,
    DTYPES: tl.constexpr,
    COMPUTE: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    if found_inf is not None:
        if tl.load(found_inf) != 0:
            return
    program = tl.program_id(0).to(tl.int64)
    tensor = tensors + tl.load(chunks + 2 * program).to(tl.int64) * (STREAMS + len(DTYPES))
    begin = tl.load(chunks + 2 * program + 1).to(tl.int64) * CHUNK
    numel = tl.load(tensor + NUMEL)
    row = hypers + tl.load(tensor + HYPERS_ROW) * ROW
    rule_hypers = ()
    for i in tl.static_range(N_HYPERS):
        rule_hypers = rule_hypers + (tl.load(row + i).to(COMPUTE),)
    variant = tl.load(row + VARIANT).to(tl.int32)
    grad_sign = tl.load(row + GRAD_SIGN).to(COMPUTE)
    if grad_scale is not None:
        scale = tl.load(grad_scale).to(COMPUTE)
    else:
        scale = None
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
                RULE,
                OPTIONS,
                DTYPES,
                COMPUTE,
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
                RULE,
                OPTIONS,
                DTYPES,
                COMPUTE,
                INTERPRETED,
            )
