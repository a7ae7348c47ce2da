"""What the storage formats promise, of the oracle that the kernels' bits are compared with."""

import numpy as np
import pytest

from support.format_oracle import FORMATS, GROUP, decode, encode, key, random16

KEYS = [key(seed=0, parameter_index=i, stream=2, step=i + 1) for i in range(4)]
UPPERS = np.arange(65536, dtype=np.uint16)
SIXTEEN_BITS = ("bf16", "bf16_stochastic", "f16_stochastic")
SPLITS = ("bf16_split8", "bf16_split16", "f16_split8", "f16_split16")
EIGHT_BITS = ("s8", "u8")
SIGMAS = 5.0  # one of 1.7 million independent means lies outside
REMAINDERS = {
    np.int8: range(-128, 128),
    np.int16: [
        *(-0x8000, -0x7FFF, -0x7FFE, -0x4000, -0x1001, -0x1000, -0xFFF, -256, -3, -2, -1, 0),
        *(1, 2, 3, 255, 0xFFE, 0xFFF, 0x1000, 0x4000, 0x7FFB, 0x7FFC, 0x7FFD, 0x7FFE, 0x7FFF),
    ],
}


def floats(bits):
    return np.asarray(bits, np.uint32).view(np.float32)


def bits(values):
    return values.view(np.uint32)


def magnitudes(exponent):
    """All float32 with this biased exponent."""
    return floats(np.arange(2**23, dtype=np.uint32) + np.uint32(exponent << 23))


def wild(n, seed=0):
    """Any finite float32, small ones and large ones beside each other."""
    values = floats(np.random.default_rng(seed).integers(0, 2**32, n, dtype=np.uint32))
    return np.where(np.isfinite(values), values, np.float32(0))


def same(a, b):
    return np.array_equal(bits(a)[~np.isnan(a)], bits(b)[~np.isnan(a)]) and np.array_equal(
        np.isnan(a), np.isnan(b)
    )


def rounded(format, values, key=KEYS[0]):
    return decode(format, *encode(format, values, key))


# Random bits


def test_key_is_made_by_splitmix64():
    """0xE220... is the generator's first number for seed 0, as its authors publish it."""
    first = 0xE220A8397B1DCDAF
    # Each of the three more rounds starts from 0 again.
    assert key(0, first, first, first) == (first & 0xFFFFFFFF, first >> 32)


def test_keys_differ():
    words = [
        (s, p, m, t) for s in (0, 1, 2**63) for p in range(20) for m in (0, 2, 3) for t in range(50)
    ]
    assert len({key(*word) for word in words}) == len(words)


def test_random_bits_belong_to_the_element():
    whole = random16(KEYS[0], 0, 4096)
    for first in (64, 192, 4032):
        assert np.array_equal(random16(KEYS[0], first, 64), whole[first : first + 64])
    assert not np.array_equal(random16(KEYS[0], 2**33, 64), whole[:64])


def test_each_random_bit_is_fair():
    n = 2**18
    for k in KEYS:
        random = random16(k, 0, n)
        for bit in range(16):
            mean = (random >> bit & 1).mean()
            assert abs(mean - 0.5) < SIGMAS * 0.5 / np.sqrt(n)


def test_random_numbers_are_uniform():
    n, n_bins = 2**20, 1024
    counts = np.bincount(random16(KEYS[0], 0, n) >> 6, minlength=n_bins)
    chi2 = ((counts - n / n_bins) ** 2 / (n / n_bins)).sum()
    assert abs(chi2 - (n_bins - 1)) < SIGMAS * np.sqrt(2 * (n_bins - 1))


def assert_uncorrelated(a, b):
    """All 16 x 16 pairs of bits, and the numbers."""
    bits_of = [(x[:, None] >> np.arange(16) & 1).astype(np.float32) - 0.5 for x in (a, b)]
    pairs = 4 * bits_of[0].T @ bits_of[1] / len(a)
    assert np.abs(pairs).max() < SIGMAS / np.sqrt(len(a))
    assert abs(np.corrcoef(a, b)[0, 1]) < SIGMAS / np.sqrt(len(a))


@pytest.mark.parametrize("lag", [1, 2, 3, 4, 15, 16, 17, 31, 32, 64, 512])
def test_elements_are_uncorrelated(lag):
    random = random16(KEYS[0], 0, 2**16 + lag)
    assert_uncorrelated(random[lag:], random[:-lag])


@pytest.mark.parametrize(
    "other", [(0, 0, 2, 2), (0, 0, 2, 3), (0, 1, 2, 1), (0, 0, 3, 1), (1, 0, 2, 1), (0, 0, 0, 1)]
)
def test_steps_params_streams_and_seeds_are_uncorrelated(other):
    assert_uncorrelated(random16(key(0, 0, 2, 1), 0, 2**16), random16(key(*other), 0, 2**16))


# What is stored stays


@pytest.mark.parametrize("format", SIXTEEN_BITS)
def test_stored_16_bits_stay(format):
    values = decode(format, UPPERS)
    for first in range(0, 64 * 2**16, 2**16):  # 64 random numbers for each
        again, _ = encode(format, values, KEYS[0], first)
        finite = ~np.isnan(values)
        assert np.array_equal(again[finite], UPPERS[finite])
        assert np.isnan(decode(format, again)[~finite]).all()


@pytest.mark.parametrize("format", SPLITS)
def test_param_survives_any_remainder(format):
    """Any param beside any remainder, as after a write from outside, is a float32 that rounds to it."""
    for i, remainder in enumerate(REMAINDERS[np.int8 if format.endswith("8") else np.int16]):
        remainders = np.full(65536, remainder, "int8" if format.endswith("8") else "int16")
        values = decode(format, UPPERS, remainders)
        codes, again = encode(format, values, KEYS[i % 4], first=i * 65536)
        number = ~np.isnan(values)
        assert np.array_equal(codes[number], UPPERS[number])
        assert same(decode(format, codes, again), values)
        of_param = decode("bf16" if format.startswith("bf16") else "f16_stochastic", UPPERS)
        assert np.array_equal(np.isnan(of_param), ~number)
        assert np.array_equal(values[np.isinf(of_param)], of_param[np.isinf(of_param)])
        assert np.array_equal(np.signbit(values), np.signbit(of_param))


@pytest.mark.parametrize("format", SPLITS)
def test_zero_remainder_is_the_param_itself(format):
    zeros = np.zeros(65536, "int8" if format.endswith("8") else "int16")
    of_param = decode("bf16" if format.startswith("bf16") else "f16_stochastic", UPPERS)
    assert same(decode(format, UPPERS, zeros), of_param)


@pytest.mark.parametrize("format", FORMATS)
def test_zeros_stay_zeros(format):
    values = np.zeros(100, np.float32)
    assert np.array_equal(rounded(format, values), values)
    signs = np.signbit(rounded(format, -values))
    assert np.array_equal(signs, np.full(100, format not in EIGHT_BITS))


# Exact masters


@pytest.mark.parametrize("exponent", [0, 1, 127, 254])
@pytest.mark.parametrize("sign", [1, -1])
def test_bf16_split16_is_float32(exponent, sign):
    values = np.float32(sign) * magnitudes(exponent)
    # Those round to infinity.
    values = values[(bits(values) & 0x7FFFFFFF) < 0x7F7F8000]
    assert np.array_equal(bits(rounded("bf16_split16", values)), bits(values))


def test_bf16_split16_overflows_as_the_param_does():
    assert np.isposinf(rounded("bf16_split16", floats([0x7F7F8000, 0x7F7FFFFF]))).all()


@pytest.mark.parametrize("exponent", [110, 112, 113, 127, 142])
def test_f16_split16_is_float32_from_2_to_the_minus_17_on(exponent):
    values = -magnitudes(exponent)
    values = values[np.abs(values) < 65520]
    assert np.array_equal(bits(rounded("f16_split16", values)), bits(values))


@pytest.mark.parametrize("exponent", [0, 1, 86, 100, 109])
def test_f16_split16_is_close_below(exponent):
    values = magnitudes(exponent)[::8]
    error = np.abs(rounded("f16_split16", values).astype(float) - values)
    assert error.max() <= 2.0**-41


@pytest.mark.parametrize(
    ("format", "upper"),
    [
        ("f16_split16", "f16"),
        ("f16_split8", "f16"),
        ("bf16_split16", "bf16"),
        ("bf16_split8", "bf16"),
    ],
)
def test_upper_part_is_the_nearest_16_bit_number(format, upper):
    """Except for ties, which go away from zero, and what has been rounded to fewer bits before."""
    values = np.concatenate(
        [wild(2**18), np.float32(2.0**-14) * wild(2**18).view(np.int32) / 2**31]
    )
    values = values.astype(np.float32)
    codes, extra = encode(format, values, KEYS[0])
    values = decode(format, codes, extra)
    with np.errstate(over="ignore"):
        nearest = values.astype(np.float16).view(np.uint16)
    if upper == "bf16":
        nearest, _ = encode("bf16", values, KEYS[0])
    half = -(2 ** (8 * extra.itemsize - 1))
    tie = (extra == half) | ((upper == "f16") & (extra == -0x1000))
    assert np.array_equal(codes[~tie], nearest[~tie])


# Stochastic rounding


def assert_unbiased(mean, value, low, high, n, resolution):
    """A binomial mean within SIGMAS, beside what the number of random bits allows."""
    probability = np.clip((value - low) / (high - low), 0, 1)
    bound = SIGMAS * (high - low) * np.sqrt(probability * (1 - probability) / n)
    assert (np.abs(mean - value) <= bound + resolution * (high - low)).all()


@pytest.mark.parametrize(
    ("format", "exponents"),
    [
        ("bf16_stochastic", (0, 1, 100, 127, 200)),
        ("f16_stochastic", (103, 108, 112, 113, 127, 140)),
        ("bf16_split8", (0, 1, 100, 127, 200)),
        ("f16_split8", (96, 103, 108, 112, 113, 127, 140)),
    ],
)
@pytest.mark.parametrize("sign", [1, -1])
def test_rounding_is_unbiased(format, exponents, sign):
    n = 2**16
    mantissas = np.random.default_rng(1).integers(0, 2**23, len(exponents) * 8, dtype=np.uint32)
    values = floats(np.repeat(np.array(exponents, np.uint32) << 23, 8) | mantissas)
    for i, value in enumerate(np.float32(sign) * values):
        decoded = rounded(format, np.full(n, value, np.float32), key(7, 0, 2, i)).astype(float)
        low, high = decoded.min(), decoded.max()
        assert low <= value <= high and len(np.unique(decoded)) <= 2
        if low < high:
            assert_unbiased(decoded.mean(), float(value), low, high, n, 2.0**-16)


def test_roots_are_unbiased_from_one_code_on():
    n_groups = 2**12
    root = np.geomspace(1e-3, 0.25, GROUP)
    values = (root**2).astype(np.float32)
    decoded = np.sqrt(rounded("u8", np.tile(values, n_groups)).astype(float))
    decoded = decoded.reshape(n_groups, GROUP)
    scale = decode("bf16", encode("u8", values, KEYS[0])[1])[0].astype(float)
    root = np.sqrt(values.astype(float))
    low = np.floor(root / scale) * scale
    # 2**-16 of the random bits; three roundings of codes up to 253 < 2**8, in quanta.
    resolution = 2.0**-16 + 3 * 2.0**8 * 2.0**-24
    is_above = root >= scale
    assert is_above.sum() > 50
    assert_unbiased(
        decoded.mean(0)[is_above],
        root[is_above],
        low[is_above],
        low[is_above] + scale,
        n_groups,
        resolution,
    )


# 8 bits


def scales_of_elements(scales, n):
    return np.repeat(decode("bf16", scales).astype(float), GROUP)[:n]


@pytest.mark.parametrize("n", [1, 63, 64, 65, 4096 + 17])
@pytest.mark.parametrize("magnitude", [1.0, 1e-10, 1e30])
def test_signed_codes_are_close(n, magnitude):
    values = (np.random.default_rng(0).standard_t(3, n) * magnitude).astype(np.float32)
    codes, scales = encode("s8", values, KEYS[0])
    assert scales.shape == (-(-n // GROUP),)
    error = np.abs(decode("s8", codes, scales).astype(float) - values)
    # Half a quantum, and the roundings of up to 126 < 2**7 quanta: quotient, inverse, product.
    scale = scales_of_elements(scales, n)
    assert (error <= scale * (0.5 + 3 * 2.0**7 * 2.0**-24)).all()
    largest = np.repeat(np.maximum.reduceat(np.abs(values), np.arange(0, n, GROUP)), GROUP)[:n]
    assert (scale <= largest.astype(float) / 126 * (1 + 2.0**-7) * (1 + 2.0**-22)).all()


@pytest.mark.parametrize("n", [1, 63, 64, 65, 4096 + 17])
@pytest.mark.parametrize("magnitude", [1.0, 1e-30, 1e30])
def test_root_codes_are_close(n, magnitude):
    values = (np.random.default_rng(0).standard_t(3, n) ** 2 * magnitude).astype(np.float32)
    codes, scales = encode("u8", values, KEYS[0])
    root = np.sqrt(decode("u8", codes, scales).astype(float))
    scale = scales_of_elements(scales, n)
    # One quantum, and the roundings of up to 253 < 2**8 quanta: root, quotient, inverse, product, square.
    assert (
        np.abs(root - np.sqrt(values.astype(float))) < scale * (1 + 5 * 2.0**8 * 2.0**-24)
    ).all()
    largest = np.repeat(np.maximum.reduceat(np.sqrt(values), np.arange(0, n, GROUP)), GROUP)[:n]
    assert (scale <= largest.astype(float) / 253 * (1 + 2.0**-7) * (1 + 2.0**-22)).all()


def test_finite_8_bits_stay_finite():
    """Up to where a square can be rounded beyond the largest float32."""
    largest = floats([0x7F7FFFFF])
    for factor in np.linspace(0.25, 1, 400, dtype=np.float32):
        assert np.isfinite(rounded("s8", factor * largest)).all()
        if factor < 0.9995:
            assert np.isfinite(rounded("u8", np.repeat(factor * largest, 64))).all()


@pytest.mark.parametrize("values", [
    floats(np.arange(1, 4097)),
    np.geomspace(1e-45, 3e38, 4096).astype(np.float32),
    np.abs(wild(2**16)),
], ids=["subnormal", "geometric", "wild"])  # fmt: skip
def test_second_moments_never_become_zero(values):
    values = np.random.default_rng(0).permutation(values)
    for k in KEYS:
        assert ((rounded("u8", values, k) > 0) == (values > 0)).all()


def test_each_smallest_second_moment_alone():
    for i in range(1, 200):
        assert rounded("u8", floats([i]))[0] > 0


@pytest.mark.parametrize("format", FORMATS)
def test_nan_and_inf_stay_where_they_are(format):
    values = np.abs(wild(4096)) if format == "u8" else wild(4096)
    generator = np.random.default_rng(2)
    places = generator.choice(4096, 96, replace=False)
    nans, infs = places[:48], places[48:]
    spoiled, zeroed = values.copy(), values.copy()
    zeroed[places] = 0
    payloads = generator.integers(1, 2**23, 48, dtype=np.uint32)
    signs = generator.integers(0, 2, 48, dtype=np.uint32) << 31
    spoiled[nans] = floats(0x7F800000 | payloads | signs)
    spoiled[infs] = np.inf if format == "u8" else np.copysign(np.inf, generator.normal(size=48))
    codes, extra = encode(format, spoiled, KEYS[0])
    decoded = decode(format, codes, extra)
    assert np.isnan(decoded[nans]).all()
    assert np.array_equal(decoded[infs], spoiled[infs])
    others = np.delete(np.arange(4096), places)
    expected = decode(format, *encode(format, zeroed, KEYS[0]))
    assert same(decoded[others], expected[others])


@pytest.mark.parametrize("format", EIGHT_BITS)
def test_groups_without_finite_elements(format):
    values = np.array([np.nan] * 64 + [np.inf] * 64 + [np.nan, np.inf] * 32 + [1.0], np.float32)
    assert same(rounded(format, values)[:192], values[:192])
    assert rounded(format, values)[192] == pytest.approx(1, abs=0.01)


def test_negative_second_moments_are_not_numbers():
    values = np.array([1.0, -1e-45, -1.0, -np.inf, -0.0], np.float32)
    decoded = rounded("u8", values)
    assert np.isnan(decoded[1:4]).all() and decoded[4] == 0 and decoded[0] > 0.9


@pytest.mark.parametrize("format", FORMATS)
def test_parts_are_encoded_as_the_whole(format):
    values = np.abs(wild(640))
    codes, extra = encode(format, values, KEYS[0])
    part, extra_of_part = encode(format, values[320:], KEYS[0], first=320)
    assert np.array_equal(part, codes[320:])
    if extra is not None:
        begin = 320 // GROUP if format in EIGHT_BITS else 320
        assert np.array_equal(extra_of_part, extra[begin:])
