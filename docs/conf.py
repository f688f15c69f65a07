"""Build the documentation with Sphinx: `make docs`. The build is strict and needs no network."""

import re
from importlib.metadata import version as installed
from typing import Any

import phatgoose

project = "phatgoose"
author = "the phatgoose contributors"
version = release = installed("phatgoose")

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
myst_enable_extensions = ["colon_fence"]
myst_heading_anchors = 4
exclude_patterns = ["_build"]

html_theme = "furo"
html_title = f"phatgoose {release}"
# The pages are complete without a network: no source links, no search engines, no analytics.
html_show_sourcelink = False
html_copy_source = False

autodoc_typehints = "description"
autodoc_typehints_description_target = "documented_params"
autodoc_member_order = "bysource"
autodoc_preserve_defaults = True
python_use_unqualified_type_names = True
napoleon_google_docstring = True
napoleon_numpy_docstring = False

# Every reference to a public name must resolve. Not checked are names of other projects, whose
# inventories would have to be downloaded, and internal classes that type hints mention.
nitpicky = True
nitpick_ignore_regex = [("py:.*", r"(?!phatgoose\.).*"), ("py:class", r"phatgoose(\.\w+){2,}")]


def _markdown_code(
    app: Any, what: str, name: str, thing: Any, options: Any, lines: list[str]
) -> None:
    """Show `code` of a docstring as code; reStructuredText would take it for a reference."""
    lines[:] = [re.sub(r"(?<![`:])`([^`]+)`(?!`)", r"``\1``", line) for line in lines]


def _public_name(app: Any, env: Any, node: Any, content: Any) -> Any:
    """Resolve `phatgoose.expert.Expert` to `phatgoose.Expert`, under which it is documented."""
    name = str(node.get("reftarget", "")).rpartition(".")[2]
    if node.get("refdomain") != "py" or name not in phatgoose.__all__:
        return None
    target = f"phatgoose.{name}"
    if node["reftarget"] == target:
        return None
    domain = env.get_domain("py")
    return domain.resolve_xref(
        env, node["refdoc"], app.builder, node["reftype"], target, node, content
    )


def setup(app: Any) -> None:
    """Connect the two functions above."""
    # Before napoleon (500), which writes reStructuredText of its own.
    app.connect("autodoc-process-docstring", _markdown_code, priority=400)
    app.connect("missing-reference", _public_name)
