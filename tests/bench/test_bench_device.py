"""The benchmark on a GPU, played by fakes: events and their timer, input sets, targets, the table."""

import dataclasses
import json
import time
from types import SimpleNamespace

import pytest
import torch

from fused_optim import cli
from fused_optim.bench import (
    contestants,
    device,
    machine,
    measure,
    peers,
    phase,
    results,
    terminal,
    timing,
    workloads,
)
from fused_optim.bench.device import EventTimer
from fused_optim.bench.timing import HostTimer, Quartiles
from fused_optim.bench.workloads import Target, Workload
from support.marks import needs_cpu_kernels

pytestmark = [needs_cpu_kernels, pytest.mark.usefixtures("frozen_heap")]

MIB = 2**20


class FakeGpu:
    """A host and a device with a queue of its own. Time passes in launches and waits alone."""

    def __init__(self):
        self.host = 0.0
        self.device_done = 0.0
        self.n_holds = 0

    def launch(self, host_s, device_s):
        self.host += host_s
        self.device_done = max(self.device_done, self.host) + device_s

    def hold(self):
        self.n_holds += 1
        self.launch(1e-6, 1e-3)

    def synchronize(self):
        self.host = max(self.host, self.device_done)

    def event(self):
        return FakeEvent(self)

    def step(self, n_launches, host_s, device_s, *, waits=False):
        def step():
            for _ in range(n_launches):
                self.launch(host_s, device_s)
            if waits:
                self.synchronize()

        return step


class FakeEvent:
    def __init__(self, gpu):
        self.gpu = gpu
        self.time = None

    def record(self):
        self.time = max(self.gpu.device_done, self.gpu.host)

    def query(self):
        return self.gpu.host >= self.time

    def synchronize(self):
        self.gpu.host = max(self.gpu.host, self.time)

    def elapsed_time(self, end):
        return (end.time - self.time) * 1e3


@pytest.fixture
def gpu():
    return FakeGpu()


@pytest.fixture
def event_timer(gpu):
    return EventTimer(gpu.event, gpu.hold)


def test_events_measure_the_device_where_it_is_slower_than_the_host(gpu, event_timer):
    step = gpu.step(1, host_s=1e-5, device_s=1e-3)
    assert event_timer.burst(step, 3, None) == pytest.approx(1e-3)
    assert gpu.n_holds == 1


def test_events_measure_the_device_where_the_host_is_slower(gpu, event_timer):
    # 10 ms of the host's time for 0.5 ms of the device's.
    step = gpu.step(100, host_s=1e-4, device_s=5e-6)
    assert event_timer.burst(step, 1, None) == pytest.approx(5e-4)
    tried = gpu.n_holds
    assert tried == 1 + 2 + 4 + 8 + 16
    # What was found out stays known.
    assert event_timer.burst(step, 1, None) == pytest.approx(5e-4)
    assert gpu.n_holds == tried + 16


def test_each_step_has_a_hold_of_its_own(gpu, event_timer):
    event_timer.burst(gpu.step(100, host_s=1e-4, device_s=5e-6), 1, None)
    tried = gpu.n_holds
    event_timer.burst(gpu.step(1, host_s=1e-5, device_s=1e-3), 1, None)
    assert gpu.n_holds == tried + 1


def test_a_step_that_waits_for_the_device_is_measured_as_it_runs(gpu, event_timer):
    step = gpu.step(10, host_s=1e-4, device_s=5e-6, waits=True)
    gpu.synchronize()
    assert event_timer.burst(step, 2, None) == pytest.approx(10 * 1e-4, rel=0.1)
    tried = gpu.n_holds
    assert event_timer.burst(step, 2, None) == pytest.approx(10 * 1e-4, rel=0.1)
    assert gpu.n_holds == tried


def test_events_leave_out_what_comes_before_each_step(gpu, event_timer):
    step = gpu.step(1, host_s=1e-5, device_s=1e-3)
    before = gpu.step(1, host_s=1e-5, device_s=7e-3)
    begin = gpu.device_done
    assert event_timer.burst(step, 3, before) == pytest.approx(1e-3)
    assert gpu.device_done - begin == pytest.approx(1e-3 + 3 * (1e-3 + 7e-3), rel=0.1)


def test_the_host_is_timed_from_an_empty_queue(gpu):
    seen = []

    def step():
        seen.append(gpu.device_done <= gpu.host)
        gpu.launch(1e-5, 1e-3)

    timer = HostTimer(lambda: gpu.host)
    assert timer.burst(step, 4, gpu.synchronize) == pytest.approx(1e-5)
    assert seen == [True] * 4


def test_contestants_alternate_by_events_too(gpu, event_timer):
    schedule = timing.Schedule(
        budget_s=0.1, limit_s=9, min_rounds=4, max_rounds=50, n_passes=3, n_screening_rounds=1,
        burst_s=2e-4,
    )  # fmt: skip
    steps = {
        "many": gpu.step(100, host_s=1e-5, device_s=1e-6),
        "one": gpu.step(1, host_s=1e-5, device_s=2e-4),
    }
    samples = timing.alternate(steps, schedule, clock=lambda: gpu.host, timer=event_timer)
    for name, seconds in (("many", 1e-4), ("one", 2e-4)):
        assert len(samples[name]) >= 4
        for passes in samples[name]:
            assert passes == pytest.approx([seconds] * 3)


@pytest.mark.parametrize(
    ("l2_nbytes", "nbytes", "n_sets"),
    [
        (0, 1, 1),  # the CPU
        (50 * MIB, 2000 * MIB, 1),
        (50 * MIB, 200 * MIB, 1),
        (50 * MIB, 125 * MIB, 2),
        (50 * MIB, 10 * MIB, 20),
        (126 * MIB, 125 * MIB, 5),
    ],
)
def test_between_two_uses_of_a_set_the_cache_is_filled_several_times(l2_nbytes, nbytes, n_sets):
    found = device.Device(torch.device("cpu"), l2_nbytes).n_sets(nbytes)
    assert found == n_sets
    assert found * nbytes >= device.ROTATION * l2_nbytes


def test_steps_rotate():
    calls = []
    step = device.rotate([lambda name=name: calls.append(name) for name in "abc"])
    for _ in range(7):
        step()
    assert "".join(calls) == "abcabca"


def exactly(value):
    return Quartiles(value, value, value)


@pytest.mark.parametrize(
    ("target", "ratio", "copy_part", "met"),
    [
        (Target(1.1, copy=0.92, either=True), 1.05, 0.91, False),
        (Target(1.1, copy=0.92, either=True), 1.2, 0.5, True),
        (Target(1.1, copy=0.92, either=True), 0.9, 0.93, True),
        (Target(1.0, copy=0.92), 0.98, 0.93, True),
        (Target(1.0, copy=0.92), 0.98, 0.91, False),
        (Target(1.0, copy=0.92), 0.96, 0.93, False),
        (Target(copy=0.9), 0.1, 0.91, True),
        (Target(copy=0.9), 9.0, 0.89, False),
        (Target(), 9.0, 0.99, None),
    ],
)
def test_targets_with_the_copy(target, ratio, copy_part, met):
    assert results.is_met(target, exactly(ratio), None, exactly(copy_part)) is met


def test_gpu_table_has_the_sizes_it_names():
    rows = {row.name: row for row in workloads.gpu_table(quick=False)}
    assert len(rows) == len(workloads.gpu_table(quick=False))
    assert rows["billion"].n_tensors == 300
    assert rows["billion"].numel == pytest.approx(1e9, rel=0.05)
    assert (rows["gpt2-adamw"].n_tensors, rows["small"].n_tensors) == (148, 2_000)
    assert {row.name for row in workloads.select(["*host"], quick=True, device_type="cuda")} == {
        "gpt2-host",
        "small-host",
    }


def test_huge_workloads_have_few_contestants():
    [billion] = workloads.select(["billion"], quick=False, device_type="cuda")
    variants, why_not = contestants.stock_variants(billion, quick=False)
    assert variants == ["fused"]
    assert why_not == dict.fromkeys(["for-loop", "foreach"], "workload too large")
    for peer in peers.lineup(None, "cuda").peers:
        assert peer.why_not(billion, quick=False, device_type="cuda") == "workload too large"


# Not larger than what a test may take: 2 MiB of AdamW's streams in 5 tensors. Every machine meets the target.
WORK = Workload("work", "AdamW, work", "AdamW", [(25_000,)] * 5, Target(1e-9, copy=1e-9))
SCHEDULE = timing.Schedule(
    budget_s=0.01, limit_s=1e9, min_rounds=4, max_rounds=5, n_passes=1, n_screening_rounds=1
)


class HostEvent:
    """An event of a device whose queue is always empty: the host is the device."""

    def record(self):
        self.time = time.perf_counter()

    def query(self):
        return False

    def synchronize(self):
        pass

    def elapsed_time(self, end):
        return (end.time - self.time) * 1e3


@pytest.fixture
def played(monkeypatch):
    """A "GPU" that is this CPU."""
    for name in ("FULL", "QUICK", "GPU"):
        monkeypatch.setattr(measure, name, SCHEDULE)
    monkeypatch.setattr(measure, "COPY_NBYTES", 4 * MIB)
    about = {
        "type": "cuda", "name": "Fake 1", "memory_nbytes": 2**30, "l2_nbytes": MIB,
        "driver": "1.2", "cuda": "13.0", "hip": None,
    }  # fmt: skip
    return device.Device(torch.device("cpu"), MIB, about, new_event=HostEvent)


def test_a_row_by_events_knows_the_copy_and_rotates_inputs(played):
    row = measure.measure_row(WORK, quick=True, device=played)
    assert (row.clock, row.n_sets) == ("device", 3)
    assert {contestants.OURS, contestants.COPY, "fused", "foreach"} <= set(row.samples_s)
    nbytes = sum(torch.Size(shape).numel() for shape in WORK.shapes) * 4 * 7
    assert row.nbytes == nbytes
    ours, copy = (row.samples_s[name] for name in (contestants.OURS, contestants.COPY))
    parts = [(nbytes / o[0]) / (8 * MIB / c[0]) for o, c in zip(ours, copy, strict=True)]
    expected = timing.quartiles(parts)
    assert row.copy_part is not None
    assert row.copy_part.median == pytest.approx(expected.median)
    assert row.copy_part.q1 == pytest.approx(expected.q1)
    assert row.met is True


def test_a_row_of_host_time_drains_the_queue_before_every_step(played, monkeypatch):
    drained = []
    device_ = dataclasses.replace(played, synchronize=lambda: drained.append(1))
    work = dataclasses.replace(WORK, timed="call", target=Target(5.0))
    row = measure.measure_row(work, quick=True, device=device_)
    assert (row.clock, row.n_sets, row.copy_part) == ("host", 1, None)
    assert len(drained) >= len(row.samples_s) * SCHEDULE.min_rounds
    assert contestants.COPY not in row.samples_s


def test_a_phase_by_events_counts_its_bytes(played, monkeypatch):
    monkeypatch.setattr(phase, "CHOICE", SCHEDULE)
    work = dataclasses.replace(WORK, phase=workloads.WHOLE)
    row = measure.measure_row(work, quick=True, device=played)
    assert (row.clock, row.baseline, row.n_sets) == ("device", contestants.STOCK_CALLS, 1)
    assert set(row.samples_s) == {contestants.OURS, contestants.STOCK_CALLS, contestants.COPY}
    assert row.nbytes == work.numel * 44
    assert row.copy_part is not None
    assert row.faster_peers == []
    poor = dataclasses.replace(played, free_nbytes=lambda: work.nbytes)
    with pytest.raises(measure.NotMeasured, match="are free"):
        measure.measure_row(work, quick=True, device=poor)


def test_states_get_the_dtypes_asked_for_and_who_cannot_says_so(played):
    work = dataclasses.replace(
        WORK, dtype=torch.bfloat16, state_dtypes={"exp_avg_sq": torch.float32}
    )
    row = measure.measure_row(work, quick=True, device=played)
    # Read and written: param and exp_avg in bfloat16, exp_avg_sq in float32; read: the grad.
    assert row.nbytes == work.numel * (2 * (2 + 2 + 4) + 2)
    assert row.not_measured["fused"].startswith("failed: RuntimeError: expected scalar type")
    assert row.baseline in ("for-loop", "foreach")
    assert row.as_dict()["state_dtypes"] == {"exp_avg_sq": torch.float32}


def test_a_workload_that_stock_does_not_take_has_the_copy_alone(played, monkeypatch):
    def refuse(workload, params, variant):
        raise RuntimeError(f"no {variant}")

    monkeypatch.setattr(contestants, "stock", refuse)
    row = measure.measure_row(
        dataclasses.replace(WORK, target=Target(copy=1e-9)), quick=True, device=played
    )
    assert (row.baseline, row.ratio, row.met) == (None, None, True)
    assert row.not_measured["fused"] == "failed: RuntimeError: no fused"
    assert row.as_dict()["ratio"] is None
    found = results.Results(machine.about(quick=True, device=played), [row])
    terminal.print_results(found)


def test_too_little_memory_skips_the_row_and_names_what_it_needs(played):
    poor = dataclasses.replace(played, free_nbytes=lambda: 3 * 2**30)
    billion = workloads.select(["billion"], quick=True, device_type="cuda")
    found = measure.run(billion, quick=True, threads=None, device=poor)
    assert found.rows == []
    assert found.skipped == {"billion": "needs 38.53 GiB, 3 GiB are free"}


@pytest.fixture
def printed(played, capsys, tmp_path):
    target = Target(1.1, copy=0.92, either=True)
    works = [
        dataclasses.replace(WORK, target=target),
        dataclasses.replace(WORK, name="h", title="host time", timed="call", target=Target(5.0)),
    ]
    lineup = peers.lineup(None, "cuda")
    found = measure.run(works, quick=True, threads=None, device=played, lineup=lineup)
    found.skipped["other"] = "needs 39 GiB, 3 GiB are free"
    terminal.print_results(found)
    found.save(tmp_path / "bench.json")
    return capsys.readouterr().out, json.loads((tmp_path / "bench.json").read_text())


def test_the_table_of_a_gpu(printed):
    out, _ = printed
    for text in (
        "Fake 1, 1 GiB, L2 1 MiB, driver 1.2, CUDA 13.0",
        "The roof is a large torch.Tensor.copy_",
        "1.1x or 92%",
        "torch.compile",
        "peers faster than ours (target: none)",
        "other: not measured: needs 39 GiB",
    ):
        assert text in out


def test_the_json_of_a_gpu(printed):
    _, saved = printed
    assert saved["device"]["name"] == "Fake 1"
    assert saved["device"]["l2_nbytes"] == MIB
    assert saved["device"]["driver"] == "1.2"
    assert {"torch", "triton", "python"} <= set(saved["versions"])
    assert saved["skipped"] == {"other": "needs 39 GiB, 3 GiB are free"}
    by_device, by_host = saved["rows"]
    assert by_device["target"] == {"ratio": 1.1, "probe": None, "copy": 0.92, "either": True}
    assert (by_device["clock"], by_device["timed"], by_device["n_sets"]) == ("device", "step", 3)
    assert by_device["copy_part"]["median"] > 0
    assert contestants.COPY in by_device["samples_s"]
    assert (by_host["clock"], by_host["timed"], by_host["copy_part"]) == ("host", "call", None)


def test_faster_peers_are_named():
    samples = {"fused_optim": [[2.0]], "fused": [[1.0]], "copy_": [[0.1]], "near": [[1.9]],
               "far": [[9.0]]}  # fmt: skip
    row = results.Row(WORK, "fused", samples, [0.5], 0, None, None, {}, {}, [])
    assert row.faster_peers == ["near"]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("cuda:99", "is not available"),
        ("meta", "is not supported; accepted: cpu, cuda, cuda:N"),
        ("gpu", "is no device; accepted: cpu, cuda, cuda:N"),
    ],
)
def test_a_device_that_is_not_there_is_an_error(name, message, capsys):
    with pytest.raises(ValueError, match=message):
        device.find(name)
    with pytest.raises(SystemExit) as stopped:
        cli.main(["bench", "--device", name])
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


def test_peers_with_small_states_enter_the_rows_of_such_states(monkeypatch):
    monkeypatch.setattr(peers.importlib.util, "find_spec", lambda name: object())
    entered = {
        peer.name: {
            row.name
            for row in workloads.gpu_table(False)
            if not peer.why_not(row, quick=False, device_type="cuda")
        }
        for peer in peers.lineup(None, "cuda").peers
    }
    assert entered["torchao"] == entered["bitsandbytes"] == {"formats-int8"}
    assert entered["FlashOptim"] == {"formats-split8"}
    assert not any(
        name.startswith("formats") for name in entered["optimi"] | entered["torch.compile"]
    )


def test_peers_with_small_states_are_built_from_their_libraries(monkeypatch):
    def build(params, **options):
        return torch.optim.SGD(params)

    fakes = SimpleNamespace(AdamW8bit=build, FlashAdamW=build)
    imported = []
    monkeypatch.setattr(
        peers.importlib, "import_module", lambda name: imported.append(name) or fakes
    )
    for peer in peers.PEERS:
        if peer.formats:
            (row,) = (r for r in workloads.gpu_table(True) if r.format in peer.formats)
            peer.build(row, [torch.nn.Parameter(torch.ones(3))])
    assert imported == ["torchao.optim", "bitsandbytes.optim", "flashoptim"]
