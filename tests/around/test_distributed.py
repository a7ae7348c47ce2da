"""torch's own engines for several processes: two on gloo run every scenario, this one is the third alone."""

import json
import os
import runpy
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

import fused_optim
from fused_optim import storage
from support import distributed_worker as worker
from support.cases import DEVICE
from support.marks import needs_cpu_kernels
from support.processes import HANG_S, python_all

pytestmark = [
    needs_cpu_kernels,
    pytest.mark.skipif(
        DEVICE.type != "cpu" or not dist.is_available(), reason="needs a second GPU"
    ),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("distributed")


@pytest.fixture
def alone(tmp_path) -> Iterator[None]:
    """A process group of this process."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as in the workers: matmul's bits depend on it
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/alone", rank=0, world_size=1)
    yield
    dist.destroy_process_group()
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def outcomes(folder) -> list[dict[str, str]]:
    """Of each rank: scenario -> "" or a traceback."""
    # Saved by one process, before two resume it.
    alone_folder = folder / "alone"
    alone_folder.mkdir()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{alone_folder}/r", rank=0, world_size=1)
    try:
        for run, name, packed in worker.each_run():
            model = worker.shard_fully(worker.make_model(packed))
            opt = worker.make_optimizer(name, model.parameters(), packed)
            worker.train(model, opt, range(2), range(2), 1 / 2)
            worker.save(folder / "one" / run, model, opt)
    finally:
        dist.destroy_process_group()
        torch.set_num_threads(threads)
    programs = [
        f"from support.distributed_worker import main; main({rank}, {str(folder)!r})"
        for rank in range(worker.WORLD_SIZE)
    ]
    found = []
    for rank, done in enumerate(python_all(programs)):
        file = folder / f"outcomes{rank}.json"
        found.append(json.loads(file.read_text()) if file.exists() else {})
        found[-1]["log"] = (done.stdout + done.stderr)[-4000:]
    return found


@pytest.mark.parametrize("name", worker.SCENARIOS)
def test_two_processes(name, outcomes):
    for rank, outcome in enumerate(outcomes):
        if name not in outcome:
            failed = next((key for key, text in outcome.items() if text and key != "log"), None)
            pytest.fail(f"rank {rank} did not come to it; failed: {failed}; log:\n{outcome['log']}")
        assert not outcome[name], f"rank {rank}:\n{outcome[name]}"


@pytest.mark.parametrize(("run", "name", "packed"), [*worker.each_run()])
def test_one_process_goes_on_where_two_were_ended(run, name, packed, outcomes, folder, alone):
    assert outcomes[0].get("save-on-two") == ""
    model, opt = worker.resume(folder / "two" / run, name, packed)
    worker.train(model, opt, range(2, 4), range(2), 1 / 2)
    worker.assert_served(opt)
    worker.assert_model_is(model, worker.train_alone(name, range(4), packed)[0])


@pytest.mark.parametrize("packed", [False, True])
def test_checkpoints_of_whole_models(packed, tmp_path, alone):
    """What is not sharded is decoded too where torch.distributed.checkpoint asks: anyone can load it."""
    model, opt = worker.train_alone("AdamW", range(2), packed)
    worker.save(tmp_path / "saved", model, opt)
    compact = opt.state_dict()["state"][0]
    assert ("exp_avg_scale" in compact) == packed
    resumed = worker.make_model(packed, seed=1)
    its_opt = worker.make_optimizer("AdamW", resumed.parameters(), packed)
    worker.load(tmp_path / "saved", resumed, its_opt)
    sharded, opt_of_sharded = worker.resume(tmp_path / "saved", "AdamW", packed)
    for one, optimizer in ((model, opt), (resumed, its_opt), (sharded, opt_of_sharded)):
        worker.train(one, optimizer, range(2, 4), range(2), 1 / 2)
        worker.assert_model_is(one, model)


def test_a_checkpoint_of_8_bits_loads_into_other_formats(tmp_path, alone):
    model = worker.make_model()
    opt = fused_optim.AdamW(model.parameters(), state_dtype="int8")
    worker.train(model, opt, range(2), range(2), 1 / 2)
    worker.save(tmp_path / "saved", model, opt)
    twin = worker.make_model(seed=1)
    stock = torch.optim.AdamW(twin.parameters())
    worker.load(tmp_path / "saved", twin, stock)
    for param, other in zip(model.parameters(), twin.parameters()):
        decoded = storage.decode_states(opt.state[param], ["exp_avg", "exp_avg_sq"])
        for key in ("exp_avg", "exp_avg_sq"):
            assert torch.equal(stock.state[other][key], decoded[key])


def test_the_example_resumes_on_another_number_of_processes(tmp_path, monkeypatch, capsys):
    script = Path(__file__).parents[2] / "examples" / "fsdp2_train.py"
    options = ["--steps", "2", "--state-dtype", "int8", "--master", "split8", "--checkpoint"]
    torchrun = ("-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone")
    run = subprocess.run(
        [sys.executable, *torchrun, "--", str(script), *options, str(tmp_path)],
        env={
            **os.environ,
            "PYTHONPATH": os.pathsep.join(p for p in sys.path if p),
            "OMP_NUM_THREADS": "1",
        },
        capture_output=True,
        text=True,
        timeout=HANG_S,
    )
    assert run.returncode == 0, run.stderr
    # Alone, as torchrun would start it, but where torch is imported already.
    environment = {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 1, "LOCAL_WORLD_SIZE": 1}
    environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": 0}  # any that is free
    for key, value in environment.items():
        monkeypatch.setenv(key, str(value))
    monkeypatch.setattr(sys, "argv", [str(script), *options, str(tmp_path)])
    runpy.run_path(str(script))["main"]()
    lines = [*run.stdout.splitlines(), *capsys.readouterr().out.splitlines()]
    before, after = (line for line in lines if line.startswith("step"))
    assert before.startswith("step 2: loss") and after.startswith("step 4: loss")
    assert float(after.split()[-1]) < float(before.split()[-1])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["2", "4"]
