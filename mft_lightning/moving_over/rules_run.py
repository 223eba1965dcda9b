"""What the original was told of devices, precision, length, validations and checkpoints."""

from __future__ import annotations

from typing import Any

from mft_lightning.errors import UserError
from mft_lightning.moving_over.conversion import Conversion
from mft_lightning.moving_over.old_options import OPTIONS
from mft_lightning.moving_over.old_values import is_open
from mft_lightning.moving_over.rules_data import validates

STRATEGIES = ("steps", "epoch", "steps,epoch")


def convert_run(conversion: Conversion) -> None:
    """The keys of the run as a whole, but for its devices."""
    draft = conversion.draft
    conversion.copy("seed")
    conversion.copy("output_dir")
    conversion.copy("tensorboard_dir", "tb_dir")
    name, steps = conversion.first("max_steps", "max_train_steps")
    if steps is not None and steps != -1:
        draft.put("trainer.max_steps", steps)
        conversion.take("num_train_epochs")
        if conversion.has("num_train_epochs"):
            draft.ignored.append(("num_train_epochs", f"{name} is given, which came first"))
    else:
        epochs = conversion.copy("num_train_epochs")
        if isinstance(epochs, int) and epochs < 1:
            raise UserError(
                f"{conversion.where('num_train_epochs')}: {epochs} trains nothing. Give epochs, or max_steps."
            )
    conversion.copy("log_interval", comment=_step_comment(conversion, "log_interval"))
    _clipping(conversion)
    _validations(conversion)
    _checkpoints(conversion)


def _step_comment(conversion: Conversion, name: str) -> str:
    """What is different about counted steps; nothing where no gradients accumulate."""
    return "" if conversion.take("gradient_accumulation_steps") in (None, 1) else OPTIONS[name].says


def _clipping(conversion: Conversion) -> None:
    name = "max_grad_norm"
    norm, launched = conversion.take(name), conversion.take_launched("gradient_clipping")
    norm = launched if norm is None else norm
    if norm is None:
        return
    if not is_open(norm) and norm <= 0:
        conversion.draft.put("trainer.gradient_clip_val", None, f"{norm:g} in the original: nothing is clipped")
    else:
        conversion.draft.put("trainer.gradient_clip_val", norm)


# ---------------------------------------------------------------- validations


def _validations(conversion: Conversion) -> None:
    draft = conversion.draft
    strategy = _strategy(conversion, "evaluation_strategy", "evaluation.strategy")
    name, steps = conversion.first("valid_interval", "evalation_steps", "evaluation_steps")
    if steps is not None:
        draft.put("evaluation.steps", steps, _step_comment(conversion, name), conversion.default_told(name))
    _limit(conversion)
    patience = _patience(conversion)
    if validates(conversion):
        draft.put(
            "early_stopping.patience", patience, OPTIONS["early_stopping_patience"].says if patience == -1 else ""
        )
        return
    draft.put("evaluation.strategy", "none", f"{strategy or 'steps'} in the original, but data_split leaves nothing")
    draft.values.pop("evaluation.steps", None)
    draft.values.pop("evaluation.max_conversations_per_task", None)
    if patience != -1:
        draft.put("early_stopping.patience", -1, f"{patience} in the original, but there are no validations")


def _strategy(conversion: Conversion, name: str, key: str) -> str | None:
    strategy: str | None = conversion.take(name)
    if strategy is None or is_open(strategy):
        conversion.copy(name, comment="")
        return strategy
    plain = strategy.replace(" ", "")
    plain = "steps,epoch" if plain == "epoch,steps" else plain
    if plain not in STRATEGIES and not (name == "evaluation_strategy" and plain in ("none", "no")):
        raise UserError(f"{conversion.where(name)}: {strategy!r} is none of {'; '.join(STRATEGIES)}. Mend it.")
    plain = "none" if plain == "no" else plain
    conversion.draft.put(key, plain, OPTIONS[name].says, conversion.default_told(name))
    return plain


def _limit(conversion: Conversion) -> None:
    iters = conversion.take("valid_iters")
    if iters is None:
        return
    if not is_open(iters) and iters < 1:
        raise UserError(
            f"{conversion.where('valid_iters')}: {iters} validates on nothing. Give evaluation_strategy none."
        )
    size = conversion.first("per_device_valid_batch_size", "per_device_eval_batch_size")[1]
    if is_open(iters) or is_open(size):
        raise UserError(
            f"{conversion.where('valid_iters')}: times the validation batch size gives "
            f"evaluation.max_conversations_per_task, and they are {iters} and {size}. Give what is open: --set "
            "NAME=VALUE"
        )
    conversion.draft.put(
        "evaluation.max_conversations_per_task",
        iters * size,
        f"valid_iters: {iters} batches of {size}; {OPTIONS['valid_iters'].says}",
        conversion.default_told("valid_iters"),
    )


def _patience(conversion: Conversion) -> Any:
    """How many validations without improvement end a run; -1 where none do."""
    patience = conversion.take("early_stopping_patience")
    on, stalls = conversion.take("early_stopping"), conversion.take("early_stopping_stall_num")
    if conversion.has("early_stopping_patience"):
        return patience if is_open(patience) or patience > 0 else -1
    if on is False:
        if conversion.has("early_stopping_stall_num"):
            conversion.draft.ignored.append(("early_stopping_stall_num", "early_stopping is false"))
        return -1
    if on is None:
        return stalls if stalls is not None else -1
    if stalls is None:
        raise UserError(
            f"{conversion.where('early_stopping')}: is on, but early_stopping_stall_num is missing. Add it."
        )
    return stalls


# ---------------------------------------------------------------- checkpoints


def _checkpoints(conversion: Conversion) -> None:
    draft = conversion.draft
    _strategy(conversion, "save_strategy", "checkpoint.save_strategy")
    steps, epochs = (
        conversion.take("checkpointing_steps"),
        conversion.first("extra_save_by_epoch", "epoch_checkpointing"),
    )
    if steps == 0 or (steps is None and conversion.of_config):
        draft.put("checkpoint.save_strategy", "epoch", "checkpointing_steps is 0 in the original: none by steps")
    elif steps is not None:
        draft.put(
            "checkpoint.checkpointing_steps",
            steps,
            _step_comment(conversion, "checkpointing_steps"),
            conversion.default_told("checkpointing_steps"),
        )
    name, limit = conversion.first("save_total_limit", "saving_limit")
    if name in conversion.given or conversion.of_config:
        _kept(conversion, limit)
    if epochs[1] is not None:
        draft.put("checkpoint.extra_save_by_epoch", epochs[1])
    _best(conversion)


def _kept(conversion: Conversion, limit: Any) -> None:
    whole = conversion.of_config and conversion.take("peft_type") is None
    if not is_open(limit) and (limit is None or limit < 1):
        if whole:
            conversion.draft.put("checkpoint.save_total_limit", 2, "the original took 2 where all weights train")
        else:
            conversion.draft.put("checkpoint.save_total_limit", None, OPTIONS["save_total_limit"].says)
    else:
        conversion.draft.put("checkpoint.save_total_limit", limit)


def _best(conversion: Conversion) -> None:
    metric, greater = conversion.take("metric_for_best_model"), conversion.take("greater_is_better")
    if metric is not None and not is_open(metric) and metric.removeprefix("valid_").removeprefix("eval_") != "loss":
        raise UserError(
            f"{conversion.where('metric_for_best_model')}: {metric!r} is not measured here. Give loss, or set "
            "checkpoint.monitor by hand: val/loss/<task>, val/accuracy/<task>."
        )
    if metric is not None:
        conversion.draft.put("checkpoint.monitor", "val/loss", OPTIONS["metric_for_best_model"].says)
    if greater is None:
        return
    if greater.lower() not in ("true", "false"):
        raise UserError(f"{conversion.where('greater_is_better')}: {greater!r} is neither true nor false. Mend it.")
    conversion.draft.put("checkpoint.mode", "max" if greater.lower() == "true" else "min")
