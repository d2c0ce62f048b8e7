"""The examples in the docstrings of `jaxdpo.data` are its first tests."""

import doctest
import importlib

import pytest


@pytest.mark.parametrize(
    "module",
    [
        "chat",
        "content",
        "dataset",
        "fields",
        "findings",
        "formats",
        "groups",
        "messages",
        "packing",
        "partners",
        "plan",
        "records",
        "summaries",
        "transcripts",
    ],
)
def test_examples(module):
    result = doctest.testmod(importlib.import_module(f"jaxdpo.data.{module}"))
    assert result.attempted > 0
    assert result.failed == 0
