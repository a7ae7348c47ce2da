"""The Triton kernels' storage formats give the oracle's bits, and lean machine code."""

import os
from dataclasses import dataclass

import numpy as np
import pytest
import torch

from support import format_oracle
from support.cases import DEVICE
from support.format_oracle import GROUP

pytest.importorskip("triton", reason="needs triton")

import triton
import triton.language as tl
from triton.compiler import ASTSource

from fused_optim.codegen import compilation, kernels
from fused_optim.codegen.machine_code import Needs, complaints
from fused_optim.triton_kernels import formats, specialize, streams
from fused_optim.triton_kernels.streams import RUN

IS_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
runs = pytest.mark.skipif(
    not IS_INTERPRETED and DEVICE.type == "cpu", reason="needs Triton: a GPU or its interpreter"
)
compiles = pytest.mark.skipif(IS_INTERPRETED, reason="needs triton's compiler, not its interpreter")
# Values are computed that are not chosen.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

N = 65536
# A block as the kernels have it, or one that the interpreter is quick with.
PARTS = 2
NUM_WARPS = 1
GPU_BLOCK = PARTS * RUN.value * 32 * NUM_WARPS
BLOCK = 8192 if IS_INTERPRETED else GPU_BLOCK
CODES = {"s8": np.int8, "u8": np.uint8}
NOT_FINITE = {"s8": (127, -127, -128), "u8": (254, 255)}
EXTRAS = {
    "s8": np.uint16,
    "u8": np.uint16,
    "bf16_split8": np.int8,
    "bf16_split16": np.int16,
    "f16_split8": np.int8,
    "f16_split16": np.int16,
}
# format -> (storage, dtype of the stream). A bfloat16 rounded to nearest is no storage of its own.
STORED = {
    "bf16_stochastic": (streams.STOCHASTIC.value, tl.bfloat16),
    "f16_stochastic": (streams.STOCHASTIC.value, tl.float16),
    "s8": (streams.SIGNED8.value, tl.int8),
    "u8": (streams.ROOT8.value, tl.uint8),
    "bf16_split8": (streams.SPLIT8.value, tl.bfloat16),
    "bf16_split16": (streams.SPLIT16.value, tl.bfloat16),
    "f16_split8": (streams.SPLIT8.value, tl.float16),
    "f16_split16": (streams.SPLIT16.value, tl.float16),
}


@triton.jit
def both_ways(
    values,
    codes,
    extra,
    old_codes,
    old_extra,
    decoded,
    odd_codes,
    odd_values,
    keys,
    begin,
    STORAGE: tl.constexpr,
    DTYPE: tl.constexpr,
    PAIRED: tl.constexpr,
    SPECIAL: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Encode the values, the elements from `begin` on of a tensor; decode the old codes.

    odd_codes, odd_values: int32 of each block, whether SPECIAL is said to be needed.
    """
    program = tl.program_id(0).to(tl.int64)
    first = program * BLOCK
    numel = tl.num_programs(0).to(tl.int64) * BLOCK
    offsets = streams.offsets_of(PARTS, BLOCK)
    indices = ()
    for p in tl.static_range(PARTS):
        indices = indices + (first + offsets[p],)  # noqa: RUF005 (not in Triton)
    old = streams.load(old_codes, indices, numel, True, PARTS)
    beside = streams.load_extra(old_extra, first, indices, 0, True, STORAGE, PARTS, BLOCK)
    found = streams.decode(old, beside, SPECIAL, STORAGE, DTYPE, tl.float32, PARTS, BLOCK, False)
    if streams.has_special_codes(STORAGE):
        odd = streams.is_odd(found, beside, STORAGE, DTYPE, PARTS, BLOCK)
        tl.store(odd_codes + program, tl.max(odd.to(tl.int32), axis=0))
    for p in tl.static_range(PARTS):
        tl.store(decoded + indices[p], found[p])
    given = streams.load(values, indices, numel, True, PARTS)
    given = streams.to_encode(given, STORAGE, PARTS)
    largest = streams.largest_of(given, STORAGE, PARTS, BLOCK)
    odd = largest >= streams.safe(DTYPE)
    tl.store(odd_values + program, tl.max(odd.to(tl.int32), axis=0))
    key = (tl.load(keys), tl.load(keys + 1))
    streams.store(
        codes, extra, given, largest, first, indices, numel, key, first + begin,
        PAIRED, SPECIAL, STORAGE, DTYPE, PARTS, BLOCK, False,
    )  # fmt: skip


def on_device(array):
    return torch.from_numpy(array.copy()).to(DEVICE)


def any_float32(generator):
    """All kinds: any bits; of a float16's range; groups of one magnitude; special groups; small ones."""
    values = generator.integers(0, 2**32, N, dtype=np.uint32).view(np.float32)
    part = N // 8
    sizes = 2.0 ** generator.uniform(-32, 18, 2 * part)
    values[part : 3 * part] = generator.choice([-1, 1], 2 * part) * sizes
    sizes = np.repeat(2.0 ** generator.uniform(-140, 128, part // 16), GROUP)
    values[3 * part : 7 * part] = np.abs(generator.standard_normal(4 * part)) * np.minimum(
        sizes, 2.0**125
    )
    values[5 * part : 6 * part] *= generator.choice([-1, 1], part)
    special = [0.0, -0.0, np.inf, -np.inf, np.nan, 1.0, 65504.0, 65520.0, 1e-45, -1e-45, 2.0**-14]
    special = np.array([*special, 2.0**-14 - 2.0**-38, 3.4028234e38, 3.3895e38, -5e-5], np.float32)
    values[7 * part : 7 * part + len(special) * GROUP] = np.repeat(special, GROUP)
    values[-part // 2 :] = generator.choice(special, part // 2)
    values[-part // 4 :] = generator.integers(0, 1000, part // 4, dtype=np.uint32).view(np.float32)
    return values


def assert_same(ours, expected):
    if expected.dtype == np.float32:
        nan = np.isnan(expected)
        assert np.array_equal(np.isnan(ours), nan)
        ours, expected = ours[~nan].view(np.uint32), expected[~nan].view(np.uint32)
    assert np.array_equal(ours, expected)


@dataclass
class Outcome:
    """Of `both_ways`; the oracle's, and for each block whether SPECIAL was said to be needed."""

    codes: np.ndarray
    extra: np.ndarray
    decoded: np.ndarray
    odd_codes: np.ndarray
    odd_values: np.ndarray
    expected: np.ndarray
    expected_extra: np.ndarray | None
    expected_decoded: np.ndarray


def outcome(format, begin, values, paired, special):
    generator = np.random.default_rng(begin)
    key = format_oracle.key(3, 5, 2, begin)
    code_dtype, extra_dtype = CODES.get(format, np.uint16), EXTRAS.get(format, np.uint8)
    n_extra = N // GROUP if extra_dtype == np.uint16 else N
    # All codes of 16 bits, and any remainder or scale beside any code.
    old_codes = generator.permutation(np.arange(N, dtype=np.uint16)).astype(code_dtype)
    old_extra = generator.integers(0, 65536, n_extra, dtype=np.uint16).astype(extra_dtype)
    if format in NOT_FINITE:  # the sign of their scale says so
        is_odd = np.isin(old_codes, NOT_FINITE[format]).reshape(-1, GROUP).any(axis=1)
        old_extra |= is_odd.astype(np.uint16) << 15
    codes, extra = on_device(old_codes), on_device(old_extra)
    decoded = torch.empty(N, device=DEVICE)
    odd = torch.zeros((2, N // BLOCK), dtype=torch.int32, device=DEVICE)
    storage, dtype = STORED[format]
    both_ways[(N // BLOCK,)](
        on_device(values),
        codes,
        extra,
        on_device(old_codes),
        on_device(old_extra),
        decoded,
        odd[0],
        odd[1],
        on_device(np.array(key, np.uint32)),
        begin,
        STORAGE=storage,
        DTYPE=dtype,
        PAIRED=paired,
        SPECIAL=special,
        PARTS=PARTS,
        BLOCK=BLOCK,
        num_warps=NUM_WARPS,
        **specialize.COMPILE_OPTIONS,
    )
    expected, expected_extra = format_oracle.encode(format, values, key, begin)
    return Outcome(
        codes.cpu().numpy(),
        extra.cpu().numpy(),
        decoded.cpu().numpy(),
        *odd.bool().cpu().numpy(),
        expected,
        expected_extra,
        format_oracle.decode(format, old_codes, old_extra),
    )


@runs
# Pairs of random bits are shared only from a multiple of 32 on, and where their numbers' upper bits agree.
@pytest.mark.parametrize(
    ("begin", "paired"),
    [
        (0, True),
        (8192, False),
        (2**33 - 4 * 8192 - 37, False),
        (2**40, True),
        (3 * 2**33 + 32, True),
    ],
)
@pytest.mark.parametrize("format", STORED)
def test_bits_of_the_oracle(format, begin, paired):
    values = any_float32(np.random.default_rng(begin + 1))
    found = outcome(format, begin, values, paired, special=True)
    assert_same(found.codes, found.expected)
    assert_same(found.decoded, found.expected_decoded)
    if found.expected_extra is not None:
        assert_same(found.extra, found.expected_extra)


@runs
@pytest.mark.parametrize("format", STORED)
def test_without_special_the_bits_are_the_same_or_a_block_says_that_it_needs_it(format):
    generator = np.random.default_rng(1)
    values = any_float32(generator)
    # Half of the blocks have nothing that is not finite, or large.
    limit = np.float32(65504 if format.startswith("f16") else 2.0**127)
    calm = np.abs(values) < limit
    if format == "u8":
        calm &= values >= 0
    values[: N // 2] = np.where(calm[: N // 2], values[: N // 2], 0.5)
    found = outcome(format, 0, values, paired=True, special=False)
    of_block = found.codes.reshape(-1, BLOCK)
    wrong = (of_block != found.expected.reshape(-1, BLOCK)).any(axis=1)
    assert not (wrong & ~found.odd_values).any()
    assert wrong.any() and not found.odd_values[: N // 2 // BLOCK].any()
    if found.expected_extra is not None:
        per_block = len(found.extra) * BLOCK // N
        extra, expected = (a.reshape(-1, per_block) for a in (found.extra, found.expected_extra))
        assert not ((extra != expected).any(axis=1) & ~found.odd_values).any()
    nan = np.isnan(found.expected_decoded)
    same = found.decoded.view(np.uint32) == found.expected_decoded.view(np.uint32)
    wrong = ~(same | (nan & np.isnan(found.decoded))).reshape(-1, BLOCK).all(axis=1)
    assert not (wrong & ~found.odd_codes).any()


@triton.jit
def nearest(values, codes, decoded, BLOCK: tl.constexpr):
    index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    code = formats.encode_nearest_bf16(tl.load(values + index))
    tl.store(codes + index, code)
    tl.store(decoded + index, formats.decode_bf16(code))


@runs
def test_bfloat16_rounded_to_nearest():
    """What the interpreter's own casts get wrong."""
    values = any_float32(np.random.default_rng(0))
    codes, decoded = on_device(np.zeros(N, np.uint16)), torch.empty(N, device=DEVICE)
    nearest[(N // BLOCK,)](on_device(values), codes, decoded, BLOCK=BLOCK)
    expected, _ = format_oracle.encode("bf16", values, format_oracle.key(0, 0, 0, 0), 0)
    assert_same(codes.cpu().numpy(), expected)
    assert_same(decoded.cpu().numpy(), format_oracle.decode("bf16", expected, None))


def compiled(format, target):
    def name(dtype):
        return {"i": "*i", "u": "*u"}[np.dtype(dtype).kind] + str(8 * np.dtype(dtype).itemsize)

    code, extra = name(CODES.get(format, np.uint16)), name(EXTRAS.get(format, np.uint8))
    tensors = {"values": "*fp32", "codes": code, "extra": extra, "old_codes": code}
    tensors |= {"old_extra": extra, "decoded": "*fp32", "keys": "*u32"}
    tensors |= {"odd_codes": "*i32", "odd_values": "*i32"}
    storage, dtype = STORED[format]
    constants = {"STORAGE": storage, "DTYPE": dtype, "PAIRED": True, "SPECIAL": False}
    constants |= {"PARTS": PARTS, "BLOCK": GPU_BLOCK}
    signature = tensors | {"begin": "i64"} | dict.fromkeys(constants, "constexpr")
    index = both_ways.arg_names.index
    source = ASTSource(
        both_ways,
        {argument: signature[argument] for argument in both_ways.arg_names},
        {(index(name),): value for name, value in constants.items()},
        {(index(name),): [["tt.divisibility", 16]] for name in tensors},
    )
    options = {"num_warps": NUM_WARPS, **specialize.COMPILE_OPTIONS}
    return triton.compile(source, target=kernels.gpu_target(target), options=options)


@compiles
@pytest.mark.parametrize("format", STORED)
def test_machine_code_is_lean(format):
    kernel = compiled(format, "sm_90")
    measured = compilation._measure(kernel, disassemble=True)
    # Values; of the codes and remainders, those of 16 bits are wide enough to count.
    accesses = {128: PARTS}
    if format not in CODES:
        accesses[64] = PARTS * (2 if format.endswith("split16") else 1)
    # No thread needs what another one has, but for the largest of 64 elements: a thread has 8 of them.
    needs = Needs(accesses, accesses, max_registers=64)
    assert complaints(needs, measured) == []
    assert kernel.asm["ptx"].count("shfl.sync") == (3 if format in CODES else 0)
