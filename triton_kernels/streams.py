"""One stream between memory and the compute type, whatever its format: a dtype alone, or a storage.

The storages are csrc/kernel.h's (Triton 3.6 takes no strings out of a tuple, so they are numbers).

A block of elements that follow each other in memory comes as a tuple of PARTS 1-D tensors: part p has of
every 16 * PARTS elements those from 16 * p on, and RUN of them that follow each other are one thread's. So
a thread has both elements that share random bits, and many of those that share a scale: what they have in
common is computed once. Tensors of one number per run and part, [BLOCK // PARTS // RUN], hold that.
`extra` is where a stream's scales lie, or a param's remainder.
"""

from __future__ import annotations

import triton
import triton.language as tl

from . import formats
from .formats import F16_SAFE, INF, SAFE, SCALE_BLOCK
from .rules import square_root

STORAGES = ("plain", "stochastic", "signed8", "root8", "split8", "split16")
PLAIN = tl.constexpr(0)
STOCHASTIC = tl.constexpr(1)
SIGNED8 = tl.constexpr(2)
ROOT8 = tl.constexpr(3)
SPLIT8 = tl.constexpr(4)
SPLIT16 = tl.constexpr(5)
RUN = tl.constexpr(4)


@triton.jit
def offsets_of(PARTS: tl.constexpr, BLOCK: tl.constexpr):
    """int32, of each part's elements within the block."""
    lane = tl.arange(0, BLOCK // PARTS)
    if PARTS > 1:
        lane = lane // 16 * (16 * PARTS) + lane % 16
    offsets = ()
    for p in tl.static_range(PARTS):
        offsets = offsets + (lane + 16 * p,)
    return offsets


@triton.jit
def scale_blocks_of(PARTS: tl.constexpr, BLOCK: tl.constexpr):
    """int32, of each run's scale block within the block."""
    return tl.arange(0, BLOCK // PARTS // RUN) // (SCALE_BLOCK // RUN // PARTS)


@triton.jit
def mask_of(index, numel, WHOLE: tl.constexpr):
    """WHOLE: the tensor has all elements of the block."""
    if WHOLE:
        mask = None
    else:
        mask = index < numel
    return mask


@triton.jit
def load(address, indices, numel, WHOLE: tl.constexpr, PARTS: tl.constexpr):
    """The codes of all parts."""
    codes = ()
    for p in tl.static_range(PARTS):
        mask = mask_of(indices[p], numel, WHOLE)
        codes = codes + (tl.load(address + indices[p], mask=mask),)
    return codes


@triton.jit
def load_extra(
    extra, first, indices, numel, WHOLE: tl.constexpr,
    STORAGE: tl.constexpr, PARTS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The scales, one of each run; or the remainders of all parts; else nothing of use."""
    if has_scales(STORAGE):
        scale_block = scale_blocks_of(PARTS, BLOCK)
        mask = mask_of(scale_block * SCALE_BLOCK, numel - first, WHOLE)
        found = (tl.load(extra + first // SCALE_BLOCK + scale_block, mask=mask),)
    elif has_remainder(STORAGE):
        found = load(extra, indices, numel, WHOLE, PARTS)
    else:
        found = (numel,)
    return found


@triton.jit
def spread(run, PARTS: tl.constexpr, BLOCK: tl.constexpr):
    """The number of each run for its elements in a part."""
    RUNS: tl.constexpr = BLOCK // PARTS // RUN
    return tl.reshape(tl.broadcast_to(tl.expand_dims(run, 1), (RUNS, RUN)), (BLOCK // PARTS,))


@triton.jit
def largest_of_runs(values, PARTS: tl.constexpr, BLOCK: tl.constexpr):
    """The bits of the largest magnitude of each run, over all parts: those of NaN come behind infinity's."""
    largest = formats.magnitude(values[0])
    for p in tl.static_range(1, PARTS):
        largest = tl.maximum(largest, formats.magnitude(values[p]))
    return tl.max(tl.reshape(largest, (BLOCK // PARTS // RUN, RUN)), axis=1)


@triton.jit
def largest_of_scale_blocks(values, PARTS: tl.constexpr, BLOCK: tl.constexpr):
    """The bits of the largest magnitude of each run's scale block."""
    runs = largest_of_runs(values, PARTS, BLOCK)
    WIDTH: tl.constexpr = SCALE_BLOCK // RUN // PARTS
    SCALE_BLOCKS: tl.constexpr = BLOCK // SCALE_BLOCK
    largest = tl.max(tl.reshape(runs, (SCALE_BLOCKS, WIDTH)), axis=1, keep_dims=True)
    return tl.reshape(tl.broadcast_to(largest, (SCALE_BLOCKS, WIDTH)), (SCALE_BLOCKS * WIDTH,))


@triton.jit
def decode_plain(value, COMPUTE: tl.constexpr, INTERPRETED: tl.constexpr):
    if INTERPRETED and value.dtype == tl.bfloat16:
        # The interpreter's own cast is wrong for subnormals (Triton 3.6 and 3.9).
        value = formats.decode_bf16(value.to(tl.uint16, bitcast=True))
    return value.to(COMPUTE)


@triton.jit
def encode_plain(value, DTYPE: tl.constexpr, INTERPRETED: tl.constexpr):
    if INTERPRETED and DTYPE == tl.bfloat16:
        # The interpreter's own cast truncates.
        value = formats.encode_nearest_bf16(value).to(tl.bfloat16, bitcast=True)
    return value.to(DTYPE)


@triton.jit
def without_remainder(code, DTYPE: tl.constexpr):
    if DTYPE == tl.bfloat16:
        value = formats.decode_bf16(code)
    else:
        value = formats.decode_f16(code)
    return value


@triton.constexpr_function
def has_scales(STORAGE):
    return STORAGE in (SIGNED8, ROOT8)


@triton.constexpr_function
def has_remainder(STORAGE):
    return STORAGE in (SPLIT8, SPLIT16)


@triton.constexpr_function
def draws_random(STORAGE):
    return STORAGE in (ROOT8, STOCHASTIC, SPLIT8)


@triton.constexpr_function
def has_special_codes(STORAGE):
    """True if the arithmetic that decodes most codes gives the wrong value for some."""
    return STORAGE not in (PLAIN, STOCHASTIC)


@triton.constexpr_function
def safe(DTYPE):
    """The bits of a magnitude: what is smaller needs no SPECIAL."""
    return F16_SAFE if DTYPE == tl.float16 else SAFE


@triton.jit
def decode(
    codes, extra, SPECIAL: tl.constexpr, STORAGE: tl.constexpr, DTYPE: tl.constexpr,
    COMPUTE: tl.constexpr, PARTS: tl.constexpr, BLOCK: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """The values of all parts. extra: as load_extra has it."""
    if has_scales(STORAGE):
        scale = spread(tl.abs(formats.decode_bf16(extra[0])), PARTS, BLOCK)
    values = ()
    for p in tl.static_range(PARTS):
        if STORAGE == PLAIN:
            value = decode_plain(codes[p], COMPUTE, INTERPRETED)
        elif STORAGE == SIGNED8:
            value = formats.decode_signed8(codes[p], scale, SPECIAL)
        elif STORAGE == ROOT8:
            value = formats.decode_root8(codes[p], scale, SPECIAL)
        elif STORAGE == STOCHASTIC:
            value = without_remainder(codes[p], DTYPE)
        elif DTYPE == tl.bfloat16:
            value = formats.decode_split_bf16(codes[p], extra[p], SPECIAL)
        else:
            value = formats.decode_split_f16(codes[p], extra[p], SPECIAL)
        values = values + (value,)
    return values


@triton.jit
def is_odd(
    values, extra, STORAGE: tl.constexpr, DTYPE: tl.constexpr, PARTS: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """True for each run that has to be decoded with SPECIAL; values: decoded without."""
    if has_scales(STORAGE):
        odd = extra[0] >= 0x8000  # the sign says so
    else:
        odd = largest_of_runs(values, PARTS, BLOCK) >= safe(DTYPE)
    return odd


@triton.jit
def to_encode(values, STORAGE: tl.constexpr, PARTS: tl.constexpr):
    """The values to encode: these, or their roots, which are the rule's own."""
    if STORAGE == ROOT8:
        roots = ()
        for p in tl.static_range(PARTS):
            roots = roots + (square_root(values[p]),)
        values = roots
    return values


@triton.jit
def largest_of(values, STORAGE: tl.constexpr, PARTS: tl.constexpr, BLOCK: tl.constexpr):
    """The bits that decide on each run's scale, and whether it has to be encoded with SPECIAL."""
    if has_scales(STORAGE):
        largest = largest_of_scale_blocks(values, PARTS, BLOCK)
    else:
        largest = largest_of_runs(values, PARTS, BLOCK)
    return largest


@triton.jit
def random_bits(
    first, key, PAIRED: tl.constexpr, PARTS: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """16 random bits for each element of all parts.

    Args:
        first: number of the block's first element in the whole param.
        PAIRED: that is a multiple of 32, and the numbers of the block's pairs agree in their upper 32 bits.
    """
    offsets = offsets_of(PARTS, BLOCK)
    random = ()
    for p in tl.static_range(0, PARTS, 2 if PAIRED else 1):
        if PAIRED:
            numbers = offsets[p] // 32 * 16 + offsets[p] % 16
            x = formats.pair_hashes(first, numbers, key[0], key[1])
            random = random + (formats.first_half(x), formats.second_half(x))
        else:
            random = random + (formats.random16(first, offsets[p], key[0], key[1]),)
    return random


@triton.jit
def store(
    address, extra, values, largest, first, indices, numel, key, first_random,
    WHOLE: tl.constexpr, SPECIAL: tl.constexpr, STORAGE: tl.constexpr, DTYPE: tl.constexpr,
    PARTS: tl.constexpr, BLOCK: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """Returns what was stored in the stream itself.

    Args:
        values, largest: as to_encode and largest_of have them.
        key: of the random bits, drawn as for the elements from first_random on.
    """
    if has_scales(STORAGE):
        INVERSE: tl.constexpr = (
            formats.SIGNED8_INVERSE if STORAGE == SIGNED8 else formats.ROOT8_INVERSE
        )
        SMALLEST: tl.constexpr = (
            formats.SIGNED8_SMALLEST_SCALE if STORAGE == SIGNED8 else formats.ROOT8_SMALLEST_SCALE
        )
        if SPECIAL:
            finite = ()
            for p in tl.static_range(PARTS):
                finite = finite + (tl.where(formats.magnitude(values[p]) < INF, values[p], 0.0),)
            sign = tl.where(largest >= INF, 0x8000, 0).to(tl.uint32)
            largest = largest_of_scale_blocks(finite, PARTS, BLOCK)
        scale, inverse = formats.scale_of(formats.from_bits(largest), INVERSE, SMALLEST)
        scale_bits = formats.bits_of(scale) >> 16
        if SPECIAL:
            scale_bits = scale_bits | sign
        inverse = spread(inverse, PARTS, BLOCK)
        # One thread stores what others have read: none is late, since the scale depends on all of them.
        run = tl.arange(0, BLOCK // PARTS // RUN)
        scale_block = scale_blocks_of(PARTS, BLOCK)
        is_first = run % (SCALE_BLOCK // RUN // PARTS) == 0
        if not WHOLE:
            is_first = is_first & (scale_block * SCALE_BLOCK < numel - first)
        tl.store(
            extra + first // SCALE_BLOCK + scale_block, scale_bits.to(tl.uint16), mask=is_first
        )
    if draws_random(STORAGE):
        random = random_bits(first_random, key, WHOLE, PARTS, BLOCK)
    else:
        random = values
    stored = ()
    for p in tl.static_range(PARTS):
        mask = mask_of(indices[p], numel, WHOLE)
        if STORAGE == PLAIN:
            code = encode_plain(values[p], DTYPE, INTERPRETED)
        elif STORAGE == SIGNED8:
            code = formats.encode_signed8(values[p], inverse, SPECIAL)
        elif STORAGE == ROOT8:
            code = formats.encode_root8(values[p], inverse, random[p], SPECIAL)
        elif STORAGE == STOCHASTIC:
            if DTYPE == tl.bfloat16:
                code = formats.encode_stochastic_bf16(values[p], random[p], SPECIAL)
            else:
                code = formats.encode_stochastic_f16(values[p], random[p], SPECIAL)
        else:
            if DTYPE == tl.bfloat16:
                code, remainder = formats.encode_split_bf16(
                    values[p], random[p], extra.dtype.element_ty, SPECIAL
                )
            else:
                code, remainder = formats.encode_split_f16(
                    values[p], random[p], extra.dtype.element_ty, SPECIAL
                )
            tl.store(extra + indices[p], remainder, mask=mask)
        tl.store(address + indices[p], code, mask=mask)
        stored = stored + (code,)
    return stored


@triton.jit
def zero(address, mask, BLOCK: tl.constexpr):
    tl.store(address, tl.zeros([BLOCK], address.dtype.element_ty), mask=mask)
