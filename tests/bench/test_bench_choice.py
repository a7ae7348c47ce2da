"""Rows that a user asks for: models, factories, optimizers, formats and peers, and their errors."""

import dataclasses
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fused_optim import cli
from fused_optim.bench import (
    agreement,
    choice,
    contestants,
    device,
    factory,
    measure,
    models,
    peers,
    words,
)
from fused_optim.bench.contestants import OURS
from fused_optim.bench.workloads import Workload
from support.marks import needs_cpu_kernels
from support.processes import HANG_S

pytestmark = [needs_cpu_kernels, pytest.mark.usefixtures("frozen_heap")]


def numel(shapes):
    return sum(torch.Size(shape).numel() for shape in shapes)


# Published counts: torchvision's table of weights; the GPT-2 of 124 M; Hugging Face's BertModel.
PUBLISHED = {
    "resnet50": (161, 25_557_032),
    "gpt2": (148, 124_439_808),
    "bert-large": (391, 335_141_888),
    "vit-b": (152, 86_567_656),
    "many-small": (2_000, 512_000),
    "tiny": (10, 100),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_model_shapes_have_the_published_sizes(name):
    shapes = models.model(name).shapes
    assert (len(shapes), numel(shapes)) == PUBLISHED[name]


def test_all_layers_of_llama_and_its_embeddings_have_the_published_size():
    layer = models.model("llama-8b-slice").shapes
    # Two matrices of 128,256 tokens and the last norm are not in the layers.
    assert 32 * numel(layer) + 2 * 128_256 * 4096 + 4096 == 8_030_261_248


def test_every_model_is_checked_and_told_of_in_the_help(capsys):
    assert {*PUBLISHED, "llama-8b-slice"} == set(models.MODELS)
    with pytest.raises(SystemExit):
        cli.main(["bench", "--help"])
    words = re.split(r"[\s,;.()]+", capsys.readouterr().out)
    assert {*models.MODELS, *models.FORMATS} <= set(words)
    assert {peer.name for peer in peers.PEERS} - {"torch.compile"} <= set(words)


def test_rows_are_the_product_and_named_by_it():
    rows = choice.product(["tiny", "resnet50"], None, ["AdamW", "SGD"], ["own", "int8"])
    assert [row.name for row in rows] == [
        "tiny-adamw", "tiny-adamw-int8", "tiny-sgd", "tiny-sgd-int8",
        "resnet50-adamw", "resnet50-adamw-int8", "resnet50-sgd", "resnet50-sgd-int8",
    ]  # fmt: skip
    assert rows[3].formats == {"state_dtype": "int8"}
    assert rows[3].options == {"momentum": 0.9}
    assert rows[0].formats == rows[0].options == {}


def test_without_a_model_it_is_gpt2_and_without_an_optimizer_adamw():
    assert [row.name for row in choice.product(None, None, ["Adam"], None)] == ["gpt2-adam"]
    assert [row.name for row in choice.product(["tiny"], None, None, None)] == ["tiny-adamw"]


MODEL = """
import sys
import torch
from torch import nn

LAYER = nn.Linear(5, 3)

def make_model():
    model = nn.Sequential(LAYER, nn.Linear(3, 2).bfloat16(), LAYER)
    model[1].bias.requires_grad_(False)
    return model

class Holder:
    @staticmethod
    def params():
        return (p for p in [torch.zeros(2, 3, requires_grad=True), nn.Parameter(torch.zeros(4))])

def raises(): raise RuntimeError("no data")
def ends(): sys.exit(3)
def number(): return 7
def pairs(): return LAYER.named_parameters()
def frozen(): return LAYER.requires_grad_(False)
def lazy(): return nn.LazyLinear(3)
def eighths(): return [nn.Parameter(torch.zeros(3).to(torch.float8_e4m3fn))]
def breaks():
    yield LAYER.weight
    raise KeyError("later")
def reads_arguments():
    assert len(sys.argv) == 1 and sys.argv[0].endswith("model.py"), sys.argv
    return LAYER
"""


@pytest.fixture
def script(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.delitem(sys.modules, "model", raising=False)
    (tmp_path / "model.py").write_text(MODEL)
    yield str(tmp_path / "model.py")
    sys.modules.pop("model", None)


def test_a_factory_gives_shapes_and_dtypes_of_what_is_trained(script):
    found = factory.load(f"{script}:make_model")
    assert found.shapes == [(3, 5), (3,), (2, 3)]
    assert found.dtypes == (torch.float32, torch.float32, torch.bfloat16)
    assert (found.name, found.title) == ("make_model", "Sequential of model.py:make_model")


def test_a_factory_may_be_an_attribute_return_tensors_and_be_in_a_module(script, monkeypatch):
    found = factory.load(f"{script}:Holder.params")
    assert found.shapes == [(2, 3), (4,)]
    monkeypatch.chdir(Path(script).parent)
    sys.modules.pop("model")
    assert factory.load("model:Holder.params").shapes == found.shapes


def test_a_script_does_not_see_the_arguments_of_the_benchmark(script):
    assert factory.load(f"{script}:reads_arguments").shapes == [(3, 5), (3,)]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("absent", "has no 'absent'; it has: make_model, Holder, raises"),
        ("LAYER.weight", "is not callable"),
        # The first line of MODEL is empty.
        ("raises", r"raises raised RuntimeError: no data \(.*model.py, line 18\)"),
        ("ends", "ends raised SystemExit: 3"),
        ("number", "returned <class 'int'>; a torch.nn.Module or an iterable of parameters"),
        ("pairs", "item 0 is no parameter but of <class 'tuple'>"),
        ("frozen", "no parameters that require grad"),
        ("lazy", "parameter 0 has no shape yet"),
        ("eighths", "float8_e4m3fn, which no optimizer here steps"),
        ("breaks", "the iterable raised KeyError: 'later'"),
    ],
)
def test_a_factory_that_gives_no_parameters_says_why(script, name, message):
    with pytest.raises(ValueError, match=message):
        factory.load(f"{script}:{name}")


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("train.py", "names no callable; write script.py:make_model"),
        ("no/such/train.py:f", "there is no file no/such/train.py"),
        ("no_such_module_anywhere:f", "raised ModuleNotFoundError"),
        ("{broken}:f", "raised SyntaxError"),
    ],
)
def test_a_factory_that_is_not_there_says_so(tmp_path, monkeypatch, spec, message):
    monkeypatch.setattr(sys, "path", list(sys.path))
    (tmp_path / "broken.py").write_text("def f(:\n")
    with pytest.raises(ValueError, match=message):
        factory.load(spec.format(broken=tmp_path / "broken.py"))


def test_a_format_changes_real_params_of_up_to_32_bits(monkeypatch):
    f64, c64, bf16, f16 = torch.float64, torch.complex64, torch.bfloat16, torch.float16
    mixed = models.Model("m", "m", [(2,)] * 4, (f64, c64, bf16, f16))
    monkeypatch.setattr(factory, "load", lambda spec: mixed)
    own, float32, split8 = choice.product(None, ["m.py:m"], None, ["own", "float32", "split8"])
    assert own.tensor_dtypes == mixed.dtypes
    assert float32.tensor_dtypes == (f64, c64, torch.float32, torch.float32)
    assert split8.tensor_dtypes == (f64, c64, bf16, bf16)
    assert own.dtype_names == ["bfloat16", "complex64", "float16", "float64"]
    for row in (own, float32, split8):
        params = contestants.make_params(row)
        assert [param.dtype for param in params] == list(row.tensor_dtypes)
        assert all(param.grad.dtype == param.dtype and param.grad.any() for param in params)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--model", "vgg"], "--model 'vgg' is unknown; accepted: resnet50, gpt2"),
        (["--optimizer", "Sophia"], "--optimizer 'Sophia' is unknown; accepted: "),
        (["--format", "fp4"], "--format 'fp4' is unknown; accepted: own, float32"),
        (["--only", "tiny", "--model", "tiny"], "--only chooses rows of the table, --model makes"),
        (["--only", "tiny", "--from", "a.py:b"], "--only chooses rows of the table, --from makes"),
        (
            ["--peers", "apex"],
            "--peers 'apex' is unknown; accepted: for-loop, foreach, fused, Deep",
        ),
        (["--peers", "none", "optimi"], "--peers none cannot be combined"),
        (["--peers", "FlashOptim"], "--peers FlashOptim: not for CPU tensors"),
        (["--model", "tiny", "--html", "/proc/no/such/x.html"], "/proc/no"),
    ],
)
def test_bench_rejects_what_it_does_not_know(args, message, capsys):
    with pytest.raises(SystemExit) as stopped:
        cli.main(["bench", *args])
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


def absent(name):
    raise ModuleNotFoundError(f"No module named {name!r}", name=name)


def broken(name):
    raise ImportError("undefined symbol")


def lacking(name):
    raise ModuleNotFoundError("No module named 'cpuinfo'", name="cpuinfo")


@pytest.mark.parametrize(
    ("load", "message"),
    [
        (absent, "--peers optimi is not installed: pip install torch-optimi"),
        (broken, "--peers optimi does not import: ImportError: undefined symbol"),
        (lacking, "--peers optimi does not import: No module named 'cpuinfo'"),
    ],
)
def test_a_peer_asked_for_by_name_that_cannot_be_imported_is_an_error(monkeypatch, load, message):
    monkeypatch.setattr(peers.importlib, "import_module", load)
    with pytest.raises(ValueError, match=message):
        peers.lineup(["optimi"], "cpu")


def test_peers_choose_who_is_timed(monkeypatch):
    monkeypatch.setattr(peers.importlib, "import_module", lambda name: None)
    assert peers.lineup(["none"], "cpu") == peers.Lineup(())
    assert peers.lineup(["all"], "cpu").peers == peers.PEERS
    chosen = peers.lineup(["torch.compile", "foreach"], "cpu")
    assert [peer.name for peer in chosen.peers] == ["torch.compile"]
    assert chosen.variants == ("foreach",)
    on_cpu = [peer.name for peer in peers.lineup(None, "cpu").peers]
    assert on_cpu == ["DeepSpeedCPUAdam", "optimi", "schedulefree"]


def test_torch_compile_enters_a_quick_run_when_it_is_asked_for():
    [compiled] = peers.lineup(["torch.compile"], "cpu").peers
    [tiny] = choice.product(["tiny"], None, None, None)
    [small] = choice.product(["many-small"], None, None, None)
    asked = {"quick": True, "device_type": "cpu", "by_name": True}
    assert compiled.why_not(tiny, **asked) is None
    assert compiled.why_not(small, **asked) == "compiles for too long"
    assert compiled.why_not(tiny, quick=True, device_type="cpu") == "compiles for too long"


def test_variants_that_torch_optim_lacks_are_named():
    rmsprop = Workload("r", "r", "RMSprop", [(3,)])
    variants, why_not = contestants.stock_variants(rmsprop, quick=False)
    assert (variants, why_not) == (
        ["for-loop", "foreach"], {"fused": "torch.optim has no fused RMSprop"}
    )  # fmt: skip
    # Who asks for that one alone still needs something to compare with.
    assert contestants.stock_variants(rmsprop, quick=False, asked=["fused"])[0] == variants


def test_an_optimizer_that_torch_optim_lacks_is_timed_beside_a_plain_loop_and_its_package(
    monkeypatch,
):
    monkeypatch.setattr(measure, "QUICK", dataclasses.replace(measure.QUICK, budget_s=0.01))
    lineup = peers.lineup(["schedulefree"], "cpu")
    work = Workload("s", "s", "AdamWScheduleFree", [(3,)])
    row = measure.measure_row(work, quick=True, lineup=lineup)
    assert set(row.samples_s) == {OURS, contestants.PLAIN, "schedulefree"}
    assert row.baseline == contestants.PLAIN and row.ratio is not None
    assert row.not_measured["fused"] == "torch.optim has no AdamWScheduleFree"
    assert ", a plain loop " in words.headline([row])
    assert "Steps of 2 works beside a plain loop: " in words.headline([row, row])
    stock = dataclasses.replace(row, baseline="fused")
    beside = "beside the fastest of torch.optim, of what it lacks a plain loop: "
    assert beside in words.headline([row, stock])


def test_memory_of_the_cpu_is_checked_before(monkeypatch):
    [row] = choice.product(["resnet50"], None, None, None)
    # Ours, three variants and the probe: five times 16 bytes for each of 25.6 M parameters.
    poor = device.Device(torch.device("cpu"), free_nbytes=lambda: 2**30)
    with pytest.raises(measure.NotMeasured, match=r"needs 2\.095 GiB, 1 GiB are free"):
        measure.measure_row(row, quick=False, device=poor, lineup=peers.lineup(["none"], "cpu"))


def test_free_memory_is_what_a_container_leaves(tmp_path, monkeypatch):
    everything = device.CPU.free_nbytes()
    assert everything is not None and everything > 0
    monkeypatch.setattr(device, "_CGROUP", tmp_path)
    (tmp_path / "memory.max").write_text("3000\n")
    (tmp_path / "memory.current").write_text("1000\n")
    assert device.CPU.free_nbytes() == 2000
    (tmp_path / "memory.max").write_text("max\n")
    assert device.CPU.free_nbytes() > 2000


def test_a_variant_that_was_dropped_is_no_baseline():
    [row] = choice.product(["tiny"], None, None, None)
    ours = contestants.ours(row, contestants.make_params(row))
    ours.step()
    entrants = contestants.Entrants(
        ours, {}, baselines=["for-loop", "foreach", "fused"], nbytes=1, n_streams=4
    )
    # Slower in the first round, after which the others were disturbed.
    samples = {
        OURS: [[1.0], [1.0], [1.0]], "for-loop": [[1.7]],
        "foreach": [[1.1], [4.0], [4.0]], "fused": [[1.0], [3.0], [3.0]],
    }  # fmt: skip
    made = measure._row(row, samples, entrants)
    assert (made.baseline, made.ratio_samples) == ("fused", [1.0, 3.0, 3.0])


# What a peer may do otherwise, by optimizer; each makes another algorithm.
OTHERWISE = {
    "AdamW": [{"lr": 1.01e-3}, {"betas": (0.9, 0.99)}, {"betas": (0.91, 0.999)}, {"eps": 1.1e-8},
              {"weight_decay": 0.0}, {"amsgrad": True}],
    "Adam": [{"weight_decay": 1e-2}, {"eps": 1e-6}],
    "SGD": [{"momentum": 0.0}, {"nesterov": True}, {"dampening": 0.1}],
}  # fmt: skip


@pytest.mark.parametrize("name", OTHERWISE)
def test_a_peer_that_computes_something_else_is_not_timed(name):
    def peer(**options):
        def build(workload, params):
            cls = getattr(torch.optim, workload.optimizer)
            return cls(params, **{**workload.options, **options})

        return peers.Peer("peer", "torch", "torch", {name: build})

    [row] = choice.product(["tiny"], None, [name], None)
    for flags in peers.STOCK_FLAGS.values():
        assert agreement.refusal(peer(**flags), row) is None
    for options in OTHERWISE[name]:
        assert "computes something else" in (agreement.refusal(peer(**options), row) or ""), options


def test_such_a_peer_is_named_in_its_row(monkeypatch):
    monkeypatch.setattr(measure, "QUICK", dataclasses.replace(measure.QUICK, budget_s=0.01))
    build = {"AdamW": lambda workload, params: torch.optim.AdamW(params, lr=1.0)}
    [row] = choice.product(["tiny"], None, None, None)
    other = peers.Lineup((peers.Peer("other", "torch", "torch", build),))
    measured = measure.measure_row(row, quick=True, lineup=other)
    assert measured.not_measured["other"].startswith("computes something else: ")
    assert "other" not in measured.samples_s


@pytest.mark.parametrize("name", ["Adam", "AdamW", "SGD"])
def test_peers_are_given_our_hypers(monkeypatch, name):
    """Each by the names that its documentation has for them, none left to its own default."""
    given = {}

    class Library:
        def __getattr__(self, wanted):
            return lambda params, **options: given.update(options, name=wanted)

    monkeypatch.setattr(peers.importlib, "import_module", lambda module: Library())
    [row] = choice.product(["tiny"], None, [name], None)
    theirs = getattr(torch.optim, name)([torch.zeros(1)], **row.options).defaults
    wanted = {"lr", "momentum"} if name == "SGD" else {"lr", "betas", "eps", "weight_decay"}
    for peer in peers.PEERS:
        if name in peer.factories and not peer.compiles:
            given.clear()
            peer.build(row, [])
            assert wanted <= set(given), peer.name
            assert {key: given[key] for key in wanted} == {key: theirs[key] for key in wanted}


def test_from_a_script_to_a_report(tmp_path):
    (tmp_path / "model.py").write_text(MODEL)
    arguments = "--from model.py:make_model --quick --threads 1 --html out/r.html --json out/r.json"
    done = subprocess.run(
        [sys.executable, "-m", "fused_optim", "bench", *arguments.split()], cwd=tmp_path,
        capture_output=True, text=True, timeout=HANG_S,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "row 1: AdamW, Sequential of model.py:make_model" in done.stderr
    saved = json.loads((tmp_path / "out/r.json").read_text())
    assert saved["command"] == f"python -m fused_optim bench {arguments}"
    [row] = saved["rows"]
    assert (row["name"], row["dtype"]) == ("make_model-adamw", "bfloat16, float32")
    assert (row["numel"], row["backends"], row["fallbacks"]) == (24, {"cpu": 3}, [])
    assert row["bytes_per_step"] == 18 * 4 * 7 + 6 * 2 * 7
    assert {"for-loop", "foreach", "fused", OURS} <= set(row["samples_s"])
    assert saved["roofs_bytes_per_s"].keys() == {"probe", "copy_"}
    page = (tmp_path / "out/r.html").read_text()
    assert "AdamW, Sequential of model.py:make_model: a step of fused_optim takes" in page
    assert f"bench {arguments}</code>" in page
