"""DTensors in every format, part by part: without communication one process can be any of many."""

import copy
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

import fused_optim
from fused_optim import backends, sharding, storage
from fused_optim._C import SMALLEST_INT8
from support.cases import DEVICE, VARIANTS, fullest
from support.format_oracle import encode as oracle_encode
from support.format_oracle import key as oracle_key
from support.formats import each_dtype, each_format, without_cancelling
from support.marks import each_name, needs_cpu_kernels
from support.program import SCALARS, Program, Streams, assert_same_bits

pytestmark = [
    needs_cpu_kernels,
    pytest.mark.skipif(
        DEVICE.type != "cpu" or not torch.distributed.is_available(), reason="needs a second GPU"
    ),
]


class Rank:
    """A process group of which this process is one rank and the others are nobody."""

    def __init__(self, rank: int, *shape: int) -> None:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.testing._internal.distributed.fake_pg import FakeStore

        self.n = torch.Size(shape).numel()
        torch.distributed.init_process_group(
            "fake", rank=rank, world_size=self.n, store=FakeStore()
        )
        # torch keeps what it has derived from a mesh for equal ones, which in one process are of one rank.
        names = tuple(f"rank{rank}_dim{dim}" for dim in range(len(shape)))
        self.mesh = init_device_mesh("cpu", shape, mesh_dim_names=names)

    def part(self, whole: Tensor, *placements) -> Tensor:
        from torch.distributed.tensor import distribute_tensor

        return distribute_tensor(whole, self.mesh, placements, src_data_rank=None)


@pytest.fixture
def on_rank() -> Iterator:
    def begin(rank: int, *shape: int) -> Rank:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
        return Rank(rank, *shape)

    yield begin
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def shard(dim: int):
    from torch.distributed.tensor import Shard

    return Shard(dim)


def replicate():
    from torch.distributed.tensor import Replicate

    return Replicate()


class Part(Program):
    """One param of a rank's; `whole` is what all ranks begin with."""

    def __init__(self, name: str, rank: Rank, placements, whole: Tensor, **options) -> None:
        self.rank, self.placements = rank, placements
        self.param = nn.Parameter(rank.part(whole.clone(), *placements))
        super().__init__(fullest(name).fused([self.param], **options), [self.param])

    def step_with(self, whole_grad: Tensor) -> None:
        self.param.grad = self.rank.part(whole_grad.clone(), *self.placements)
        self.step_as_is()

    def harvest(self) -> Streams:
        return {key: sharding.part_of(value) for key, value in super().harvest().items()}


def train(name: str, whole: Tensor, n_steps: int, **options):
    """The unsharded run, and the grads it took."""
    param = nn.Parameter(whole.clone())
    opt = fullest(name).fused([param], **options)
    grads = [torch.randn(whole.shape).to(whole.dtype) for _ in range(n_steps)]
    for grad in grads:
        param.grad = grad.clone()
        opt.step()
    return param, opt.state[param], grads


def assert_is_part(part: Part, param: Tensor, states: dict, first: int) -> None:
    """Bitwise, scales included: what the part holds is that run of the whole."""
    n = part.param._local_tensor.numel()
    mine = part.opt.state[part.param]
    pairs = [(part.param.detach(), param.detach()), *((mine[key], states[key]) for key in states)]
    assert mine.keys() == states.keys()
    for (a, b), key in zip(pairs, ["param", *states]):
        a = sharding.part_of(a)
        if key.endswith("_scale"):
            run = b[first // 64 : (first + n + 63) // 64]
        else:
            run = b if key in SCALARS else b.flatten()[first : first + n].view_as(a)
        assert_same_bits([a], [run])


@each_name
@each_format
def test_parts_that_begin_with_a_group_have_the_bits_of_the_whole(
    name, dtype, state_dtype, master, on_rank
):
    options = {"state_dtype": state_dtype, "master": master}
    # Even; uneven, with a part of nothing; parts of a row, each one group.
    for shape, dim, n_ranks in (((128, 96), 0, 2), ((5, 1024), 0, 4), ((1, 4160), 1, 65)):
        whole = torch.randn(shape).to(dtype)
        param, states, grads = train(name, whole, 2, **options)
        for index in range(n_ranks) if n_ranks < 5 else (0, 64):
            rank = on_rank(index, n_ranks)
            part = Part(name, rank, [shard(dim)], whole, **options)
            for grad in grads:
                part.step_with(grad)
            assert part.opt.last_step.tensors == {"cpu": 1}, part.opt.last_step
            numel, first = sharding.place_of(part.param)
            assert numel == param.numel()
            if part.param._local_tensor.numel():
                assert first % 64 == 0
            assert_is_part(part, param, states, first)


@each_dtype
@pytest.mark.parametrize("state_dtype", [torch.float32, torch.bfloat16], ids=str)
def test_single_elements_are_rounded_alike_wherever_a_part_begins(dtype, state_dtype, on_rank):
    """Without 8-bit codes there are no groups."""
    options = {
        "state_dtype": state_dtype,
        "master": None if dtype == torch.float32 else "split8",
    }
    whole = torch.randn(75, 69).to(dtype)
    param, states, grads = train("AdamW", whole, 3, **options)
    for index in range(2):
        part = Part("AdamW", on_rank(index, 2), [shard(0)], whole, **options)
        for grad in grads:
            part.step_with(grad)
        first = sharding.place_of(part.param)[1]
        assert first == index * 38 * 69
        assert_is_part(part, param, states, first)


def test_random_bits_are_those_of_the_oracle_from_any_element_on():
    values = torch.randn(333).numpy()
    for first in (0, 1, 31, 63, 64, 1000, 2**33 + 5):
        stream = torch.empty(333, dtype=torch.int16).numpy()
        backends.codec().transcode(
            True, "stochastic", "bfloat16", stream=stream.ctypes.data, extra=0,
            values=values.ctypes.data, numel=333, key=(1, 2, 3, 4), num_threads=1, offset=first,
        )  # fmt: skip
        expected, _ = oracle_encode("bf16_stochastic", values, oracle_key(1, 2, 3, 4), first)
        assert (stream.view("uint16") == expected).all()


def test_what_is_quantised_is_for_the_whole_to_decide(on_rank):
    for shape, expected in (((64, 64), torch.int8), ((63, 65), torch.float32)):
        part = Part("AdamW", on_rank(0, 8), [shard(0)], torch.randn(shape), state_dtype="int8")
        part.step_with(torch.randn(shape))
        assert part.param._local_tensor.numel() < SMALLEST_INT8
        assert part.opt.state[part.param]["exp_avg"].dtype == expected


def elements_of(rank: Rank, shape, placements) -> set[int]:
    part = nn.Parameter(rank.part(torch.zeros(shape), *placements))
    _, first = sharding.place_of(part)
    return set(range(first, first + part._local_tensor.numel()))


def test_no_two_parts_share_random_bits(on_rank):
    """Parts of columns, of rows and columns, of rows of a transposed tensor; replicas do share them."""
    shape = (6, 50)
    for placements, mesh in (
        ([shard(0)], (4,)),
        ([shard(1)], (4,)),
        ([shard(0), shard(1)], (2, 2)),
        ([shard(1), shard(0)], (2, 2)),
        ([shard(0), shard(0)], (2, 2)),
    ):
        seen = set()
        for index in range(4):
            elements = elements_of(on_rank(index, *mesh), shape, placements)
            assert not seen & elements
            seen |= elements
        assert len(seen) == 300
        if all(placement == shard(0) for placement in placements):
            assert seen == set(range(300))
    both = [
        [elements_of(on_rank(2 * i + j, 2, 2), shape, [replicate(), shard(0)]) for i in range(2)]
        for j in range(2)
    ]
    assert both[0][0] == both[0][1] != both[1][0] == both[1][1]
    transposed = nn.Parameter(on_rank(1, 2).part(torch.zeros(8, 6), shard(0)).t())
    assert transposed.placements == (shard(1),)
    assert sharding.place_of(transposed)[1] == 2 * 64


@each_name
@each_format
def test_checkpoints_have_decoded_states_and_lose_nothing(
    name, dtype, state_dtype, master, on_rank
):
    """In the same sharding; 8-bit codes come out as float32, all else as it is stored."""
    options = {"state_dtype": state_dtype, "master": master}
    whole = torch.randn(75, 69).to(dtype)
    rank = on_rank(1, 2)
    run = Part(name, rank, [shard(0)], whole, **options)
    grads = [torch.randn(75, 69).to(dtype) for _ in range(3)]
    for grad in grads[:2]:
        run.step_with(grad)
    saved = copy.deepcopy(run.opt.state_dict())
    (states,) = saved["state"].values()
    assert not any(key.endswith("_scale") for key in states)
    for key, value in states.items():
        if key not in SCALARS:
            assert sharding.is_sharded_like(value, run.param) and value.shape == run.param.shape
            assert value.dtype not in (torch.uint8, torch.int8) or key == "param_remainder"
    resumed = Part(name, rank, [shard(0)], whole, **options)
    resumed.param.data.copy_(run.param.data)
    resumed.opt.load_state_dict(saved)
    assert_same_bits(run.harvest(), resumed.harvest())
    twin = copy.deepcopy(run)
    for one in (run, resumed, twin):
        one.step_with(grads[2])
    assert_same_bits(run.harvest(), resumed.harvest())
    assert_same_bits(run.harvest(), twin.harvest())


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8], ids=str)
def test_codes_are_found_again(dtype):
    """Of many groups that kernels have written, each; of others, none is touched."""
    is_square = dtype == torch.uint8
    format = storage.Format("root8" if is_square else "signed8", dtype)
    values = (
        torch.randn(64 * 5000 + 17)
        * torch.exp(torch.linspace(-30, 30, 5001)).repeat_interleave(64)[: 64 * 5000 + 17]
    )
    values[::5] = 0
    if is_square:
        values.square_()
    values[64 * 7 + 3], values[64 * 9] = torch.nan, torch.inf
    stream, scales = storage.encode(format, values, values, (0, 0, 2, 1))
    decoded = storage.decode(format, stream, scales)
    again, new_scales = storage.encode(format, values, decoded, (0, 0, 2, 2))
    assert not torch.equal(again, stream)  # what it is good for
    storage.restore_codes(decoded, again, new_scales)
    special = scales.signbit().repeat_interleave(64)[: len(values)]
    assert special.sum() == 128
    assert torch.equal(again[~special], stream[~special])
    assert_same_bits([storage.decode(format, again, new_scales)[~special]], [decoded[~special]])
    before = again.clone()
    storage.restore_codes(values, again, new_scales)  # which no codes stand for
    zeros = values.unfold(0, 64, 64).abs().sum(1) == 0
    assert not zeros.any()
    assert torch.equal(again, before)


def test_the_states_of_one_process_load_into_parts(on_rank):
    """torch.optim's and compact ones: each part takes what belongs to it."""
    whole = torch.randn(128, 96)
    keys = ["exp_avg", "exp_avg_sq"]
    for options in ({}, {"state_dtype": "int8"}):
        param, states, _ = train("AdamW", whole, 2, **options)
        opt = fused_optim.AdamW([param], **options)
        opt.state[param] = states
        part = Part("AdamW", on_rank(1, 2), [shard(0)], whole, state_dtype="int8")
        groups = part.opt.state_dict()["param_groups"]
        part.opt.load_state_dict({**opt.state_dict(), "param_groups": groups})
        decoded, mine = (
            storage.decode_states(found, keys) for found in (states, part.opt.state[part.param])
        )
        for key in keys:
            expected, found = decoded[key][64:], mine[key]._local_tensor
            if options:
                assert torch.equal(found, expected)
            elif key == "exp_avg":  # half a quantum of the largest, whose scale is rounded up
                assert (found - expected).abs().max() <= expected.abs().max() / 126 * 1.01 / 2
            else:  # a quantum of the largest root
                roots, wanted = found.sqrt(), expected.sqrt()
                assert (roots - wanted).abs().max() <= wanted.max() / 253 * 1.01
        part.step_with(torch.randn(128, 96))
        assert part.opt.last_step.tensors == {"cpu": 1}


def test_states_of_another_shape_are_refused(on_rank):
    part = Part("AdamW", on_rank(1, 2), [shard(0)], torch.randn(128, 96), state_dtype="int8")
    part.step_with(torch.randn(128, 96))
    saved = copy.deepcopy(part.opt.state_dict())
    saved["state"][0]["exp_avg"] = torch.zeros(64, 96)  # a local tensor
    before = part.harvest()
    with pytest.raises(ValueError, match="which has shape"):
        part.opt.load_state_dict(saved)
    assert_same_bits(before, part.harvest())


@each_format
# DTensors do not do what torch.optim.Rprop does.
@pytest.mark.parametrize("name", [name for name in VARIANTS if name != "Rprop"])
def test_without_kernels_parts_are_stepped_too(
    name, dtype, state_dtype, master, on_rank, monkeypatch
):
    whole = torch.randn(75, 69).to(dtype)
    grads = [torch.randn(75, 69).to(dtype) for _ in range(2)]
    rank = on_rank(1, 2)
    options = {"state_dtype": state_dtype, "master": master, **without_cancelling(name)}
    runs = [Part(name, rank, [shard(0)], whole, **options) for _ in range(2)]
    for grad in grads:
        runs[0].step_with(grad)
    monkeypatch.setattr(backends, "cpu_kernels", lambda: None)
    for grad in grads:
        runs[1].step_with(grad)
    assert runs[1].opt.last_step.tensors == {"stock": 1}
    a, b = ({key: (t.dtype, t.shape) for key, t in run.harvest().items()} for run in runs)
    assert a == b
    # As test_formats.test_without_kernels_the_same_formats.
    quantum = {torch.float32: 0.0, torch.bfloat16: 2**-7, "int8": 2 / 126}
    of_states = 0.4 * quantum.get(state_dtype, torch.finfo(dtype).eps)
    mine, other = (run.param.detach()._local_tensor.float() for run in runs)
    assert (
        (mine - other).abs() <= (2 * torch.finfo(dtype).eps + of_states) * (1 + mine.abs())
    ).all()


def test_a_grad_in_another_sharding_goes_around_the_kernels(on_rank):
    whole = torch.randn(64, 64)
    rank = on_rank(0, 2)
    part = Part("AdamW", rank, [replicate()], whole, state_dtype="int8")
    part.param.grad = rank.part(torch.randn(64, 64), replicate()).redistribute(
        placements=[shard(0)]
    )
    part.opt.step()
    assert part.opt.last_step.tensors == {"stock": 1}
    assert "sharded otherwise" in part.opt.last_step.fallbacks[0].reason
    assert part.opt.state[part.param]["exp_avg"].dtype == torch.int8


def test_masters_of_parts(on_rank):
    whole = torch.randn(65, 64).bfloat16()
    rank = on_rank(1, 2)
    part = Part("AdamW", rank, [shard(0)], whole, state_dtype="int8", master="split16")
    for _ in range(3):
        part.step_with(torch.randn(65, 64).bfloat16())
    (master,) = part.opt.master_params()
    assert sharding.is_sharded_like(master, part.param) and master.dtype == torch.float32
    other = Part("AdamW", rank, [shard(0)], whole, state_dtype="int8", master="split16")
    other.opt.load_master_params([master])
    assert torch.equal(other.opt.master_params()[0]._local_tensor, master._local_tensor)
    assert not torch.equal(master._local_tensor, part.param.detach()._local_tensor.float())


def test_version_counters_of_both_tensors_tell_of_a_step(on_rank):
    part = Part("SGD", on_rank(0, 2), [shard(0)], torch.randn(8, 8))
    part.param.grad = part.rank.part(torch.randn(8, 8), shard(0))
    before = part.param._version, part.param._local_tensor._version
    part.opt.step()
    assert part.param._version > before[0] and part.param._local_tensor._version > before[1]


def test_optimizers_know_their_dtensors_by_where_this_process_is(on_rank):
    """A place that is remembered belongs to one coordinate."""
    for index in (0, 1):
        part = nn.Parameter(on_rank(index, 2).part(torch.zeros(4, 64), shard(0)))
        assert sharding.place_of(part) == (256, index * 128)


@pytest.mark.parametrize("options", [{}, {"state_dtype": "int8"}], ids=str)
def test_explain_counts_the_part(on_rank, options) -> None:
    rank = on_rank(1, 2)
    part = Part("AdamW", rank, [shard(0)], torch.ones(128, 64), **options)
    part.param.grad = rank.part(torch.ones(128, 64), shard(0))
    for _ in range(2):  # before the first step and behind it
        (row,) = part.opt.explain().rows
        # Of 64 * 64 elements; a scale is for 64 of them.
        nbytes = 4096 + 4096 // 64 * 2 if options else 4 * 4096
        assert (row.backend, row.numel, row.state_nbytes) == ("cpu", 4096, 3 * nbytes + 4)
        part.opt.step()
