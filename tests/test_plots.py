"""The picture of a run shows the numbers of its metrics."""

import pytest
from matplotlib.figure import Figure

from jaxdpo.plots import save_curves

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
