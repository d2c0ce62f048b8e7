"""What the README shows is what happens."""

import re
from pathlib import Path

import jax.numpy as jnp

import jaxdpo
from jaxdpo.cli import parse

README = Path(__file__).parent.parent / "README.md"


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README.read_text(encoding="utf-8"), re.M | re.S)


def test_the_first_two_blocks_set_up_and_run_quickstart_and_tests():
    quickstart, tests = blocks("sh")[:2]
    for block in (quickstart, tests):
        assert "python3 -m venv .venv" in block and "apt install python3-venv" in block
    assert quickstart.rstrip().endswith(".venv/bin/jaxdpo quickstart")
    assert tests.rstrip().endswith(".venv/bin/pytest -q")


def test_every_jaxdpo_command_parses():
    text = README.read_text(encoding="utf-8")
    commands = re.findall(r"jaxdpo (dpo --model .*|export --checkpoint .*? --output-dir \w+)", text)
    assert len(commands) == 2
    for command in commands:
        verb, config = parse(command.split())
        assert verb in command and config.output_dir


def test_library_example_prints_what_it_says(capsys):
    (example,) = blocks("python")
    exec(compile(example, str(README), "exec"), {})
    first, _ = capsys.readouterr().out.splitlines()
    margin = 0.1 * ((-12.0 + 13.0) - (-15.0 + 14.0))
    assert first == str(jnp.log1p(jnp.exp(-jnp.array([margin]))))
    assert re.search(r"\[0\.5981", first)


def test_version_is_that_of_the_package():
    from importlib.metadata import version

    assert jaxdpo.__version__ == version("jaxdpo")
