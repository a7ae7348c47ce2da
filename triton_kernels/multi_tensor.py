"""The one kernel: load -> compute type -> rule -> store, for any number of tensors.

A launch steps all tensors that share a device, the dtypes of their streams and the set of their
states. What differs between them comes from tables in device memory:

tensors  int64 [n_tensors, columns]: numel, negative if some stream is not aligned to 16 bytes, or random
         bits cannot be drawn for pairs of elements; the row of `hypers`; the address of each stream. If
         some stream is packed, also: of which element of the whole param the tensor's first one is; for
         each stream the address of its scales, or of the param's remainder; for each stream the seed of
         its keys
chunks   int32 [n_chunks, 2]: which tensor, and which CHUNK elements of it, one program takes
hypers   int32 or int64 [n_rows, ROW]: bits in the compute type of the rule's hypers, of the sign of the
         grad and of the weight of the EMA; and, for keys, the step, its lower 32 bits first

Where there is one row of hypers, the launch brings it as word0, word1 ...: what changes in each step then
needs no upload.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .formats import random_key
from .rules import divide, lerp
from .streams import (
    PLAIN,
    RUN,
    decode,
    decode_plain,
    encode_plain,
    has_special_codes,
    is_odd,
    largest_of,
    load,
    load_extra,
    mask_of,
    offsets_of,
    safe,
    store,
    to_encode,
    without_remainder,
    zero,
)

# The columns of `hypers`: at most so many hypers, then what every rule has.
MAX_HYPERS = tl.constexpr(8)
GRAD_SIGN = tl.constexpr(8)
EMA_WEIGHT = tl.constexpr(9)
STEP = tl.constexpr(10)
ROW = tl.constexpr(12)
# The columns of `tensors`.
NUMEL = tl.constexpr(0)
HYPERS_ROW = tl.constexpr(1)
STREAMS = tl.constexpr(2)
# A step leaves the grad: as it was, unscaled, clipped on top, or zeros (csrc/kernel.h).
KEPT = tl.constexpr(0)
UNSCALED = tl.constexpr(1)
CLIPPED = tl.constexpr(2)
ZEROED = tl.constexpr(3)


@triton.constexpr_function
def is_packed(STORAGES):
    return any(storage != PLAIN for storage in STORAGES)


@triton.jit
def decode_block(
    codes, extras, SPECIAL: tl.constexpr, DTYPES: tl.constexpr, STORAGES: tl.constexpr,
    COMPUTE: tl.constexpr, PARTS: tl.constexpr, BLOCK: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """The values of all streams, each a tuple of parts."""
    values = ()
    for s in tl.static_range(len(DTYPES)):
        if DTYPES[s] is not None:
            value = decode(
                codes[s], extras[s], SPECIAL, STORAGES[s], DTYPES[s], COMPUTE, PARTS, BLOCK,
                INTERPRETED,
            )  # fmt: skip
            values = values + (value,)
        else:
            values = values + (values[0],)
    return values


@triton.jit
def store_block(
    streams, extras, values, sizes, first, indices, numel, keys, first_random, ema, ema_weight,
    PACKED: tl.constexpr, SPECIAL: tl.constexpr, WHOLE: tl.constexpr, DTYPES: tl.constexpr,
    STORAGES: tl.constexpr, COMPUTE: tl.constexpr, PARTS: tl.constexpr, BLOCK: tl.constexpr,
    INTERPRETED: tl.constexpr,
):  # fmt: skip
    """Encode and store param and states: those that are packed, or the others.

    ema: the old values of the average, which follows the param.
    """
    EMA: tl.constexpr = len(DTYPES) - 1
    for s in tl.static_range(EMA):
        if s != 1 and DTYPES[s] is not None and (STORAGES[s] != PLAIN) == PACKED:
            stored = store(
                streams[s], extras[s], values[s], sizes[s], first, indices, numel, keys[s],
                first_random, WHOLE, SPECIAL, STORAGES[s], DTYPES[s], PARTS, BLOCK, INTERPRETED,
            )  # fmt: skip
            if s == 0 and DTYPES[EMA] is not None:
                for p in tl.static_range(PARTS):
                    mask = mask_of(indices[p], numel, WHOLE)
                    if STORAGES[0] == PLAIN:
                        param = decode_plain(stored[p], COMPUTE, INTERPRETED)
                    else:
                        param = without_remainder(stored[p], DTYPES[0])
                    # An average of what is not finite would keep that: the first one copies.
                    average = tl.where(ema_weight == 1, param, lerp(ema[p], param, ema_weight))
                    code = encode_plain(average, DTYPES[EMA], INTERPRETED)
                    tl.store(streams[EMA] + indices[p], code, mask=mask)


@triton.jit
def update_block(
    streams, extras, keys, first, first_random, numel, hypers, grad_sign, grad_scale, clip,
    ema_weight, WHOLE: tl.constexpr,
    RULE: tl.constexpr, THERE: tl.constexpr, DTYPES: tl.constexpr, STORAGES: tl.constexpr,
    COMPUTE: tl.constexpr, GRAD_WRITE: tl.constexpr, PARTS: tl.constexpr, BLOCK: tl.constexpr,
    INTERPRETED: tl.constexpr,
):  # fmt: skip
    """One block. What is special in it sends all of it another way, which gives the same bits.

    WHOLE: the tensor has all elements of the block, and random_bits may take them as pairs.
    """
    EMA: tl.constexpr = len(DTYPES) - 1
    offsets = offsets_of(PARTS, BLOCK)
    indices = ()
    for p in tl.static_range(PARTS):
        indices = indices + (first + offsets[p],)
    codes = ()
    found = ()
    for s in tl.static_range(EMA + 1):
        if DTYPES[s] is not None:
            codes = codes + (load(streams[s], indices, numel, WHOLE, PARTS),)
            extra = load_extra(extras[s], first, indices, numel, WHOLE, STORAGES[s], PARTS, BLOCK)
            found = found + (extra,)
        else:
            codes = codes + (codes[0],)
            found = found + (found[0],)
    values = decode_block(
        codes, found, not WHOLE, DTYPES, STORAGES, COMPUTE, PARTS, BLOCK, INTERPRETED
    )
    IS_PACKED: tl.constexpr = is_packed(STORAGES)
    if WHOLE and IS_PACKED:
        odd = tl.zeros([BLOCK // PARTS // RUN], tl.int1)
        for s in tl.static_range(EMA):
            if has_special_codes(STORAGES[s]):
                odd = odd | is_odd(values[s], found[s], STORAGES[s], DTYPES[s], PARTS, BLOCK)
        if tl.max(odd.to(tl.int32), axis=0) != 0:
            values = decode_block(
                codes, found, True, DTYPES, STORAGES, COMPUTE, PARTS, BLOCK, INTERPRETED
            )
    stepped = ()
    for p in tl.static_range(PARTS):
        index = indices[p]
        mask = mask_of(indices[p], numel, WHOLE)
        grad = values[1][p]
        states = ()
        for s in tl.static_range(2, EMA):
            states = states + (values[s][p],)
        if GRAD_WRITE == UNSCALED:
            grad = divide(grad, grad_scale)
            tl.store(streams[1] + index, encode_plain(grad, DTYPES[1], INTERPRETED), mask=mask)
        if clip is not None:
            if GRAD_WRITE == CLIPPED:
                code = encode_plain(clip * grad, DTYPES[1], INTERPRETED)
                tl.store(streams[1] + index, code, mask=mask)
            grad = grad_sign * clip * grad
        else:
            grad = grad_sign * grad
        param, states = RULE(values[0][p], grad, states, hypers, THERE)
        stepped = stepped + ((param, grad) + states,)
    to_store = ()
    sizes = ()
    odd = tl.zeros([BLOCK // PARTS // RUN], tl.int1)
    for s in tl.static_range(EMA):
        parts = ()
        for p in tl.static_range(PARTS):
            parts = parts + (stepped[p][s],)
        if DTYPES[s] is not None:
            parts = to_encode(parts, STORAGES[s], PARTS)
        to_store = to_store + (parts,)
        if STORAGES[s] != PLAIN:
            size = largest_of(parts, STORAGES[s], PARTS, BLOCK)
            odd = odd | (size >= safe(DTYPES[s]))
        else:
            size = numel
        sizes = sizes + (size,)
    store_block(
        streams, extras, to_store, sizes, first, indices, numel, keys, first_random, values[EMA],
        ema_weight, False, False, WHOLE, DTYPES, STORAGES, COMPUTE, PARTS, BLOCK, INTERPRETED,
    )  # fmt: skip
    if IS_PACKED:
        if not WHOLE or tl.max(odd.to(tl.int32), axis=0) != 0:
            store_block(
                streams, extras, to_store, sizes, first, indices, numel, keys, first_random,
                values[EMA], ema_weight, True, True, WHOLE, DTYPES, STORAGES, COMPUTE, PARTS, BLOCK,
                INTERPRETED,
            )  # fmt: skip
        else:
            store_block(
                streams, extras, to_store, sizes, first, indices, numel, keys, first_random,
                values[EMA], ema_weight, True, False, WHOLE, DTYPES, STORAGES, COMPUTE, PARTS, BLOCK,
                INTERPRETED,
            )  # fmt: skip
    if GRAD_WRITE == ZEROED:
        # After stores that need the grads: right after their loads, zeros for 0.5 GB of grads took 2.1 ms
        # (H200, GPT-2 small), where stock's zero_grad takes 0.15.
        for p in tl.static_range(PARTS):
            zero(streams[1] + indices[p], mask_of(indices[p], numel, WHOLE), BLOCK // PARTS)


@triton.jit
def zero_chunk(tensor, begin, DTYPES: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr):
    numel = tl.abs(tl.load(tensor + NUMEL))
    grad = tl.load(tensor + STREAMS + 1).to(tl.pointer_type(DTYPES[1]))
    for start in range(0, CHUNK, BLOCK):
        index = begin + start + tl.arange(0, BLOCK)
        zero(grad + index, index < numel, BLOCK)


@triton.jit
def load_word(row, words, in_table, COLUMN: tl.constexpr):
    return tl.load(row + COLUMN, mask=in_table != 0, other=words[COLUMN])


@triton.jit(
    do_not_specialize=["in_table", *(f"word{i}" for i in range(ROW.value))],
    do_not_specialize_on_alignment=["grad_scale", "found_inf", "clip"],
)
def multi_tensor(
    tensors,
    chunks,
    hypers,
    grad_scale,
    found_inf,
    clip,
    in_table,
    word0,
    word1,
    word2,
    word3,
    word4,
    word5,
    word6,
    word7,
    word8,
    word9,
    word10,
    word11,
    RULE: tl.constexpr,
    THERE: tl.constexpr,
    N_HYPERS: tl.constexpr,
    DTYPES: tl.constexpr,
    CODES: tl.constexpr,
    STORAGES: tl.constexpr,
    EXTRAS: tl.constexpr,
    COLUMNS: tl.constexpr,
    COMPUTE: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
    PARTS: tl.constexpr,
    GRAD_WRITE: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """Step the tensors, unless found_inf.

    Grads are divided by grad_scale, and multiplied by clip, which is to unscale too unless GRAD_WRITE
    is UNSCALED.

    Args:
        in_table: whether `hypers` is read, and not word0 ...
        THERE: of each state whether there is one.
        DTYPES, CODES, STORAGES, EXTRAS: of each stream the dtype, that of its elements in memory, its
            storage (see streams.py), and that of its scales or remainder, or None.
        COLUMNS: of `tensors`.
    """
    program = tl.program_id(0).to(tl.int64)
    if found_inf is not None and GRAD_WRITE != ZEROED:
        if tl.load(found_inf) != 0:
            return
    tensor = tensors + tl.load(chunks + 2 * program).to(tl.int64) * COLUMNS
    begin = tl.load(chunks + 2 * program + 1).to(tl.int64) * CHUNK
    if found_inf is not None and GRAD_WRITE == ZEROED:
        if tl.load(found_inf) != 0:
            zero_chunk(tensor, begin, DTYPES, CHUNK, BLOCK)
            return
    numel = tl.load(tensor + NUMEL)
    row = hypers + tl.load(tensor + HYPERS_ROW) * ROW
    words = (
        word0, word1, word2, word3, word4, word5, word6, word7, word8, word9, word10, word11,
    )  # fmt: skip
    rule_hypers = ()
    for i in tl.static_range(N_HYPERS):
        hyper = load_word(row, words, in_table, i).to(COMPUTE, bitcast=True)
        rule_hypers = rule_hypers + (hyper,)
    grad_sign = load_word(row, words, in_table, GRAD_SIGN).to(COMPUTE, bitcast=True)
    ema_weight = load_word(row, words, in_table, EMA_WEIGHT).to(COMPUTE, bitcast=True)
    if GRAD_WRITE == UNSCALED:
        scale = tl.load(grad_scale).to(COMPUTE)
    else:
        scale = None
    if clip is not None:
        factor = tl.load(clip).to(COMPUTE)
    else:
        factor = None
    N: tl.constexpr = len(DTYPES)
    IS_PACKED: tl.constexpr = COLUMNS > STREAMS + N
    if IS_PACKED:
        step = load_word(row, words, in_table, STEP).to(tl.uint32, bitcast=True).to(tl.uint64)
        step_high = load_word(row, words, in_table, STEP + 1).to(tl.uint32, bitcast=True)
        step |= step_high.to(tl.uint64) << 32
        whole = tl.load(tensor + STREAMS + N)
    else:
        step = None
        whole = begin
    streams = ()
    aligned = ()
    extras = ()
    aligned_extras = ()
    keys = ()
    for s in tl.static_range(N):
        if DTYPES[s] is not None:
            address = tl.load(tensor + STREAMS + s).to(tl.pointer_type(CODES[s]))
            streams = streams + (address,)
            aligned = aligned + (tl.multiple_of(address, 16),)
        else:
            streams = streams + (streams[0],)
            aligned = aligned + (aligned[0],)
        if EXTRAS[s] is not None:
            extra = tl.load(tensor + STREAMS + N + 1 + s).to(tl.pointer_type(EXTRAS[s]))
            extras = extras + (extra,)
            aligned_extras = aligned_extras + (tl.multiple_of(extra, 16),)
        else:
            extras = extras + (streams[0],)
            aligned_extras = aligned_extras + (aligned[0],)
        if STORAGES[s] != PLAIN:
            seed = tl.load(tensor + STREAMS + 2 * N + 1 + s)
            keys = keys + (random_key(seed.to(tl.uint64, bitcast=True), step),)
        else:
            keys = keys + (numel,)
    for start in range(0, CHUNK, BLOCK):
        first = begin + start
        # A mask would split the accesses, so a whole block goes without one.
        if first + BLOCK <= numel:
            update_block(
                aligned, aligned_extras, keys, first, whole + first, numel, rule_hypers,
                grad_sign, scale, factor, ema_weight, True,
                RULE, THERE, DTYPES, STORAGES, COMPUTE, GRAD_WRITE, PARTS, BLOCK, INTERPRETED,
            )  # fmt: skip
        elif first < tl.abs(numel):
            # In smaller blocks: a mask and 64-bit numbers for each element take registers.
            for part in range(0, BLOCK, BLOCK // PARTS):
                update_block(
                    streams, extras, keys, first + part, whole + first + part, tl.abs(numel),
                    rule_hypers, grad_sign, scale, factor, ema_weight, False,
                    RULE, THERE, DTYPES, STORAGES, COMPUTE, GRAD_WRITE, 1, BLOCK // PARTS, INTERPRETED,
                )  # fmt: skip
