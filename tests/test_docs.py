"""What the pages show is what happens, and the build of the API reference fails where a public name is left out."""

import contextlib
import doctest
import io
import re
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest

import jaxdpo
from jaxdpo.cli import CONFIG_VERBS, main
from jaxdpo.config import DPOConfig, ExportConfig, PlanConfig, QuickstartConfig
from jaxdpo.losses import DIVERGENCES, LOSSES, preference_metrics, reward_metrics, unpaired_metrics
from jaxdpo.train.run_dir import RunDir
from jaxdpo.train.step import as_floats
from tests import tiny

DOCS = Path(__file__).parent.parent / "docs"
PAGES = sorted(path for path in DOCS.rglob("*.md") if "_build" not in path.parts)
EXAMPLES = [path for path in PAGES if ">>>" in path.read_text("utf-8")]
VERBS = {"dpo": DPOConfig, "export": ExportConfig, "plan": PlanConfig, "quickstart": QuickstartConfig}

sys.path.insert(0, str(DOCS))
import from_code  # noqa: E402 -- the documentation's own module, not a package's


def page(name: str) -> str:
    return (DOCS / name).read_text(encoding="utf-8")


def rows_under(heading: str, text: str) -> list[str]:
    """First cells of the first table below a heading."""
    table = re.search(r"^\|.*\n\|[-|]+\n((?:\|.*\n)+)", text.split(f"\n{heading}\n")[1], re.MULTILINE)
    return [re.search(r"`([^`]+)`", line)[1] for line in table[1].splitlines()]


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.name)
def test_examples_print_what_the_page_says(path):
    text = re.sub(r"^```.*$", "", path.read_text(encoding="utf-8"), flags=re.MULTILINE)  # keeps the line numbers
    example = doctest.DocTestParser().get_doctest(text, {}, path.name, str(path), 0)
    failures = io.StringIO()
    result = doctest.DocTestRunner(verbose=False).run(example, out=failures.write)
    assert result.attempted > 0
    assert result.failed == 0, failures.getvalue()


@pytest.mark.parametrize("verb", VERBS)
def test_the_page_has_a_table_of_every_verbs_options(verb):
    name = VERBS[verb].__name__
    assert f"```{{option-table}} {name}\n```" in page("usage.md")
    with contextlib.redirect_stdout(io.StringIO()) as text, pytest.raises(SystemExit):
        main([verb, "--help"])
    flag = re.compile("--[a-z-]*[a-z]")
    in_help = set(flag.findall(text.getvalue()))
    cells = re.findall(r"^\| `([^`]+)`", from_code.option_table(name), re.MULTILINE)
    in_table = set(flag.findall(" ".join(cells)))
    assert in_help == in_table | ({"--help", "--config"} if verb in CONFIG_VERBS else {"--help"})


def test_option_table_says_type_default_help_and_range():
    table = from_code.option_table("DPOConfig")
    assert "| `--model` | str | required |" in table
    assert "| `--beta` | float | `0.1` | strength of the KL constraint" in table and "above 0 |" in table
    assert "| `--shuffle, --no-shuffle` | bool | `true` |" in table
    assert "| `--optimizer` | `rmsprop`, `adamw` | `rmsprop` |" in table
    assert "| `--max-steps` | int |  | optimizer steps" in table


def test_metrics_page_names_every_metric_in_order():
    pair = np.array([[-3.0, -4.0]])
    metrics = {"loss": 1.0, "grad_norm": 1.0, **preference_metrics(pair, pair, lengths=np.ones((1, 2)))}
    of_a_step = as_floats({name: np.float32(0) for name in metrics})  # in the order of a row
    named = rows_under("## Metrics", page("usage.md"))
    assert named == ["step", *of_a_step, "learning_rate", "tokens"]


def test_observability_page_names_all_that_is_measured_in_order():
    assert rows_under("## Metrics", page("observability.md")) == list(tiny.MEASURED)


def test_metrics_page_names_every_metric_of_labelled_completions():
    pair = np.array([[-3.0, -4.0]])
    text = page("usage.md").split("For completions with a label")[1].split("\n\n")[0]
    for name in unpaired_metrics(pair, pair, label=np.array([True])):
        assert all(f"`{part}`" in text or f"`{part}/`" in text for part in name.split("/")), name


@pytest.mark.parametrize(
    "name, metrics",
    [
        ("sft.md", ["entropy", "mean_token_accuracy"]),
        ("reward_models.md", list(reward_metrics(np.array([[2.0, -1.0]])))),
    ],
)
def test_pages_of_other_commands_name_every_metric_in_order(name, metrics):
    of_a_step = as_floats({metric: np.float32(0) for metric in ("loss", "grad_norm", *metrics)})
    assert rows_under("## Metrics", page(name)) == list(of_a_step)


def facts(spec):
    """What the table of objectives says under "needs"."""
    return {
        "ref": spec.needs_reference,
        "n": "lengths" in spec.data,
        "K": spec.candidates is None,
        "label": "label" in spec.data,
        "step": spec.coupling != "none",
        "f": spec.divergence,
    }


def test_losses_page_has_every_objective_and_what_it_needs():
    table = page("losses.md").split("\n## All of them\n")[1].split("\n## ")[0]
    rows = [re.split(r" *\| *", line)[1:-1] for line in table.splitlines() if line.startswith("| `")]
    assert {len(row) for row in rows} == {6}
    assert [name.strip("`") for name, *_ in rows] == list(LOSSES)
    for name, _, _, needs, _, _ in rows:
        expected = [word for word, holds in facts(LOSSES[name.strip("`")]).items() if holds]
        assert needs == ", ".join(expected), name


def test_losses_page_has_every_divergence():
    assert rows_under("## Changes to any of them", page("losses.md")) == list(DIVERGENCES)


def test_the_papers_of_the_losses_page_are_those_of_the_docstrings():
    source = "".join(path.read_text("utf-8") for path in (DOCS.parent / "jaxdpo/losses").glob("*.py"))
    table = page("losses.md").split("\n## All of them\n")[1].split("\n## ")[0]
    papers = set(re.findall(r"arxiv\.org/abs/(\d+\.\d+)", table))
    assert len(papers) > 15
    assert {paper for paper in papers if paper not in source} == set()


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_pictures_of_a_page_are_there(path):
    for picture in re.findall(r"!\[[^]]+\]\(([^)]+)\)", path.read_text("utf-8")):
        assert (path.parent / picture).read_bytes().startswith(b"\x89PNG") and (
            path.parent / picture
        ).stat().st_size < 250_000


def test_run_directory_page_names_every_path():
    run = RunDir(Path("run"))
    paths = [run.config, run.metrics, run.curves, run.checkpoints, run.model, run.export]
    assert [name.rstrip("/") for name in rows_under("## What a run leaves", page("usage.md"))] == [
        p.name for p in paths
    ]


def test_api_reference_is_complete():
    assert from_code.undocumented(jaxdpo._HOME, page("api.md")) == []


@pytest.mark.parametrize("name", ["dpo_loss", "LOSSES", "Batch", "InputError"])
def test_a_name_that_the_reference_lacks_is_a_complaint(name):
    without = re.sub(rf"^\.\. auto\w+:: jaxdpo\.(\w+\.)*{name}\n", "", page("api.md"), flags=re.MULTILINE)
    assert without != page("api.md")
    assert from_code.undocumented(jaxdpo._HOME, without) == [
        f"jaxdpo.{name} is public, but api.md does not list it; add its autodoc directive"
    ]


SOURCE = '''
from somewhere_documented import borrowed
TABLE: dict = {}
"""Its text."""
BARE = {}
def described():
    """Its docstring."""
def bare(): ...
class Described:
    """Its docstring."""
    def method(self): ...
    def _private(self): ...
class Bare: ...
'''


@pytest.mark.parametrize(
    ("name", "missing"),
    [
        ("TABLE", []),
        ("BARE", ["BARE"]),
        ("described", []),
        ("bare", ["bare"]),
        ("Described", ["Described.method"]),
        ("Bare", ["Bare"]),
        ("borrowed", ["borrowed"]),
    ],
)
def test_a_name_without_docstring_is_a_complaint(name, missing, tmp_path, monkeypatch):
    (tmp_path / "somewhere.py").write_text(SOURCE)
    (tmp_path / "somewhere_documented.py").write_text("def borrowed(): ...\n")
    monkeypatch.syspath_prepend(tmp_path)
    complaints = from_code.undocumented({name: "somewhere"}, f".. autofunction:: jaxdpo.{name}\n")
    assert complaints == [f"somewhere: {what} has no docstring; write one" for what in missing]


def test_the_build_fails_where_a_public_name_is_left_out(tmp_path):
    application = pytest.importorskip("sphinx.application", reason="needs Sphinx: pip install -e '.[docs]'")
    pytest.importorskip("myst_parser", reason="needs myst-parser: pip install -e '.[docs]'")
    errors = pytest.importorskip("sphinx.errors")
    source = tmp_path / "docs"
    shutil.copytree(DOCS, source, ignore=shutil.ignore_patterns("_build", "__pycache__"))
    (source / "api.md").write_text(page("api.md").replace(".. autofunction:: jaxdpo.save_hf\n", ""))
    silent = {"status": None, "warning": io.StringIO()}
    with pytest.raises(errors.ExtensionError, match=r"jaxdpo\.save_hf is public, but api\.md does not list it"):
        application.Sphinx(source, source, tmp_path / "out", tmp_path / "trees", "html", **silent)
