"""``estimate``: the memory a run needs on each device, and what would need less, with the keys of ``fit``."""

from __future__ import annotations

from typing import Any

from mft_lightning.commands.memory_changes import Change, changes
from mft_lightning.commands.planned import PlannedRun
from mft_lightning.errors import UserError
from mft_lightning.model.memory import PARTS, Moment, moments_of_step
from mft_lightning.model.step_setup import StepSetup
from mft_lightning.quiet import quieten
from mft_lightning.screen import Grid, labelled, print_json, reader_may_leave, say

GIB = 2**30
NEAR = 0.9  # of a device's memory, above which what is not counted may be too much


def estimate(argv: list[str]) -> None:
    """Print each device's memory by part, and changes that need less; no weights are loaded and no data is read."""
    quieten()
    run = PlannedRun(argv)
    memory = run.config["device_memory"]
    if memory is not None and not memory > 0:
        raise UserError(f"--device-memory: {memory:g} is no number above 0. Give the GiB that a device has, like 80.")
    with run.placing():
        run.model.check(run.datamodule, run.settings.parallel.tensor_parallel_size)
        setup = run.step()
    moments, found = moments_of_step(setup), changes(run, setup)
    with reader_may_leave():
        if run.config["json"]:
            print_json(as_object(setup, moments, found, memory))
        else:
            _say_step(run, setup)
            _say_parts(moments, memory)
            _say_changes(found, max(moment.total for moment in moments), memory)


def as_object(setup: StepSetup, moments: list[Moment], found: list[Change], memory: float | None) -> dict[str, Any]:
    """The JSON object of an estimate, in bytes on each device; ``fits`` is null where no memory was given."""
    peak = max(moments, key=lambda moment: moment.total)
    return {
        "peak": peak.total,
        "moment": peak.name,
        "fits": None if memory is None else peak.total <= memory * GIB,
        "moments": {moment.name: moment.parts for moment in moments},
        "devices": setup.devices,
        "tensor_parallel_size": setup.parallel.tensor_parallel_size,
        "device": setup.device,
        "strategy": setup.sharing,
        "precision": setup.precision,
        "micro_batches": setup.micro_batches,
        "conversations": setup.conversations,
        "length": setup.length,
        "changes": [
            {"keys": change.keys, "peak": change.peak, "saves": peak.total - change.peak, "same": change.same}
            for change in found
        ],
    }


def _say_step(run: PlannedRun, setup: StepSetup) -> None:
    optim = run.model.optim
    rows = "packed end to end" if setup.packed else "in padded rows"
    source = "data.seq_length; --length if they are shorter" if run.config["length"] is None else "--length"
    named = "one device" if setup.sharing == "one device" else f"{setup.devices} devices, {setup.sharing}"
    if (size := setup.parallel.tensor_parallel_size) > 1:
        named += f", each layer shared by {size}"
    lines = [
        ("model", f"{run.model.source.path}, {run.model.peft_type or 'full'}"),
        ("devices", f"{named}, {setup.device}, precision {setup.precision}"),
        ("step", f"{setup.micro_batches} micro-batch(es) of {setup.conversations} on each device, {rows}"),
        ("assumed", f"conversations of {setup.length:,} tokens ({source}), all of them supervised"),
        *([("optimizer", f"AdamW's two moments; {optim.name} may keep something else")] if optim.is_own else []),
    ]
    say(*labelled(lines))


def _say_parts(moments: list[Moment], memory: float | None) -> None:
    peak = max(moments, key=lambda moment: moment.total)
    there = [part for part in PARTS if any(moment.parts[part] for moment in moments)]
    rows = [[part, *(_gib(moment.parts[part]) for moment in moments)] for part in there]
    rows.append(["total", *(_gib(moment.total) for moment in moments)])
    say("", Grid(("GiB on each device", *(moment.name for moment in moments)), rows))
    lines = [("peak", f"{_gib(peak.total)} GiB on each device ({peak.name})")]
    if memory is not None:
        lines.append(("fits", f"{_fits(peak.total, memory)}, with {memory:g} GiB on each device"))
    lines.append(("not in it", "CUDA's own memory, communication, and gaps between tensors: about a tenth"))
    say("", *labelled(lines))


def _say_changes(found: list[Change], peak: int, memory: float | None) -> None:
    if not found:
        return
    rows = []
    for change in found:
        keys = ", ".join(f"{key}: {str(value).lower()}" for key, value in change.keys.items())
        fits = [_fits(change.peak, memory)] if memory is not None else []
        same = "the same" if change.same else "otherwise"
        rows.append([keys, _gib(change.peak), _gib(peak - change.peak), *fits, same])
    columns = ("to need less", "GiB", "saved", *(["fits"] if memory is not None else []), "learns")
    say("", Grid(columns, rows, left=("fits", "learns")))


def _fits(need: int, memory: float) -> str:
    if need > memory * GIB:
        return "no"
    return "yes" if need <= NEAR * memory * GIB else "barely"


def _gib(count: int) -> str:
    return f"{count / GIB:.3f}"
