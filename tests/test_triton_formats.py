"""The Triton kernels' storage formats give the oracle's bits, and lean machine code."""

import os

import format_oracle
import numpy as np
import pytest
import torch
from cases import DEVICE
from format_oracle import FORMATS, GROUP

pytest.importorskip("triton", reason="needs triton")

import triton
import triton.language as tl
from triton.compiler import ASTSource

from fused_optim.cli import codegen, kernels
from fused_optim.cli.machine_code import Needs, complaints
from fused_optim.triton_kernels import formats, specialize

IS_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
runs = pytest.mark.skipif(
    not IS_INTERPRETED and DEVICE.type == "cpu", reason="needs Triton: a GPU or its interpreter"
)
compiles = pytest.mark.skipif(IS_INTERPRETED, reason="needs triton's compiler, not its interpreter")
# Values are computed that are not chosen.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

N = 65536
NUM_WARPS = 4
GPU_BLOCK = 128 * NUM_WARPS  # 4 elements per thread
BLOCK = 8192 if IS_INTERPRETED else GPU_BLOCK
CODES = {"s8": np.int8, "u8": np.uint8}
EXTRAS = {
    "s8": np.uint16,
    "u8": np.uint16,
    "bf16_split8": np.int8,
    "bf16_split16": np.int16,
    "f16_split8": np.int8,
    "f16_split16": np.int16,
}


@triton.jit
def encode(values, codes, extra, first, index, random, FORMAT: tl.constexpr, BLOCK: tl.constexpr):
    value = tl.load(values + index)
    if FORMAT == "bf16":
        tl.store(codes + index, formats.encode_bf16(value))
    elif FORMAT == "bf16_stochastic":
        tl.store(codes + index, formats.encode_bf16_stochastic(value, random))
    elif FORMAT == "f16_stochastic":
        tl.store(codes + index, formats.encode_f16_stochastic(value, random))
    else:
        if FORMAT == "s8":
            code, rest = formats.encode_s8(value, BLOCK)
        elif FORMAT == "u8":
            code, rest = formats.encode_u8(value, random, BLOCK)
        elif FORMAT == "bf16_split8" or FORMAT == "bf16_split16":
            code, rest = formats.encode_bf16_split(value, random, extra.dtype.element_ty)
        else:
            code, rest = formats.encode_f16_split(value, random, extra.dtype.element_ty)
        tl.store(codes + index, code)
        if FORMAT == "s8" or FORMAT == "u8":
            group = first // 64 + tl.arange(0, BLOCK // 64)
            tl.store(extra + group, rest)
        else:
            tl.store(extra + index, rest)


@triton.jit
def decode(codes, extra, index, FORMAT: tl.constexpr):
    code = tl.load(codes + index)
    if FORMAT == "bf16" or FORMAT == "bf16_stochastic":
        value = formats.decode_bf16(code)
    elif FORMAT == "f16_stochastic":
        value = formats.decode_f16(code)
    elif FORMAT == "s8":
        value = formats.decode_s8(code, tl.load(extra + index // 64))
    elif FORMAT == "u8":
        value = formats.decode_u8(code, tl.load(extra + index // 64))
    elif FORMAT == "bf16_split8" or FORMAT == "bf16_split16":
        value = formats.decode_bf16_split(code, tl.load(extra + index))
    else:
        value = formats.decode_f16_split(code, tl.load(extra + index))
    return value


@triton.jit
def both_ways(
    values,
    codes,
    extra,
    old_codes,
    old_extra,
    decoded,
    keys,
    begin,
    FORMAT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Encode the values, the elements from `begin` on of a tensor; decode the old codes."""
    first = tl.program_id(0).to(tl.int64) * BLOCK
    index = first + tl.arange(0, BLOCK)
    random = formats.random16(first + begin, tl.load(keys), tl.load(keys + 1), BLOCK)
    tl.store(decoded + index, decode(old_codes, old_extra, index, FORMAT))
    encode(values, codes, extra, first, index, random, FORMAT, BLOCK)


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


@runs
@pytest.mark.parametrize("begin", [0, 8192, 2**33 - 4 * 8192 - 37, 2**40])
@pytest.mark.parametrize("format", FORMATS)
def test_bits_of_the_oracle(format, begin):
    generator = np.random.default_rng(begin)
    key = format_oracle.key(3, 5, 2, begin)
    values = any_float32(generator)
    code_dtype, extra_dtype = CODES.get(format, np.uint16), EXTRAS.get(format, np.uint8)
    n_extra = N // GROUP if extra_dtype == np.uint16 else N
    # All codes of 16 bits, and any remainder or scale beside any code.
    old_codes = generator.permutation(np.arange(N, dtype=np.uint16)).astype(code_dtype)
    old_extra = generator.integers(0, 65536, n_extra, dtype=np.uint16).astype(extra_dtype)
    codes, extra = on_device(old_codes), on_device(old_extra)
    decoded = torch.empty(N, device=DEVICE)
    both_ways[(N // BLOCK,)](
        on_device(values),
        codes,
        extra,
        on_device(old_codes),
        on_device(old_extra),
        decoded,
        on_device(np.array(key, np.uint32)),
        begin,
        FORMAT=format,
        BLOCK=BLOCK,
        num_warps=NUM_WARPS,
        **specialize.COMPILE_OPTIONS,
    )
    expected, expected_extra = format_oracle.encode(format, values, key, begin)
    assert_same(codes.cpu().numpy(), expected)
    assert_same(decoded.cpu().numpy(), format_oracle.decode(format, old_codes, old_extra))
    if expected_extra is not None:
        assert_same(extra.cpu().numpy(), expected_extra)


def compiled(format, target):
    def name(dtype):
        return {"i": "*i", "u": "*u"}[np.dtype(dtype).kind] + str(8 * np.dtype(dtype).itemsize)

    code, extra = name(CODES.get(format, np.uint16)), name(EXTRAS.get(format, np.uint8))
    tensors = {"values": "*fp32", "codes": code, "extra": extra, "old_codes": code}
    tensors |= {"old_extra": extra, "decoded": "*fp32", "keys": "*u32"}
    constants = {"FORMAT": format, "BLOCK": GPU_BLOCK}
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
@pytest.mark.parametrize("format", FORMATS)
def test_machine_code_is_lean(format):
    kernel = compiled(format, "sm_90")
    measured = codegen._measure(kernel, disassemble=True)
    accesses = {
        128: 1
    }  # values; of the codes and remainders the 16-bit ones are wide enough to count
    if format not in CODES:
        accesses[64] = 2 if format.endswith("split16") else 1
    # A scale takes one way through shared memory, from the threads that know it to those that store it.
    needs = Needs(accesses, accesses, max_registers=32, max_shared_nbytes=2048 * (format in CODES))
    print(f"{format}: {measured.registers} registers, {measured.shared_nbytes} bytes shared")
    assert complaints(needs, measured) == []
    # The largest of 64 elements, of which a thread has 4 and knows the largest by itself.
    assert kernel.asm["ptx"].count("shfl.sync") == (4 if format in CODES else 0)
