"""python -m fused_optim: the commands as a user runs them, and the statistics they print."""

import dataclasses
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch

from fused_optim import cli, units
from fused_optim.bench import contestants, measure, peers, results, terminal, timing, workloads
from fused_optim.bench.timing import Quartiles
from fused_optim.bench.workloads import Target
from support.marks import needs_cpu_kernels
from support.processes import HANG_S

pytestmark = [needs_cpu_kernels, pytest.mark.usefixtures("frozen_heap")]

# Of the same schema.
PUBLISHED = Path(__file__).parents[2] / "benchmarks/results/cpu-xeon-2cores.json"
PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"


def run_cli(*args, **env):
    return subprocess.run(
        [sys.executable, "-m", "fused_optim", *map(str, args)],
        # Away from the repository, where the source tree would shadow an installed wheel.
        cwd=tempfile.gettempdir(),
        capture_output=True,
        text=True,
        timeout=HANG_S,
        env={**os.environ, **env},
    )


@pytest.fixture(scope="module")
def tiny_run(tmp_path_factory):
    """One run of the smallest row, with everything it can write."""
    folder = tmp_path_factory.mktemp("bench")
    json_file, plots = folder / "new" / "bench.json", folder / "plots"
    args = ["--quick", "--only", "tiny", "linear-10", "--threads", "1"]
    done = run_cli("bench", *args, "--json", json_file, "--plot", plots)
    assert done.returncode == 0, done.stderr
    return done.stdout, json.loads(json_file.read_text()), plots


def test_info_prints_version_and_instruction_set():
    done = run_cli("info")
    assert done.returncode == 0, done.stderr
    import fused_optim

    for word in (fused_optim.__version__, fused_optim.config()["isa"], torch.__version__):
        assert word in done.stdout


def test_what_is_optional_is_imported_only_where_it_is_needed():
    code = (
        "import sys, fused_optim; "
        "bad = {'fused_optim.cli', 'fused_optim.bench', 'rich', 'matplotlib'} & set(sys.modules); "
        "assert not bad, bad; "
        "sys.modules['rich'] = None; "  # as if it were not installed
        "from fused_optim.cli import main; "
        "assert main(['info']) == 0; "
        "assert main(['bench']) == 2"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=HANG_S,
        cwd=tempfile.gettempdir(),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stderr == "bench needs rich: pip install 'fused-optim[bench]'\n"


def test_bench_prints_the_table(tiny_run):
    stdout, _, _ = tiny_run
    for word in (
        "AdamW, 10 x 10",
        "for-loop",
        "foreach",
        "DeepSpeedCPUAdam",
        "optimi",
        "1 thread",
    ):
        assert word in stdout


def test_bench_json_follows_the_schema(tiny_run):
    _, saved, _ = tiny_run
    assert saved["schema"] == results.SCHEMA
    published = json.loads(PUBLISHED.read_text())
    assert saved.keys() == published.keys()
    assert all(row.keys() == published["rows"][0].keys() for row in saved["rows"])
    assert saved["machine"]["threads"] == 1
    assert saved["versions"]["torch"] == torch.__version__
    assert saved["settings"] == {"quick": True}
    assert saved["interrupted"] is False
    assert [row["name"] for row in saved["rows"]] == ["tiny", "linear-10"]
    row = saved["rows"][0]
    assert (row["n_tensors"], row["numel"]) == (10, 100)
    assert row["target"] == {"ratio": 4.0, "probe": None}
    assert row["backends"] == {"cpu": 10}
    assert row["fallbacks"] == []
    # 4 streams of float32, of which the grad is only read.
    assert row["bytes_per_step"] == 100 * 4 * 7
    assert row["cpu_elsewhere"] is None or 0 <= row["cpu_elsewhere"] <= 1
    for peer in peers.lineup(None, "cpu").peers:
        assert (peer.name in row["not_measured"]) != (peer.name in row["samples_s"])


def test_bench_json_summary_follows_from_its_samples(tiny_run):
    _, saved, _ = tiny_run
    for row in saved["rows"]:
        for name, rounds in row["samples_s"].items():
            per_round = [statistics.median(passes) for passes in rounds]
            assert row["seconds"][name]["median"] == pytest.approx(statistics.median(per_round))
        # One that was dropped early may have had a quieter machine.
        most = max(len(row["samples_s"][name]) for name in peers.STOCK_FLAGS)
        stock = [name for name in peers.STOCK_FLAGS if len(row["samples_s"][name]) == most]
        assert row["baseline"] == min(stock, key=lambda name: row["seconds"][name]["median"])
        assert row["ratio"]["median"] == pytest.approx(statistics.median(row["ratio_samples"]))


def test_bench_draws_charts(tiny_run):
    _, _, plots = tiny_run
    assert sorted(path.name for path in plots.iterdir()) == [
        "linear.png",
        "ratios.png",
        "roofline.png",
        "times.png",
    ]
    for path in plots.iterdir():
        assert path.read_bytes().startswith(PNG_SIGNATURE)


def test_bench_fails_when_a_tensor_fell_back(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(measure, "QUICK", dataclasses.replace(SCHEDULE, budget_s=0.01))
    script = tmp_path / "complex.py"
    script.write_text("import torch\ndef f(): return [(torch.ones(3) * 1j).requires_grad_()]\n")
    monkeypatch.setattr(sys, "path", list(sys.path))
    assert cli.main(["bench", "--quick", "--from", f"{script}:f"]) == 1
    out = capsys.readouterr().out
    assert "FELL BACK" in out
    assert "f-adamw: a complex tensor" in out


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--only", "no-such-row"], "no-such-row"),
        (["--threads", "0"], "'0' is not a whole number"),
        (["--json", "/proc/no/such/folder/x.json"], "/proc/no"),
    ],
)
def test_bench_rejects_bad_arguments(args, message, capsys):
    with pytest.raises(SystemExit) as stopped:
        cli.main(["bench", *args])
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("quick", [False, True])
def test_table_names_are_unique_and_a_shortened_model_says_so(quick):
    rows = workloads.table(quick)
    assert len({row.name for row in rows}) == len(rows)
    for row in rows:
        if row.name.startswith("gpt2"):
            assert ("2/12" in row.title) is quick


@pytest.mark.parametrize("layout", ["matching", "transposed", "channels_last"])
def test_copies_have_equal_values_and_the_layout_asked_for(layout):
    shapes = [(5, 3), (4, 3, 2, 2), (7,)]
    params = contestants.make_params(workloads.Workload("w", "w", "AdamW", shapes))
    copies = contestants.copy_params(params, layout)
    for param, copy in zip(params, copies, strict=True):
        assert torch.equal(param, copy)
        assert torch.equal(param.grad, copy.grad)
        assert param.data_ptr() != copy.data_ptr()
        assert param.grad.data_ptr() != copy.grad.data_ptr()
    strides = [copy.grad.stride() for copy in copies]
    assert strides[0] == ((1, 5) if layout == "transposed" else (3, 1))
    assert strides[1] == ((12, 1, 6, 3) if layout == "channels_last" else (12, 4, 2, 1))


@pytest.mark.parametrize("n_values", [2, 3, 4, 5, 10, 101])
def test_quartiles_agree_with_the_standard_library(n_values):
    values = [(37 * i) % 101 / 7 for i in range(n_values)]
    expected = statistics.quantiles(values, n=4, method="inclusive")
    found = timing.quartiles(values)
    assert [found.q1, found.median, found.q3] == pytest.approx(expected)


def test_quartiles_of_one_value_are_that_value():
    assert timing.quartiles([3.0]) == Quartiles(3.0, 3.0, 3.0)


def test_ratios_are_paired_within_a_round_and_stop_with_the_shorter_run():
    slow = [[2.0, 100.0, 4.0], [30.0, 30.0, 30.0], [1.0, 1.0, 1.0]]
    fast = [[1.0, 2.0, 3.0], [10.0, 1.0, 99.0]]
    assert timing.paired_ratios(slow, fast) == [2.0, 3.0]


class FakeClock:
    """Time passes only inside the callables."""

    def __init__(self):
        self.now = 0.0
        self.calls = []

    def __call__(self):
        return self.now

    def step(self, name, seconds):
        def step():
            self.calls.append(name)
            self.now += seconds

        return step


SCHEDULE = timing.Schedule(
    budget_s=1.0,
    limit_s=1e3,
    min_rounds=4,
    max_rounds=6,
    n_passes=3,
    n_screening_rounds=2,
    burst_s=0.01,
)


def test_alternate_measures_each_in_each_pass_and_leaves_out_what_comes_before():
    clock = FakeClock()
    steps = {"a": clock.step("a", 0.004), "b": clock.step("b", 0.02)}
    samples = timing.alternate(steps, SCHEDULE, before=clock.step("before", 0.5), clock=clock)
    # 4 rounds of 3 passes are beyond the budget of 1 s because of what comes before.
    assert {name: len(rounds) for name, rounds in samples.items()} == {"a": 4, "b": 4}
    assert all(len(passes) == 3 for rounds in samples.values() for passes in rounds)
    for name, seconds in (("a", 0.004), ("b", 0.02)):
        for passes in samples[name]:
            assert passes == pytest.approx([seconds] * 3)
    # A burst of "a" takes 3 steps to fill 10 ms, one of "b" takes 1; what is not measured comes first.
    measured = clock.calls[-2 * 4 * 3 * (3 + 1) :]
    assert measured.count("a") == 4 * 3 * 3
    assert measured.count("b") == 4 * 3
    assert set(clock.calls[::2]) == {"before"}


def test_alternate_changes_the_order():
    clock = FakeClock()
    steps = {name: clock.step(name, 0.02) for name in "abc"}
    timing.alternate(steps, SCHEDULE, clock=clock)
    passes = ["".join(clock.calls[at : at + 3]) for at in range(6, len(clock.calls), 3)]
    assert {"".join(sorted(one_pass)) for one_pass in passes} == {"abc"}
    assert len(set(passes)) > 1
    assert {one_pass[0] for one_pass in passes} == set("abc")


def test_alternate_drops_the_slow_and_keeps_their_samples():
    clock = FakeClock()
    steps = {"fast": clock.step("fast", 0.02), "slow": clock.step("slow", 0.2)}
    asked = []

    def drop(medians):
        asked.append(medians)
        return {"slow"}

    samples = timing.alternate(steps, SCHEDULE, drop=drop, clock=clock)
    assert asked == [{"fast": pytest.approx(0.02), "slow": pytest.approx(0.2)}]
    assert len(samples["slow"]) == 2
    assert len(samples["fast"]) == 4


def test_alternate_stops_at_the_most_rounds():
    clock = FakeClock()
    samples = timing.alternate({"a": clock.step("a", 0.01)}, SCHEDULE, clock=clock)
    assert len(samples["a"]) == SCHEDULE.max_rounds


def test_alternate_stops_at_the_limit_before_it_has_all_rounds():
    clock = FakeClock()
    schedule = dataclasses.replace(SCHEDULE, limit_s=5.0)
    samples = timing.alternate({"a": clock.step("a", 1.0)}, schedule, clock=clock)
    # A round of 3 passes takes 3 s.
    assert len(samples["a"]) == 2


@pytest.mark.parametrize(
    ("target", "ratio", "probe_part", "met"),
    [
        (Target(), Quartiles(0.1, 0.1, 0.1), None, None),
        (Target(1.0), Quartiles(0.97, 0.98, 1.0), None, True),
        (Target(1.0), Quartiles(0.96, 1.2, 1.3), None, False),
        (Target(3.0), Quartiles(1.0, 3.0, 4.0), None, True),
        (Target(3.0), Quartiles(2.9, 2.95, 4.0), None, False),
        (Target(1.0, 0.95), Quartiles(1.0, 1.0, 1.0), Quartiles(0.9, 0.95, 1.0), True),
        (Target(1.0, 0.95), Quartiles(1.0, 1.0, 1.0), Quartiles(0.9, 0.94, 1.0), False),
    ],
)
def test_targets(target, ratio, probe_part, met):
    assert results.is_met(target, ratio, probe_part) is met


@pytest.mark.parametrize(
    ("n_rounds", "cpu_elsewhere", "met"),
    [
        (results.MIN_ROUNDS_TO_JUDGE, None, True),
        (results.MIN_ROUNDS_TO_JUDGE, 0.02, True),
        (results.MIN_ROUNDS_TO_JUDGE, 0.5, None),
        (results.MIN_ROUNDS_TO_JUDGE - 1, 0.02, None),
    ],
)
def test_no_verdict_from_few_rounds_or_a_busy_machine(n_rounds, cpu_elsewhere, met):
    [tiny] = workloads.select(["tiny"], quick=True)
    ratios = [9.0] * n_rounds
    row = results.Row(tiny, "fused", {}, ratios, 0, None, None, {}, {}, [], cpu_elsewhere)
    assert row.met is met


def test_what_the_process_takes_is_told_beside_the_times(tmp_path, capsys):
    work = workloads.Workload(workloads.MEMORY, "AdamW, one", "AdamW", [(3,)])
    found = measure.run([work], quick=True, threads=None)
    assert found.import_s > 0
    terminal.print_results(found)
    lines = capsys.readouterr().out.splitlines()
    assert lines[-2].startswith("memory that one step adds at its peak, AdamW, one: fused_optim ")
    assert f"already: {units.seconds(found.import_s)}" in lines[-1]
    found.save(tmp_path / "bench.json")
    assert json.loads((tmp_path / "bench.json").read_text())["import_s"] == found.import_s


def raise_build_error(workload, params):
    raise RuntimeError("no compiler")


def test_peers_that_do_not_run_are_named_with_the_reason(monkeypatch):
    def adamw(workload, params):
        return torch.optim.AdamW(params)

    lineup = peers.Lineup(
        (
            peers.Peer("absent", "no_such_module_anywhere.optim", "no-such", {"AdamW": adamw}),
            peers.Peer("narrow", "torch", "torch", {"RMSprop": adamw}),
            peers.Peer("broken", "torch", "torch", {"AdamW": raise_build_error}),
            peers.Peer("running", "torch", "torch", {"AdamW": adamw}),
        )
    )
    monkeypatch.setattr(measure, "QUICK", dataclasses.replace(SCHEDULE, budget_s=0.01))
    [tiny] = workloads.select(["tiny"], quick=True)
    row = measure.measure_row(tiny, quick=True, lineup=lineup)
    assert row.not_measured == {
        "absent": "not installed",
        "narrow": "has no AdamW",
        "broken": "failed: RuntimeError: no compiler",
    }
    assert {"fused_optim", "for-loop", "foreach", "fused", "running"} == set(row.samples_s)
