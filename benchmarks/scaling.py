"""How time and memory of a training step grow: with row length, pairs, completions of a prompt, prompt and vocabulary.

    python benchmarks/scaling.py --output results --attention dense

A small Llama with random weights takes optimizer steps on random ids. Every point has a process of its own: its memory
is what XLA plans for temporaries, and by how much the process grew at most while it took the steps. Times are the least
of several steps. Exponents are fitted to the points on logarithmic axes. Writes `scaling_FORM.json`, `.md` and `.png`.
"""

import argparse
import itertools
import json
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from growth import write
from machine import machine

GROUP = (64, 32, 32)
"""Tokens of the prompt and the completions of a group of fixed length."""
LENGTHS = (256, 512, 1024, 2048, 4096, 8192)
PAIRS = (1, 2, 4, 8, 16, 32)
COMPLETIONS = (2, 4, 6, 8)
PROMPT_SHARES = (0.125, 0.25, 0.5, 0.75, 0.875)
VOCABULARIES = (2048, 8192, 32768, 131072)
VOCABULARY = 4096
"""Where it is not what changes."""

Group = tuple[int, ...]
"""Tokens of a prompt, and of each completion."""


class Point(NamedTuple):
    """One step that is measured."""

    sweep: str
    """What changes from point to point."""
    size: float
    """How large it is here."""
    rows: tuple[tuple[Group, ...], ...]
    """The groups in each row."""
    vocabulary: int = VOCABULARY

    @property
    def tokens(self) -> int:
        """Of all rows."""
        return sum(map(sum, itertools.chain(*self.rows)))


def points() -> list[Point]:
    """All that is measured."""
    fixed, one = "row length, groups of 128 tokens", "row length, one group"
    lengths = [Point(fixed, n, ((GROUP,) * (n // sum(GROUP)),)) for n in LENGTHS]
    lengths += [Point(one, n, (((n // 2, n // 4, n // 4),),)) for n in LENGTHS]
    batches = [Point("pairs", n, (((256, 128, 128),),) * n) for n in PAIRS]
    trees = [Point("completions, one prompt", k, (((256, *(64,) * k),),) * 4) for k in COMPLETIONS]
    apart = [Point("completions, in pairs", k, (((256, 64, 64),),) * (4 * k // 2)) for k in COMPLETIONS]
    shares = [Point("prompt share", share, ((_path(512, share),),) * 8) for share in PROMPT_SHARES]
    vocabularies = [Point("vocabulary", n, (((256, 128, 128),),) * 4, n) for n in VOCABULARIES]
    compared = itertools.chain(*zip(trees, apart, strict=True))  # one after the other: the machine may drift
    return [*lengths, *batches, *compared, *shares, *vocabularies]


def _path(length: int, share: float) -> Group:
    prompt = round(length * share)
    return (prompt, length - prompt, length - prompt)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, help="a directory")
    parser.add_argument("--attention", default="dense", help="the form; `jaxdpo.models.forms.ATTENTION` has them")
    parser.add_argument("--repeats", type=int, default=5, help="timed steps of a point")
    parser.add_argument("--longest", type=int, default=max(LENGTHS), help="leave longer rows out, to try it out")
    parser.add_argument("--only", help="one sweep")
    parser.add_argument("--point", help=argparse.SUPPRESS)  # what the processes are called with
    args = parser.parse_args()
    if args.point:
        print(json.dumps(measure(_point(json.loads(args.point)), args.attention, args.repeats)))
        return
    chosen = [p for p in points() if args.only in (None, p.sweep) and max(map(_length, p.rows)) <= args.longest]
    if args.output is None or not chosen:
        parser.error(
            "--output is missing" if chosen else f"--only {args.only} is no sweep; allowed: {sweeps(points())}"
        )
    rows = []
    for point in chosen:
        command = [sys.executable, __file__, "--point", json.dumps(point), "--attention", args.attention]
        done = subprocess.run([*command, "--repeats", str(args.repeats)], stdout=subprocess.PIPE, check=True, text=True)
        rows.append({"sweep": point.sweep, "size": point.size, "tokens": point.tokens, **json.loads(done.stdout)})
        print(describe(rows[-1]), flush=True)
    print(f"\n{write(rows, args.output, attention=args.attention, machine=machine('jax'))}")


def _point(fields: list[Any]) -> Point:
    sweep, size, rows, vocabulary = fields
    return Point(sweep, size, tuple(tuple(map(tuple, row)) for row in rows), vocabulary)


def _length(row: Iterable[Group]) -> int:
    return sum(map(sum, row))


def sweeps(of: Iterable[Point]) -> str:
    """The names of the sweeps."""
    return ", ".join(f"'{name}'" for name in dict.fromkeys(point.sweep for point in of))


def describe(row: dict[str, Any]) -> str:
    """One line of a point."""
    return (
        f"{row['sweep']} {row['size']:g}: {row['tokens']} tokens, {1e3 * row['seconds']:.0f} ms, "
        f"{row['temp_bytes'] / 2**20:.0f} MiB of temporaries, grew by {row['peak_bytes'] / 2**20:.0f} MiB"
    )


def measure(point: Point, attention: str, repeats: int) -> dict[str, float]:
    """Takes steps; seconds of the fastest, bytes of temporaries and by how much the process grew at most."""
    import jax

    step, (state, *rest) = compiled_step(point, attention)
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before = _status("VmRSS")
    times = []
    for _ in range(repeats + 1):
        began = time.perf_counter()
        state, *_ = jax.block_until_ready(step(state, *rest))
        times.append(time.perf_counter() - began)
    peak = _status("VmHWM") - before
    temporaries = step.memory_analysis().temp_size_in_bytes
    return {"seconds": min(times[1:]), "temp_bytes": temporaries, "peak_bytes": peak}


def compiled_step(point: Point, attention: str) -> tuple[Any, tuple[Any, ...]]:
    """The step of a run, compiled, and its arguments: state, microbatch, counts and options."""
    import jax

    from jaxdpo.data.batch import build_batch
    from jaxdpo.data.dataset import TokenizedDataset
    from jaxdpo.data.packing import Capacity, Shape
    from jaxdpo.losses import LOSSES
    from jaxdpo.models import TransformerConfig, init_params, make_decoder
    from jaxdpo.sharding import make_mesh, place_batch
    from jaxdpo.train.objective import preference_task, step_counts
    from jaxdpo.train.optimizer import OPTIMIZERS
    from jaxdpo.train.state import init_state
    from jaxdpo.train.step import Microbatch, make_programs

    config = TransformerConfig(
        model_type="llama",
        vocab_size=point.vocabulary,
        embed_dim=256,
        num_layers=2,
        num_heads=4,
        num_kv_heads=2,
        head_dim=64,
        mlp_dim=768,
        max_positions=max(LENGTHS),
        tie_embeddings=True,
    )
    mesh = make_mesh(jax.devices()[:1])
    decoder = make_decoder(config, attention=attention)
    groups = list(itertools.chain(*point.rows))
    data = TokenizedDataset.of(random_groups(groups, point.vocabulary))
    capacity = Capacity(
        length=max(map(_length, point.rows)),
        slots=max(sum(sum(group[1:]) for group in row) for row in point.rows),
        groups=max(map(len, point.rows)),
        candidates=max(len(group) - 1 for group in groups),
    )
    first = itertools.accumulate(map(len, point.rows), initial=0)
    members = [range(start, start + len(row)) for start, row in zip(first, point.rows, strict=False)]
    batch = build_batch(data, members, Shape(capacity, len(point.rows)))
    optimizer = OPTIMIZERS["rmsprop"](lambda step: 1e-6)
    loss = LOSSES["plackett_luce"]._replace(data=())  # of two completions that of DPO
    with jax.set_mesh(mesh):
        state = init_state(init_params(decoder, jax.random.key(0), mesh), optimizer, mesh)
        shardings = jax.tree.map(lambda x: x.sharding, state)
        programs = make_programs(preference_task(decoder, loss), optimizer, shardings)
        microbatch = place_batch(Microbatch(batch, np.zeros(batch.slot_owner.shape, np.float32)), mesh)
        arguments = state, microbatch, step_counts([batch]), {"beta": 0.1}
        return programs.step.lower(*arguments).compile(), arguments


def random_groups(groups: Sequence[Group], vocabulary: int) -> list[Any]:
    """Groups of the given sizes with random ids."""
    from jaxdpo.data.groups import TokenizedGroup
    from jaxdpo.types import Origin

    rng = np.random.default_rng(0)
    made = []
    for number, sizes in enumerate(groups):
        prompt, *completions = (rng.integers(0, vocabulary, size, np.int32) for size in sizes)
        origin = Origin("random", number, "row")
        made.append(TokenizedGroup(prompt, tuple(completions), False, (False,) * len(completions), origin))
    return made


def _status(field: str) -> int:
    """Bytes of this process, as Linux counts them."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{field}:")) * 1024


if __name__ == "__main__":
    main()
