"""Storage formats of less than 32 bits: how a block of float32 becomes codes, and codes float32.

csrc/packed.h's formats, bit for bit. A block is a 1-D tensor of BLOCK elements that follow each other in
memory; elements behind the end of their tensor are zeros. Codes of 16 bits are bit patterns (uint16), as
the scales are, of a bfloat16. `random` are random16's numbers for the same elements.

Nothing here may depend on how a float is cast to an int that cannot hold it, or on subnormals: such values
are computed and not chosen.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .rules import divide, square_root

GROUP = tl.constexpr(64)  # elements of one scale
SIGN = tl.constexpr(0x80000000)
MAGNITUDE = tl.constexpr(0x7FFFFFFF)
INF = tl.constexpr(0x7F800000)
QUIET = tl.constexpr(0x400000)
F16_INF = tl.constexpr(0x7C00)
F16_SMALLEST_NORMAL = tl.constexpr(0x38800000)  # 2**-14 as a float32
F16_OVERFLOW = tl.constexpr(0x47800000)  # 65536 as a float32
F16_REBIAS = tl.constexpr(0x38000000)  # (127 - 15) << 23
RANDOM_UNIT = tl.constexpr(2.0**-16)
# Added to a float32 below 2**22, leaves its nearest integer in the low bits.
ROUNDING = tl.constexpr(12582912.0)
ROUNDING_BITS = tl.constexpr(0x4B400000)
# Signed codes, up to 126; those of what is not finite.
S8_INVERSE = tl.constexpr(1 / 126)
S8_SMALLEST_SCALE = tl.constexpr(2.0**-120)
S8_INF = tl.constexpr(127)
S8_NAN = tl.constexpr(-128)
# Codes of square roots, from 1 on if not of zero. The smallest scale has a square that is not zero.
U8_LARGEST = tl.constexpr(253)
U8_INVERSE = tl.constexpr(1 / 253)
U8_SMALLEST_SCALE = tl.constexpr(2.0**-74)
U8_NAN = tl.constexpr(254)
U8_INF = tl.constexpr(255)


@triton.jit
def random_key(seed, step):
    """Two uint32 for the random bits of one stream in one step: a round of splitmix64 (S. Vigna)."""
    x = (seed ^ step) + 0x9E3779B97F4A7C15
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB
    x = x ^ (x >> 31)
    return x.to(tl.uint32), (x >> 32).to(tl.uint32)


@triton.jit
def random16(first, key0, key1, BLOCK: tl.constexpr):
    """16 random bits for each element, uint32: one hash serves two elements that lie 16 apart.

    first: of the block's elements; key0, key1: uint32.
    """
    # Of element e the hash is number e // 32 * 16 + e % 16, whose upper half may change within the block.
    number = first.to(tl.uint64) // 32 * 16
    lower = number.to(tl.uint32)
    lane = (first % 32).to(tl.uint32) + tl.arange(0, BLOCK).to(tl.uint32)
    x = lower + ((lane >> 5 << 4) | (lane & 15))
    upper = (number >> 32).to(tl.uint32) * 0x9E3779B9
    x = x + key0 + tl.where(x < lower, upper + 0x9E3779B9, upper)
    x ^= x >> 16
    x *= 0x7FEB352D
    x ^= key1
    x ^= x >> 15
    x *= 0x846CA68B
    x ^= x >> 16
    return tl.where((lane & 16) == 0, x & 0xFFFF, x >> 16)


@triton.jit
def bits_of(value):
    return value.to(tl.uint32, bitcast=True)


@triton.jit
def float_of(bits):
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def randomly(y, random):
    """The non-negative float32 as an int32, rounded up with a probability that is its fraction."""
    whole = y.to(tl.int32)
    # The sum with y itself would be rounded, and an integer might become the next one.
    return whole + (y - whole.to(tl.float32) + random.to(tl.float32) * RANDOM_UNIT).to(tl.int32)


@triton.jit
def encode_bf16(value):
    """Rounded to nearest even."""
    bits = bits_of(value)
    rounded = bits + 0x7FFF + ((bits >> 16) & 1)
    return (tl.where(value != value, bits | QUIET, rounded) >> 16).to(tl.uint16)


@triton.jit
def encode_bf16_stochastic(value, random):
    bits = bits_of(value)
    return (tl.where(value != value, bits | QUIET, bits + random) >> 16).to(tl.uint16)


@triton.jit
def decode_bf16(codes):
    return float_of(codes.to(tl.uint32) << 16)


@triton.jit
def f16_nan(bits):
    return 0x7E00 | ((bits >> 13) & 0x3FF)


@triton.jit
def encode_f16_stochastic(value, random):
    bits = bits_of(value)
    m = bits & MAGNITUDE
    rounded = m + (random >> 3)
    half = tl.where(rounded >= F16_OVERFLOW, F16_INF, (rounded - F16_REBIAS) >> 13)
    subnormal = randomly(float_of(m) * 2.0**24, random).to(tl.uint32)
    half = tl.where(m < F16_SMALLEST_NORMAL, subnormal, half)
    half = tl.where(m > INF, f16_nan(bits), half)
    return (half | ((bits >> 16) & 0x8000)).to(tl.uint16)


@triton.jit
def decode_f16(codes):
    return codes.to(tl.float16, bitcast=True).to(tl.float32)


@triton.jit
def group_scales(magnitude, INVERSE: tl.constexpr, SMALLEST: tl.constexpr):
    """Of each group [n, 64] the scale as float32, rounded up to a bfloat16, and its inverse."""
    largest = tl.max(magnitude, axis=1, keep_dims=True)
    up = float_of((bits_of(largest * INVERSE) + 0xFFFF) & 0xFFFF0000)
    up = tl.where(up > SMALLEST, up, SMALLEST)
    there = largest > 0
    one = tl.full(up.shape, 1.0, tl.float32)
    return tl.where(there, up, 0.0), tl.where(there, divide(one, up), 0.0)


@triton.jit
def stored_scales(scale, special, BLOCK: tl.constexpr):
    """As bits of a bfloat16, with the sign where some code of the group stands for NaN or an infinity."""
    sign = tl.max(special.to(tl.int32), axis=1, keep_dims=True).to(tl.uint32) << 15
    return tl.reshape(bits_of(scale) >> 16 | sign, (BLOCK // GROUP,)).to(tl.uint16)


@triton.jit
def grouped(values, BLOCK: tl.constexpr):
    return tl.reshape(values, (BLOCK // GROUP, GROUP))


@triton.jit
def encode_s8(value, BLOCK: tl.constexpr):
    """Linear codes (int8), and scales [BLOCK // 64]."""
    value = grouped(value, BLOCK)
    m = bits_of(value) & MAGNITUDE
    scale, inverse = group_scales(float_of(tl.where(m < INF, m, 0)), S8_INVERSE, S8_SMALLEST_SCALE)
    codes = (value * inverse + ROUNDING).to(tl.int32, bitcast=True) - ROUNDING_BITS
    # A finite one is at most 126 and a few roundings, which is 126 again.
    codes = tl.where(m == INF, tl.where(value > 0, S8_INF, -S8_INF), codes)
    codes = tl.where(m > INF, S8_NAN, codes)
    return tl.reshape(codes.to(tl.int8), (BLOCK,)), stored_scales(scale, m >= INF, BLOCK)


@triton.jit
def decode_s8(codes, scales):
    """scales: each element's own."""
    codes = codes.to(tl.int32)
    value = codes.to(tl.float32) * tl.abs(decode_bf16(scales))
    value = tl.where(codes == S8_INF, float("inf"), value)
    value = tl.where(codes == -S8_INF, float("-inf"), value)
    return tl.where(codes == S8_NAN, float("nan"), value)


@triton.jit
def encode_u8(value, random, BLOCK: tl.constexpr):
    """Codes of square roots (uint8), rounded stochastically, never to 0; and scales [BLOCK // 64]."""
    value = grouped(value, BLOCK)
    bits = bits_of(value)
    # As integers, negative numbers come behind infinity, as NaN does.
    root = square_root(float_of(tl.where(bits < INF, bits, 0)))
    scale, inverse = group_scales(root, U8_INVERSE, U8_SMALLEST_SCALE)
    up = grouped(random, BLOCK).to(tl.float32) * RANDOM_UNIT
    codes = (root * inverse + up).to(tl.int32)
    codes = tl.minimum(tl.maximum(codes, 1), U8_LARGEST)
    codes = tl.where(bits < INF, codes, U8_NAN)
    codes = tl.where(bits == INF, U8_INF, codes)
    codes = tl.where(value == 0, 0, codes)
    return tl.reshape(codes.to(tl.uint8), (BLOCK,)), stored_scales(scale, codes > U8_LARGEST, BLOCK)


@triton.jit
def decode_u8(codes, scales):
    """scales: each element's own."""
    codes = codes.to(tl.int32)
    root = codes.to(tl.float32) * tl.abs(decode_bf16(scales))
    value = tl.where(codes == U8_INF, float("inf"), root * root)
    return tl.where(codes == U8_NAN, float("nan"), value)


@triton.jit
def encode_bf16_split(value, random, REMAINDER: tl.constexpr):
    """The nearest bfloat16, and what remains (int16); int8: rounded stochastically to 24 bits before."""
    bits = bits_of(value)
    rounded = bits
    DROPPED: tl.constexpr = 8 if REMAINDER == tl.int8 else 0
    if DROPPED:
        rounded = (bits + (random >> 8)) & 0xFFFFFF00
    upper = (rounded + 0x8000) >> 16
    remainder = (rounded - (upper << 16)).to(tl.int32, bitcast=True) >> DROPPED
    upper = tl.where(value != value, (bits | QUIET) >> 16, upper)
    remainder = tl.where((upper & 0x7FFF) < (INF >> 16), remainder, 0)
    return upper.to(tl.uint16), remainder.to(REMAINDER)


@triton.jit
def decode_bf16_split(upper, remainder):
    upper = upper.to(tl.uint32)
    DROPPED: tl.constexpr = 8 if remainder.dtype == tl.int8 else 0
    rest = (remainder.to(tl.int32) << DROPPED).to(tl.uint32, bitcast=True)
    m = upper & 0x7FFF
    # A zero beside a negative remainder has been written by someone else.
    alone = (m >= (INF >> 16)) | ((m == 0) & (remainder < 0))
    return float_of((upper << 16) + tl.where(alone, 0, rest))


@triton.jit
def encode_f16_split(value, random, REMAINDER: tl.constexpr):
    """The nearest float16, and what remains (int16); int8: rounded stochastically to 8 more bits before.

    Below 2**-14 the remainder counts steps of 2**-40 (int8: 2**-32).
    """
    bits = bits_of(value)
    m = bits & MAGNITUDE
    IS_SHORT: tl.constexpr = REMAINDER == tl.int8
    UNIT_LOG2: tl.constexpr = 8 if IS_SHORT else 16
    DROPPED: tl.constexpr = 5 if IS_SHORT else 0
    rounded = m
    if IS_SHORT:
        rounded = (m + (random >> 11)) & 0xFFFFFFE0
        steps = randomly(float_of(m) * 2.0**32, random)
    else:
        t = float_of(m) * 2.0**40
        steps = t.to(tl.int32)
        steps += tl.where(t - steps.to(tl.float32) >= 0.5, 1, 0)
    nearest = (rounded + 0x1000) & 0xFFFFE000
    is_inf = nearest >= F16_OVERFLOW
    upper = tl.where(is_inf, F16_INF, (nearest - F16_REBIAS) >> 13)
    remainder = (rounded - nearest).to(tl.int32, bitcast=True) >> DROPPED
    subnormal = m < F16_SMALLEST_NORMAL
    upper_steps = (steps + (1 << (UNIT_LOG2 - 1))) >> UNIT_LOG2
    upper = tl.where(subnormal, upper_steps.to(tl.uint32), upper)
    remainder = tl.where(subnormal, steps - (upper_steps << UNIT_LOG2), remainder)
    upper = tl.where(m > INF, f16_nan(bits), upper)
    remainder = tl.where(is_inf, 0, remainder)
    return (upper | ((bits >> 16) & 0x8000)).to(tl.uint16), remainder.to(REMAINDER)


@triton.jit
def decode_f16_split(upper, remainder):
    h = upper.to(tl.int32) & 0x7FFF
    rest = remainder.to(tl.int32)
    IS_SHORT: tl.constexpr = remainder.dtype == tl.int8
    UNIT: tl.constexpr = 256 if IS_SHORT else 65536
    STEP: tl.constexpr = 2.0**-32 if IS_SHORT else 2.0**-40
    # A remainder outside of these bounds is that of a param that someone else has overwritten.
    if IS_SHORT:
        of_normal = rest * 32
        of_subnormal = rest
    else:
        of_normal = tl.minimum(tl.maximum(rest, -0x1000), 0xFFF)
        of_subnormal = tl.minimum(rest, 0x7FFF - (h >> 8))
    normal = float_of((h << 13) + F16_REBIAS + of_normal)
    subnormal = tl.maximum(h * UNIT + of_subnormal, 0).to(tl.float32) * STEP
    is_normal = (h > 0x400) | ((h == 0x400) & (rest >= 0))
    m = bits_of(tl.where(is_normal, normal, subnormal))
    value = float_of(m | ((upper.to(tl.uint32) & 0x8000) << 16))
    return tl.where(h < F16_INF, value, decode_f16(upper))
