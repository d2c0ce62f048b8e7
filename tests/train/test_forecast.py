"""The estimate before a run counts the work that the run does."""

import dataclasses

import pytest

from jaxdpo.models import make_decoder
from jaxdpo.models.forms import ATTENTION
from jaxdpo.train.flops import forward_flops
from jaxdpo.train.forecast import SKIPPING, duration, layout_costs
from tests import tiny


@pytest.mark.parametrize("head", ["lm", "score"])
def test_what_a_layout_weighs_follows_from_the_widths_of_the_model(head):
    """A slot and a key in units of a token's layers; a score head has no slots, a form that skips no keys to count."""
    config = dataclasses.replace(tiny.LLAMA, head=head)
    layers = forward_flops(config, rows=1, length=1, slots=0, keys=0)
    slot = forward_flops(config, rows=1, length=0, slots=1, keys=0) / layers
    key = forward_flops(config, rows=1, length=1, slots=0, keys=1) / layers - 1
    assert layout_costs(make_decoder(config, attention="dense")) == pytest.approx((slot, key))
    assert layout_costs(make_decoder(config, attention="blockwise")) == pytest.approx((slot, 0))
    assert (slot == 0) == (head == "score") and key > 0


def test_forms_that_skip_are_forms():
    assert set(SKIPPING) < set(ATTENTION)


@pytest.mark.parametrize(
    "seconds, text", [(0.2, "0 s"), (40, "40 s"), (89, "89 s"), (300, "5 min"), (5399, "90 min"), (11520, "3.2 h")]
)
def test_durations_to_read(seconds, text):
    assert duration(seconds) == text
