"""Train a small transformer with its params and states sharded over processes, and resume it on any number.

    torchrun --nproc-per-node 2 examples/fsdp2_train.py
    torchrun --nproc-per-node 2 -- examples/fsdp2_train.py --state-dtype int8 --master split8 --checkpoint DIR

On GPUs if there is one for each process, else on the CPU. Run again with the same DIR, it goes on where it
has ended, with any number of processes. (Without the two dashes, torchrun takes --master for one of its own.)
"""

import argparse
import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import fused_optim

VOCABULARY, WIDTH, LENGTH, BATCH = 64, 128, 32, 16  # the batch is that of all processes


class Transformer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, WIDTH)
        self.blocks = nn.ModuleList(
            nn.TransformerEncoderLayer(WIDTH, 4, 4 * WIDTH, dropout=0.0, batch_first=True)
            for _ in range(2)
        )
        self.head = nn.Linear(WIDTH, VOCABULARY)

    def forward(self, tokens: Tensor) -> Tensor:
        hidden = self.embedding(tokens)
        for block in self.blocks:
            hidden = block(hidden)
        return self.head(hidden.flatten(0, 1))


def batch_of(step: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """This process's part of a batch: in each sequence the tokens count on from a random one."""
    random = torch.Generator().manual_seed(step)
    start = torch.randint(VOCABULARY, (BATCH, 1), generator=random)
    tokens = (start + torch.arange(LENGTH + 1)) % VOCABULARY
    tokens = tokens.chunk(dist.get_world_size())[dist.get_rank()].to(device)
    return tokens[:, :-1], tokens[:, 1:]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--steps", type=int, default=30, help="to take in this run")
    parser.add_argument("--state-dtype", choices=["float32", "bfloat16", "int8"])
    parser.add_argument("--master", choices=["stochastic", "split8", "split16"])
    parser.add_argument("--checkpoint", type=Path, help="directory to resume from and to save to")
    arguments = parser.parse_args()

    n_local = int(os.environ["LOCAL_WORLD_SIZE"])
    on_gpus = torch.cuda.is_available() and torch.cuda.device_count() >= n_local
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if on_gpus else torch.device("cpu")
    if on_gpus:
        torch.cuda.set_device(device)
    dist.init_process_group("cpu:gloo,cuda:nccl" if on_gpus else "gloo")
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))

    torch.manual_seed(0)
    model = Transformer().to(device)
    if arguments.master is not None:
        model.bfloat16()
    for block in model.blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    state_dtype = arguments.state_dtype
    opt = fused_optim.AdamW(
        model.parameters(),
        lr=1e-3,
        max_grad_norm=1.0,
        state_dtype=state_dtype if state_dtype in (None, "int8") else getattr(torch, state_dtype),
        master=arguments.master,
    )

    first = 0
    if arguments.checkpoint is not None:
        first = max((int(path.name) for path in arguments.checkpoint.glob("[0-9]*")), default=0)
    if first > 0:
        weights, states = get_state_dict(model, opt)
        saved = {"model": weights, "opt": states}
        dcp.load(saved, checkpoint_id=arguments.checkpoint / str(first))
        set_state_dict(model, opt, model_state_dict=saved["model"], optim_state_dict=saved["opt"])

    last = first + arguments.steps
    for step in range(first, last):
        tokens, targets = batch_of(step, device)
        loss = nn.functional.cross_entropy(model(tokens).float(), targets.flatten())
        opt.zero_grad()
        loss.backward()
        opt.step()
        mean = loss.detach()
        dist.all_reduce(mean)
        if dist.get_rank() == 0 and ((step + 1) % 10 == 0 or step + 1 == last):
            print(f"step {step + 1}: loss {mean.item() / dist.get_world_size():.4f}", flush=True)

    if arguments.checkpoint is not None:
        weights, states = get_state_dict(model, opt)
        saved = {"model": weights, "opt": states}
        dcp.save(saved, checkpoint_id=arguments.checkpoint / str(last))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
    # What fully_shard leaves in torch's caches keeps gloo's threads alive past destroy_process_group, and one
    # that still lets go of a tensor while the interpreter ends aborts it (torch 2.13).
    sys.stdout.flush()
    os._exit(0)
