"""What of the benchmarks needs none of the libraries that they measure: numbers, tables, refusals, protocol."""

import ast
import contextlib
import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from matplotlib.image import imread

from jaxdpo.hf import load_config, load_tokenizer
from jaxdpo.types import InputError
from tests.tiny import write_model, write_pairs

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))
import charts
import dpo_vs_peers
import growth
import scaling
from peers import environments, pairs, summary, wire

BENCHMARKS = Path(dpo_vs_peers.__file__).parent
RUNNERS = sorted(BENCHMARKS.glob("peers/run_*.py"))
SETTINGS = dpo_vs_peers.SETTINGS
WORK = summary.Work(pairs=64, tree_tokens=1000, scored_tokens=400, body_parameters=10, head_parameters=5)
SECONDS = {
    "jaxdpo float32": 30.0,
    "jaxdpo bfloat16": 20.0,
    "trl float32": 160.0,
    "trl fastest": 60.0,
    "tunix float32": 800.0,
}
DRIFT = {
    "jaxdpo float32": 1e-4,
    "jaxdpo bfloat16": 2e-2,
    "trl float32": 0.0,
    "trl fastest": 3e-2,
    "tunix float32": 1e-6,
}


def rows(settings=SETTINGS, *, rounds=range(1, 4), slower=1.0):
    """Rounds in which a setting takes its time, later rounds more by `slower`; jaxdpo's reference takes 10 s more."""
    return [
        {
            "round": number,
            "setting": name,
            "loss": 0.69 + DRIFT[name],
            "seconds": SECONDS[name] * slower**number,
            "reference_seconds": 10.0 * slower**number if settings[name].reference == "apart" else None,
            "peak_rss_bytes": 4 * 2**30 if name.startswith("jaxdpo") else 10 * 2**30,
        }
        for number in rounds
        for name in settings
    ]


def summarised(settings=SETTINGS, measured=None, peaks=None):
    work = dict.fromkeys(range(9), WORK)
    measured = summary.by_setting(rows(settings) if measured is None else measured)
    return summary.summarise(measured, settings, work, peaks or {"float32": 1e4, "bfloat16": 2e4})


def test_cases_tell_the_reference_time_where_it_can_be_told():
    assert [str(case) for case in summary.cases(SETTINGS)] == [
        "jaxdpo float32, reference included",
        "jaxdpo float32, reference excluded",
        "jaxdpo bfloat16, reference included",
        "jaxdpo bfloat16, reference excluded",
        "trl float32, reference included",
        "trl fastest, reference excluded",
        "tunix float32, reference included",
    ]


def test_rates_and_shares_are_work_over_time():
    included, excluded = summarised()[:2]
    each = 1000 * 10 + 400 * 5  # tree tokens through the body, scored tokens through the head
    assert included["pairs_per_second"]["median"] == 64 / 40
    assert excluded["pairs_per_second"]["median"] == 64 / 30
    assert excluded["useful_tokens_per_second"]["median"] == pytest.approx(1000 / 30)
    assert excluded["share_of_peak"]["float32"]["median"] == pytest.approx(6 * each / 30 / 1e4)
    assert included["share_of_peak"]["bfloat16"]["median"] == pytest.approx(8 * each / 40 / 2e4)


def test_a_visit_that_was_begun_again_replaces_what_it_measured():
    stopped = [row | {"seconds": 1e9, "loss": 9.0} for row in rows(rounds=[2]) if row["setting"] == "trl float32"]
    found = summary.by_setting(stopped + rows(rounds=[3, 2]))
    assert list(found["trl float32"]) == [2, 3]
    assert found["trl float32"][2]["seconds"] == SECONDS["trl float32"] and found["trl float32"][2]["loss"] == 0.69


def test_rounds_that_only_one_setting_did_are_not_compared():
    measured = rows(rounds=range(1, 4)) + [row for row in rows(rounds=[4]) if row["setting"] == "jaxdpo float32"]
    measured[-1] |= {"seconds": 1.0, "loss": 9.0}
    report = summarised(measured=measured)
    assert list(report[0]["seconds"].values()) == [40.0, 40.0, 40.0, 11.0]
    assert report[0]["loss_drift"]["TRL's"] == pytest.approx(1e-4)
    assert summary.compare(report)[0]["max"] == 4


def test_settings_take_turns_and_turn_round():
    assert dpo_vs_peers.visits(["a", "b"], 5, 2) == [
        ("a", range(1, 3)),
        ("b", range(1, 3)),
        ("b", range(3, 5)),
        ("a", range(3, 5)),
        ("a", range(5, 6)),
        ("b", range(5, 6)),
    ]


def test_only_visits_that_are_missing_are_made(tmp_path, monkeypatch, model):
    data = str(write_pairs(tmp_path / "data.jsonl", range(12)))
    output = tmp_path / "results"
    monkeypatch.setattr(dpo_vs_peers, "make_environment", lambda *_: Path(sys.executable))
    visited = []

    def visit(output, name, setting, python, model, rounds):
        visited.append((name, *rounds))
        if len(visited) == 4:
            raise KeyboardInterrupt
        for row in rows(rounds=rounds):
            if row["setting"] == name:
                dpo_vs_peers.append(output / "rounds.jsonl", row | {"versions": {}})
        rates = {dtype: {"numpy": 1.0} for dtype in ("float32", "bfloat16")}
        dpo_vs_peers.append(output / "matmul.jsonl", {"rates": rates})

    monkeypatch.setattr(dpo_vs_peers, "visit", visit)
    flags = f"--envs e --data {data} --output {output} --model {model} --rounds 3 --rounds-per-visit 2"
    flags += " --pairs-per-step 4 --peers jaxdpo,trl --max-prompt-length 99 --max-response-length 99"
    monkeypatch.setattr(sys, "argv", ["x", *flags.split()])
    with pytest.raises(KeyboardInterrupt):
        dpo_vs_peers.main()
    stopped = visited.copy()
    dpo_vs_peers.main()
    assert visited[4:][0] == stopped[-1] and len(visited) == len(set(visited)) + 1 == 9
    facts = json.loads((output / "results.json").read_text())
    assert facts["summary"][0]["pairs_per_second"]["median"] == 4 / 40
    assert list(facts["losses"]) == [name for name in SETTINGS if name != "tunix float32"]


def test_what_must_hold_is_compared_round_by_round():
    report = summarised(measured=rows(rounds=range(1, 4), slower=2.0))  # drift that hits all alike changes no ratio
    found = {row["what"]: row for row in summary.compare(report)}
    included, memory, loss, fastest, tunix, share = found.values()
    assert included["median"] == included["min"] == included["max"] == 160 / 40 and included["holds"]
    assert memory["median"] == 0.4 and memory["at_most"] == 0.55 and memory["holds"]
    assert loss["median"] == pytest.approx(1e-4) and loss["holds"]
    assert fastest["median"] == 60 / 20, "bfloat16 drifts less than TRL's autocast"
    assert tunix["median"] == 800 / 40
    assert share["median"] == pytest.approx(6 * 12000 / 120 / 1e4) and not share["holds"]


def test_a_setting_that_drifts_more_than_trls_autocast_is_not_compared(monkeypatch):
    monkeypatch.setitem(DRIFT, "jaxdpo bfloat16", 0.2)
    fastest = summary.compare(summarised())[3]
    assert "jaxdpo float32" in fastest["what"] and fastest["median"] == 60 / 30


def test_libraries_that_were_left_out_are_not_compared():
    alone = {name: setting for name, setting in SETTINGS.items() if setting.peer == "jaxdpo"}
    report = summarised(alone)
    assert [row["what"] for row in summary.compare(report)] == ["useful FLOPs of the measured float32 peak"]
    assert set(report[0]["loss_drift"]) == {"its own"}


def test_tables_hold_every_case_and_every_bound():
    report = summarised(measured=rows(rounds=range(1, 3), slower=1.5))
    comparisons = summary.compare(report)
    text = summary.markdown(report, comparisons)
    lines = [line for line in text.splitlines() if line]
    assert len(lines) == 2 + len(report) + 2 + len(comparisons)
    assert len({line.count("|") for line in lines[: 2 + len(report)]}) == 1
    assert "| jaxdpo float32, reference included | 0.889 (0.711 to 1.07) |" in text
    assert "1.0e-04 from TRL's float32" in text
    assert "≤ 0.55 | 0.4 | yes |" in text and "≥ 0.45 | 0.62 | no |" in text


def test_the_picture_is_drawn(tmp_path):
    charts.save_peers(summarised(measured=rows(slower=1.5)), tmp_path / "peers.png")
    assert np.ptp(imread(tmp_path / "peers.png")[..., :3]) > 0.5


SPEC = wire.Spec("m", "p", "o", 2, 4, 0.1, 1e-6, 150, 0.99, 1e-8, 512, 304, 264, {"dtype": "float32"})


def test_a_specification_is_read_as_it_was_written(tmp_path):
    wire.write_spec(tmp_path / "spec.json", SPEC)
    assert wire.read_spec([str(tmp_path / "spec.json")]) == SPEC


@pytest.mark.parametrize("runner", RUNNERS, ids=lambda path: path.stem)
@pytest.mark.parametrize(
    "arguments, message",
    [
        ([], "allowed: the path of one specification"),
        (["{}/absent.json"], "does not exist"),
        (["{}/foreign.json"], "steps missing or unknown"),
    ],
)
def test_runners_refuse_what_is_no_specification(tmp_path, runner, arguments, message):
    foreign = {name: value for name, value in SPEC._asdict().items() if name != "steps"}
    (tmp_path / "foreign.json").write_text(json.dumps(foreign))
    command = [sys.executable, str(runner), *(argument.format(tmp_path) for argument in arguments)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1 and message in done.stderr and "Traceback" not in done.stderr


@pytest.mark.parametrize("script", [*RUNNERS, BENCHMARKS / "peers" / "matmul.py"], ids=lambda path: path.stem)
def test_runners_load_no_library_before_they_need_it(script):
    """So that their answers are safe from what a library prints, and a bad call costs nothing."""
    imported = {
        name.split(".")[0]
        for node in ast.parse(script.read_text()).body
        for name in (
            [alias.name for alias in node.names]
            if isinstance(node, ast.Import)
            else [node.module]
            if isinstance(node, ast.ImportFrom)
            else []
        )
    }
    assert imported <= set(sys.stdlib_module_names) | {"wire"}


def test_every_library_has_a_runner_and_a_setting():
    assert {path.stem.removeprefix("run_") for path in RUNNERS} == set(environments.PEERS)
    assert {setting.peer for setting in SETTINGS.values()} == set(environments.PEERS)
    assert {setting.reference for setting in SETTINGS.values()} <= {"apart", "within", "before"}


ECHO = """
import sys
sys.path.insert(0, {directory!r})
from wire import Wire, read_spec
spec, wire = read_spec(sys.argv[1:]), Wire()
print("a library prints this")
wire.ready("numpy")
while (step := wire.next_step()) is not None:
    if step == spec.steps:
        raise RuntimeError("no more steps")
    wire.done(step, 0.5 + step, 2.0, 1.0)
"""


@pytest.fixture
def runner(tmp_path):
    """A runner without a library."""
    (tmp_path / "echo.py").write_text(ECHO.format(directory=str(BENCHMARKS / "peers")))
    wire.write_spec(tmp_path / "spec.json", SPEC)
    made = wire.Runner(Path(sys.executable), tmp_path / "echo.py", tmp_path / "spec.json", tmp_path / "echo.log")
    yield made
    made.close()


def test_a_runner_answers_step_by_step(runner):
    runner.wait_until_ready()
    assert runner.versions == {"numpy": np.__version__}
    answers = [runner.step(step) for step in range(2)]
    assert [answer["loss"] for answer in answers] == [0.5, 1.5]
    assert answers[0]["seconds"] == 2.0 and answers[0]["reference_seconds"] == 1.0
    assert answers[0]["peak_rss_bytes"] > 2**20
    assert runner.log.read_text() == "a library prints this\n"


def test_a_runner_that_dies_is_reported_with_its_last_words(runner):
    runner.wait_until_ready()
    with pytest.raises(RuntimeError, match=r"status 1(.|\n)*no more steps"):
        runner.step(2)


def test_jaxdpos_runner_trains(tmp_path, model):
    records, _ = pairs.usable_pairs(str(write_pairs(tmp_path / "data.jsonl", range(6))), model, 6, (64, 64, 64))
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    places = {"model": str(model), "pairs": str(tmp_path / "pairs.jsonl"), "output": str(tmp_path / "run")}
    spec = SPEC._replace(**places, steps=3, pairs_per_step=2, max_length=64, learning_rate=1e-2, warmup_steps=0)
    wire.write_spec(tmp_path / "spec.json", spec)
    script = BENCHMARKS / "peers" / "run_jaxdpo.py"
    with contextlib.closing(wire.Runner(Path(sys.executable), script, tmp_path / "spec.json", tmp_path / "log")) as run:
        run.wait_until_ready()
        answers = [run.step(step) for step in range(3)]
    assert answers[0]["loss"] == pytest.approx(np.log(2), abs=1e-4)
    assert abs(answers[2]["loss"] - np.log(2)) > 1e-3, "two updates changed the policy"
    assert all(answer["reference_seconds"] > 0 for answer in answers)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("bench") / "model")


def test_usable_pairs_are_those_that_nobody_cuts(tmp_path, model):
    data = str(write_pairs(tmp_path / "pairs.jsonl", range(12)))
    everything, none = pairs.usable_pairs(data, model, 12, (512, 512, 512))
    assert none == 0 and len(everything) == 12
    longest = max(len(record["chosen_ids"]) for record in everything)
    short, left_out = pairs.usable_pairs(data, model, 4, (512, 512, longest - 1))
    fitting = [r for r in everything if max(len(r["chosen_ids"]), len(r["rejected_ids"])) < longest]
    assert short == fitting[:4]
    assert left_out == everything.index(short[-1]) + 1 - 4 > 0
    tokenizer = load_tokenizer(model)
    record = everything[0]
    assert record["prompt"] == "Is 0 fine?" and record["chosen"] == " yes"
    assert tokenizer(record["chosen"], add_special_tokens=False)["input_ids"] == record["chosen_ids"][:-1]


def test_too_few_pairs_are_refused(tmp_path, model):
    data = str(write_pairs(tmp_path / "pairs.jsonl", range(3)))
    with pytest.raises(InputError, match="has 3 usable pairs; needed: 4"):
        pairs.usable_pairs(data, model, 4, (512, 512, 512))


def test_work_counts_the_prompt_once_and_completions_in_the_head(model):
    records = [{"prompt_ids": [1, 2, 3], "chosen_ids": [4, 5], "rejected_ids": [6]}]
    work, config = pairs.step_work(model, records), load_config(model)
    assert work[:3] == (1, 6, 3)
    q = o = config.embed_dim * config.num_heads * config.head_dim
    k = v = config.embed_dim * config.num_kv_heads * config.head_dim
    assert work.body_parameters == config.num_layers * (q + k + v + o + 3 * config.embed_dim * config.mlp_dim)
    assert work.flops(with_reference=False) == 6 * (6 * work.body_parameters + 3 * work.head_parameters)


def test_rounds_of_another_benchmark_are_not_continued(tmp_path):
    plan = {"data": "a.jsonl", "settings": SETTINGS["trl float32"]._asdict()}
    dpo_vs_peers.check_plan(tmp_path / "plan.json", plan)
    dpo_vs_peers.check_plan(tmp_path / "plan.json", plan)
    with pytest.raises(InputError, match=r"data 'a.jsonl' is now 'b.jsonl'; allowed: the same benchmark"):
        dpo_vs_peers.check_plan(tmp_path / "plan.json", {**plan, "data": "b.jsonl"})


def test_a_line_that_was_cut_off_is_left_out(tmp_path):
    path = tmp_path / "rounds.jsonl"
    dpo_vs_peers.append(path, {"round": 1})
    with open(path, "a") as file:
        file.write('{"round": 2, "loss"')
    assert dpo_vs_peers.read(path) == [{"round": 1}]
    dpo_vs_peers.append(path, {"round": 3})
    assert dpo_vs_peers.read(path) == [{"round": 1}, {"round": 3}]
    assert dpo_vs_peers.read(tmp_path / "absent.jsonl") == []


@pytest.mark.parametrize(
    "flags, message",
    [
        ("--peers jaxdpo,torchtune", "has torchtune; allowed: jaxdpo, trl, tunix"),
        ("--rounds 0", "--rounds is 0; allowed: at least 1"),
    ],
)
def test_bad_options_are_refused(monkeypatch, capsys, flags, message):
    monkeypatch.setattr(sys, "argv", ["x", *["--envs", "e", "--data", "d", "--output", "o"], *flags.split()])
    with pytest.raises(SystemExit):
        dpo_vs_peers.parse()
    assert message in capsys.readouterr().err


@pytest.fixture
def environment(tmp_path):
    """A directory of environments, in which TRL's has the packages of these tests."""
    python = tmp_path / "trl" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text(f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')
    python.chmod(0o755)
    return tmp_path


def test_an_environment_with_other_versions_is_refused(environment, monkeypatch):
    monkeypatch.setitem(environments.PINNED, "trl", (("numpy==0.0.1", f"pytest=={pytest.__version__}"),))
    message = r"numpy is [\d.]+; allowed: numpy==0.0.1 pytest==[\d.]+; fix: remove it, and it is built again"
    with pytest.raises(SystemExit, match=message):
        environments.make_environment("trl", environment, environment / "log")


def test_an_environment_that_is_right_is_used(environment, monkeypatch):
    monkeypatch.setitem(environments.PINNED, "trl", ((f"numpy=={np.__version__}",),))
    python = environments.make_environment("trl", environment, environment / "log")
    assert python == environment / "trl" / "bin" / "python" and not (environment / "log").exists()


def test_pins_follow_the_interpreter():
    pins = environments.pinned_versions("tunix", Path(sys.executable))
    assert pins["google-tunix"] == "0.1.7"
    assert pins["jax"].startswith("0.10." if sys.version_info < (3, 12) else "0.12.")


def test_the_matrix_product_is_measured(monkeypatch, capsys):
    spec = importlib.util.spec_from_file_location("matmul", BENCHMARKS / "peers" / "matmul.py")
    matmul = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(matmul)
    monkeypatch.setattr(matmul, "SIZE", 64)
    monkeypatch.setattr(matmul, "LIBRARIES", {name: matmul.LIBRARIES[name] for name in ("numpy", "jax")})
    matmul.main()
    rates = json.loads(capsys.readouterr().out)
    assert set(rates["float32"]) == {"numpy", "jax"} and set(rates["bfloat16"]) == {"jax"}
    assert dpo_vs_peers.best_rates([{"rates": rates}])["float32"] == max(rates["float32"].values()) > 0


def test_the_peak_is_the_best_librarys_median():
    measured = [{"numpy": 3.0, "torch": 5.0}, {"numpy": 3.0, "torch": 4.0}, {"numpy": 9.0, "torch": 6.0}, {"jax": 4.5}]
    rates = dpo_vs_peers.best_rates([{"rates": {"float32": rates, "bfloat16": {"jax": 1.0}}} for rates in measured])
    assert rates == {"float32": 5.0, "bfloat16": 1.0}


def test_slopes_are_the_exponents_of_power_laws():
    sizes = [256, 512, 1024, 8192]
    assert growth.slope(sizes, [3.0 * n**1.5 for n in sizes]) == pytest.approx(1.5)
    measured = [
        {"sweep": "s", "size": n, "tokens": n, "seconds": n, "temp_bytes": n**2, "peak_bytes": n} for n in sizes
    ]
    fitted = growth.slopes(measured)["s"]
    assert fitted["seconds"] == pytest.approx(1) and fitted["temporaries, MiB"] == pytest.approx(2)


def test_points_are_what_they_are_called():
    by_sweep = {}
    for point in scaling.points():
        by_sweep.setdefault(point.sweep, []).append(point)
    for name in ("row length, groups of 128 tokens", "row length, one group"):
        assert [point.tokens for point in by_sweep[name]] == [point.size for point in by_sweep[name]]
    shared = {point.size: point.tokens for point in by_sweep["completions, one prompt"]}
    in_pairs = {point.size: point.tokens for point in by_sweep["completions, in pairs"]}
    assert shared[2] == in_pairs[2] and shared[8] / in_pairs[8] == 0.5
    assert [point.vocabulary for point in by_sweep["vocabulary"]] == [point.size for point in by_sweep["vocabulary"]]


def test_results_of_scaling_are_written(tmp_path):
    measured = [
        {
            "sweep": p.sweep,
            "size": p.size,
            "tokens": p.tokens,
            "seconds": 1e-3 * p.tokens,
            "temp_bytes": 2**20,
            "peak_bytes": 0,
        }
        for p in scaling.points()
    ]
    growth.write(measured, tmp_path, attention="dense", machine="a machine")
    facts = json.loads((tmp_path / "scaling_dense.json").read_text())
    assert facts["slopes"]["row length, one group"]["seconds"] == pytest.approx(1)
    assert facts["shared_prompt"][-1] == {"completions": 8, "time": 0.5, "ideal": 0.5}
    text = (tmp_path / "scaling_dense.md").read_text()
    assert "| row length, one group | 8192 | 8192 | 8.192 | 1 | 0 |" in text and "| 8 | 0.50 | 0.50 |" in text
    assert np.ptp(imread(tmp_path / "scaling_dense.png")[..., :3]) > 0.5


def test_a_step_of_the_scaling_benchmark_runs():
    point = scaling.Point("tiny", 1, (((8, 4, 4), (6, 2, 2)), ((8, 4, 4),)), 64)
    done = subprocess.run(
        [sys.executable, str(BENCHMARKS / "scaling.py"), "--point", json.dumps(point), "--repeats", "1"],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    measured = json.loads(done.stdout)
    assert measured["seconds"] > 0 and measured["temp_bytes"] > 0
