"""The same bits for any thread count, cut, alignment, layout and instruction set.

Compared are all bits of params and states; a NaN is a NaN, whatever its payload and sign.
"""

import functools
import hashlib
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from fused_optim import _C
from support.cases import CASES, DEVICE, DTYPES, Case, n_steps_of_all
from support.marks import all_cases, each_optimizer, every_dtype, needs_cpu_kernels
from support.processes import python
from support.program import SCALARS, Program, Streams, assert_same_bits, bits, joined, wild

# More elements than stay on the calling thread (64 K), several chunks, and an odd rest.
ROWS, COLUMNS = 277, 257
NUMEL = ROWS * COLUMNS
SMALL = 1009


@pytest.fixture(autouse=True)
def restore_switches() -> Iterator[None]:
    isa, threads = _C.isa(), torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    _C.set_isa(isa)
    torch.set_num_threads(threads)
    torch.set_flush_denormal(False)


def run(
    case: Case,
    dtype: torch.dtype,
    numel: int = NUMEL,
    cut: Callable[[Tensor], list[Tensor]] = lambda values: [values.clone()],
    cut_grad: Callable[[Tensor], list[Tensor]] | None = None,
    move_state: Callable[[Tensor], Tensor] | None = None,
) -> Streams:
    """Params and states after some steps on the kernels, pieces joined in order."""
    params = cut(wild(numel, dtype, seed=0))
    program = Program(
        case.fused(params), params, lambda step: (cut_grad or cut)(wild(numel, dtype, step + 1))
    )
    for _ in range(n_steps_of_all(case)):
        program.step()
        assert program.opt.last_step.tensors == {case.backend: len(params)}
        if move_state:
            for state in program.opt.state.values():
                for key in state.keys() - SCALARS:
                    state[key] = move_state(state[key])
    return joined(program.harvest())


@functools.lru_cache(maxsize=2 * len(CASES) * len(DTYPES))
def reference(case: Case, dtype: torch.dtype, numel: int = NUMEL) -> Streams:
    """One contiguous tensor on one thread with the best instruction set."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    found = run(case, dtype, numel)
    torch.set_num_threads(threads)
    return found


def test_the_data_can_tell() -> None:
    """Equal bits would prove little if the data had no subnormals, or 0 and -0 looked alike."""
    for dtype in DTYPES:
        values = wild(NUMEL, dtype, seed=0)
        subnormal = (values != 0) & (values.abs() < torch.finfo(dtype).tiny)
        assert subnormal.sum() > NUMEL / 20
        assert values.isnan().any() and (values == float("inf")).any()
        zero = torch.zeros(1, dtype=dtype, device=DEVICE)
        assert not torch.equal(bits(zero), bits(-zero))
        assert torch.equal(bits(values), bits(torch.where(values.isnan(), -values, values)))


@needs_cpu_kernels
@every_dtype
@each_optimizer
def test_thread_count(case: Case, dtype: torch.dtype) -> None:
    torch.set_num_threads(2)
    assert_same_bits(run(case, dtype), reference(case, dtype))


def _pieces(values: Tensor) -> list[Tensor]:
    """Small tensors of every length up to 3 tiles and of some thousands: each tail position."""
    lengths, total = [], 0
    while total < len(values):
        length = len(lengths) % 49 if len(lengths) % 3 else 4096 - len(lengths) % 5
        lengths.append(min(length, len(values) - total))
        total += lengths[-1]
    return [piece.clone() for piece in values.split(lengths)]


@every_dtype
@each_optimizer
def test_chunk_boundaries_and_tails(case: Case, dtype: torch.dtype) -> None:
    assert_same_bits(run(case, dtype, cut=_pieces), reference(case, dtype))


def _misaligned(values: Tensor) -> Tensor:
    """A slice that starts at an odd element of a flat buffer, another one each time."""
    offset = values.numel() % 5 * 2 + 1
    flat = values.new_zeros(values.numel() + offset)
    flat[offset:] = values.flatten()
    return flat[offset:].view(values.shape)


@every_dtype
@each_optimizer
def test_alignment(case: Case, dtype: torch.dtype) -> None:
    def cut(values: Tensor) -> list[Tensor]:
        return [_misaligned(piece) for piece in values.split((SMALL, SMALL + 1, SMALL + 2, 2, 3))]

    numel = 3 * SMALL + 8
    moved = run(case, dtype, numel, cut, move_state=_misaligned)
    assert_same_bits(moved, reference(case, dtype, numel))


def _matrix(values: Tensor) -> list[Tensor]:
    return [values.view(ROWS, COLUMNS).clone()]


def _transposed(values: Tensor) -> list[Tensor]:
    return [values.view(ROWS, COLUMNS).t().contiguous().t()]


def _sliced(values: Tensor) -> list[Tensor]:
    wide = values.new_full((ROWS, COLUMNS + 3), 7.0)
    wide[:, :COLUMNS] = values.view(ROWS, COLUMNS)
    return [wide[:, :COLUMNS]]


LAYOUTS = [_matrix, _transposed, _sliced]


@pytest.mark.parametrize("cut_grad", LAYOUTS)
@pytest.mark.parametrize("cut", LAYOUTS)
@every_dtype
@each_optimizer
def test_layout(
    case: Case,
    dtype: torch.dtype,
    cut: Callable[[Tensor], list[Tensor]],
    cut_grad: Callable[[Tensor], list[Tensor]],
) -> None:
    torch.set_num_threads(2)
    assert_same_bits(run(case, dtype, cut=cut, cut_grad=cut_grad), reference(case, dtype))


@needs_cpu_kernels
@every_dtype
@all_cases
def test_every_isa(case: Case, dtype: torch.dtype) -> None:
    isas = _C.isas()
    assert "baseline" in isas or "neon" in isas
    expected = reference(case, dtype, SMALL)
    for isa in isas:
        _C.set_isa(isa)
        assert _C.isa() == isa
        assert_same_bits(run(case, dtype, SMALL), expected)


@needs_cpu_kernels
@every_dtype
@each_optimizer
def test_flush_denormal_reaches_every_thread_and_isa(case: Case, dtype: torch.dtype) -> None:
    """torch.set_flush_denormal is per thread: workers must take over the caller's setting."""
    torch.set_num_threads(2)
    kept = run(case, dtype)  # starts the workers, and makes the data, with subnormals kept
    if not torch.set_flush_denormal(True):
        pytest.skip("needs another ISA: this one cannot flush subnormals")
    flushed = run(case, dtype)
    torch.set_num_threads(1)
    for isa in _C.isas():
        _C.set_isa(isa)
        assert_same_bits(run(case, dtype), flushed)
    if dtype == torch.float32:
        assert not torch.equal(bits(kept["param"]), bits(flushed["param"])), "nothing was flushed"


def digest() -> str:
    """One hash over every case and dtype."""
    whole = hashlib.sha256()
    for dtype in DTYPES:
        for case in CASES:
            for stream in run(case, dtype, SMALL).values():
                whole.update(bits(stream).numpy().tobytes())
    return whole.hexdigest()


@needs_cpu_kernels
def test_isa_from_the_environment() -> None:
    """The switch that users have gives the ISA that it names, and the same bits."""
    program = "from rules import test_bitwise as t; print(t.digest(), t._C.isa())"
    expected = digest()
    for isa in _C.isas():
        result = python(program, FUSED_OPTIM_ISA=isa)
        assert result.returncode == 0, result.stderr
        assert result.stdout.split() == [expected, isa]
