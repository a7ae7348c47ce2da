"""The 2-norm of all grads of one device, and what follows from it, in two kernels.

`norm` sums the squares of NORM_CHUNK elements of one grad per program, `finish` adds up what the programs
have found. Both add in float64 in the order that csrc/kernel.h and csrc/norm.cpp give, so that the norm
has the same bits on every device. Tables in device memory:

grads     int64 [n_tensors, 3]: numel, negative if the grad is not aligned to 16 bytes; its address; the
          number of its first chunk among those of all grads of the device
chunks    int32 [n_chunks, 2]: which tensor, and which NORM_CHUNK elements of it, one program takes
partials  float64 [2, n_partials]: of each chunk of the device the sum, and whether some element is not
          finite
result    float64 [RESULT]: what `finish` writes
"""

from __future__ import annotations

import triton
import triton.language as tl

from .streams import decode_plain

# As in csrc/kernel.h: a chunk is cut into parts, and lane l of a part sums every NORM_LANES-th element.
NORM_PARTS = tl.constexpr(4)
NORM_LANES = tl.constexpr(128)
NORM_PART = tl.constexpr(16384)
NORM_CHUNK = tl.constexpr(65536)
LANES = tl.constexpr(512)  # of all parts
LEVELS = tl.constexpr(9)  # of the tree over them
# Elements of a lane, and partial sums of one, that are on their way at the same time.
AHEAD = tl.constexpr(4)
WIDEST = tl.constexpr(8)  # elements of an access of 16 bytes, at most
LARGEST = tl.constexpr(1.7976931348623157e308)

# The columns of `grads`.
NUMEL = tl.constexpr(0)
ADDRESS = tl.constexpr(1)
FIRST_CHUNK = tl.constexpr(2)
GRADS_ROW = tl.constexpr(3)
# The elements of `result`: the sum of the squares; its root, divided by the grad scale; the coefficient
# that clips; that one divided by the grad scale; whether the step is skipped; whether some grad is not
# finite.
SQUARES = tl.constexpr(0)
NORM = tl.constexpr(1)
CLIP = tl.constexpr(2)
FACTOR = tl.constexpr(3)
FOUND_INF = tl.constexpr(4)
NONFINITE = tl.constexpr(5)
RESULT = tl.constexpr(6)


@triton.jit
def add_halves(lanes):
    """One number: the upper half is added to the lower one, again and again."""
    for level in tl.static_range(LEVELS):
        lanes = tl.sum(tl.reshape(lanes, (2, LANES >> (level + 1))), axis=0)
    return tl.sum(lanes, axis=0)


@triton.jit
def add_squares(sums, bad, grad, index, numel, INTERPRETED: tl.constexpr):
    """Adds AHEAD elements of each lane, the first one at `index`; numel: how many there are; None: all."""
    loaded = ()
    for i in tl.static_range(AHEAD):
        there = index + i * NORM_LANES
        if numel is None:
            loaded = loaded + (tl.load(grad + there),)
        else:
            loaded = loaded + (tl.load(grad + there, mask=there < numel, other=0.0),)
    for i in tl.static_range(AHEAD):
        value = decode_plain(loaded[i], tl.float64, INTERPRETED)
        sums += value * value
        if grad.dtype.element_ty == tl.float64:
            bad = bad | ~(tl.abs(value) <= LARGEST)
    return sums, bad


@triton.jit(do_not_specialize=["n_partials"])
def norm(
    grads,
    chunks,
    partials,
    n_partials,
    DTYPE: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """Sum of one chunk."""
    program = tl.program_id(0).to(tl.int64)
    tensor = grads + tl.load(chunks + 2 * program).to(tl.int64) * GRADS_ROW
    chunk = tl.load(chunks + 2 * program + 1).to(tl.int64)
    numel = tl.load(tensor + NUMEL)
    rest = tl.abs(numel) - chunk * NORM_CHUNK
    grad = tl.load(tensor + ADDRESS).to(tl.pointer_type(DTYPE)) + chunk * NORM_CHUNK
    aligned = tl.multiple_of(grad, 16)
    partial = partials + tl.load(tensor + FIRST_CHUNK) + chunk
    lane = tl.arange(0, LANES)
    lane = lane // NORM_LANES * NORM_PART + lane % NORM_LANES
    sums = tl.zeros([LANES], tl.float64)
    bad = tl.zeros([LANES], tl.int1)
    # A mask would split the accesses, so a whole chunk goes without one.
    if numel >= (chunk + 1) * NORM_CHUNK:
        for start in range(0, NORM_PART, AHEAD * NORM_LANES):
            sums, bad = add_squares(sums, bad, aligned, lane + start, None, INTERPRETED)
    else:
        # Neither does a mask split them that is the same for all elements of one.
        whole = tl.multiple_of(tl.where(numel < 0, 0, rest // WIDEST * WIDEST), WIDEST)
        for start in range(0, NORM_PART, AHEAD * NORM_LANES):
            if start < whole:
                sums, bad = add_squares(sums, bad, aligned, lane + start, whole, INTERPRETED)
        # The few elements that are left, one for a lane; if it is not aligned, all.
        first = whole % NORM_PART // NORM_LANES * NORM_LANES
        end = tl.minimum(first + rest - whole, NORM_PART)
        while first < end:
            index = lane + first
            mask = (index >= whole) & (index < rest)
            value = decode_plain(
                tl.load(grad + index, mask=mask, other=0.0), tl.float64, INTERPRETED
            )
            sums += value * value
            if DTYPE == tl.float64:
                bad = bad | ~(tl.abs(value) <= LARGEST)
            first += NORM_LANES
    total = add_halves(sums)
    if DTYPE == tl.float64:
        # Squares of large numbers overflow without an infinite one among them.
        nonfinite = tl.max(bad.to(tl.int32), axis=0).to(tl.float64)
    else:
        nonfinite = tl.where(total <= LARGEST, 0.0, 1.0)
    tl.store(partial, total)
    tl.store(partial + n_partials, nonfinite)


@triton.jit(
    do_not_specialize=["n_partials"],
    do_not_specialize_on_alignment=[
        "extra",
        "grad_scale",
        "found_inf",
        "report",
        "n_skipped",
        "result",
    ],
)
def finish(
    partials,
    n_partials,
    extra,
    max_norm,
    grad_scale,
    found_inf,
    report,
    n_skipped,
    result,
    SKIPS_NONFINITE: tl.constexpr,
):
    """Norm, clip coefficient, and whether the step is skipped; one program.

    extra: float64 [2], what is added to the sum of the squares, and whether that is not finite;
    report: takes whether the step is skipped; n_skipped: int64, how many were. All but the first two
    and the result may be None.
    """
    lane = tl.arange(0, LANES)
    sums = tl.zeros([LANES], tl.float64)
    bad = tl.zeros([LANES], tl.float64)
    n_partials = n_partials.to(tl.int64)
    first = n_partials * 0
    while first < n_partials:
        values = ()
        for i in tl.static_range(AHEAD):
            index = first + i * LANES + lane
            mask = index < n_partials
            values = values + (tl.load(partials + index, mask=mask, other=0.0),)
            bad += tl.load(partials + n_partials + index, mask=mask, other=0.0)
        for i in tl.static_range(AHEAD):
            sums += values[i]
        first += AHEAD * LANES
    squares = add_halves(sums)
    nonfinite = tl.max(bad, axis=0)
    if extra is not None:
        squares += tl.load(extra)
        nonfinite += tl.load(extra + 1)
    total = tl.sqrt(squares)
    if grad_scale is not None:
        scale = tl.load(grad_scale).to(tl.float64)
        total = total / scale
        unscaling = 1 / scale
    else:
        unscaling = tl.full([], 1.0, tl.float64)
    if max_norm is not None:
        # As torch.nn.utils.clip_grad_norm_ has it: NaN for a NaN.
        clip = tl.load(max_norm) / (total + 1e-6)
        clip = tl.where(clip > 1, 1.0, clip)
    else:
        clip = tl.full([], 1.0, tl.float64)
    skips = tl.full([], 0.0, tl.float64)
    if found_inf is not None:
        skips = tl.where(tl.load(found_inf) != 0, 1.0, skips)
    if SKIPS_NONFINITE:
        skips = tl.where(nonfinite != 0, 1.0, skips)
    tl.store(result + SQUARES, squares)
    tl.store(result + NORM, total)
    tl.store(result + CLIP, clip)
    tl.store(result + FACTOR, clip * unscaling)
    tl.store(result + FOUND_INF, skips)
    tl.store(result + NONFINITE, nonfinite)
    if report is not None:
        tl.store(report, skips.to(tl.float32))
    if n_skipped is not None:
        tl.store(n_skipped, tl.load(n_skipped) + skips.to(tl.int64))
