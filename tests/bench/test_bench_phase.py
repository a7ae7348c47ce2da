"""The benchmark's rows of whole phases: their table, fair inputs, and that both sides do the same."""

import dataclasses
import json
import re

import pytest
import torch

import fused_optim
from fused_optim.bench import (
    contestants,
    machine,
    measure,
    peers,
    phase,
    results,
    terminal,
    timing,
    workloads,
)
from fused_optim.bench.agreement import Disagreement
from fused_optim.bench.contestants import NEVER_ON, OURS, STOCK_CALLS
from fused_optim.bench.workloads import CLIP, PARTS, WHOLE, Phase, Target, Workload
from fused_optim.cli import main
from support.marks import needs_cpu_kernels

pytestmark = [needs_cpu_kernels, pytest.mark.usefixtures("frozen_heap")]

SCHEDULE = timing.Schedule(
    budget_s=0.01, limit_s=1e9, min_rounds=4, max_rounds=5, n_passes=1, n_screening_rounds=1,
    burst_s=1e-5,
)  # fmt: skip
# Three grads uniform in (-1, 1) have a norm of about 40.
WORK = Workload(
    "work", "work", "AdamW", [(40, 50), (3,), (2_500,)], Target(0.01), phase=WHOLE, threads=1
)
PHASES = [WHOLE, CLIP, Phase(PARTS, "torch.amp"), Phase(PARTS, "fused_optim")]
IDS = ["whole", "clip", "torch.amp", "fused_optim"]


@pytest.fixture
def short(monkeypatch):
    for name in ("FULL", "QUICK"):
        monkeypatch.setattr(measure, name, SCHEDULE)
    monkeypatch.setattr(phase, "CHOICE", SCHEDULE)


def enter(work=WORK):
    params = contestants.make_params(work)
    return phase.enter(work, params, [], quick=False, timer=None), params


@pytest.fixture
def two_threads():
    """Torch's own choice on a machine with two cores."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def test_the_table_has_each_phase_on_each_model_with_each_number_of_threads(two_threads):
    rows = {row.name: row for row in workloads.table(quick=False) if row.phase}
    for model, numel in (("gpt2", 124_439_808), ("resnet50", 25_557_032)):
        for n in (1, 2):
            whole, clip = rows[f"{model}-phase-{n}t"], rows[f"{model}-clip-{n}t"]
            assert (whole.phase, whole.target, whole.threads) == (WHOLE, Target(1.8), n)
            assert (clip.phase, clip.target, clip.threads) == (CLIP, Target(1.4), n)
            assert whole.numel == clip.numel == numel
            assert f"{n} thread" in whole.title
    for scaler in ("torch.amp", "fused_optim"):
        row = rows[f"gpt2-{scaler}-scaler"]
        assert (row.phase, row.target) == (Phase(PARTS, scaler), Target())
        assert f"{scaler}.GradScaler" in row.title
    assert len(rows) == 10


def test_the_table_of_a_gpu_has_each_phase_on_each_model():
    rows = {row.name: row for row in workloads.gpu_table(quick=False) if row.phase}
    for model in ("gpt2", "resnet50"):
        assert (rows[f"{model}-phase"].phase, rows[f"{model}-phase"].target.ratio) == (WHOLE, 1.5)
        assert (rows[f"{model}-clip"].phase, rows[f"{model}-clip"].target.ratio) == (CLIP, 1.25)
    assert {row.threads for row in rows.values()} == {None}
    assert len(rows) == 6


def test_rows_take_the_number_of_threads_asked_for():
    rows = workloads.select(["*-phase-*", "*-clip-*"], quick=True, threads=3)
    assert {row.threads for row in rows} == {3}
    assert [row.name for row in rows] == [
        "gpt2-phase-3t", "resnet50-phase-3t", "gpt2-clip-3t", "resnet50-clip-3t"
    ]  # fmt: skip


def test_a_quick_run_has_one_phase_and_the_others_by_name(two_threads):
    unasked = [row.name for row in workloads.select(None, quick=True) if row.phase]
    assert unasked == ["gpt2-phase-1t"]
    assert len(workloads.select(["*-phase-*"], quick=True)) == 4
    assert len([row for row in workloads.select(None, quick=False) if row.phase]) == 10


@pytest.mark.parametrize("chosen", PHASES, ids=IDS)
def test_both_read_the_same_grads_filled_before_each_step(short, chosen):
    work = dataclasses.replace(WORK, phase=chosen)
    entrants, params = enter(work)
    scale = phase.SCALE if "unscale" in chosen.parts else 1.0
    original = contestants.make_params(work)[0]
    assert original.grad is not None
    for _ in range(3):
        for step in entrants.steps.values():
            entrants.before()
            assert torch.equal(params[0].grad, original.grad * scale)
            before = params[0].grad.clone()
            step()
            if "zero" in chosen.parts:
                assert not params[0].grad.any()
            elif step is entrants.steps[STOCK_CALLS]:
                assert params[0].grad.norm() < 1 < before.norm()
    own_norm = torch.cat([p.grad.flatten() for p in contestants.make_params(work)]).norm()
    assert entrants.ours.grad_norm.item() == pytest.approx(own_norm.item(), rel=1e-6)
    assert entrants.ours.last_step.tensors == {"cpu": 3}


def test_of_each_call_the_fastest_variant_is_chosen(short):
    entrants, _ = enter()
    assert list(entrants.stock_calls) == list(PARTS)
    n_variants = [len(choice.seconds) for choice in entrants.stock_calls.values()]
    assert n_variants == [2, 2, 2, 2, 2]
    for choice in entrants.stock_calls.values():
        assert choice.seconds[choice.variant] == min(choice.seconds.values()) > 0


def test_a_scaler_unscales_with_the_one_call_it_has(short):
    entrants, _ = enter(dataclasses.replace(WORK, phase=Phase(PARTS, "torch.amp")))
    assert list(entrants.stock_calls["unscale"].seconds) == [
        "_amp_foreach_non_finite_check_and_unscale_"
    ]


def test_the_bytes_are_those_of_one_pass(short):
    # AdamW alone moves 28 bytes per float32 param. The norm reads 4, EMA moves 8, zeroing writes 4.
    assert enter()[0].nbytes == 44 * WORK.numel
    assert enter(dataclasses.replace(WORK, phase=CLIP))[0].nbytes == 32 * WORK.numel


# What ours may get wrong -> what tells.
WRONG = {
    "no clipping": ({"max_grad_norm": 1e9}, "param 0 differs"),
    "other clipping": ({"max_grad_norm": 1.01}, "exp_avg 0 differs"),
    "other average": ({"ema_decay": 0.98}, "average 0 differs"),
    "grads kept": ({"zero_grads": False}, "fused_optim leaves grads that are not zero"),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_two_different_things_are_not_timed(short, monkeypatch, wrong):
    options, message = WRONG[wrong]
    right = phase.one_pass_options(WHOLE)
    monkeypatch.setattr(phase, "one_pass_options", lambda phase: {**right, **options})
    with pytest.raises(Disagreement, match=message):
        enter()


def test_an_optimizer_that_does_not_unscale_is_not_timed(short, monkeypatch):
    monkeypatch.setattr(phase, "_our_step", lambda ours, phase, device: ours.step)
    with pytest.raises(Disagreement, match="the norm is"):
        enter()


@pytest.mark.parametrize("hyper", [{"lr": 1.01e-3}, {"betas": (0.9, 0.998)}, {"weight_decay": 0.1}])
def test_an_optimizer_with_other_hypers_is_not_timed(short, monkeypatch, hyper):
    right = contestants.ours
    monkeypatch.setattr(
        contestants, "ours", lambda work, params, options: right(work, params, {**options, **hyper})
    )
    with pytest.raises(Disagreement, match="differs"):
        enter()


def test_grads_that_need_no_clipping_are_not_timed(short, monkeypatch):
    monkeypatch.setattr(phase, "MAX_GRAD_NORM", 30.0)
    with pytest.raises(Disagreement, match="nothing to clip"):
        enter()


@pytest.mark.parametrize("chosen", PHASES, ids=IDS)
def test_a_phase_is_a_row(short, capsys, tmp_path, chosen):
    n_threads = torch.get_num_threads()
    work = dataclasses.replace(WORK, phase=chosen)
    found = measure.run([work], quick=True, threads=None)
    assert torch.get_num_threads() == n_threads
    [row] = found.rows
    assert (row.baseline, set(row.samples_s)) == (STOCK_CALLS, {OURS, STOCK_CALLS})
    assert (row.threads, row.n_rounds >= 4, row.fallbacks) == (1, True, [])
    assert not found.disagreements

    terminal.print_results(found)
    out = capsys.readouterr().out
    assert "clip: clip_grad_norm_(foreach=" in out
    found.save(tmp_path / "bench.json")
    [saved] = json.loads((tmp_path / "bench.json").read_text())["rows"]
    assert saved["threads"] == 1
    assert saved["phase"] == {"parts": list(chosen.parts), "scaler": chosen.scaler}
    assert list(saved["stock_calls"]) == list(chosen.parts)
    step = saved["stock_calls"]["step"]
    assert step["seconds"][step["variant"]] > 0


def test_steps_of_peers_are_timed_among_the_same_calls(short, capsys):
    def fails(workload, params):
        raise OSError("no compiler")

    builds = {
        "like": lambda workload, params: torch.optim.AdamW(params),
        "other": lambda workload, params: torch.optim.AdamW(params, lr=1.0),
        "broken": fails,
    }
    lineup = peers.Lineup(
        tuple(
            peers.Peer(name, "torch", "torch", {"AdamW": build}) for name, build in builds.items()
        )
    )
    found = measure.run([WORK], quick=True, threads=None, lineup=lineup)
    [row] = found.rows
    assert (row.baseline, set(row.samples_s)) == (STOCK_CALLS, {OURS, STOCK_CALLS, "like"})
    assert row.not_measured["other"].startswith("computes something else: ")
    assert row.not_measured["broken"] == "failed: OSError: no compiler"
    terminal.print_results(found)
    assert re.search(r"time of a step .*\| +like \|", capsys.readouterr().out)


def test_a_disagreement_takes_the_place_of_the_row_and_is_an_error(short, monkeypatch, capsys):
    monkeypatch.setattr(phase, "EMA_DECAY", float("nan"))
    monkeypatch.setattr(workloads, "gpt2_small", lambda n_blocks: WORK.shapes)
    monkeypatch.setattr(phase, "one_pass_options", lambda phase: {"max_grad_norm": 1.0})
    assert main(["bench", "--quick", "--threads", "1", "--only", "gpt2-phase-1t", "tiny"]) == 1
    out = capsys.readouterr().out
    assert "gpt2-phase-1t: NOT TIMED, ours and the baseline compute something else" in out
    assert "AdamW, 10 x 10" in out


def test_options_that_are_off_again_change_nothing(short):
    work = dataclasses.replace(WORK, phase=None, switched=True, target=Target(1.0))
    params, others = contestants.make_params(work), contestants.make_params(work)
    grads = [param.grad.clone() for param in params]
    switched, plain = contestants.switched(work, params), fused_optim.AdamW(others)
    assert switched.grad_norm is not None
    assert all(torch.equal(p.grad, grad) for p, grad in zip(params, grads, strict=True))
    # The two steps so far: a plain one, and a clipped one.
    for optimizer in (switched, plain):
        optimizer.step()
        assert optimizer.last_step.tensors == {"cpu": 3}
    assert all(torch.equal(p.grad, grad) for p, grad in zip(params, grads, strict=True))

    row = measure.measure_row(work, quick=True)
    assert (row.baseline, set(row.samples_s)) == (NEVER_ON, {OURS, NEVER_ON})
    terminal.print_results(results.Results(machine.about(quick=True), [row]))
