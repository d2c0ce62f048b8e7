"""What the pages take from the code each time they are built: tables of options, and the check that no name is missing.

Only the standard library and jaxdpo, so that the tests run without Sphinx; `conf.py` wires it into the build.
"""

import ast
import dataclasses
import importlib.util
import re
import types
import typing
from collections.abc import Mapping
from pathlib import Path

from jaxdpo import config
from jaxdpo.config.ranges import RANGES
from jaxdpo.options import flag

LISTED = re.compile(r"^\.\. auto\w+:: jaxdpo\.(?:\w+\.)*(\w+)\s*$", re.MULTILINE)
"""An autodoc directive of `api.md`; its group is the public name."""


def undocumented(homes: Mapping[str, str], page: str) -> list[str]:
    """What keeps the API reference from being complete, one sentence each.

    Args:
      homes: public name -> the module that jaxdpo takes it from.
      page: text of the reference.
    Returns:
      Sentences that name a public name that the page does not list, a name without docstring, or a public method
      without docstring; empty if all is documented.
    """
    listed = set(LISTED.findall(page))
    complaints = []
    for name, module in sorted(homes.items()):
        if name not in listed:
            complaints.append(f"jaxdpo.{name} is public, but api.md does not list it; add its autodoc directive")
        complaints += [f"{module}: {what} has no docstring; write one" for what in without_docstring(module, name)]
    return complaints


def without_docstring(module: str, name: str) -> list[str]:
    """Which of a module's name and, for a class, its public methods have no docstring; followed through re-exports."""
    spec = importlib.util.find_spec(module)
    if spec is None or spec.origin is None:
        raise ValueError(f"there is no module {module!r}")
    body = ast.parse(Path(spec.origin).read_text(encoding="utf-8")).body
    for i, node in enumerate(body):
        following = body[i + 1] if i + 1 < len(body) else None
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and node.name == name:
            methods = [item for item in getattr(node, "body", []) if isinstance(item, ast.FunctionDef)]
            public = [item for item in methods if not item.name.startswith("_") and isinstance(node, ast.ClassDef)]
            bare = [f"{name}.{item.name}" for item in public if not ast.get_docstring(item)]
            return ([] if ast.get_docstring(node) else [name]) + bare
        if isinstance(node, ast.Assign | ast.AnnAssign) and name in _targets(node):
            documented = isinstance(following, ast.Expr) and isinstance(getattr(following.value, "value", None), str)
            return [] if documented else [name]
        if isinstance(node, ast.ImportFrom) and node.module and name in [alias.name for alias in node.names]:
            return without_docstring(node.module, name)
    raise ValueError(f"module {module!r} does not define {name!r}")


def option_table(name: str) -> str:
    """Every option of a configuration class of `jaxdpo.config`, grouped, as tables in Markdown."""
    cls = getattr(config, name)
    hints = typing.get_type_hints(cls)
    groups: dict[str, list[tuple[str, ...]]] = {}
    for field in dataclasses.fields(cls):
        allowed = "" if hints[field.name] is bool else RANGES.get(field.name, ("", None))[0]
        row = (
            f"`{_flags(field.name, hints[field.name])}`",
            _type_name(hints[field.name]),
            _default(field.default),
            field.metadata["help"] + (f"; allowed: {allowed}" if allowed else ""),
        )
        groups.setdefault(field.metadata["group"], []).append(row)
    tables = []
    for group, rows in groups.items():
        lines = [f"**{group}**", "", _line("flag", "type", "default", "meaning"), _line(*["---"] * 4)]
        tables.append("\n".join(lines + [_line(*row) for row in rows]))
    return "\n\n".join(tables) + "\n"


def _targets(node: ast.Assign | ast.AnnAssign) -> list[str]:
    targets = node.targets if isinstance(node, ast.Assign) else [node.target]
    return [target.id for target in targets if isinstance(target, ast.Name)]


def _flags(name: str, hint: object) -> str:
    return f"{flag(name)}, {flag('no_' + name)}" if hint is bool else flag(name)


def _type_name(hint: typing.Any) -> str:
    """What may stand behind the flag: `int`, or the values of a Literal."""
    if types.NoneType in typing.get_args(hint):
        hint = typing.get_args(hint)[0]
    choices = typing.get_args(hint)
    return ", ".join(f"`{choice}`" for choice in choices) if choices else hint.__name__


def _default(value: object) -> str:
    if value is dataclasses.MISSING:
        return "required"
    return "" if value is None else f"`{str(value).lower() if isinstance(value, bool) else value}`"


def _line(*cells: str) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"
