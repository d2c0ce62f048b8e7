"""The picture of a run shows the numbers of its metrics, those of the losses every loss."""

import sys
from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure

from jaxdpo.losses import LOSSES
from jaxdpo.plots import LossCurve, save_curves, save_loss_curves

sys.path.insert(0, str(Path(__file__).parent.parent / "docs"))
import loss_curves  # a script of the documentation, not a package's

TRAIN = ("loss", "rewards/margins", "rewards/accuracies", "rewards/chosen", "rewards/rejected")


def row(step, *, evaluated=False):
    values = {"step": step, "grad_norm": 1.0, "tokens": 10, "pairs_per_second": 1.0, "learning_rate": step * 1e-7}
    values |= {name: step + i / 10 for i, name in enumerate(TRAIN)}
    values |= {"logps/chosen": -step, "logps/rejected": -2 * step}
    return values | (held_out(step) if evaluated else {})


def held_out(step):
    return {"step": step, "eval_loss": step / 2, "eval_rewards/margins": step / 3, "eval_rewards/accuracies": step / 4}


@pytest.fixture
def drawn(monkeypatch):
    """Figures that are saved, as well as written."""
    figures = []
    save = Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda self, *args, **kw: (figures.append(self), save(self, *args, **kw)))
    return figures


def lines_of(figure):
    """`panel title -> {label: [(step, value)]}`."""
    return {
        axes.get_title(): {line.get_label(): list(zip(*line.get_data(), strict=True)) for line in axes.lines}
        for axes in figure.axes
    }


def test_every_series_is_drawn_from_its_key(tmp_path, drawn):
    rows = [held_out(0), row(1), row(2, evaluated=True)]
    save_curves(rows, tmp_path / "curves.png", title="tiny")
    (figure,) = drawn
    assert figure.get_suptitle() == "tiny"

    def series(key):
        return [(r["step"], r[key]) for r in rows if key in r]

    assert lines_of(figure) == {
        "loss (nats)": {"train": series("loss"), "held out": [(0, 0.0), (2, 1.0)]},
        "rewards/margins (nats)": {"train": series("rewards/margins"), "held out": series("eval_rewards/margins")},
        "rewards/accuracies": {"train": series("rewards/accuracies"), "held out": series("eval_rewards/accuracies")},
        "rewards (nats)": {"chosen": series("rewards/chosen"), "rejected": series("rewards/rejected")},
        "logps (nats)": {"chosen": series("logps/chosen"), "rejected": series("logps/rejected")},
        "learning rate": {"learning rate": [(1, 1e-7), (2, 2e-7)]},
    }
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_a_run_without_held_out_data_has_no_such_lines(tmp_path, drawn):
    save_curves([row(1)], tmp_path / "curves.png", title="tiny")
    panels = lines_of(drawn[0])
    assert set(panels["loss (nats)"]) == {"train"}
    legends = {axes.get_title() for axes in drawn[0].axes if axes.get_legend()}
    assert legends == {"rewards (nats)", "logps (nats)"}


def test_a_single_point_is_visible(tmp_path, drawn):
    """A line through one point would show nothing."""
    save_curves([row(1)], tmp_path / "curves.png", title="tiny")
    assert {line.get_marker() for axes in drawn[0].axes for line in axes.lines} == {"o"}


def test_accuracies_have_the_whole_range(tmp_path, drawn):
    save_curves([row(1)], tmp_path / "curves.png", title="tiny")
    (axes,) = (axes for axes in drawn[0].axes if axes.get_title() == "rewards/accuracies")
    assert axes.get_ylim()[0] < 0 and axes.get_ylim()[1] > 1


@pytest.fixture(scope="module")
def curves():
    return {name: loss_curves.curve(spec) for name, spec in LOSSES.items()}


def test_every_loss_is_drawn_once(curves, tmp_path, drawn):
    loss_curves.draw(curves, tmp_path)
    assert sorted(axes.get_title() for figure in drawn for axes in figure.axes if axes.get_title()) == sorted(LOSSES)
    assert {path.name for path in tmp_path.iterdir()} == {
        "losses_with_reference.png",
        "losses_without_reference.png",
    }


def test_the_curves_of_dpo(curves):
    curve = curves["sigmoid"]
    margin = np.array(curve.reward)
    np.testing.assert_allclose(curve.losses[""], np.log1p(np.exp(-margin)), rtol=1e-5)
    for side in ("chosen", "rejected"):
        np.testing.assert_allclose(curve.weights[side], 1 / (1 + np.exp(margin)), rtol=1e-5)


@pytest.mark.parametrize("name", LOSSES)
def test_a_weight_is_the_slope_of_its_loss(curves, name):
    """Between two points the loss falls by the mean weight; only at a kink or a jump of a weight by less or more."""
    curve = curves[name]
    if "" in curve.losses:  # the margin moves both rewards by one half
        falls = {"": (np.array(curve.weights["chosen"]) + np.array(curve.weights["rejected"])) / 2}
    else:
        falls = {"chosen": np.array(curve.weights["chosen"]), "rejected": -np.array(curve.weights["rejected"])}
    assert set(falls) == set(curve.losses)
    for side, fall in falls.items():
        slope = -np.diff(curve.losses[side]) / np.diff(curve.reward)
        error = np.abs(slope - (fall[1:] + fall[:-1]) / 2)
        assert np.isfinite(curve.losses[side]).all()
        assert np.quantile(error, 0.99) < 2e-3


def test_losses_and_weights_stand_one_above_the_other(tmp_path, drawn):
    pair = LossCurve("margin", [-1.0, 1.0], {"": [2.0, 1.0]}, {"chosen": [0.5, 0.25], "rejected": [0.0, 0.125]})
    single = LossCurve("reward", [-1.0, 1.0], {"chosen": [2.0, 1.0], "rejected": [0.0, 3.0]}, pair.weights)
    save_loss_curves({"a": pair, "b": single, "c": pair}, tmp_path / "losses.png", title="three", columns=2)
    (figure,) = drawn
    shown = [axes for axes in figure.axes if axes.get_visible()]
    assert len(shown) == 2 * 3
    (above,) = (axes for axes in shown if axes.get_title() == "b")
    assert [list(line.get_ydata()) for line in above.lines] == [[2.0, 1.0], [0.0, 3.0]]
    below = [axes for axes in shown if axes.get_xlabel() == "reward"]
    assert [list(line.get_ydata()) for line in below[0].lines[1:]] == [[0.5, 0.25], [0.0, 0.125]]
