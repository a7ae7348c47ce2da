"""benchmarks/programs with trainings of a few steps, and the table of its committed results."""

import json
import runpy
import sys
from pathlib import Path

import pytest

from fused_optim.bench.timing import Schedule
from support.marks import needs_cpu_kernels
from support.processes import python

pytestmark = needs_cpu_kernels

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "benchmarks" / "programs"
# Rounded up by stable-baselines3: PPO to its first 2,048, DQN learns from the 101st on.
N_STEPS = {"ppo": 1, "dqn": 200, "characters": 3}
N_OPTIMIZER_STEPS = {"ppo": 320, "dqn": 25, "characters": 3}
N_TENSORS = {"ppo": 12, "dqn": 6, "characters": 52}

SB3 = "__import__('stable_baselines3').{}('MlpPolicy', 'CartPole-v1').policy.optimizer.param_groups[0]"
# The options of an optimizer that was asked for nothing.
DEFAULT_GROUP = {
    "ppo": SB3.format("PPO"),
    "dqn": SB3.format("DQN"),
    "characters": "worker.torch.optim.AdamW([worker.torch.ones(1)]).param_groups[0]",
}


@pytest.fixture
def modules(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(str(FOLDER))
    import alternation
    import table
    import trainings

    return alternation, table, trainings


@pytest.mark.parametrize("name", N_STEPS)
def test_programs_train_alike_with_every_contestant(name: str) -> None:
    done = python(
        f"""
import json, sys
sys.path.insert(0, {str(FOLDER)!r})
import worker
for contestant in worker.CONTESTANTS:
    print(json.dumps(worker.measure({name!r}, contestant, 0, {N_STEPS[name]})))
group = {DEFAULT_GROUP[name]}
print(json.dumps({{name: group[name] for name in ("lr", "betas", "eps", "weight_decay")}}))
""",
        OMP_NUM_THREADS="1",
    )
    assert done.returncode == 0, done.stderr
    default, fused, ours, hypers = (json.loads(line) for line in done.stdout.splitlines())
    assert ours["backends"] == {"cpu": N_TENSORS[name]}
    for sample in (default, fused, ours):
        assert sample["n_optimizer_steps"] == N_OPTIMIZER_STEPS[name]
        assert sample["hypers"] == hypers
        assert 0 < sample["step_s"] < sample["wall_s"]
        assert sample["cpu_s"] > 0
    assert default["backends"] is fused["backends"] is None


def test_a_training_has_a_process_with_its_threads(modules) -> None:
    alternation, _, trainings = modules
    sample = alternation.train("characters", trainings.OURS, 2, 7, 1)
    assert sample["threads"] == 2 and sample["seed"] == 7


@pytest.mark.parametrize(
    ("program", "reason"),
    [
        ("raise SystemExit('out of luck')", "characters with fused_optim:\nout of luck"),
        ('print(\'{"backends": {"cpu": 51, "stock": 1}}\')', "characters: not all tensors were"),
    ],
    ids=["failure", "fallback"],
)
def test_what_is_no_measurement(
    modules, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, program: str, reason: str
) -> None:
    alternation, _, trainings = modules
    worker = tmp_path / "worker.py"
    worker.write_text(program)
    monkeypatch.setattr(alternation, "WORKER", worker)
    with pytest.raises(alternation.NotMeasured, match=reason):
        alternation.train("characters", trainings.OURS, 1, 0, 1)


def sample_of(wall_s: float, **others) -> dict:
    alike = {"n_optimizer_steps": 9, "hypers": {"lr": 1e-3}, "cpu_elsewhere": 0.0}
    return alike | {"wall_s": wall_s, "cpu_s": 2 * wall_s, "step_s": wall_s / 4} | others


class Trainings:
    """In place of those in other processes: ours takes 1, 2, 4, ... s, the others twice or half as long."""

    def __init__(self, **others) -> None:
        self.turns: list[tuple] = []
        self.others = others

    def __call__(self, name, contestant, threads, seed, n_steps) -> dict:
        self.turns.append((name, contestant, threads, seed))
        factor = {"fused_optim": 1, "torch.optim": 2}.get(contestant, 0.5)
        return sample_of(factor * 2.0**seed, **(self.others if seed and factor == 1 else {}))


def test_turns_change_from_round_to_round(modules, monkeypatch: pytest.MonkeyPatch) -> None:
    alternation, _, trainings = modules
    train = Trainings()
    monkeypatch.setattr(alternation, "train", train)
    n = len(trainings.CONTESTANTS)
    rows = alternation.measure({"ppo": 1, "dqn": 1}, [1, 2], 2 * n)
    assert [(row["name"], row["threads"]) for row in rows] == [
        ("ppo", 1), ("ppo", 2), ("dqn", 1), ("dqn", 2)
    ]  # fmt: skip
    of_one = [turn for turn in train.turns if turn[0] == "dqn" and turn[2] == 2]
    rounds = [of_one[i : i + n] for i in range(0, len(of_one), n)]
    for number, turns in enumerate(rounds):
        assert {seed for *_, seed in turns} == {number}
        assert {contestant for _, contestant, *_ in turns} == {*trainings.CONTESTANTS}
    for place in range(n):
        names = [turns[place][1] for turns in rounds]
        assert all(names.count(name) == 2 for name in trainings.CONTESTANTS)


@pytest.mark.parametrize("different", [{"n_optimizer_steps": 8}, {"hypers": {"lr": 1}}])
def test_other_work_is_no_measurement(
    modules, monkeypatch: pytest.MonkeyPatch, different: dict
) -> None:
    alternation, _, _ = modules
    monkeypatch.setattr(alternation, "train", Trainings(**different))
    with pytest.raises(alternation.NotMeasured, match=f"ppo: {next(iter(different))} differ"):
        alternation.measure({"ppo": 1}, [1], 2)


ONE_ROUND = Schedule(
    budget_s=1e-6,
    limit_s=1e-6,
    min_rounds=1,
    max_rounds=1,
    n_passes=1,
    n_screening_rounds=1,
    burst_s=1e-6,
)


def test_latency_is_of_every_contestant(modules) -> None:
    alternation, _, trainings = modules
    samples = alternation.measure_latency(ONE_ROUND)
    assert samples.keys() == trainings.CONTESTANTS.keys()
    assert all(passes[0][0] > 0 for passes in samples.values())


def run_command(monkeypatch: pytest.MonkeyPatch, *args: str) -> int:
    monkeypatch.setattr(sys, "argv", ["__main__.py", *args])
    return runpy.run_path(str(FOLDER / "__main__.py"))["main"]()


def test_the_command_saves_and_prints(
    modules, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    alternation, table, _ = modules
    monkeypatch.setattr(alternation, "train", Trainings())
    latency = {
        "torch.optim": [[1e-4]],
        "torch.optim, fused=True": [[3e-5]],
        "fused_optim": [[1e-5]],
    }
    monkeypatch.setattr(alternation, "measure_latency", lambda schedule: latency)
    out = tmp_path / "new" / "out.json"
    assert run_command(monkeypatch, "--rounds", "3", "--threads", "2", "--out", str(out)) == 0
    found = json.loads(out.read_text())
    assert found["settings"] == {"rounds": 3} and len(found["load_averages"]) == 2
    assert {"torch", "stable-baselines3", "scikit-learn"} <= found["versions"].keys()
    assert found["command"].startswith("python benchmarks/programs --rounds 3")
    printed, errors = capsys.readouterr()
    assert table.written(found) in printed
    assert (
        "| PPO on CartPole, 10,240 env steps | 2 | 4.00 | 25% | 2.00 "
        "| 2.00x [2.00, 2.00] | 2.00x [2.00, 2.00] | 2.00x [2.00, 2.00] "
        "| 0.50x [0.50, 0.50] | 0.50x [0.50, 0.50] |" in printed
    )
    assert (
        "10.0 us; 100 us by `torch.optim` (10.00x [10.00, 10.00]), "
        "30.0 us with `fused=True` (3.00x [3.00, 3.00])." in printed
    )
    assert "no numbers to quote" not in errors


def test_ratios_are_paired_by_round(modules) -> None:
    _, table, _ = modules
    walls = {
        "fused_optim": [4, 1, 2],
        "torch.optim": [4, 3, 4],
        "torch.optim, fused=True": [1, 1, 1],
    }
    samples = {name: [sample_of(wall_s) for wall_s in values] for name, values in walls.items()}
    cells = table.cells({"title": "T", "threads": 1, "samples": samples})
    assert cells[2] == "4.00" and cells[4] == "2.00"
    assert cells[5] == "2.00x [1.50, 2.50]"
    assert cells[8] == "0.50x [0.38, 0.75]"


def test_what_is_not_installed_is_left_out(
    modules, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    alternation, _, trainings = modules
    monkeypatch.setattr(alternation, "train", Trainings(cpu_elsewhere=0.4))
    monkeypatch.setattr(
        alternation, "measure_latency", lambda _: {name: [[1.0]] for name in trainings.CONTESTANTS}
    )
    find_spec = "importlib.util.find_spec"
    monkeypatch.setattr(find_spec, lambda name: None if name == "stable_baselines3" else object())
    out = tmp_path / "out.json"
    assert run_command(monkeypatch, "--rounds", "2", "--out", str(out)) == 0
    errors = capsys.readouterr().err
    assert "dqn is left out, it needs stable-baselines3: pip install stable-baselines3" in errors
    assert "up to 40% of the machine: these are no numbers to quote" in errors
    found = json.loads(out.read_text())
    assert [row["name"] for row in found["rows"]] == ["characters", "characters"]
    assert {*found["skipped"]} == {"ppo", "dqn"}


def test_the_page_of_results_has_the_table_of_the_committed_samples(modules) -> None:
    _, table, _ = modules
    (file,) = (ROOT / "benchmarks/results").glob("programs-*.json")
    page = (ROOT / "benchmarks/results/README.md").read_text()
    assert file.name in page
    machine, rows, latency = table.written(json.loads(file.read_text())).strip().split("\n\n")
    assert rows in page
    prose = " ".join(page.split())
    assert machine in prose and latency in prose
