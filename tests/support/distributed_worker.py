"""What each of two processes runs for test_distributed.py: scenarios by name, in one order."""

import copy
import json
import traceback
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn

import fused_optim
from fused_optim import sharding
from support.cases import FEW_CASES, fullest
from support.processes import HANG_S
from support.program import assert_same_bits

WORLD_SIZE = 2
# Rules whose states are those of another one are parted as that one is.
NAMES = list(dict.fromkeys(case.optimizer for case in FEW_CASES))
PACKED = {"state_dtype": "int8", "master": "split8"}  # with bfloat16 params
SCENARIOS: dict[str, Callable[[Path], None]] = {}


def scenario(name: str) -> Callable[[Callable[[Path], None]], Callable[[Path], None]]:
    def register(function: Callable[[Path], None]) -> Callable[[Path], None]:
        SCENARIOS[name] = function
        return function

    return register


def make_model(packed: bool = False, seed: int = 0, width: int = 65) -> nn.Sequential:
    """Of two processes, the second holds 32 of 65 rows and none of one; parts of what is quantised begin with
    groups of 64 elements."""
    torch.manual_seed(seed)
    model = nn.Sequential(
        nn.Linear(64, width), nn.Tanh(), nn.Linear(width, 128), nn.Tanh(), nn.Linear(128, 1)
    )
    return model.bfloat16() if packed else model


def options_of(name: str, packed: bool) -> dict[str, object]:
    return {**dict(fullest(name).options), "lr": 0.01, **(PACKED if packed else {})}


def make_optimizer(name: str, params: Iterator[nn.Parameter], packed: bool = False):
    return getattr(fused_optim, name)(params, **options_of(name, packed))


def backward(model: nn.Module, step: int, shares: range | list[int], scale: float = 1.0) -> None:
    """Grads of these shares of the step's batch; with `scale` 1/2, two shares are what two ranks average."""
    dtype = next(model.parameters()).dtype
    for share in shares:
        random = torch.Generator().manual_seed(1000 * step + share)
        x, y = torch.randn(8, 64, generator=random), torch.randn(8, 1, generator=random)
        loss = (model(x.to(dtype)) - y.to(dtype)).square().mean()
        (loss * scale).backward()


def train(model: nn.Module, opt, steps: range, shares=None, scale: float = 1.0) -> None:
    for step in steps:
        opt.zero_grad()
        backward(model, step, [dist.get_rank()] if shares is None else shares, scale)
        opt.step()


def train_alone(name: str, steps: range, packed: bool = False) -> tuple[nn.Module, object]:
    """One process that sees the whole batch."""
    model = make_model(packed)
    opt = make_optimizer(name, model.parameters(), packed)
    train(model, opt, steps, range(WORLD_SIZE), 1 / WORLD_SIZE)
    return model, opt


def full(tensor: Tensor) -> Tensor:
    return tensor.detach().full_tensor() if hasattr(tensor, "full_tensor") else tensor.detach()


def assert_model_is(model: nn.Module, other: nn.Module) -> None:
    assert_same_bits([full(p) for p in model.parameters()], [full(p) for p in other.parameters()])


def assert_served(opt, n: int = 6) -> None:
    assert opt.last_step.tensors == {"cpu": n}, opt.last_step


def assert_replicas_agree(tensors: list[Tensor]) -> None:
    for tensor in tensors:
        raw = tensor.detach().contiguous().flatten().view(torch.uint8)
        theirs = [torch.empty_like(raw) for _ in range(WORLD_SIZE)]
        dist.all_gather(theirs, raw)
        assert all(torch.equal(raw, other) for other in theirs)


def shard_fully(model: nn.Sequential) -> nn.Sequential:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for layer in (model[0], model[2], model[4], model):
        fully_shard(layer, mesh=mesh)
    return model


def _ddp(name: str, packed: bool) -> None:
    from torch.nn.parallel import DistributedDataParallel

    model = DistributedDataParallel(make_model(packed))
    opt = make_optimizer(name, model.parameters(), packed)
    train(model, opt, range(3))
    assert_served(opt)
    states = [value for state in opt.state.values() for value in state.values()]
    assert_replicas_agree([*model.parameters(), *states])
    assert_model_is(model, train_alone(name, range(3), packed)[0])


def _fsdp2(name: str, packed: bool) -> None:
    model = shard_fully(make_model(packed))
    opt = make_optimizer(name, model.parameters(), packed)
    train(model, opt, range(3))
    assert_served(opt)
    rows = [param._local_tensor.shape[0] for param in model.parameters()]
    assert rows == ([33, 33, 64, 64, 1, 1] if dist.get_rank() == 0 else [32, 32, 64, 64, 0, 0])
    alone, its_opt = train_alone(name, range(3), packed)
    assert_model_is(model, alone)
    if packed:
        codes = [s["exp_avg"].dtype for s in opt.state.values() if "exp_avg" in s]
        assert codes in ([], [torch.int8, torch.float32] * 2 + [torch.float32] * 2)
        assert_same_bits([full(p) for p in opt.master_params()], its_opt.master_params())


for _name in NAMES:
    for _packed in (False, True):
        for _engine, _run in (("ddp", _ddp), ("fsdp2", _fsdp2)):
            SCENARIOS[f"{_engine}-{_name}{'-packed' if _packed else ''}"] = (
                lambda folder, run=_run, name=_name, packed=_packed: run(name, packed)
            )


@scenario("fsdp2-clips")
def _fsdp2_clips(folder: Path) -> None:
    """The norm is that of all grads; the parts' sums of squares are added up in another order."""
    model = shard_fully(make_model())
    opt = fused_optim.AdamW(
        model.parameters(), lr=0.01, max_grad_norm=0.1, ema_decay=0.5, zero_grads=True
    )
    train(model, opt, range(1))
    assert_served(opt)
    alone = make_model()
    stock = torch.optim.AdamW(alone.parameters(), lr=0.01, foreach=False)
    backward(alone, 0, range(WORLD_SIZE), 1 / WORLD_SIZE)
    norm = torch.nn.utils.clip_grad_norm_(alone.parameters(), 0.1)
    stock.step()
    n = sum(param.numel() for param in alone.parameters())
    assert abs(opt.grad_norm.item() / norm.item() - 1) <= n * 2**-24
    for param, other, average in zip(model.parameters(), alone.parameters(), opt.ema_params()):
        # Steps of lr; a grad that differs by roundings of the norm moves them by as much.
        assert (full(param) - other).abs().max() <= 0.01 * (n * 2**-24 + 16 * 2**-23)
        assert torch.equal(full(average), full(param))
        assert not full(param.grad).any()


@scenario("fsdp2-offload")
def _fsdp2_offload(folder: Path) -> None:
    """CPUOffloadPolicy: masters and states in host memory, outputs for what else reads the params."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, fully_shard

    for name in ("AdamW", "SGD"):  # it asks nothing of a rule
        models = []
        for policy in ({"offload_policy": CPUOffloadPolicy(pin_memory=False)}, {}):
            model = make_model()
            mesh = init_device_mesh("cpu", (WORLD_SIZE,))
            precision = MixedPrecisionPolicy(torch.bfloat16, torch.float32)
            for layer in (model[0], model[2], model[4], model):
                fully_shard(layer, mesh=mesh, mp_policy=precision, **policy)
            opt = make_optimizer(name, model.parameters())
            outputs = {
                param: torch.zeros_like(param, dtype=torch.bfloat16, requires_grad=False)
                for param in model.parameters()
            }
            opt.set_outputs(outputs)
            train(model, opt, range(3))
            assert_served(opt)
            for param, output in outputs.items():
                assert torch.equal(full(output), full(param).bfloat16())
            models.append(model)
        assert_model_is(*models)


@scenario("fsdp1")
def _fsdp1(folder: Path) -> None:
    from torch.distributed.fsdp import FullyShardedDataParallel

    for name in NAMES:
        model = FullyShardedDataParallel(
            make_model(), use_orig_params=True, device_id=torch.device("cpu")
        )
        opt = make_optimizer(name, model.parameters())
        train(model, opt, range(3))
        with FullyShardedDataParallel.summon_full_params(model):
            assert_model_is(model, train_alone(name, range(3))[0])


@scenario("fsdp1-packed")
def _fsdp1_packed(folder: Path) -> None:
    """Nothing tells where its parts begin, but the same ones come back."""
    from torch.distributed.fsdp import FullyShardedDataParallel

    def make():
        model = FullyShardedDataParallel(
            make_model(), use_orig_params=True, device_id=torch.device("cpu")
        )
        return model, fused_optim.AdamW(model.parameters(), lr=0.01, state_dtype="int8")

    model, opt = make()
    train(model, opt, range(2))
    assert any("exp_avg_scale" in state for state in opt.state.values())
    # Not FullyShardedDataParallel.optim_state_dict: on CPUs, torch 2.13 mixes up any optimizer's states.
    saved = copy.deepcopy(opt.state_dict())
    for states in saved["state"].values():
        assert states.keys() == {"step", "exp_avg", "exp_avg_sq"}
        assert states["exp_avg"].dtype == torch.float32
    other, its_opt = make()
    other.load_state_dict(model.state_dict())
    its_opt.load_state_dict(saved)
    train(model, opt, range(2, 4))
    train(other, its_opt, range(2, 4))
    with (
        FullyShardedDataParallel.summon_full_params(model),
        FullyShardedDataParallel.summon_full_params(other),
    ):
        assert_model_is(model, other)


@scenario("zero")
def _zero(folder: Path) -> None:
    from torch.distributed.optim import ZeroRedundancyOptimizer
    from torch.nn.parallel import DistributedDataParallel

    for name in NAMES:
        for packed in (False, True):
            model = DistributedDataParallel(make_model(packed))

            def make(model=model, name=name, packed=packed):
                return ZeroRedundancyOptimizer(
                    model.parameters(), getattr(fused_optim, name), **options_of(name, packed)
                )

            opt = make()
            train(model, opt, range(2))
            assert 0 < sum(opt.optim.last_step.tensors.values()) < 6
            saved = {}
            for to in range(WORLD_SIZE):
                opt.consolidate_state_dict(to)
                if dist.get_rank() == to:
                    saved = opt.state_dict()
            opt = make()
            opt.load_state_dict(saved)
            train(model, opt, range(2, 3))
            assert_replicas_agree([*model.parameters()])
            if not packed:  # random bits depend on the param's number among those of its process
                assert_model_is(model, train_alone(name, range(3))[0])


@scenario("tensor-parallel")
def _tensor_parallel(folder: Path) -> None:
    """Rows and columns of DTensors: the bits of whole tensors with the same grads."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor.parallel import (
        ColwiseParallel,
        RowwiseParallel,
        parallelize_module,
    )

    for name in NAMES:
        model = make_model(width=64)
        twins = [nn.Parameter(param.detach().clone()) for param in model.parameters()]
        mesh = init_device_mesh("cpu", (WORLD_SIZE,))
        parallelize_module(model, mesh, {"0": ColwiseParallel(), "2": RowwiseParallel()})
        assert {str(p.placements) for p in model.parameters() if hasattr(p, "placements")} == {
            "(Shard(dim=0),)", "(Shard(dim=1),)", "(Replicate(),)",
        }  # fmt: skip
        opt, other = make_optimizer(name, model.parameters()), make_optimizer(name, iter(twins))
        for step in range(3):
            opt.zero_grad()
            backward(model, step, [0])
            for param, twin in zip(model.parameters(), twins):
                twin.grad = full(param.grad).clone()
            opt.step()
            other.step()
        assert_served(opt)
        assert_same_bits([full(p) for p in model.parameters()], [full(p) for p in twins])


@scenario("tensor-parallel-packed")
def _tensor_parallel_packed(folder: Path) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor.parallel import (
        ColwiseParallel,
        RowwiseParallel,
        parallelize_module,
    )

    model = make_model(packed=True, width=64)
    mesh = init_device_mesh("cpu", (WORLD_SIZE,))
    parallelize_module(model, mesh, {"0": ColwiseParallel(), "2": RowwiseParallel()})
    opt = make_optimizer("AdamW", model.parameters(), packed=True)
    for step in range(3):
        opt.zero_grad()
        backward(model, step, [0])
        opt.step()
    assert_served(opt)
    parts = [sharding.part_of(p) for p in model.parameters() if not hasattr(p, "placements")]
    parts += [
        sharding.part_of(p)
        for p in model.parameters()
        if hasattr(p, "placements") and p.placements[0].is_replicate()
    ]
    assert len(parts) == 3
    assert_replicas_agree(parts)
    saved = copy.deepcopy(opt.state_dict())
    before = [sharding.part_of(v) for state in opt.state.values() for v in state.values()]
    opt.load_state_dict(saved)
    after = [sharding.part_of(v) for state in opt.state.values() for v in state.values()]
    assert_same_bits(sorted(before, key=_rank), sorted(after, key=_rank))


def _rank(tensor: Tensor) -> tuple:
    return str(tensor.dtype), tuple(tensor.shape), tensor.double().sum().item()


def save(folder: Path, model: nn.Module, opt) -> None:
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import get_state_dict

    model_state, opt_state = get_state_dict(model, opt)
    dcp.save({"model": model_state, "opt": opt_state}, checkpoint_id=folder)


def load(folder: Path, model: nn.Module, opt) -> None:
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

    model_state, opt_state = get_state_dict(model, opt)
    saved = {"model": model_state, "opt": opt_state}
    dcp.load(saved, checkpoint_id=folder)
    set_state_dict(model, opt, model_state_dict=saved["model"], optim_state_dict=saved["opt"])


def resume(folder: Path, name: str, packed: bool) -> tuple[nn.Module, object]:
    """A sharded model with other weights, until they come from the checkpoint."""
    model = shard_fully(make_model(packed, seed=1))
    opt = make_optimizer(name, model.parameters(), packed)
    load(folder, model, opt)
    return model, opt


def each_run() -> Iterator[tuple[str, str, bool]]:
    for name in NAMES:
        yield name, name, False
        yield f"{name}-packed", name, True


@scenario("resume-one-on-two")
def _resume_one_on_two(folder: Path) -> None:
    for run, name, packed in each_run():
        model, opt = resume(folder / "one" / run, name, packed)
        train(model, opt, range(2, 4))
        assert_served(opt)
        assert_model_is(model, train_alone(name, range(4), packed)[0])


@scenario("save-on-two")
def _save_on_two(folder: Path) -> None:
    for run, name, packed in each_run():
        model = shard_fully(make_model(packed))
        opt = make_optimizer(name, model.parameters(), packed)
        train(model, opt, range(2))
        save(folder / "two" / run, model, opt)
        again, its_opt = resume(folder / "two" / run, name, packed)  # on as many processes
        for one, optimizer in ((model, opt), (again, its_opt)):
            train(one, optimizer, range(2, 4))
        assert_model_is(model, again)


def main(rank: int, path: str) -> None:
    folder = Path(path)
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/rendezvous",
        rank=rank,
        world_size=WORLD_SIZE,
        timeout=timedelta(seconds=HANG_S / 2),
    )
    outcomes: dict[str, str] = {}
    for name, run in SCENARIOS.items():
        try:
            run(folder)
            outcomes[name] = ""
        except BaseException:
            # The other rank may wait for this one: nothing that follows would mean anything.
            outcomes[name] = traceback.format_exc()
            break
        finally:
            (folder / f"outcomes{rank}.json").write_text(json.dumps(outcomes))
    dist.destroy_process_group()
