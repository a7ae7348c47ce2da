"""Few small steps of every optimizer on the GPU, for compute-sanitizer; checks no numbers."""

import torch

import fused_optim

CASES = [
    (fused_optim.SGD, {"momentum": 0.9, "nesterov": True}),
    (fused_optim.Adam, {"amsgrad": True}),
    (fused_optim.AdamW, {}),
    (fused_optim.RMSprop, {"centered": True, "momentum": 0.9}),
    (fused_optim.Adagrad, {}),
    (fused_optim.Lion, {"weight_decay": 0.1}),
]


def misaligned(numel: int, dtype: torch.dtype) -> torch.Tensor:
    """A tensor that begins behind the first element of its memory and ends with the last."""
    return torch.rand(numel + 1, device="cuda").to(dtype)[1:]


def main() -> None:
    for optimizer_class, options in CASES:
        params = []
        for dtype in (torch.float32, torch.bfloat16):
            # Below, at and above what one program steps at once, and a prime.
            for numel in (1, 511, 512, 4096, 10_007):
                for make in (misaligned, lambda n, d: torch.rand(n, device="cuda").to(d)):
                    param = torch.nn.Parameter(make(numel, dtype))
                    param.grad = make(numel, dtype)
                    params.append(param)
            transposed = torch.nn.Parameter(torch.rand(33, 65, device="cuda").to(dtype))
            transposed.grad = torch.rand(65, 33, device="cuda").to(dtype).t()
            params.append(transposed)
        optimizer = optimizer_class(params, **options)
        for _ in range(2):
            optimizer.step()
        torch.cuda.synchronize()
        print(optimizer_class.__name__, optimizer.last_step)


if __name__ == "__main__":
    main()
