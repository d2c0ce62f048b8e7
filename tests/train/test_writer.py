"""`metrics.jsonl` after a kill: whole lines only, and no row of a step that will be done again."""

import json

import pytest

from jaxdpo.train.writer import MetricsWriter, read_metrics
from jaxdpo.types import InputError


def written(path, rows, *, torn=""):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows) + torn)
    return path


def rows(*steps):
    return [{"step": step, "loss": 0.5 + step} for step in steps]


def test_rows_are_lines_that_others_can_read_at_once(tmp_path):
    writer = MetricsWriter(tmp_path / "metrics.jsonl", resume_step=0)
    for row in rows(1, 2):
        writer.write(row)
        assert read_metrics(tmp_path / "metrics.jsonl")[-1] == row  # it is not closed yet
    writer.close()
    assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 1, "loss": 1.5}\n{"step": 2, "loss": 2.5}\n'


@pytest.mark.parametrize("torn", ["", '{"step": 5, "lo', '{"step": 5, "loss": 5.5}', "\x00\x00"])
@pytest.mark.parametrize("resume_step, kept", [(4, (0, 1, 2, 3, 4)), (2, (0, 1, 2)), (0, ())])
def test_rows_behind_the_restored_step_are_cut(tmp_path, torn, resume_step, kept):
    path = written(tmp_path / "metrics.jsonl", rows(0, 1, 2, 3, 4), torn=torn)
    writer = MetricsWriter(path, resume_step=resume_step)
    writer.write({"step": 9})
    writer.close()
    assert read_metrics(path) == [*rows(*kept), {"step": 9}]


def test_kept_rows_are_kept_to_the_letter(tmp_path):
    text = '{"step": 1, "loss": 0.6931471805599453, "learning_rate": 6.6225166e-09, "pairs_per_second": 1e+16}\n'
    path = tmp_path / "metrics.jsonl"
    path.write_text(text + '{"step": 2}\n')
    MetricsWriter(path, resume_step=1).close()
    assert path.read_text() == text


def test_a_torn_line_is_no_row(tmp_path):
    path = written(tmp_path / "metrics.jsonl", rows(1), torn='{"step": 2, "loss": ')
    assert read_metrics(path) == rows(1)


def test_no_file_is_an_error(tmp_path):
    with pytest.raises(
        InputError, match=r"metrics.jsonl does not exist; allowed: the metrics.jsonl of a run; fix: start"
    ):
        read_metrics(tmp_path / "metrics.jsonl")
