"""What each process of `make deepspeed` runs: ZeRO-Offload with torch.optim's AdamW and with ours."""

import deepspeed
import torch
import torch.distributed as dist
from torch import Tensor, nn

import fused_optim

N_STEPS = 4
BATCH = 8


def train(stage: int, optimizer_class: type[torch.optim.Optimizer]) -> list[Tensor]:
    """The params after some steps, whole and in float32."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 65), nn.Tanh(), nn.Linear(65, 1))
    optimizer = optimizer_class(model.parameters(), lr=0.01)
    engine, *_ = deepspeed.initialize(
        model=model,
        optimizer=optimizer,
        config={
            "train_batch_size": BATCH * dist.get_world_size(),
            "train_micro_batch_size_per_gpu": BATCH,
            "bf16": {"enabled": True},
            "gradient_clipping": 0.1,
            "zero_optimization": {"stage": stage, "offload_optimizer": {"device": "cpu"}},
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,
        },
    )
    for step in range(N_STEPS):
        generator = torch.Generator().manual_seed(10 * step + dist.get_rank())
        inputs = torch.randn(BATCH, 64, generator=generator).bfloat16()
        engine.backward(engine(inputs).float().square().mean())
        engine.step()
    if isinstance(optimizer, fused_optim.FusedOptimizer):
        assert optimizer.last_step is not None and optimizer.last_step.tensors == {"cpu": 1}
    params = list(model.parameters())
    with deepspeed.zero.GatheredParameters(params, enabled=stage == 3):
        return [param.detach().float().clone() for param in params]


def main() -> None:
    """Compare all stages."""
    deepspeed.init_distributed("gloo")
    for stage in (1, 2, 3):
        for ours, stock in zip(
            train(stage, fused_optim.AdamW), train(stage, torch.optim.AdamW), strict=True
        ):
            # float32 masters that differ by roundings are rounded to bfloat16, perhaps to neighbours.
            torch.testing.assert_close(ours, stock, rtol=2.0**-7, atol=1e-6)
            assert not torch.equal(ours, torch.zeros_like(ours))
        if dist.get_rank() == 0:
            print(f"ZeRO-Offload, stage {stage}: as with torch.optim.AdamW", flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
