"""The options that say where a process finds the others of its program."""

from typing import Any

from jaxdpo.options import flag
from jaxdpo.types import InputError

PROCESS_OPTIONS = ("coordinator", "num_processes", "process_id")
"""They say nothing of what is computed: they may differ when a run goes on, and are not stored with it."""


def check_processes(config: Any) -> None:
    """InputError unless a configuration has all of `PROCESS_OPTIONS` or none, and the number is one of those."""
    given = {name: value for name in PROCESS_OPTIONS if (value := getattr(config, name)) is not None}
    if not given:
        return
    if missing := [flag(name) for name in PROCESS_OPTIONS if name not in given]:
        raise InputError(
            f"{', '.join(map(flag, given))} without {', '.join(missing)}; allowed: all three, or none where the "
            "cluster says them; add what is missing"
        )
    if config.process_id >= config.num_processes:
        raise InputError(
            f"--process-id {config.process_id} of --num-processes {config.num_processes}; allowed: 0 to "
            f"{config.num_processes - 1}, another one for each process"
        )
