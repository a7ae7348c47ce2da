"""benchmarks/sweep.py, as far as it runs without a GPU: on a stub of one, and in Triton's interpreter."""

import contextlib
import importlib
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from support.cases import BACKEND
from support.processes import fresh_python
from support.stub_gpu import stub_gpu

if BACKEND != "cpu":
    pytest.skip("needs CPU kernels, and Triton as a compiler", allow_module_level=True)
pytest.importorskip("triton", reason="needs triton")

import fused_optim
from fused_optim.bench.timing import HostTimer, Schedule
from fused_optim.triton_kernels import streams
from fused_optim.triton_kernels.multi_tensor import multi_tensor
from fused_optim.triton_kernels.specialize import COMPILE_OPTIONS

FOLDER = Path(__file__).parents[2] / "benchmarks"
CPU = torch.device("cpu")
# Three rounds.
SCHEDULE = Schedule(1e-3, 10.0, 3, 3, 1, 3, burst_s=1e-6)


@pytest.fixture
def sweep(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(FOLDER))
    return importlib.import_module("sweep")


def step(case: Any) -> None:
    param = torch.nn.Parameter(torch.ones(5000, dtype=case.dtype))
    param.grad = torch.ones_like(param)
    fused_optim.AdamW([param], **case.options).step()


def test_every_configuration_reaches_the_compiler(
    sweep: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: dict[str, Any] = {}

    def refuse(*args: Any, **kwargs: Any) -> None:
        # (Triton 3.6 gives the same source another key when it is asked again.)
        sources = streams.load.src, streams.store.src
        asked.update(kwargs, sources=sources, key=multi_tensor.cache_key)
        raise OSError("enough")

    monkeypatch.setattr(multi_tensor, "warmup", refuse)

    def asked_with(case: Any, config: Any) -> dict[str, Any]:
        asked.clear()
        with sweep.configured(config), pytest.warns(RuntimeWarning, match="enough"):
            step(case)
        return dict(asked)

    with stub_gpu():
        for case in sweep.CASES.values():
            shipped = asked_with(case, sweep.Config())
            for config in case.configs:
                expected = dict(shipped)
                if config.shape is not None:
                    block = 32 * config.shape.per_thread * config.shape.num_warps
                    expected["BLOCK"] = block
                    expected["CHUNK"] = max(block, config.shape.chunk)
                    expected["num_warps"] = config.shape.num_warps
                    if config.shape.parts is not None:
                        expected["PARTS"] = config.shape.parts
                    assert expected["CHUNK"] % block == 0
                if config.maxnreg is not None:
                    expected["maxnreg"] = config.maxnreg
                found = asked_with(case, config)
                is_hinted = found.pop("sources") != expected.pop("sources")
                assert is_hinted == bool(config.hints), config.name
                assert found.pop("key") != expected.pop("key") or not is_hinted, config.name
                assert found == expected, config.name
            again = {**asked_with(case, sweep.Config()), "key": shipped["key"]}
            assert again == shipped, "nothing of it stays"
            assert len({config.name for config in case.configs}) == len(case.configs)
    assert "maxnreg" not in COMPILE_OPTIONS


def test_what_is_compiled_has_the_configuration(sweep: ModuleType) -> None:
    config = sweep.Config(sweep.Shape(8, 2, 1024), 72, ("load.ef", "store.cs"))
    with stub_gpu():
        ptx = []
        for one in (sweep.Config(), config):
            with sweep.configured(one) as compiled:
                step(sweep.CASES["float32"])
            (kernel,) = compiled
            ptx.append(kernel.asm["ptx"])
        finding = sweep.examine(sweep.CASES["float32"], config, CPU)
    for text in (".maxnreg 72", ".reqntid 64", "ld.global.L1::evict_first", "st.global.cs"):
        assert [text in one for one in ptx] == [False, True], text
    assert (finding.registers, finding.spills, finding.failure) == (32, 0, None)


def test_each_contestant_keeps_its_configuration(
    sweep: ModuleType, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The kernels change nothing on the stub, so all steps have the same params and states."""
    monkeypatch.setattr(sweep, "COPY_NBYTES", 2**12)
    numel = 2**14
    configs = [
        sweep.Config(),
        sweep.Config(sweep.Shape(4, 4, 512)),
        sweep.Config(sweep.Shape(4, 4, 2**16), maxnreg=80),
    ]
    with stub_gpu() as gpu:
        case = sweep.CASES["float32"]
        measured = sweep.measure(case, configs, CPU, numel * sweep.N_TENSORS, HostTimer(), SCHEDULE)
        n_programs = [n for _, n, _ in gpu.launches]
        assert gpu.compiled == ["multi_tensor"] * 3
    shipped = n_programs[0]
    assert n_programs[1:3] == [sweep.N_TENSORS * numel // 512, sweep.N_TENSORS]
    assert len({shipped, *n_programs[1:3]}) == 3
    # A step to warm up, one or more to size the bursts, and three rounds.
    assert all(n_programs[3:].count(n) >= 5 for n in n_programs[:3])
    assert measured.nbytes == 28 * numel * sweep.N_TENSORS
    names = [config.name for config in configs]
    assert list(measured.samples) == [*names, sweep.COPY, sweep.STOCK]
    sweep.report(measured, [sweep.Finding(config, "bits", None, 40, 0) for config in configs])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 1 + 5
    assert all(any(line.endswith("  " + name) for line in lines) for name in measured.samples)


def test_a_contestant_without_a_kernel_of_its_own_is_refused(
    sweep: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If the package shared kernels between optimizers, all would measure the first one's."""
    monkeypatch.setattr(sweep, "configured", lambda config: contextlib.nullcontext([]))
    with stub_gpu(), pytest.raises(AssertionError, match="maxnreg=64: nothing was compiled"):
        sweep.measure(
            sweep.CASES["float32"], [sweep.Config(maxnreg=64)], CPU, 64, HostTimer(), SCHEDULE
        )


def test_other_bits_are_not_measured(sweep: ModuleType) -> None:
    shipped = sweep.Finding(sweep.Config(), "a")
    same = sweep.Finding(sweep.Config(maxnreg=64), "a")
    other = sweep.Finding(sweep.Config(maxnreg=72), "b")
    failed = sweep.Finding(sweep.Config(maxnreg=80), failure="ptxas")
    assert sweep.usable([shipped, same, other, failed]) == [shipped, same]
    assert sweep.usable([failed, other]) == []


def test_all_configurations_give_the_same_bits_and_another_lr_does_not() -> None:
    done = fresh_python(
        f"""
import json, sys
sys.path.insert(0, {str(FOLDER)!r})
import smoke, sweep, torch
smoke.NUMELS, smoke.MISALIGNED = (1, 5003, 9001), 99
cpu = torch.device("cpu")
configs = [sweep.Config(), *sweep.shaped(16, 8, 4096), *sweep.shaped(32, 4, 8192)]
cases = [sweep.CASES["float32"], sweep.CASES["int8"]]
found = [[sweep.examine(case, config, cpu) for config in configs] for case in cases]
found.append([sweep.examine(sweep.Case(torch.float32, {{"lr": 0.1}}, []), configs[0], cpu)])
print(json.dumps([[(f.digest, f.failure) for f in findings] for findings in found]))
""",
        FUSED_OPTIM_BACKEND="triton",
        TRITON_INTERPRET="1",
        OMP_NUM_THREADS="1",
    )
    assert done.returncode == 0, done.stderr
    float32, int8, other_lr = json.loads(done.stdout.splitlines()[-1])
    digests = [{digest for digest, _ in findings} for findings in (float32, int8, other_lr)]
    assert all(failure is None for _, failure in [*float32, *int8, *other_lr])
    assert [len(one) for one in digests] == [1, 1, 1]
    assert len(set.union(*digests)) == 3
