"""How Sphinx builds the pages: `make docs`. What is warned of is an error there."""

from __future__ import annotations

from typing import Any

from sphinx.util.nodes import make_refnode

import fused_optim
from fused_optim.optimizers import OPTIMIZERS

project = "fused_optim"
author = "the authors of fused_optim"
copyright = author
release = version = fused_optim.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
exclude_patterns = ["_build"]
nitpicky = True
# Inventories of other projects would be downloaded, which a build without network cannot do. What is named
# there is named in code spans or, in docstrings, with these prefixes.
nitpick_ignore_regex = [(r"py:.*", r"(torch|typing)\..*"), (r"py:exc", r"\w*Error")]

myst_heading_anchors = 3

autodoc_member_order = "bysource"
autodoc_preserve_defaults = True
autodoc_typehints = "none"  # "Args" says it in words
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_param = False  # which would repeat what is said of "amsgrad, maximize, ..." for each
napoleon_custom_sections = ["Reference"]

html_theme = "furo"
html_title = f"fused_optim {release}"
html_static_path = ["_static"]
html_css_files = ["tables.css"]
html_copy_source = False
html_show_sphinx = False

linkcheck_timeout = 20
linkcheck_anchors = False  # pages that scripts draw have no anchors in their HTML


def public_name(app: Any, env: Any, node: Any, child: Any) -> Any:
    """A docstring of fused_optim.explain, say, that names `StepReport` means fused_optim.StepReport."""
    if node.get("refdomain") != "py":
        return None
    domain = env.domains["py"]
    found = domain.objects.get(f"fused_optim.{node['reftarget']}")
    if found is None:
        return None
    return make_refnode(app.builder, node["refdoc"], found.docname, found.node_id, child)


def name_each(app: Any, page: str, source: list[str]) -> None:
    """Have `.. autoclass:: EACH` stand for every optimizer."""
    source[0] = source[0].replace("EACH", "\n.. autoclass:: ".join(OPTIMIZERS))


def setup(app: Any) -> None:
    app.connect("source-read", name_each)
    app.connect("missing-reference", public_name)
