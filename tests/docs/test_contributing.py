"""CONTRIBUTING.md names what exists, its worked example works, and the version has one place."""

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import tomllib

import fused_optim
from support.processes import HANG_S, python

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "CONTRIBUTING.md").read_text()
MAKEFILE = (ROOT / "Makefile").read_text()
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())

# Blocks of code first: what is left has no backticks but those of code in a line.
BLOCKS = re.findall(r"```(\w*)\n(.*?)```", PAGE, re.DOTALL)
CODE = [text for _, text in BLOCKS]
CODE += re.findall(r"`([^`]+)`", re.sub(r"```.*?```", "", PAGE, flags=re.DOTALL))
# What make, git and a release create.
MADE = (".venv", "build", "dist")


def named_paths() -> set[str]:
    words = {word.strip("',") for code in CODE for word in code.split()}
    words = {word.removeprefix("a/").removeprefix("b/") for word in words}
    path = re.compile(r"\.?\w[\w.-]*/[\w./-]*|[\w-]+\.(md|toml|py|txt|yaml)")
    return {word for word in words if path.fullmatch(word) and word.split("/")[0] not in MADE}


def test_every_path_exists() -> None:
    paths = named_paths()
    assert {"csrc/rules.h", "tests/docs/test_docs.py", "pyproject.toml", ".ci/run"} <= paths
    assert [path for path in sorted(paths) if not (ROOT / path).exists()] == []
    assert [path for path in paths if path.endswith("/") and not (ROOT / path).is_dir()] == []


def test_every_make_target_exists() -> None:
    named = set(re.findall(r"\bmake ([\w-]+)", "\n".join(CODE)))
    assert {"demo", "test", "lint"} <= named
    assert named <= set(re.findall(r"^([\w-]+):", MAKEFILE, re.MULTILINE))


# In place of pytest: fails in one half.
FAKE_PYTEST = """#!/bin/sh
half=${FUSED_OPTIM_BACKEND:-native}
echo "ran $half with $OMP_NUM_THREADS thread"
test "$half" != "$FAILS"
"""


@pytest.mark.skipif(shutil.which("make") is None, reason="needs make")
@pytest.mark.parametrize("fails", ["native", "triton", "neither"])
def test_make_test_runs_both_halves_whichever_fails(fails: str, tmp_path: Path) -> None:
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/pytest").write_text(FAKE_PYTEST)
    (tmp_path / "bin/pytest").chmod(0o755)
    for stamp in ("demo", "installed"):
        (tmp_path / stamp).touch()
    # Without what a make that runs this test has set.
    ours = ("MAKE", "MFLAGS", "FUSED_OPTIM_BACKEND")
    environment = {k: v for k, v in os.environ.items() if not k.startswith(ours)}
    done = subprocess.run(
        ["make", "-C", str(ROOT), "test", f"VENV={tmp_path}"],
        env={**environment, "FAILS": fails},
        capture_output=True,
        text=True,
        timeout=HANG_S,
    )
    ran = re.findall(r"^ran (\w+) with 1 thread$", done.stdout, re.MULTILINE)
    assert ran == ["native", "triton"], done
    assert (done.returncode == 0) == (fails == "neither")


def test_every_folder_of_the_source_is_on_the_map() -> None:
    folders = {
        f"{path.relative_to(ROOT).parts[0]}/"
        for pattern in ("[!.]*/*.py", "[!.]*/*.h", "[!.]*/*.md")
        for path in ROOT.glob(pattern)
    }
    assert {"tests/", "csrc/"} <= folders
    made = {f"{name}/" for name in MADE}
    assert folders - made <= set(re.findall(r"^\| `([^`]+)` \|", PAGE, re.MULTILINE))


def apply_diff(diff: str, root: Path) -> None:
    """The old lines stand in the file once; the new ones take their place."""
    name = re.findall(r"^\+\+\+ b/(.*)$", diff, re.MULTILINE)
    lines = diff.split("@@\n")[1].splitlines(keepends=True)
    old, new = ("".join(x[1:] for x in lines if x[0] != sign) for sign in "+-")
    file = root / name[0]
    text = file.read_text()
    assert text.count(old) == 1, (name, old)
    file.write_text(text.replace(old, new))


def test_worked_example_fails_first_and_then_passes(tmp_path: Path) -> None:
    for folder in ("fused_optim", "tests"):
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("__pyc*"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    (command,) = (text for _, text in BLOCKS if text.startswith(".venv/bin/pytest"))

    def run() -> tuple[int, str]:
        """The copy comes before what is installed; plugins would only take time."""
        program = f"""
import os, sys
os.chdir({str(tmp_path)!r})
sys.path.insert(0, {str(tmp_path)!r})
import pytest
sys.exit(pytest.main({command.removeprefix(".venv/bin/pytest ").split()}))
"""
        done = python(program, PYTEST_DISABLE_PLUGIN_AUTOLOAD="1")
        return done.returncode, done.stdout + done.stderr

    test, code = (text for language, text in BLOCKS if language == "diff")
    apply_diff(test, tmp_path)
    status, output = run()
    assert status == 1 and "STOCK is unknown; accepted: cpu, triton, stock" in output, output
    apply_diff(code, tmp_path)
    status, output = run()
    assert status == 0 and "1 passed" in output, output


def test_version_has_one_place() -> None:
    assert PYPROJECT["project"]["dynamic"] == ["version"]
    assert PYPROJECT["tool"]["setuptools"]["dynamic"]["version"]["attr"] == (
        "fused_optim.__version__"
    )
    version = fused_optim.__version__
    headings = re.findall(r"^## (.*)$", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert headings[0] == version
    sources = [ROOT / "README.md", ROOT / "pyproject.toml", ROOT / "setup.py"]
    for folder in ("fused_optim", "csrc", "triton_kernels"):
        sources += [path for path in (ROOT / folder).rglob("*.*") if path.suffix in (".py", ".h")]
    assert [p for p in sources if re.search(rf'"{re.escape(version)}"', p.read_text())] == [
        ROOT / "fused_optim/__init__.py"
    ]


def test_wheels_are_tested_with_files_that_exist() -> None:
    named = re.findall(
        r"\{project\}/(\S+)", " ".join(PYPROJECT["tool"]["cibuildwheel"]["test-command"])
    )
    assert named and set(named) <= named_paths()


def test_hooks_before_a_commit_are_the_linters_of_make() -> None:
    hooks = (ROOT / ".pre-commit-config.yaml").read_text()
    entries = re.findall(r"entry: (.*)", hooks)
    (recipe,) = re.findall(r"^lint:.*\n((?:\t.*\n)+)", MAKEFILE, re.MULTILINE)
    lint = [line.strip().replace("$(BIN)", ".venv/bin") for line in recipe.splitlines()]
    assert [*entries, ".venv/bin/pre-commit validate-config"] == lint
    assert re.findall(r"repo: (.*)", hooks) == ["local"]
