"""How long the host takes for step() on a GPU's tensors, which are small: microseconds a step.

    .venv/bin/python benchmarks/host_time.py [CHECKOUT ...]

Without a GPU, on the stub of one that the tests use: Triton compiles, tensors lie on the CPU and no kernel
runs. Several checkouts (built, each with its .venv) take turns; ratios are to the first, paired by round,
and time is that of the thread, so that a busy machine does less harm.
"""

import contextlib
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

ROUNDS = 20
# Tensors, param groups, and the norm to which grads are clipped.
CASES = {
    f"{n} tensors, {name}": (n, *options)
    for n in (148, 2000)
    for name, options in (("plain", (1, None)), ("two groups", (2, None)), ("one pass", (1, 1.0)))
}


def serve() -> None:
    """Answer each name of a case with microseconds per step."""
    import torch

    import fused_optim

    torch.set_num_threads(1)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu":
        sys.path[:0] = ["tests/support", "tests"]  # the second in older checkouts
        from stub_gpu import stub_gpu
    with contextlib.nullcontext() if device == "cuda" else stub_gpu() as gpu:
        steps = {}
        for case, (n, n_groups, max_grad_norm) in CASES.items():
            params = [torch.nn.Parameter(torch.ones(16 + i % 7, device=device)) for i in range(n)]
            for param in params:
                param.grad = torch.ones_like(param)
            groups = [{"params": params[g::n_groups], "lr": 1e-3 * g} for g in range(n_groups)]
            opt = fused_optim.AdamW(groups, max_grad_norm=max_grad_norm)
            for _ in range(3):
                opt.step()
            assert opt.last_step is not None and opt.last_step.tensors == {"triton": n}
            steps[case] = opt.step
        for line in sys.stdin:
            case = line.strip()
            n_steps = 20000 // CASES[case][0]
            if device == "cuda":
                torch.cuda.synchronize()
            began = time.thread_time()
            for _ in range(n_steps):
                steps[case]()
            print((time.thread_time() - began) / n_steps * 1e6, flush=True)
            if gpu is not None:
                gpu.launches.clear()
                gpu.uploaded.clear()


def server(checkout: Path) -> subprocess.Popen[str]:
    environment = {**os.environ, "PYTHONPATH": str(checkout), "OMP_NUM_THREADS": "1"}
    command = [checkout / ".venv/bin/python", Path(__file__).resolve(), "--serve"]
    pipe = subprocess.PIPE
    return subprocess.Popen(
        command, cwd=checkout, env=environment, stdin=pipe, stdout=pipe, text=True
    )


def ask(process: subprocess.Popen[str], case: str) -> float:
    assert process.stdin is not None and process.stdout is not None
    print(case, file=process.stdin, flush=True)
    return float(process.stdout.readline())


def main() -> None:
    checkouts = [Path(argument).resolve() for argument in sys.argv[1:]] or [Path.cwd()]
    servers = [server(checkout) for checkout in checkouts]
    for case in CASES:
        rounds = [[ask(process, case) for process in servers] for _ in range(ROUNDS)]
        print(case)
        for i, checkout in enumerate(checkouts):
            seconds = [found[i] for found in rounds]
            ratios = statistics.quantiles((found[0] / found[i] for found in rounds), n=4)
            print(
                f"  {statistics.median(seconds):8.1f} us, at least {min(seconds):8.1f}, "
                f"{ratios[1]:.2f} times as fast ({ratios[0]:.2f} to {ratios[2]:.2f})  {checkout}"
            )
    for process in servers:
        process.communicate()


if __name__ == "__main__":
    serve() if "--serve" in sys.argv else main()
