"""What each of several processes does for `tests/test_processes.py`: it writes what it found to `found-NUMBER.json`.

`python -m tests.several FOLDER --coordinator HOST:PORT --num-processes N --process-id I`
"""

import argparse
import contextlib
import io
import json
import os
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from jaxdpo import cli, processes
from jaxdpo.data.pipeline import all_batches
from jaxdpo.families import FAMILIES, export_tensors
from jaxdpo.models import Decoder, abstract_params
from jaxdpo.reference import dataset_logps, make_logp_program
from jaxdpo.reference_cache import reference_cache, stored_logps
from jaxdpo.sharding import make_mesh, place, place_batch
from jaxdpo.train.digests import tree_digests
from jaxdpo.types import InputError
from tests import tiny

ARRAYS = {
    "float32": np.random.default_rng(0).normal(size=(3, 16, 8)).astype(np.float32),
    "bfloat16": np.arange(64).reshape(8, 8).astype(jnp.bfloat16),
    "int32": np.arange(-40, 40, dtype=np.int32).reshape(8, 10),
    "bool": np.arange(16) % 3 == 0,
    "scalar": np.float32(0.5),
    "empty": np.zeros((0, 8), np.float32),
}
MODEL = tiny.LLAMA
DATA = tiny.dataset(groups=20)


def arrays(mesh: jax.sharding.Mesh) -> dict[str, jax.Array]:
    """`ARRAYS` on a mesh, those whose size allows it split over all of its devices."""

    def spec(array: np.ndarray) -> jax.sharding.PartitionSpec:
        split = [axis for axis, size in enumerate(array.shape) if size and size % mesh.size == 0]
        return jax.P(*[None] * split[0], "fsdp") if split else jax.P()

    return {name: place(array, jax.NamedSharding(mesh, spec(array))) for name, array in ARRAYS.items()}


def weights(decoder: Decoder, mesh: jax.sharding.Mesh) -> dict:
    """`tiny.params` on a mesh of several processes."""
    return jax.tree.map(
        lambda x, y: place(np.asarray(x), y.sharding), tiny.params(decoder), abstract_params(decoder, mesh)
    )


def caught(function, *arguments) -> str:
    """What a function raises as InputError."""
    try:
        function(*arguments)
    except InputError as error:
        return str(error)
    return ""


def fails_on_the_last() -> None:
    with processes.together():
        if not processes.is_main():
            raise InputError("this does not work here")


def exchanges(folder: Path, number: int) -> dict:
    """What processes tell each other."""
    (folder / f"own-{number}").mkdir()
    processes.start("host:1", 5, 4)  # once connected, does nothing
    return {
        "gathered": processes.gathered({"number": number, "text": "ä" * 1000 * number}),
        "of_main": processes.of_main(number + 7),
        "largest": processes.largest(number * 3),
        "anywhere": processes.anywhere(np.arange(4) == number).tolist(),
        "together": caught(fails_on_the_last),
        "agree": caught(processes.agree, {"same": 1, "--beta": 0.1 + number, "missing": None if number else "here"}),
        "first_sharing": [processes.first_sharing(path) for path in (folder, folder / f"own-{number}", folder / "no")],
        "left": [path.name for path in folder.glob(".process-*")],
    }


def on_the_mesh() -> dict:
    """What lies on the devices of all of them."""
    mesh = make_mesh()
    placed, decoder = arrays(mesh), tiny.decoder()
    params = weights(decoder, mesh)
    batch = next(iter(all_batches(DATA, tiny.layout(DATA, row_multiple=8))))
    on_devices = place_batch(batch, mesh)
    return {
        "fetched": all(map(np.array_equal, *map(jax.tree.leaves, (processes.fetch(placed), ARRAYS)))),
        "apart": not placed["float32"].is_fully_addressable,
        "digests": tree_digests(placed),
        "batch": all(map(np.array_equal, *map(jax.tree.leaves, (processes.fetch(on_devices), batch)))),
        "exported": {
            name: float(np.abs(tensor).sum())
            for name, tensor in export_tensors(FAMILIES[MODEL.model_type], decoder, params)
        },
    }


def caches(folder: Path, number: int) -> dict:
    """The reference's log-probs, kept by each process in a cache of its own; then one of them loses its own."""
    mesh, decoder = make_mesh(), tiny.decoder()
    params = weights(decoder, mesh)
    layout, program = tiny.layout(DATA, row_multiple=8), make_logp_program(decoder)
    os.environ["JAXDPO_CACHE"] = str(folder / f"cache-{number}")

    def stored(examples):
        with jax.set_mesh(mesh):
            found = stored_logps(
                program, params, DATA, examples, layout, mesh, facts={"of": "tests"}, label="reference"
            )
        return found.computed, [float(found.logps.of(i).sum()) for i in examples]

    every = np.arange(len(DATA))
    computed = [stored(every[:10]), stored(every[:10])]
    files = {path.name: path.read_bytes() for path in reference_cache().glob("*/*.*32")}
    if number:
        os.environ["JAXDPO_CACHE"] = str(folder / "another")
    computed.append(stored(every[:10]))  # what process 1 lacks
    unchanged = files == {path.name: path.read_bytes() for path in reference_cache().glob("*/*.*32")}
    os.environ["JAXDPO_CACHE"] = str(folder / "shared")
    computed.append(stored(every))
    with jax.set_mesh(mesh):
        direct = dataset_logps(program, params, all_batches(DATA, layout), mesh, label="reference")
    return {
        "computed": [number for number, _ in computed],
        "sums": [sums for _, sums in computed],
        "direct": [float(direct.of(i).sum()) for i in every],
        "unchanged": unchanged,
    }


def command(words: list[str]) -> list:
    """Exit status and stderr of a command."""
    with contextlib.redirect_stderr(io.StringIO()) as said:
        status = cli.main(words)
    return [status, said.getvalue()]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--coordinator")
    parser.add_argument("--num-processes", type=int)
    parser.add_argument("--process-id", type=int)
    given = parser.parse_args()
    processes.start(given.coordinator, given.num_processes, given.process_id)
    folder, number = given.folder, given.process_id
    found = {"exchanges": exchanges(folder, number), "mesh": on_the_mesh(), "caches": caches(folder, number)}
    os.chdir(folder / f"cwd-{number}")  # paths that are relative name other files on each
    commands = json.loads((folder / "commands.json").read_text())
    found["commands"] = {
        name: command([word.replace("NUMBER", str(number)) for word in words]) for name, words in commands.items()
    }
    (folder / f"found-{number}.json").write_text(json.dumps(found))
    if number:
        processes.PART_SECONDS = 1
        (folder / "left.json").write_text(json.dumps(processes.ended()))  # the other one does not come
        os._exit(0)
    while not (folder / "left.json").exists():
        pass
    os._exit(0)


if __name__ == "__main__":
    main()
