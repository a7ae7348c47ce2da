"""One stream between memory and the compute type, whatever its format: a dtype alone, or a storage.

The storages are csrc/kernel.h's (Triton 3.6 takes no strings out of a tuple, so they are numbers).
`extra` is where a stream's scales lie, or a param's remainder; `first` is a block's first element.
"""

from __future__ import annotations

import triton
import triton.language as tl

from . import formats
from .formats import GROUP

STORAGES = ("plain", "stochastic", "signed8", "root8", "split8", "split16")
PLAIN = tl.constexpr(0)
STOCHASTIC = tl.constexpr(1)
SIGNED8 = tl.constexpr(2)
ROOT8 = tl.constexpr(3)
SPLIT8 = tl.constexpr(4)
SPLIT16 = tl.constexpr(5)


@triton.jit
def decode(value, COMPUTE: tl.constexpr, INTERPRETED: tl.constexpr):
    if INTERPRETED and value.dtype == tl.bfloat16:
        # The interpreter's own cast is wrong for subnormals (Triton 3.6 and 3.9).
        value = formats.decode_bf16(value.to(tl.uint16, bitcast=True))
    return value.to(COMPUTE)


@triton.jit
def encode(value, DTYPE: tl.constexpr, INTERPRETED: tl.constexpr):
    if INTERPRETED and DTYPE == tl.bfloat16:
        # The interpreter's own cast truncates.
        value = formats.encode_bf16(value).to(tl.bfloat16, bitcast=True)
    return value.to(DTYPE)


@triton.jit
def load(
    address, extra, first, mask, STORAGE: tl.constexpr, DTYPE: tl.constexpr, COMPUTE: tl.constexpr,
    BLOCK: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    index = first + tl.arange(0, BLOCK)
    code = tl.load(address + index, mask=mask)
    if STORAGE == PLAIN:
        value = decode(code, COMPUTE, INTERPRETED)
    elif STORAGE == SIGNED8:
        value = formats.decode_s8(code, tl.load(extra + index // GROUP, mask=mask))
    elif STORAGE == ROOT8:
        value = formats.decode_u8(code, tl.load(extra + index // GROUP, mask=mask))
    elif STORAGE == STOCHASTIC:
        value = without_remainder(code, DTYPE)
    elif DTYPE == tl.bfloat16:
        value = formats.decode_bf16_split(code, tl.load(extra + index, mask=mask))
    else:
        value = formats.decode_f16_split(code, tl.load(extra + index, mask=mask))
    return value


@triton.jit
def without_remainder(code, DTYPE: tl.constexpr):
    if DTYPE == tl.bfloat16:
        value = formats.decode_bf16(code)
    else:
        value = formats.decode_f16(code)
    return value


@triton.jit
def store(
    address, extra, value, first, mask, numel, key, first_random,
    STORAGE: tl.constexpr, DTYPE: tl.constexpr, BLOCK: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """Returns what was stored in the stream itself.

    Args:
        numel: of the tensor; key: of the random bits, drawn as for the elements from first_random on.
    """
    index = first + tl.arange(0, BLOCK)
    if STORAGE == ROOT8 or STORAGE == STOCHASTIC or STORAGE == SPLIT8:  # noqa: SIM109 (not in Triton)
        random = formats.random16(first_random, key[0], key[1], BLOCK)
    if STORAGE == PLAIN:
        code = encode(value, DTYPE, INTERPRETED)
    elif STORAGE == SIGNED8 or STORAGE == ROOT8:  # noqa: SIM109
        group = first // GROUP + tl.arange(0, BLOCK // GROUP)
        if mask is not None:
            value = tl.where(mask, value, 0.0)
            group_mask = group * GROUP < numel
        else:
            group_mask = None
        if STORAGE == SIGNED8:
            code, scales = formats.encode_s8(value, BLOCK)
        else:
            code, scales = formats.encode_u8(value, random, BLOCK)
        tl.store(extra + group, scales, mask=group_mask)
    elif STORAGE == STOCHASTIC:
        if DTYPE == tl.bfloat16:
            code = formats.encode_bf16_stochastic(value, random)
        else:
            code = formats.encode_f16_stochastic(value, random)
    else:
        # The last bit of 16 more is never drawn: any number will do.
        if STORAGE == SPLIT16:
            random = key[0]
        REMAINDER: tl.constexpr = extra.dtype.element_ty
        if DTYPE == tl.bfloat16:
            code, rest = formats.encode_bf16_split(value, random, REMAINDER)
        else:
            code, rest = formats.encode_f16_split(value, random, REMAINDER)
        tl.store(extra + index, rest, mask=mask)
    tl.store(address + index, code, mask=mask)
    return code


@triton.jit
def zero(address, mask, BLOCK: tl.constexpr):
    tl.store(address, tl.zeros([BLOCK], address.dtype.element_ty), mask=mask)
