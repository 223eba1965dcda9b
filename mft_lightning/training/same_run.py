"""Whether a checkpoint's run is the one that goes on: what may not differ, and what is lost where it was allowed to."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from mft_lightning.errors import UserError
from mft_lightning.model.module import MFTModule
from mft_lightning.model.quantized import KEY, described
from mft_lightning.model.saved_adapter import adapter_base
from mft_lightning.screen import shown
from mft_lightning.shipped import expanded
from mft_lightning.training.checkpoint_dirs import METADATA, read_metadata, verify_weights

LOST = (
    "What is lost: the epoch that was begun is another one now, of which conversations may come twice or not at all; "
    "losses before and after may measure different data, and so may the best; and no one configuration makes this run "
    "again."
)
ADAPTER, FROZEN, BITS = "model.lora", "frozen base (digest)", KEY + "bits"  # as a checkpoint describes itself
FOLLOWS = {KEY + "compute_dtype": " (it follows trainer.precision where it is not set)"}
UNSAID = {
    "data.role_tokens": "text",
    "model.optimizer": "adamw",
}  # by checkpoints from before it could be anything else


def check_same_run(directory: Path, now: dict[str, Any], may_change: Collection[str] = ()) -> list[str]:
    """Refuse to go on from a checkpoint whose run was made from something else.

    Args:
        directory: the checkpoint.
        now: what decides this run, by key; only these are compared with what the checkpoint has of them.
        may_change: the keys that ``checkpoint.allow_changes`` lets differ.

    Returns:
        What differs and may, like ``seed_everything was 42, is 7``.

    Raises:
        UserError: naming each key that differs and may not, and its two values.
    """
    saved = {**UNSAID, **read_metadata(directory)["fingerprint"]}
    said = _differences(saved, now)
    if refused := [text for key, text in said.items() if key not in may_change]:
        raise UserError(f"--ckpt_path: {directory.name} belongs to another run: {'; '.join(refused)}. Set them back.")
    return list(said.values())


def _differences(saved: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, str]:
    """What differs, by key, in keys that can be set: what only comes or goes with another of them is not said."""
    said = {
        key: f"{key} was {saved.get(key)!r}, is {now[key]!r}{FOLLOWS.get(key, '')}"
        for key in now
        if saved.get(key) != now[key]
    }
    before, after = (_peft_type(of) if ADAPTER in now else None for of in (saved, now))
    if before == after and BITS not in said:
        return said
    said = {
        key: text for key, text in said.items() if not (_is_of_adapters(key) and None in (saved.get(key), now[key]))
    }
    return said if before == after else {"model.peft_type": f"model.peft_type was {before!r}, is {after!r}", **said}


def _peft_type(told: Mapping[str, Any]) -> str | None:
    if told.get(BITS) is not None:
        return "qlora"
    return None if told.get(ADAPTER) is None else "lora"


def _is_of_adapters(key: str) -> bool:
    return key in (ADAPTER, FROZEN) or key.startswith(KEY)


def check_start(module: MFTModule, role_tokens: str) -> list[str]:
    """Refuse an adapter to start from that was trained on another base than the one that is built.

    Args:
        module: built.
        role_tokens: ``data.role_tokens``.

    Returns:
        What to say where that cannot be known: the adapter does not tell, or held its base in another dtype. And what
        it was trained with otherwise: role tokens, bits of the base.

    Raises:
        UserError: it was, or its files are not as they were written.
    """
    assert module.built is not None
    if module.lora.start_from is None or module.built.start is None or module.built.start.stored is None:
        return []
    directory, held = expanded(module.lora.start_from), next(iter(module.built.start.stored.values())).dtype
    trained_on, notes = None, []
    if (directory / METADATA).is_file():
        verify_weights(directory)
        saved = {**UNSAID, **read_metadata(directory)["fingerprint"]}
        trained_on = saved.get(FROZEN)
        now = {"data.role_tokens": role_tokens, **described(module.quantization)}
        told = list(now) if saved.get(BITS) == now[BITS] else ["data.role_tokens", BITS]  # others go with the bits
        other = [f"{name} {saved.get(name)}, here {now[name]}" for name in told if saved.get(name) != now[name]]
        notes = [f"note: the adapter in {shown(directory)} was trained with {'; '.join(other)}."] if other else []
    if trained_on is None or held != module.source.dtype:
        why = "it does not tell" if trained_on is None else f"it was trained in {str(held).removeprefix('torch.')}"
        return [
            *notes,
            f"note: whether the adapter in {shown(directory)} was trained on this base is not known ({why}); it names "
            f"{adapter_base(directory) or 'no base'}.",
        ]
    if trained_on != module.description[FROZEN]:
        raise UserError(
            f"model.lora.start_from: {directory} was trained on another base (digest {trained_on}, here "
            f"{module.description[FROZEN]}). Give the base that it names, {adapter_base(directory)}, as "
            "model.pretrained_model_path with model.init: pretrained."
        )
    return notes


def changed_layout(directory: Path, processes: int, sharing: int) -> list[str]:
    """What to say where a run goes on with another number of processes, or of those that share a layer."""
    metadata = read_metadata(directory)
    before, now = (metadata["processes"], metadata.get("tensor_parallel", 1)), (processes, sharing)
    if before == now:
        return []
    told = [
        f"{count} process(es)" + (f", {shared} to a layer," if shared > 1 else "") for count, shared in (now, before)
    ]
    return [
        f"note: {told[0]} go on where {told[1]} left off, over the same global batches. Sums are taken in another "
        "order, and dropout draws other masks."
    ]


def set_position(checkpoint: dict[str, Any], steps_per_epoch: int) -> None:
    """Let Lightning's loops and the loader go on where the step count falls in epochs of another length.

    What Lightning saves in ``on_train_batch_end`` of a step, of which all but the last touch is done.

    Args:
        checkpoint: Lightning's dictionary; its loops are changed.
        steps_per_epoch: optimizer steps of an epoch as it is now.
    """
    step = checkpoint["global_step"]
    epoch, within = divmod(step - 1, steps_per_epoch)
    within += 1
    fit = checkpoint["loops"]["fit_loop"]
    begun = {"ready": epoch + 1, "started": epoch + 1, "processed": epoch, "completed": epoch}
    fit["epoch_progress"] = {"total": begun, "current": dict(begun)}
    fit["epoch_loop.batch_progress"] = {
        "total": {"ready": step, "started": step, "processed": step, "completed": step - 1},
        "current": {"ready": within, "started": within, "processed": within, "completed": within - 1},
        "is_last_batch": within == steps_per_epoch,
    }
    optimizer = fit["epoch_loop.automatic_optimization.optim_progress"]["optimizer"]
    for progress in (optimizer["step"], optimizer["zero_grad"], fit["epoch_loop.scheduler_progress"]):
        for kind, count in (("total", step), ("current", within)):
            progress[kind] = dict.fromkeys(progress[kind], count)
    next_epoch, next_step = divmod(step, steps_per_epoch)
    fit["state_dict"]["combined_loader"] = [{"epoch": next_epoch, "step": next_step}]
    checkpoint["epoch"] = epoch
