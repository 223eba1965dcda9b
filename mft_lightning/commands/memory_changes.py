"""Changes of a run's keys that need less memory, each with what the run would then need."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch

from mft_lightning.commands.planned import PlannedRun, batched
from mft_lightning.model.memory import peak
from mft_lightning.model.parallel import ParallelSettings
from mft_lightning.model.quantized import has_bitsandbytes
from mft_lightning.model.settings import LoraSettings, QLoraSettings
from mft_lightning.model.step_setup import StepSetup
from mft_lightning.model.tensor_parallel import can_split
from mft_lightning.training.trainer import weights_dtype

SHORTEST = 256  # tokens below which to cut conversations is no advice
LEAST = 0.01  # of what is needed, less than which is not worth a change


@dataclass(frozen=True)
class Change:
    """Keys to change.

    Attributes:
        keys: with their new values.
        peak: bytes that each device then needs.
        same: whether the run learns the same as before, to rounding.
    """

    keys: dict[str, Any]
    peak: int
    same: bool


@dataclass(frozen=True)
class _Candidate:
    keys: dict[str, Any]
    apply: Callable[[StepSetup], StepSetup]
    same: bool


def changes(run: PlannedRun, setup: StepSetup) -> list[Change]:
    """What needs less than ``setup``, that which saves most first; before all of it, all that learns the same together.

    Args:
        run: that is planned.
        setup: of its steps.
    """
    found = []
    together, kept = setup, dict[str, Any]()
    now = needed = peak(setup).total
    for candidate in _candidates(run, setup):
        changed = candidate.apply(setup)
        if (alone := peak(changed).total) > (1 - LEAST) * now:
            continue
        found.append(Change({**candidate.keys, **_step_keys(run, setup, changed)}, alone, candidate.same))
        if candidate.same and (less := peak(candidate.apply(together)).total) < needed:
            together, needed, kept = candidate.apply(together), less, {**kept, **candidate.keys}
    found.sort(key=lambda change: change.peak)
    kept |= _step_keys(run, setup, together)
    if kept and all(kept != change.keys for change in found):
        found.insert(0, Change(kept, needed, same=True))
    return found


def _step_keys(run: PlannedRun, setup: StepSetup, changed: StepSetup) -> dict[str, Any]:
    """Keys by which a step holds as many conversations as before, where micro-batches or groups are others."""
    data = run.config["data"]
    if (setup.data_parallel_size, setup.conversations) == (changed.data_parallel_size, changed.conversations):
        return {}
    if data["gradient_accumulation_steps"] is not None:
        return {"data.gradient_accumulation_steps": changed.micro_batches}
    if data["total_train_batch_size"] is None and data["total_train_batch_tokens"] is None:
        return {"data.total_train_batch_size": run.datamodule.batch_sizes.total}
    return {}


def _candidates(run: PlannedRun, setup: StepSetup) -> Iterator[_Candidate]:
    """What there is to try, whether it saves anything or not; what learns the same can be applied one after another."""
    module, sizes = run.model, run.datamodule.batch_sizes
    yield _Candidate({"model.checkpoint_activations": True}, _with(checkpoint_activations=True), same=True)
    if module.source.attn_implementation == "eager":
        sdpa = run.network(attn_implementation="sdpa")
        yield _Candidate({"model.attn_implementation": "sdpa"}, _with(network=sdpa), same=True)
    if module.undivided is None:
        yield from _sharing(run, setup)
    for count in dict.fromkeys((setup.conversations // 2, 1)):
        if sizes.per_device is not None and 0 < count < setup.conversations and setup.conversations % count == 0:
            smaller = partial(batched, replace(sizes, per_device=count))
            yield _Candidate({"data.per_device_train_batch_size": count}, smaller, same=True)
    if sizes.per_device is None and sizes.accumulation is not None and setup.conversations > 1:
        more = replace(sizes, accumulation=2 * sizes.accumulation)
        yield _Candidate({}, partial(batched, more), same=True)
    if (half := setup.length // 2) >= SHORTEST and run.config["length"] is None:
        shorter = _with(length=half)
        yield _Candidate({"data.seq_length": half}, lambda step: batched(sizes, shorter(step)), same=False)
    if module.peft_type is None and run.takes_adapters:
        yield _Candidate({"model.peft_type": "lora"}, _with(network=run.network(LoraSettings())), same=False)
    if module.quantization is None and setup.sharing != "fsdp" and run.takes_adapters and has_bitsandbytes():
        adapters = module.lora if module.peft_type is not None else LoraSettings()
        quantized = run.network(adapters, QLoraSettings())
        yield _Candidate({"model.peft_type": "qlora"}, _with(network=quantized), same=False)
    for precision in ("bf16-mixed", "bf16-true"):
        network = run.network(dtype=getattr(torch, weights_dtype(precision)))
        yield _Candidate({"trainer.precision": precision}, _with(network=network, precision=precision), same=False)


def _sharing(run: PlannedRun, setup: StepSetup) -> Iterator[_Candidate]:
    """Weights shared out over devices, or over more of them."""
    sizes, more = run.datamodule.batch_sizes, 2 * setup.devices
    keys: dict[str, Any]
    if setup.sharing == "fsdp":
        for key in ("reshard_after_forward", "cpu_offload"):
            yield _Candidate({f"parallel.{key}": True}, _with_options(**{key: True}), same=True)
        over = _with(devices=more)
        nodes = 1 if run.config["devices"] is not None else run.trainer_config["num_nodes"]
        yield _Candidate({"trainer.devices": more // nodes}, lambda step: batched(sizes, over(step)), same=True)
        wider = 2 * setup.parallel.tensor_parallel_size
        if setup.devices % wider == 0 and can_split(setup.network.causal_lm.config, wider):
            shared = _with_options(tensor_parallel_size=wider)
            keys = {"parallel.tensor_parallel_size": wider}
            yield _Candidate(keys, lambda step: batched(sizes, shared(step)), same=True)
        return
    keys = {"trainer.strategy": "fsdp"}
    if setup.devices == 1:
        keys["trainer.devices"] = more
    over = _with(sharing="fsdp", devices=max(2, setup.devices), parallel=ParallelSettings())
    yield _Candidate(keys, lambda step: batched(sizes, over(step)), same=True)


def _with_options(**changed: Any) -> Callable[[StepSetup], StepSetup]:
    """Options of fsdp; the others stay as the step has them."""
    return lambda step: replace(step, parallel=replace(step.parallel, **changed))


def _with(**changed: Any) -> Callable[[StepSetup], StepSetup]:
    return lambda step: replace(step, **changed)
