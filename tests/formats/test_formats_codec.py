"""The C++ code of the storage formats: bit for bit the oracle's."""

import numpy as np
import pytest
import torch

from fused_optim import backends
from support.format_oracle import FORMATS, decode, encode
from support.format_oracle import key as key_of

CODEC = backends.codec()
STORAGES = {  # of the oracle's names: storage and dtype as csrc/kernel.h has them, and the stream's number
    "bf16": ("plain", torch.bfloat16, 2),
    "bf16_stochastic": ("stochastic", torch.bfloat16, 3),
    "f16_stochastic": ("stochastic", torch.float16, 0),
    "s8": ("signed8", torch.int8, 2),
    "u8": ("root8", torch.uint8, 4),
    "bf16_split8": ("split8", torch.bfloat16, 0),
    "bf16_split16": ("split16", torch.bfloat16, 0),
    "f16_split8": ("split8", torch.float16, 0),
    "f16_split16": ("split16", torch.float16, 0),
}
N = 70001  # parts of 16,384, and a group that is not full


def wild_floats() -> np.ndarray:
    """Every exponent beside every other, then groups of like sizes, then what has a name."""
    random = np.random.default_rng(0)
    wild = random.integers(0, 2**32, N, dtype=np.uint32).view(np.float32)
    tame = random.standard_normal(N).astype(np.float32)
    tame *= np.repeat(np.exp(random.uniform(-80, 80, N // 64 + 1)), 64)[:N].astype(np.float32)
    named = np.array(
        [0.0, -0.0, np.inf, -np.inf, np.nan, 1e-45, -1e-45, 1.1754944e-38, 3.4028235e38, -3.4028235e38,
         2.0**-14, 2.0**-24, 2.0**-25, 65504.0, 65520.0, 65519.996, 3.3895314e38, 3.3961775e38],
        np.float32,
    )  # fmt: skip
    one_per_group = tame.copy()
    one_per_group[:: 64 * 3] = np.resize(named, len(one_per_group[:: 64 * 3]))
    zeros = np.zeros(N, np.float32)
    return np.stack(
        [wild, tame, np.resize(named, N), one_per_group, zeros, np.abs(tame), np.abs(wild)]
    )


def transcode(packs, name, stream, extra, values, key, threads=1):
    storage, dtype, _ = STORAGES[name]
    dtype_name = str(dtype).removeprefix("torch.")
    address = 0 if extra is None else extra.ctypes.data
    CODEC.transcode(
        packs,
        storage,
        dtype_name,
        stream=stream.ctypes.data,
        extra=address,
        values=values.ctypes.data,
        numel=len(values),
        key=key,
        num_threads=threads,
    )


@pytest.mark.parametrize("isa", CODEC.isas() if CODEC else [])
@pytest.mark.parametrize("name", STORAGES)
def test_bits_of_the_oracle(name, isa):
    before = CODEC.isa()
    CODEC.set_isa(isa)
    try:
        for row, values in enumerate(wild_floats()):
            numbers = (12345, 3, STORAGES[name][2], 7 + row)
            key = key_of(*numbers)
            codes, extra = encode(name, values, key)
            mine, my_extra = np.zeros_like(codes), None if extra is None else np.zeros_like(extra)
            transcode(True, name, mine, my_extra, values, numbers, threads=1 + row % 2)
            assert np.array_equal(mine, codes)
            if extra is not None:
                assert np.array_equal(my_extra, extra)
            decoded = np.full_like(values, 7)
            transcode(False, name, mine, my_extra, decoded, numbers, threads=1 + row % 2)
            expected = decode(name, codes, extra)
            assert np.array_equal(decoded.view(np.uint32), expected.view(np.uint32))
    finally:
        CODEC.set_isa(before)


@pytest.mark.parametrize("name", [name for name in STORAGES if "split" in name])
def test_any_upper_part_beside_any_remainder(name):
    """As after someone else has written the param."""
    random = np.random.default_rng(1)
    upper = np.resize(np.arange(65536, dtype=np.uint16), N * 2)
    info = np.iinfo(np.int8 if name.endswith("8") else np.int16)
    rest = random.integers(info.min, info.max, len(upper), info.dtype, endpoint=True)
    decoded = np.zeros(len(upper), np.float32)
    transcode(False, name, upper, rest, decoded, (0, 0, 0, 0))
    expected = decode(name, upper, rest)
    assert np.array_equal(decoded.view(np.uint32), expected.view(np.uint32))


def test_every_format_of_the_oracle_is_there():
    assert STORAGES.keys() == set(FORMATS)


def test_unknown_names_are_refused():
    numbers = np.zeros(4, np.float32)
    nothing = {"stream": 0, "extra": 0, "values": numbers.ctypes.data, "numel": 0, "num_threads": 1}
    with pytest.raises(ValueError, match="unknown: packed"):
        CODEC.transcode(True, "packed", "int8", key=(0, 0, 2, 0), **nothing)
    with pytest.raises(ValueError, match="stream 1 cannot be packed"):
        CODEC.transcode(True, "signed8", "int8", key=(0, 0, 1, 0), **nothing)
