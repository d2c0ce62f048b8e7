"""Several processes that run one program: how they find each other, agree, and read what lies on all their devices.

Each has devices of its own and runs the same code; what is computed on a mesh is computed by all. So all have to come
to the same programs in the same order, and what one alone does or finds goes through `together` or `of_main`. With one
process all of this is nothing.
"""

import contextlib
import json
import os
import pathlib
import secrets
import sys
import threading
import types
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import numpy as np
from jax._src import distributed
from jax._src.clusters import ClusterEnv
from jax.experimental import multihost_utils

from jaxdpo.types import InputError, RunStopped

CONNECT_SECONDS = 300
"""How long processes wait for each other at the start."""
PART_SECONDS = 10
"""How long one that ends with an error waits for the others to end too; it cannot know whether they do."""
EXIT_SECONDS = 60
"""How long jax lets one that ends well wait for the others, before it aborts it."""
WIDTH = 1024
"""Texts that processes exchange are padded to a multiple of so many bytes: a program is compiled for each size."""

ALONE: dict[str, Callable[[Mapping[str, str]], bool]] = {
    "SlurmCluster": lambda environment: environment.get("SLURM_STEP_NUM_TASKS") == "1",
    "K8sCluster": lambda environment: "JOB_COMPLETION_INDEX" not in environment,
}
"""jax's name of a cluster -> whether a process there runs alone, although jax would ask for others: the shell of an
interactive Slurm allocation of many tasks; a pod that is no part of an indexed job."""


def start(coordinator: str | None = None, num_processes: int | None = None, process_id: int | None = None) -> None:
    """Connects this process with the others of its program; before any array is made. Once connected, does nothing.

    Args:
      coordinator: HOST:PORT of process 0. With the others None, what the environment says: jax knows Cloud TPU, GKE,
        Slurm, Open MPI and Kubernetes. Where it says nothing this process runs alone.
      num_processes: how many there are; 1: this one runs alone, whatever the environment says.
      process_id: which this one is, from 0.
    Raises:
      InputError: if it cannot connect, or jax has been used already. If others do not come, this process ends with a
        message and status 2: jax would abort it.
    """
    if jax.distributed.is_initialized() or num_processes == 1 or (coordinator is None and _detected() == 1):
        return
    # It would take SIGTERM for itself.
    jax.config.update("jax_enable_preemption_service", False)
    detection = None if coordinator is None else "deactivate"
    where = "as the cluster says" if coordinator is None else f"{num_processes} at {coordinator}"
    patience = threading.Timer(CONNECT_SECONDS, _give_up, [where])
    patience.daemon = True
    patience.start()
    try:
        jax.distributed.initialize(
            coordinator,
            num_processes,
            process_id,
            cluster_detection_method=detection,
            initialization_timeout=CONNECT_SECONDS + EXIT_SECONDS,
            shutdown_timeout_seconds=EXIT_SECONDS,
        )
    except (RuntimeError, ValueError, OSError) as error:
        raise InputError(_apart(where, str(error).splitlines()[0])) from error
    finally:
        patience.cancel()
    sys.excepthook = _uncaught


def _apart(where: str, why: str) -> str:
    return (
        f"the processes ({where}) cannot be connected: {why}; fix: start all of them within {CONNECT_SECONDS} s, with "
        "one address of process 0 that is free and that all of them reach, before jax is used; --coordinator "
        "localhost:1 --num-processes 1 --process-id 0 runs this one alone"
    )


def _give_up(where: str) -> None:
    print(f"jaxdpo: error: {_apart(where, 'not all of them came')}", file=sys.stderr, flush=True)
    os._exit(2)


def _uncaught(kind: type[BaseException], error: BaseException, traceback: types.TracebackType | None) -> None:
    """Prints an error that nothing caught, as that others are gone, and ends the process without them."""
    sys.__excepthook__(kind, error, traceback)
    if not ended():
        os._exit(1)


def _detected() -> int:
    """How many processes the environment says there are."""
    for cluster in ClusterEnv._cluster_types:
        alone = ALONE.get(cluster.__name__)
        if not cluster.opt_in_only_method and not (alone and alone(os.environ)) and cluster.is_env_present():
            return cluster.get_process_count()
    return 1


def ended() -> bool:
    """Takes leave of the others before an exit with an error; False if they do not come, as they have none.

    Then nothing but `os._exit` is left: jax would wait for them for minutes, and abort this process after that.
    """
    client = distributed.global_state.client
    if client is not None:
        try:
            client.wait_at_barrier("jaxdpo: end", PART_SECONDS * 1000)
        except Exception:  # too late, or the connection is lost
            return False
        jax.distributed.shutdown()
    return True


def several() -> bool:
    """Whether other processes run this program too."""
    return jax.process_count() > 1


def is_main() -> bool:
    """Whether this is process 0, which writes and prints for all."""
    return jax.process_index() == 0


@contextlib.contextmanager
def only_main_prints() -> Iterator[None]:
    """Within it what other processes than 0 print is dropped; their errors are not."""
    if is_main():
        yield
        return
    with open(os.devnull, "w", encoding="utf-8") as nowhere, contextlib.redirect_stdout(nowhere):
        yield


def gathered(value: Any) -> list[Any]:
    """What every process has here, JSON-able; in the order of their numbers."""
    if not several():
        return [value]
    text = np.frombuffer(json.dumps(value).encode(), np.uint8)
    sizes = multihost_utils.process_allgather(np.int32(len(text)))
    padded = np.zeros(-(-int(sizes.max()) // WIDTH) * WIDTH, np.uint8)
    padded[: len(text)] = text
    texts = multihost_utils.process_allgather(padded)  # [processes, bytes]
    return [json.loads(text[:size].tobytes()) for text, size in zip(texts, sizes.tolist(), strict=True)]


def of_main(value: Any) -> Any:
    """What process 0 has here, JSON-able."""
    return gathered(value if is_main() else None)[0] if several() else value


def largest(number: int) -> int:
    """The largest of the numbers that the processes have here: cheap enough for every step."""
    return int(multihost_utils.process_allgather(np.int32(number)).max()) if several() else number


def anywhere(mask: np.ndarray) -> np.ndarray:
    """bool: where the mask of any process is true; all have one of the same shape."""
    return multihost_utils.process_allgather(mask).any(axis=0) if several() else mask


def fetch(tree: Any) -> Any:
    """A pytree of arrays as NumPy arrays, whole, on every process; all of them have to call it."""

    def held_apart(x: Any) -> bool:
        return isinstance(x, jax.Array) and not (x.is_fully_addressable or x.is_fully_replicated)

    leaves, structure = jax.tree.flatten(tree)
    apart = [x for x in leaves if held_apart(x)]
    if apart:
        everywhere = jax.NamedSharding(apart[0].sharding.mesh, jax.P())
        whole = iter(jax.jit(_same, out_shardings=everywhere)(apart))
        leaves = [next(whole) if held_apart(x) else x for x in leaves]
    return jax.device_get(jax.tree.unflatten(structure, leaves))


def _same(arrays: list[jax.Array]) -> list[jax.Array]:
    return arrays


@contextlib.contextmanager
def together() -> Iterator[None]:
    """What one process cannot do ends all: an error within it is raised by each. Nothing within it may wait for others.

    Raises:
      InputError: if it is that on a process.
      RunStopped: for any other error on another process.
    """
    own: Exception | None = None
    try:
        yield
    except Exception as error:
        if not several():
            raise
        own = error
    if not largest(own is not None):
        return
    kind = next((known for known in (InputError, RunStopped) if isinstance(own, known)), type(own))
    errors = gathered(None if own is None else [kind.__name__, str(own)])
    if own is not None:
        raise own
    number, (name, text) = next((i, error) for i, error in enumerate(errors) if error is not None)
    known = {"InputError": InputError, "RunStopped": RunStopped}
    raise known.get(name, RunStopped)(f"process {number}: {text if name in known else f'{name}: {text}'}")


def agree(facts: Mapping[str, Any]) -> None:
    """InputError on every process, naming what differs, if they do not have the same facts; JSON-able, by name."""
    everywhere = gathered(dict(facts))
    differing = []
    for name in sorted({name for of_process in everywhere for name in of_process}):
        values: dict[str, list[int]] = {}
        for number, of_process in enumerate(everywhere):
            values.setdefault(repr(of_process.get(name)), []).append(number)
        if len(values) > 1:
            parts = (f"{value} on process {', '.join(map(str, numbers))}" for value, numbers in values.items())
            differing.append(f"{name} is {' and '.join(parts)}")
    if differing:
        raise InputError(
            f"the processes of a run differ: {'; '.join(differing)}; allowed: the same on all; fix: start all with the "
            "same options, data, model and versions"
        )


def first_sharing(directory: pathlib.Path) -> int:
    """The first of the processes for which a directory is the same one, by files that they leave there for a moment."""
    if not several():
        return 0
    token = of_main(secrets.token_hex(8))
    marks = [directory / f".process-{number}-{token}" for number in range(jax.process_count())]
    own = marks[jax.process_index()]
    with contextlib.suppress(OSError):  # not there, or read-only: shared with none
        own.touch()
    wait()
    seen = [number for number, mark in enumerate(marks) if mark.exists()]
    wait()
    own.unlink(missing_ok=True)
    return min([jax.process_index(), *seen])


def wait() -> None:
    """Waits until all processes have come here."""
    largest(0)
