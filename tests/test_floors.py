"""The architecture, read from the sources with `ast`: imports go down only, and files stay small enough to read.

4 cli -> 3 train, generate, plan, audit, evaluate -> 2 hub, hf, gguf, lm_head, logprobs, forward, reference, rewards,
classifier, data, plots -> 1 models, families, sharding, processes
-> 0 types, options, config, disk, chips, losses, theory
"""

import ast
import importlib
import re
import subprocess
import sys
import tomllib
import typing
from pathlib import Path

import pytest

import jaxdpo
from jaxdpo import config
from jaxdpo.data.formats import FORMATS
from jaxdpo.losses import DIVERGENCES, LOSSES
from jaxdpo.models import COMPUTE_DTYPES
from jaxdpo.models.forms import ATTENTION
from jaxdpo.models.remat import REMAT
from jaxdpo.train.loggers import LOGGERS
from jaxdpo.train.optimizer import OPTIMIZERS

FLOORS = {
    "types": 0,
    "options": 0,
    "config": 0,
    "disk": 0,
    "chips": 0,
    "losses": 0,
    "theory": 0,
    "models": 1,
    "families": 1,
    "sharding": 1,
    "processes": 1,
    "hub": 2,
    "hf": 2,
    "gguf": 2,
    "lm_head": 2,
    "logprobs": 2,
    "forward": 2,
    "reference": 2,
    "reference_cache": 2,
    "reference_store": 2,
    "rewards": 2,
    "classifier": 2,
    "data": 2,
    "plots": 2,
    "audit": 3,
    "evaluate": 3,
    "plan": 3,
    "train": 3,
    "generate": 3,
    "cli": 4,
}
"""Every module and package of jaxdpo. A module imports from its own floor and those below it."""

LIBRARIES = {
    "jax": {
        "losses",
        "theory",
        "models",
        "families",
        "sharding",
        "processes",
        "hf",
        "lm_head",
        "logprobs",
        "forward",
        "reference",
        "reference_cache",
        "rewards",
        "classifier",
        "plan",
        "train",
        "generate",
    },
    "chex": {"losses", "theory"},
    "flax": {"models"},
    "safetensors": {"hf"},
    "gguf": {"gguf"},
    "transformers": {"hf", "gguf", "classifier"},
    "tokenizers": {"gguf"},
    "huggingface_hub": {"data", "hub"},
    "filelock": {"reference_store"},
    "datasets": {"data"},
    "pyarrow": {"data"},
    "backports": {"data"},
    "tensorflow_datasets": {"data"},
    "grain": {"data"},
    "optax": {"plan", "train"},
    "orbax": {"train"},
    "ruamel": {"train"},
    "tqdm": {"audit", "forward", "generate", "train"},
    "matplotlib": {"plots"},
    "tyro": {"cli"},
    "scipy": {"evaluate"},
    "numpy": {
        "types",
        "models",
        "families",
        "sharding",
        "processes",
        "hf",
        "gguf",
        "forward",
        "reference",
        "reference_cache",
        "reference_store",
        "rewards",
        "classifier",
        "data",
        "plan",
        "train",
        "evaluate",
        "generate",
    },
}
"""Third-party package -> the modules of jaxdpo that import it. torch is in no line."""

EXTRAS = {"tensorboardX": {"train"}, "wandb": {"train"}, "trackio": {"train"}}
"""The same for packages that an extra installs."""

MAX_LINES, MAX_FUNCTION, MAX_ARGUMENTS, MAX_BRANCHES = 260, 90, 9, 4

ROOT = Path(jaxdpo.__file__).parent
FILES = sorted(path.relative_to(ROOT).as_posix() for path in ROOT.rglob("*.py"))
every_file = pytest.mark.parametrize("file", FILES)


def tree_of(file: str) -> ast.Module:
    return ast.parse((ROOT / file).read_text(encoding="utf-8"))


def module_of(file: str) -> str:
    """Top-level module or package under jaxdpo that a file belongs to; "" for `jaxdpo/__init__.py`."""
    return "" if file == "__init__.py" else file.split("/")[0].removesuffix(".py")


def imports_of(file: str) -> set[str]:
    """Dotted names of everything a file imports, inside functions too."""
    names: set[str] = set()
    for node in ast.walk(tree_of(file)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}, line {node.lineno}: imports are absolute"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def inner(names: set[str]) -> set[str]:
    """Top-level modules of jaxdpo among imported names."""
    return {name.split(".")[1] for name in names if name.startswith("jaxdpo.")}


def libraries(names: set[str]) -> set[str]:
    """Third-party packages among imported names."""
    return {name.split(".")[0] for name in names} - set(sys.stdlib_module_names) - {"jaxdpo"}


def test_every_module_has_a_floor():
    assert {module_of(file) for file in FILES} - {""} == set(FLOORS)


@every_file
def test_imports_go_down_only(file):
    floor = FLOORS.get(module_of(file), min(FLOORS.values()))
    imported = inner(imports_of(file))
    assert imported <= set(FLOORS), f"{file} imports a public name through the package; name its module"
    above = {name: FLOORS[name] for name in imported if FLOORS[name] > floor}
    assert not above, f"{file} is on floor {floor} and imports from above: {above}"


def test_losses_import_jax_and_chex_alone():
    names = set().union(*(imports_of(file) for file in FILES if module_of(file) == "losses"))
    assert inner(names) == {"losses", "types"}
    assert libraries(names) == {"jax", "chex"}


def test_each_library_is_imported_only_where_it_belongs():
    users: dict[str, set[str]] = {}
    for file in FILES:
        for library in libraries(imports_of(file)):
            users.setdefault(library, set()).add(module_of(file))
    assert users == LIBRARIES | EXTRAS


def test_every_library_is_a_declared_dependency():
    project = tomllib.loads((ROOT.parent / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    declared = {re.match(r"[\w-]+", line)[0].replace("-", "_").lower() for line in project["dependencies"]}
    installed_as = {
        "orbax": "orbax_checkpoint",
        "backports": "backports_zstd",
    }  # import name -> name on PyPI, where they differ
    assert {installed_as.get(library, library) for library in LIBRARIES} <= declared
    extras = "".join(line for extra in project["optional-dependencies"].values() for line in extra)
    assert all(library in extras for library in EXTRAS)


def test_the_package_itself_imports_nothing_early():
    assert imports_of("__init__.py") == {"importlib", "typing.Any"}


@pytest.mark.parametrize(
    "names, table",
    [
        (config.Loss, LOSSES),
        (config.Divergence, DIVERGENCES),
        (config.Format, ["auto", *FORMATS]),
        (config.Optimizer, OPTIMIZERS),
        (config.Logger, LOGGERS),
        (config.Attention, ATTENTION),
        (config.Remat, REMAT),
    ],
)
def test_names_on_the_command_line_are_those_of_the_tables(names, table):
    assert list(typing.get_args(names)) == list(table)


def test_dtypes_on_the_command_line_are_computable():
    assert set(typing.get_args(config.DType)) < set(COMPUTE_DTYPES)


def run_python(source: str) -> str:
    done = subprocess.run([sys.executable, "-c", source], capture_output=True, text=True, cwd=ROOT.parent)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_losses_load_no_training_library():
    loaded = run_python("import sys, jaxdpo.losses; print(*sys.modules)").split()
    assert "jax" in loaded and "chex" in loaded
    assert not {"flax", "optax", "orbax", "grain", "transformers", "safetensors", "tyro", "matplotlib"} & set(loaded)
    assert {name for name in loaded if name.startswith("jaxdpo.")} - {"jaxdpo.types"} == {
        name for name in loaded if name.startswith("jaxdpo.losses")
    }


@every_file
def test_every_module_imports(file):
    name = ".".join(["jaxdpo", *Path(file).with_suffix("").parts]).removesuffix(".__init__")
    assert importlib.import_module(name).__doc__, f"{file} has no docstring"


@every_file
def test_files_stay_readable(file):
    lines = (ROOT / file).read_text(encoding="utf-8").count("\n")
    assert lines <= MAX_LINES, f"{file} has {lines} lines; split it"


@every_file
def test_functions_stay_small(file):
    for node in ast.walk(tree_of(file)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            where = f"{file}, {node.name}"
            assert node.end_lineno - node.lineno + 1 <= MAX_FUNCTION, f"{where} is too long; split it"
            arguments = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
            assert len(arguments) <= MAX_ARGUMENTS, f"{where} takes {len(arguments)} arguments; group them"


def branches(node: ast.If) -> int:
    """Conditions of an if-elif ladder."""
    count = 1
    while len(node.orelse) == 1 and isinstance(node.orelse[0], ast.If):
        node, count = node.orelse[0], count + 1
    return count


@every_file
def test_no_ladders(file):
    for node in ast.walk(tree_of(file)):
        if isinstance(node, ast.If):
            assert branches(node) <= MAX_BRANCHES, f"{file}, line {node.lineno}: use a table"


def test_the_checks_see_what_they_are_meant_to_see():
    """A ladder, a nested import and a from-import are found: the tests above can fail."""
    ladder = ast.parse("if a: 1\nelif b: 2\nelif c: 3\nelif d: 4\nelif e: 5\nelse: 6").body[0]
    assert branches(ladder) == 5
    assert inner({"jaxdpo.train.step.METRICS", "jax.numpy"}) == {"train"}
    assert libraries({"jax.numpy", "os.path", "jaxdpo.types"}) == {"jax"}
    assert "jaxdpo.train.dpo.run_dpo" in imports_of("cli.py")
