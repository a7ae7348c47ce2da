"""Storage formats of less than 32 bits: how float32 becomes codes, and codes float32.

csrc/formats.h's formats, bit for bit. Codes of 16 bits are bit patterns (uint16), as the scales are, of
a bfloat16. `random` are 16 random bits for each element (uint32). What is not finite is rare and takes many
instructions: with SPECIAL false the functions do without it, and the caller has made sure that there is none.

Nothing here may depend on how a float is cast to an int that cannot hold it: such values are computed and
not chosen.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .rules import divide

SCALE_BLOCK = tl.constexpr(64)  # elements of one scale
MAGNITUDE = tl.constexpr(0x7FFFFFFF)
INF = tl.constexpr(0x7F800000)
QUIET = tl.constexpr(0x400000)
F16_INF = tl.constexpr(0x7C00)
F16_NORMAL = tl.constexpr(0x38800000)  # 2**-14 as a float32
F16_BIAS = tl.constexpr(0x38000000)  # (127 - 15) << 23
# Magnitudes, 2**127 and 65504: below them, what becomes a bfloat16 or float16, and what is beside it, is
# neither special nor rounded to what is.
SAFE = tl.constexpr(0x7F000000)
F16_SAFE = tl.constexpr(0x477FE000)
# As a float32, 128; whose last bit is worth 2**-16.
UNIT_128 = tl.constexpr(0x43000000)
# Added to a float32 below 2**22, leaves its nearest integer in the low bits.
ROUNDING = tl.constexpr(12582912.0)
# Signed codes, up to 126; those of what is not finite.
SIGNED8_INVERSE = tl.constexpr(1 / 126)
SIGNED8_SMALLEST_SCALE = tl.constexpr(2.0**-120)
SIGNED8_INF = tl.constexpr(127)
SIGNED8_NAN = tl.constexpr(-128)
# Codes of square roots, from 1 on if not of zero. The smallest scale has a square that is not zero.
ROOT8_LARGEST = tl.constexpr(253)
ROOT8_INVERSE = tl.constexpr(1 / 253)
ROOT8_SMALLEST_SCALE = tl.constexpr(2.0**-74)
ROOT8_NAN = tl.constexpr(254)
ROOT8_INF = tl.constexpr(255)


@triton.jit
def bits_of(value):
    return value.to(tl.uint32, bitcast=True)


@triton.jit
def from_bits(bits):
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def magnitude(value):
    """The bits without the sign."""
    return bits_of(value) & MAGNITUDE


@triton.jit
def decode_bf16(codes):
    return from_bits(codes.to(tl.uint32) << 16)


@triton.jit
def decode_f16(codes):
    return codes.to(tl.float16, bitcast=True).to(tl.float32)


@triton.jit
def random_key(seed, step):
    """Two uint32 for the random bits of one stream in one step: a round of splitmix64 (S. Vigna)."""
    x = (seed ^ step) + 0x9E3779B97F4A7C15
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB
    x = x ^ (x >> 31)
    return x.to(tl.uint32), (x >> 32).to(tl.uint32)


@triton.jit
def mix(x, key1):
    """ "lowbias32" (C. Wellons) with a key in it, but for the last of its steps."""
    x ^= x >> 16
    x *= 0x7FEB352D
    x ^= (x >> 15) ^ (key1 ^ (key1 >> 15))  # of x ^ key1
    x *= 0x846CA68B
    return x


@triton.jit
def pair_hashes(first, numbers, key0, key1):
    """32 random bits for each pair of elements 16 apart, for first_half and second_half to take apart.

    Element e belongs to pair e // 32 * 16 + e % 16.

    Args:
        first: number of the block's first element in the whole param, a multiple of 32.
        numbers: int32, of the pairs, counted from that element's; all have the same upper 32 bits.
    """
    number = first.to(tl.uint64) // 2
    start = number.to(tl.uint32) + (key0 + (number >> 32).to(tl.uint32) * 0x9E3779B9)
    return mix(start + numbers.to(tl.uint32), key1)


@triton.jit
def first_half(x):
    """16 random bits for the first element of each pair."""
    return (x ^ (x >> 16)) & 0xFFFF


@triton.jit
def second_half(x):
    return x >> 16


@triton.jit
def random16(first, offsets, key0, key1):
    """16 random bits for each element, uint32; first: of any number, int64; offsets: int32, from it on."""
    start = first.to(tl.uint64) // 32 * 16
    lower = start.to(tl.uint32)
    lane = (first % 32).to(tl.uint32) + offsets.to(tl.uint32)
    x = lower + ((lane >> 5 << 4) | (lane & 15))
    upper = (start >> 32).to(tl.uint32) * 0x9E3779B9
    x = mix(x + key0 + tl.where(x < lower, upper + 0x9E3779B9, upper), key1)
    return tl.where((lane & 16) == 0, first_half(x), second_half(x))


@triton.jit
def fraction(random):
    """random / 2**16 as a float32."""
    return from_bits(random | UNIT_128) - 128.0


@triton.jit
def randomly(y, random):
    """The non-negative float32 as an int32, rounded up with a probability that is its fraction."""
    whole = y.to(tl.int32)
    # The sum with y itself would be rounded, and an integer might become the next one.
    return whole + (y - whole.to(tl.float32) + fraction(random)).to(tl.int32)


@triton.jit
def scale_of(largest, INVERSE: tl.constexpr, SMALLEST: tl.constexpr):
    """The scale as a float32, rounded up to a bfloat16, and its inverse; largest: finite."""
    up = from_bits((bits_of(largest * INVERSE) + 0xFFFF) & 0xFFFF0000)
    up = tl.where(up > SMALLEST, up, SMALLEST)
    one = tl.full(up.shape, 1.0, tl.float32)
    # Where all are zeros, their code is 0 whatever the inverse.
    return tl.where(largest > 0, up, 0.0), divide(one, up)


@triton.jit
def decode_signed8(codes, scale, SPECIAL: tl.constexpr):
    """scale: each element's own, not negative."""
    value = codes.to(tl.float32) * scale
    if SPECIAL:
        value = tl.where(codes == SIGNED8_INF, float("inf"), value)
        value = tl.where(codes == -SIGNED8_INF, float("-inf"), value)
        value = tl.where(codes == SIGNED8_NAN, float("nan"), value)
    return value


@triton.jit
def encode_signed8(value, inverse, SPECIAL: tl.constexpr):
    """Linear codes, int8. inverse: of each element's scale."""
    # The nearest integer is in the last byte. It is at most 126 and a few roundings, which is 126 again.
    codes = bits_of(value * inverse + ROUNDING).to(tl.int8)
    if SPECIAL:
        m = magnitude(value)
        codes = tl.where(
            m == INF, tl.where(value > 0, SIGNED8_INF, -SIGNED8_INF).to(tl.int8), codes
        )
        codes = tl.where(m > INF, SIGNED8_NAN, codes).to(tl.int8)
    return codes


@triton.jit
def decode_root8(codes, scale, SPECIAL: tl.constexpr):
    """scale: each element's own, not negative."""
    root = codes.to(tl.float32) * scale
    value = root * root
    if SPECIAL:
        value = tl.where(codes == ROOT8_INF, float("inf"), value)
        value = tl.where(codes == ROOT8_NAN, float("nan"), value)
    return value


@triton.jit
def encode_root8(root, inverse, random, SPECIAL: tl.constexpr):
    """Codes of square roots, uint8, rounded stochastically, never to 0."""
    codes = (root * inverse + fraction(random)).to(tl.int32)
    codes = tl.minimum(codes, ROOT8_LARGEST)
    # As integers, positive numbers are at least 1. A root is not negative but for -0.
    codes = tl.maximum(codes, tl.minimum(root.to(tl.int32, bitcast=True), 1))
    if SPECIAL:
        m = magnitude(root)
        codes = tl.where(m >= INF, tl.where(m == INF, ROOT8_INF, ROOT8_NAN), codes)
    return codes.to(tl.uint8)


@triton.jit
def encode_nearest_bf16(value):
    """Rounded to nearest even."""
    bits = bits_of(value)
    rounded = bits + 0x7FFF + ((bits >> 16) & 1)
    return (tl.where(value != value, bits | QUIET, rounded) >> 16).to(tl.uint16)


@triton.jit
def encode_stochastic_bf16(value, random, SPECIAL: tl.constexpr):
    bits = bits_of(value)
    rounded = bits + random
    if SPECIAL:
        rounded = tl.where(value != value, bits | QUIET, rounded)
    return (rounded >> 16).to(tl.uint16)


@triton.jit
def f16_nan(bits):
    return 0x7E00 | ((bits >> 13) & 0x3FF)


@triton.jit
def encode_stochastic_f16(value, random, SPECIAL: tl.constexpr):
    bits = bits_of(value)
    m = bits & MAGNITUDE
    half = (m + (random >> 3) - F16_BIAS) >> 13
    subnormal = randomly(from_bits(m) * 2.0**24, random).to(tl.uint32)
    half = tl.where(m < F16_NORMAL, subnormal, half)
    if SPECIAL:
        half = tl.minimum(half, F16_INF)
        half = tl.where(m > INF, f16_nan(bits), half)
    return (half | ((bits >> 16) & 0x8000)).to(tl.uint16)


@triton.jit
def decode_split_bf16(upper, remainder, SPECIAL: tl.constexpr):
    """Without SPECIAL, what had to be decoded with it comes out as no less than SAFE."""
    upper = upper.to(tl.uint32)
    DROPPED: tl.constexpr = 8 if remainder.dtype == tl.int8 else 0
    rest = (remainder.to(tl.int32) << DROPPED).to(tl.uint32, bitcast=True)
    if SPECIAL:
        m = upper & 0x7FFF
        # Other code has written a zero beside a negative remainder.
        alone = (m >= (INF >> 16)) | ((m == 0) & (remainder < 0))
        rest = tl.where(alone, 0, rest)
    return from_bits((upper << 16) + rest)


@triton.jit
def encode_split_bf16(value, random, REMAINDER: tl.constexpr, SPECIAL: tl.constexpr):
    """The nearest bfloat16, and what remains (int16); int8: rounded stochastically to 24 bits before."""
    bits = bits_of(value)
    rounded = bits
    DROPPED: tl.constexpr = 8 if REMAINDER == tl.int8 else 0
    if DROPPED:
        rounded = bits + (random >> 8)
    upper = (rounded + 0x8000) >> 16
    # Below the nearest upper part it counts down from it: two's complement.
    remainder = (rounded >> DROPPED).to(REMAINDER)
    if SPECIAL:
        upper = tl.where(value != value, (bits | QUIET) >> 16, upper)
        remainder = tl.where((upper & 0x7FFF) < (INF >> 16), remainder, 0).to(REMAINDER)
    return upper.to(tl.uint16), remainder


@triton.jit
def decode_split_f16(upper, remainder, SPECIAL: tl.constexpr):
    """Without SPECIAL, what had to be decoded with it comes out as no less than F16_SAFE."""
    h = upper.to(tl.int32) & 0x7FFF
    rest = remainder.to(tl.int32)
    # A remainder outside of these bounds belongs to a param that other code has overwritten.
    if remainder.dtype == tl.int8:
        # A float16 with 8 more bits has the bits of a float32 with another bias.
        m = (h << 13) + rest * 32
        if SPECIAL:
            m = tl.maximum(m, 0)
        m = bits_of(from_bits(m) * 2.0**112)
    else:
        of_normal = tl.minimum(tl.maximum(rest, -0x1000), 0xFFF)
        of_subnormal = tl.minimum(rest, 0x7FFF - (h >> 8))
        normal = (h << 13) + F16_BIAS + of_normal
        subnormal = tl.maximum(h * 65536 + of_subnormal, 0).to(tl.float32) * 2.0**-40
        is_normal = (h > 0x400) | ((h == 0x400) & (rest >= 0))
        m = bits_of(tl.where(is_normal, from_bits(normal), subnormal))
    value = from_bits(m | ((upper.to(tl.uint32) & 0x8000) << 16))
    if SPECIAL:
        value = tl.where(h < F16_INF, value, decode_f16(upper))
    return value


@triton.jit
def encode_split_f16(value, random, REMAINDER: tl.constexpr, SPECIAL: tl.constexpr):
    """The nearest float16, and what remains (int16); int8: rounded stochastically to 8 more bits before.

    Below 2**-14 the remainder counts steps of 2**-40 (int8: 2**-32).
    """
    bits = bits_of(value)
    m = bits & MAGNITUDE
    subnormal = m < F16_NORMAL
    if REMAINDER == tl.int8:
        # The bits of a float16, and 8 more, count such steps below 2**-14 too.
        normal = (m + (random >> 11) - F16_BIAS) >> 5
        steps = randomly(from_bits(m) * 2.0**32, random).to(tl.uint32)
        remainder = tl.where(subnormal, steps, normal)
        upper = (remainder + 0x80) >> 8
    else:
        t = from_bits(m) * 2.0**40
        steps = t.to(tl.int32)
        steps += tl.where(t - steps.to(tl.float32) >= 0.5, 1, 0)
        steps = steps.to(tl.uint32)
        nearest = (m + 0x1000) & 0xFFFFE000
        upper = tl.where(subnormal, (steps + 0x8000) >> 16, (nearest - F16_BIAS) >> 13)
        remainder = tl.where(subnormal, steps, m - nearest)
    if SPECIAL:
        remainder = tl.where(upper >= F16_INF, 0, remainder)
        upper = tl.where(upper >= F16_INF, F16_INF, upper)
        upper = tl.where(m > INF, f16_nan(bits), upper)
    # Below the nearest upper part, the remainder counts down from it: two's complement.
    return (upper | ((bits >> 16) & 0x8000)).to(tl.uint16), remainder.to(REMAINDER)
