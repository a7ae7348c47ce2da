"""Few small steps of every kernel on a GPU, for compute-sanitizer; checks no numbers.

python benchmarks/memcheck.py [DEVICE]
"""

import sys
from collections.abc import Iterator
from typing import Any

import torch
from smoke import FORMATS, ONE_PASS, OPTIONS, expect

import fused_optim

PLAIN = (torch.float32, torch.bfloat16)
# Below, at and above what one program steps at once, and a prime.
NUMELS = (1, 511, 512, 4096, 10_007)


def aligned(numel: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    return torch.rand(numel, device=device).to(dtype)


def misaligned(numel: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """A tensor that begins behind the first element of its memory and ends with the last."""
    return aligned(numel + 1, dtype, device)[1:]


def params_of(dtype: torch.dtype, device: torch.device) -> list[torch.nn.Parameter]:
    """With grads; the last is transposed."""
    params = []
    for numel in NUMELS:
        for make in (aligned, misaligned):
            params.append(torch.nn.Parameter(make(numel, dtype, device)))
            params[-1].grad = make(numel, dtype, device)
    params.append(torch.nn.Parameter(aligned(33 * 65, dtype, device).view(33, 65)))
    params[-1].grad = aligned(33 * 65, dtype, device).view(65, 33).t()
    return params


def cases() -> Iterator[tuple[str, tuple[torch.dtype, ...], dict[str, Any]]]:
    """Optimizer, dtypes of its params, options."""
    for name, options in OPTIONS.items():
        yield name, PLAIN, options
    yield "AdamW", PLAIN, ONE_PASS
    for dtype, options in FORMATS:
        yield "AdamW", (dtype,), options
    yield "AdamW", (torch.bfloat16,), {**FORMATS[-1][1], **ONE_PASS}


def main(device: torch.device) -> None:
    n_cases = 0
    for name, dtypes, options in cases():
        params = [param for dtype in dtypes for param in params_of(dtype, device)]
        optimizer = getattr(fused_optim, name)(params, **options)
        for _ in range(2):
            optimizer.step()
        if device.type == "cuda":
            torch.cuda.synchronize()
        expect(optimizer, "triton", len(params))
        n_cases += 1
        print(name, options, optimizer.last_step, flush=True)
    print(f"{n_cases} cases checked")


if __name__ == "__main__":
    main(torch.device(sys.argv[1] if len(sys.argv) > 1 else "cuda"))
