"""A plan for people."""

from collections.abc import Iterator
from typing import Any

BOUNDS = {
    "compute": "matrix products",
    "memory": "memory bandwidth",
    "ici": "links between chips",
    "dcn": "the network between slices",
}


def report(plan: dict[str, Any]) -> str:
    """The text that `jaxdpo plan` prints."""
    return "\n".join(_lines(plan))


def short(value: float) -> str:
    """Three digits, or a whole number: 0.0134, 61.6, 1,040."""
    return f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"


def _lines(plan: dict[str, Any]) -> Iterator[str]:
    slices = f"{plan['slices']} slices of " if plan["slices"] > 1 else ""
    chips = f"{plan['chips']} chip(s)" + (f", {plan['devices']} devices" if plan["devices"] != plan["chips"] else "")
    yield f"model      {plan['model']}: {plan['parameters'] / 1e9:.3g} B parameters, {plan['dtype']}"
    yield f"devices    {slices}{plan['topology']}: {chips} ({plan['device_kind']}); mesh {plan['mesh']}"
    yield f"compute    attention {plan['attention']}, remat {plan['remat']}"
    yield (
        f"step       {plan['batch_size']} pairs, taken to be {plan['prompt_tokens']} + 2 x {plan['completion_tokens']} "
        f"tokens each, in {plan['microbatches']} microbatch(es) of {plan['rows']} rows x {plan['length']}; "
        f"{plan['fill']:.0%} of it is tokens"
    )
    kinds = ", ".join(f"{name} {size:.2f}" for name, size in plan["hbm_gib_by_kind"].items())
    needed = "more" if plan["hbm_gib_per_chip"] is None else f"{plan['hbm_gib_per_chip']:.2f}"
    fits = "fits" if plan["fits"] else "DOES NOT FIT"
    yield f"memory     {needed} of {plan['hbm_limit_gib']:.2f} GiB a chip: {fits}"
    yield f"           {kinds}"
    if plan["refused"]:
        yield f"           {plan['refused']}"
    if "step_seconds_bound" in plan:
        yield from _times(plan)
    effort = ", with the least effort" if plan["quick"] else ""
    yield f"compiled   in {plan['compile_seconds']:.0f} s{effort}"
    for warning in plan["warnings"]:
        yield f"warning    {warning}"
    if len(plan["candidates"]) > 1:
        yield "ways       by estimate, the best first; those with * were compiled"
        yield from map(_way, plan["candidates"])


def _times(plan: dict[str, Any]) -> Iterator[str]:
    seconds = ", ".join(f"{name} {short(value)}" for name, value in plan["seconds"].items())
    traffic = plan["hbm_bytes_per_chip"]
    moved = "" if traffic is None else f", {short(traffic / 1e9)} GB of memory traffic a chip"
    yield f"work       {plan['flops_per_step']:.3g} FLOPs in all{moved}"
    for sent in plan["sent_bytes_per_chip"]:
        network = sent["network"].upper()
        yield f"           a chip sends {short(sent['bytes'] / 1e9)} GB over {network} for {sent['collective']}"
    yield (
        f"time       at least {short(plan['step_seconds_bound'])} s a step, bound by {BOUNDS[plan['bound']]} (seconds: "
        f"{seconds})"
    )
    at_most = f"{short(plan['pairs_per_second_bound'])} pairs/s, and {plan['mfu_bound']:.0%} of the chips' FLOP/s (MFU)"
    yield f"           at most {at_most}"
    yield f"reference  at least {short(plan['reference_seconds_bound'])} s for these pairs, once before training"


def _way(way: dict[str, Any]) -> str:
    fits = "" if way["estimated_fits"] else "  may not fit"
    return (
        f"         {'*' if way['compiled'] else ' '} {way['mesh']:<28} remat {way['remat']:<12}"
        f"{way['estimated_gib_per_chip']:8.1f} GiB  {short(way['estimated_seconds'])} s, {way['estimated_bound']}{fits}"
    )
