"""torch.compile, dispatch modes, make_fx and the profiler around optimizers."""

import pytest
from cases import OF_TORCH, VARIANTS
from processes import python


@pytest.mark.parametrize(
    ("name", "patched"),
    [*((name, False) for name in VARIANTS), *((name, True) for name in OF_TORCH)],
)
def test_compiled_functions_make_and_use_optimizers(name: str, patched: bool) -> None:
    """In a process of its own: the first optimizer of a class wraps its step()."""
    done = python(f"from compiled import check; check({name!r}, {patched})", timeout=600)
    assert done.returncode == 0, done.stderr
