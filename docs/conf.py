"""How the site is built: `sphinx-build -W --keep-going -b html docs docs/_build/html`. Warnings are errors in CI."""

import importlib.metadata
import re
import sys
from pathlib import Path

from docutils import nodes
from sphinx.application import Sphinx
from sphinx.errors import ExtensionError
from sphinx.util.docutils import SphinxDirective

sys.path.insert(0, str(Path(__file__).parent))
import from_code

import jaxdpo

project = "jaxdpo"
author = "the jaxdpo authors"
version = release = importlib.metadata.version("jaxdpo")

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.mathjax"]
exclude_patterns = ["_build"]
html_theme = "furo"
html_title = f"jaxdpo {version}"
html_copy_source = False

myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 3

default_role = "code"  # docstrings write `code` in single backticks
autodoc_member_order = "bysource"
autodoc_preserve_defaults = True
autodoc_typehints = "none"  # the Args of every docstring say shape, dtype and unit, which annotations cannot
napoleon_numpy_docstring = False
napoleon_attr_annotations = False
napoleon_use_ivar = True  # an Attributes section describes fields; they are no objects of their own

COLON = "\ue000"  # a character of the private use area, which no docstring holds


class OptionTable(SphinxDirective):
    """`{option-table} DPOConfig`: the options of a class of `jaxdpo.config`, read from the code."""

    required_arguments = 1

    def run(self) -> list[nodes.Node]:
        """Parses the Markdown of the tables in place."""
        return self.parse_text_to_nodes(from_code.option_table(self.arguments[0]))


def hide_colons(app: Sphinx, what: str, name: str, obj: object, options: object, lines: list[str]) -> None:
    """Keeps napoleon from taking what stands before a colon in a Returns section, or in a field's text, for a type."""
    section = "Returns:" if what in ("attribute", "data", "property") else ""
    for i, line in enumerate(lines):
        if re.fullmatch(r"[A-Z][a-z]+:", line):
            section = line
        elif section == "Returns:":
            lines[i] = line.replace(":", COLON)


def finish(app: Sphinx, what: str, name: str, obj: object, options: object, lines: list[str]) -> None:
    """What reStructuredText would misread: the colons go back, `Batch`es may follow code, fields may share a text.

    What Python itself says of a NamedTuple's field without a text of its own tells a reader nothing, and goes.
    """
    if lines and lines[0].startswith("Alias for field number"):
        lines.clear()
    for i, line in enumerate(lines):
        line = re.sub(r"(`[^`]+`)(?=(\w?))", lambda m: m[1] + ("\\ " if m[2] else ""), line)
        line = re.sub(r"^:ivar [\w, ]+:", lambda m: m[0].replace(", ", "/"), line)  # else the first ones are its type
        lines[i] = line.replace(COLON, ":")


def check_api_is_complete(app: Sphinx) -> None:
    """Fails the build where a public name is missing from `api.md` or has no docstring."""
    page = (Path(app.srcdir) / "api.md").read_text(encoding="utf-8")
    if complaints := from_code.undocumented(jaxdpo._HOME, page):
        raise ExtensionError("the API reference is not complete:\n  " + "\n  ".join(complaints))


def setup(app: Sphinx) -> None:
    """Registers the directive and the hooks."""
    app.add_directive("option-table", OptionTable)
    app.connect("builder-inited", check_api_is_complete)
    app.connect("autodoc-process-docstring", hide_colons, priority=400)  # napoleon has 500
    app.connect("autodoc-process-docstring", finish, priority=600)
