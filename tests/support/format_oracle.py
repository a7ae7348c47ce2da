"""The storage formats in plain numpy, one function per format and direction, for clarity alone.

Codes are uint16 bit patterns of a bfloat16 or float16, or int8 ("s8") and uint8 ("u8"). The extra array
is the remainder of a master (int8 or int16), the scales of 64 elements each (bit patterns of a bfloat16),
or None. Arithmetic on floats is float32's, every operation rounded by itself.
"""

import numpy as np

GROUP = 64
U32, I64, F32 = np.uint32, np.int64, np.float32
MASK32, MASK64 = 2**32 - 1, 2**64 - 1
SIGN, INF = 0x80000000, 0x7F800000  # of a float32
F16_INF = 0x7C00
F16_SMALLEST_NORMAL = 0x38800000  # 2**-14 as a float32
F16_OVERFLOW = 0x47800000  # 65536 as a float32
F16_REBIAS = 0x38000000  # (127 - 15) << 23


def _splitmix(x):
    x = (x + 0x9E3779B97F4A7C15) & MASK64
    x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 & MASK64
    x = (x ^ x >> 27) * 0x94D049BB133111EB & MASK64
    return x ^ x >> 31


def key(seed, parameter_index, stream, step):
    """The two 32-bit numbers that the random bits of one stream in one step come from."""
    k = 0
    for word in (seed, parameter_index, stream, step):
        k = _splitmix(k ^ word)
    return k & MASK32, k >> 32


def random16(key, first, n):
    """16 random bits for each of the elements first ... first + n - 1, as uint32.

    One hash of 32 bits serves two elements that lie 16 apart.
    """
    element = np.arange(n, dtype=np.uint64) + np.uint64(first)
    number = element // 32 * 16 + element % 16
    low, high = (number & np.uint64(MASK32)).astype(U32), (number >> np.uint64(32)).astype(U32)
    x = low + U32(key[0]) + high * U32(0x9E3779B9)
    x ^= x >> 16
    x *= U32(0x7FEB352D)
    x ^= U32(key[1])
    x ^= x >> 15
    x *= U32(0x846CA68B)
    x ^= x >> 16
    return np.where(element // 16 % 2 == 0, x & 0xFFFF, x >> 16)


def _bits(values):
    return values.view(U32).astype(I64)


def _float(bits):
    return np.asarray(bits).astype(U32).view(F32)


def _randomly(y, random):
    """The non-negative float32 rounded to an integer, up with a probability that is its fraction."""
    whole = y.astype(I64)
    return whole + (y - whole.astype(F32) + random.astype(F32) * F32(2.0**-16)).astype(I64)


# 16 bits


def _encode_bf16(values, random):
    bits = _bits(values)
    quiet = np.isnan(values)
    rounded = np.where(quiet, bits | 0x400000, bits + 0x7FFF + (bits >> 16 & 1))
    return (rounded >> 16).astype(np.uint16), None


def _encode_bf16_stochastic(values, random):
    bits = _bits(values)
    rounded = np.where(np.isnan(values), bits | 0x400000, bits + random)
    return (rounded >> 16).astype(np.uint16), None


def _decode_bf16(codes, extra):
    return _float(codes.astype(U32) << 16)


def _encode_f16_stochastic(values, random):
    sign, m = _bits(values) >> 16 & 0x8000, _bits(values) & ~SIGN
    normal = m + (random >> 3).astype(I64)
    half = np.where(normal >= F16_OVERFLOW, F16_INF, (normal - F16_REBIAS) >> 13)
    subnormal = m < F16_SMALLEST_NORMAL
    half[subnormal] = _randomly(_float(m[subnormal]) * F32(2.0**24), random[subnormal])
    return (sign | _nan_or(values, half)).astype(np.uint16), None


def _nan_or(values, half):
    return np.where(np.isnan(values), 0x7E00 | (_bits(values) >> 13 & 0x3FF), half)


def _decode_f16(codes, extra):
    return codes.view(np.float16).astype(F32)


# 8 bits with scales


def _in_groups(values):
    padded = np.zeros(-(-len(values) // GROUP) * GROUP, values.dtype)
    padded[: len(values)] = values
    return padded.reshape(-1, GROUP)


def _scales(magnitudes, largest_code, smallest):
    """Rounded up, so that the largest magnitude fits: of each group the scale, and of each element its
    inverse; 0 for a group of zeros."""
    largest = _in_groups(magnitudes).max(axis=1, initial=F32(0))
    bits = _bits(largest * (F32(1) / F32(largest_code)))
    scale = np.maximum(_float((bits + 0xFFFF) & 0xFFFF0000), F32(smallest))
    scale[largest == 0] = 0
    inverse = np.zeros_like(scale)
    np.divide(F32(1), scale, out=inverse, where=scale != 0)
    return (_bits(scale) >> 16).astype(np.uint16), _for_each(inverse, len(magnitudes))


def _for_each(of_groups, n):
    return np.repeat(of_groups, GROUP)[:n]


def _marked(scales, special):
    """With the sign where some code of the group stands for NaN or an infinity."""
    return scales | np.where(_in_groups(special).any(axis=1), 0x8000, 0).astype(np.uint16)


def _encode_s8(values, random):
    finite = np.where(np.isfinite(values), values, F32(0))
    scales, inverse = _scales(np.abs(finite), 126, 2.0**-120)
    codes = np.clip(np.rint(finite * inverse), -126, 126)
    codes = np.where(np.isinf(values), np.copysign(F32(127), values), codes)
    codes = np.where(np.isnan(values), F32(-128), codes)
    return codes.astype(np.int8), _marked(scales, ~np.isfinite(values))


def _decode_s8(codes, scales):
    values = codes.astype(F32) * _for_each(np.abs(_decode_bf16(scales, None)), len(codes))
    values = np.where(np.abs(codes.astype(int)) == 127, np.copysign(F32(np.inf), codes), values)
    return np.where(codes == -128, F32(np.nan), values).astype(F32)


def _encode_u8(values, random):
    valid = np.isfinite(values) & (values > 0)
    root = np.sqrt(np.where(valid, values, F32(0)))
    scales, inverse = _scales(root, 253, 2.0**-74)
    codes = (root * inverse + random.astype(F32) * F32(2.0**-16)).astype(I64)
    codes = np.where(valid, np.clip(codes, 1, 253), 0)
    codes[np.isnan(values) | (values < 0)] = 254
    codes[values == np.inf] = 255
    return codes.astype(np.uint8), _marked(scales, codes >= 254)


def _decode_u8(codes, scales):
    root = codes.astype(F32) * _for_each(np.abs(_decode_bf16(scales, None)), len(codes))
    values = root * root
    values[codes == 254] = np.nan
    values[codes == 255] = np.inf
    return values


# Masters: a 16-bit param, and what its float32 is more than that


def _encode_bf16_split(values, random, nbits):
    bits = _bits(values)
    dropped = 16 - nbits
    if dropped:
        bits = (bits + (random >> (16 - dropped)).astype(I64)) & ~0xFF
    upper = (bits + 0x8000) >> 16
    remainder = (bits - (upper << 16)) >> dropped
    nan = np.isnan(values)
    upper = np.where(nan, _bits(values) >> 16 | 0x40, upper)
    remainder[nan | (upper & 0x7FFF == INF >> 16)] = 0
    return upper.astype(np.uint16), remainder.astype(f"int{nbits}")


def _decode_bf16_split(upper, remainder):
    upper, dropped = upper.astype(I64), 16 - 8 * remainder.itemsize
    nonfinite = upper & 0x7FFF >= INF >> 16
    # Then the param has been written by someone else.
    below_zero = (upper & 0x7FFF == 0) & (remainder < 0)
    rest = np.where(nonfinite | below_zero, 0, remainder.astype(I64) << dropped)
    return _float((upper << 16) + rest)


def _encode_f16_split(values, random, nbits):
    sign, m = _bits(values) >> 16 & 0x8000, _bits(values) & ~SIGN
    dropped = 0 if nbits == 16 else 5  # of the 13 bits that a float16 lacks
    rounded = m
    if dropped:
        rounded = (m + (random >> (16 - dropped)).astype(I64)) & ~0x1F
    u = (rounded + 0x1000) & ~0x1FFF
    upper = np.where(u >= F16_OVERFLOW, F16_INF, (u - F16_REBIAS) >> 13)
    remainder = np.where(u >= F16_OVERFLOW, 0, (rounded - u) >> dropped)

    subnormal = m < F16_SMALLEST_NORMAL
    total = _float(m[subnormal]) * F32(2.0 ** (24 + nbits))
    if dropped:
        total = _randomly(total, random[subnormal])
    else:
        whole = total.astype(I64)
        total = whole + (total - whole.astype(F32) >= 0.5)
    unit = 2**nbits
    upper[subnormal] = (total + unit // 2) // unit
    remainder[subnormal] = total - upper[subnormal] * unit

    remainder[np.isnan(values)] = 0
    upper = sign | _nan_or(values, upper)
    return upper.astype(np.uint16), remainder.astype(f"int{nbits}")


def _decode_f16_split(upper, remainder):
    nbits = 8 * remainder.itemsize
    h, rest = upper.astype(I64) & 0x7FFF, remainder.astype(I64)
    # Both bounds are for a remainder whose param has been written by someone else.
    of_normal = np.clip(rest, -0x1000, 0xFFF) if nbits == 16 else rest * 32
    normal = _float((h << 13) + F16_REBIAS + of_normal)
    of_subnormal = np.minimum(rest, 0x7FFF - (h >> 8))
    total = np.maximum((h << nbits) + of_subnormal, 0)
    subnormal = total.astype(F32) * F32(2.0 ** -(24 + nbits))
    value = np.where((h > 0x400) | ((h == 0x400) & (rest >= 0)), normal, subnormal)
    value = np.where(h >= F16_INF, np.abs(_decode_f16(upper, None)), value)
    return np.where(upper >> 15 != 0, -value, value)


_FORMATS = {
    "bf16": (_encode_bf16, _decode_bf16),
    "bf16_stochastic": (_encode_bf16_stochastic, _decode_bf16),
    "f16_stochastic": (_encode_f16_stochastic, _decode_f16),
    "s8": (_encode_s8, _decode_s8),
    "u8": (_encode_u8, _decode_u8),
    "bf16_split8": (lambda *args: _encode_bf16_split(*args, 8), _decode_bf16_split),
    "bf16_split16": (lambda *args: _encode_bf16_split(*args, 16), _decode_bf16_split),
    "f16_split8": (lambda *args: _encode_f16_split(*args, 8), _decode_f16_split),
    "f16_split16": (lambda *args: _encode_f16_split(*args, 16), _decode_f16_split),
}
FORMATS = tuple(_FORMATS)


def encode(format, values, key, first=0):
    """Codes and extra of a 1-D float32 array whose elements are first, first + 1, ... of their tensor."""
    with np.errstate(all="ignore"):
        return _FORMATS[format][0](values, random16(key, first, len(values)))


def decode(format, codes, extra=None):
    """The float32 values."""
    with np.errstate(all="ignore"):
        return _FORMATS[format][1](codes, extra)
