"""Every public name resolves, is documented, and a wrong one says what there is."""

import ast
import importlib
import inspect
import itertools
import subprocess
import sys

import pytest

import jaxdpo


def documented_constants(module) -> set[str]:
    """Names of a module's assignments that a text follows, which is how constants are documented."""
    body = ast.parse(inspect.getsource(module)).body
    return {
        ast.unparse(node.target if isinstance(node, ast.AnnAssign) else node.targets[0])
        for node, after in itertools.pairwise(body)
        if isinstance(node, ast.Assign | ast.AnnAssign)
        and isinstance(after, ast.Expr)
        and isinstance(after.value, ast.Constant)
        and isinstance(after.value.value, str)
    }


@pytest.mark.parametrize("name", jaxdpo.__all__)
def test_public_name_resolves_and_is_documented(name):
    value = getattr(jaxdpo, name)
    home = importlib.import_module(jaxdpo._HOME[name])
    assert value is getattr(home, name)
    if inspect.isclass(value) or inspect.isroutine(value):
        text = inspect.getdoc(value)
        assert text and not text.startswith(f"{name}("), f"{name} has no docstring of its own"
    else:
        assert name in documented_constants(home), f"{name} has no text below it"


def test_a_star_import_brings_exactly_the_public_names():
    names: dict[str, object] = {}
    exec("from jaxdpo import *", names)
    assert set(names) - {"__builtins__"} == set(jaxdpo.__all__) == set(dir(jaxdpo))


def test_an_unknown_name_lists_the_public_ones():
    with pytest.raises(AttributeError, match=r"module 'jaxdpo' has no attribute 'dpo_los'; public names: .*dpo_loss"):
        jaxdpo.dpo_los  # noqa: B018
    with pytest.raises(ImportError, match="dpo_los"):
        from jaxdpo import dpo_los  # noqa: F401


def test_names_are_resolved_lazily():
    source = "import sys, jaxdpo; jaxdpo.InputError; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", source], capture_output=True, text=True, check=True).stdout.split()
    assert "jaxdpo.types" in loaded
    assert "jax" not in loaded and "jaxdpo.losses" not in loaded
