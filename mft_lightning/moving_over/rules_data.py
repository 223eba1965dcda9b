"""What the original was told of data and batches."""

from __future__ import annotations

import math

from mft_lightning.errors import UserError
from mft_lightning.moving_over.conversion import Conversion
from mft_lightning.moving_over.old_options import OPTIONS
from mft_lightning.moving_over.old_values import is_open

MODES = {"sft": "sft", "pretrain": "pretrain", "sst": "pretrain"}


def convert_data(conversion: Conversion, devices: int | None) -> None:
    """The keys of ``data``.

    Args:
        conversion: of the launch.
        devices: that share out the data; None where that is left to the machine.
    """
    _paths(conversion)
    _modes(conversion)
    conversion.copy("seq_length")
    _batches(conversion, devices)
    _weights(conversion)
    for name in ("num_workers", "preprocessing_num_workers", "eos_token", "pad_token"):
        conversion.copy(name)


def validates(conversion: Conversion) -> bool:
    """Whether the split leaves anything to validate on."""
    split = conversion.draft.values.get("data.data_split")
    return not isinstance(split, str) or is_open(split) or float(split.split(",")[1]) > 0


def _paths(conversion: Conversion) -> None:
    paths = conversion.take("data_paths")
    if paths is None:
        raise UserError("data_paths: is missing, and nothing can be trained without. Add it.")
    whole = len(paths) == 1 and is_open(paths[0]) and paths[0].startswith("${") and paths[0].endswith("}")
    conversion.draft.put("data.data_paths", paths[0] if whole else paths)
    if conversion.take("load_raw_dataset", True) is False:
        raise UserError(
            f"{conversion.where('load_raw_dataset')}: false reads binary files of the original, which are not read "
            "here. Give task directories of JSONL files."
        )
    if not conversion.of_config and "load_raw_dataset" not in conversion.given:
        conversion.draft.remarks.append(
            "load_raw_dataset is not given: the original then read binary files of its own. Here data_paths are task "
            "directories of JSONL files."
        )
    split = conversion.take("data_split")
    if split is None or is_open(split):
        if split is not None:
            conversion.draft.put("data.data_split", split, OPTIONS["data_split"].says)
        return
    try:
        shares = [float(part) for part in split.replace("/", ",").split(",")]
    except ValueError:
        shares = []
    if len(shares) == 1 and 0 < shares[0] <= 100:
        shares.append(100 - shares[0])
    shares += [0.0] * (3 - len(shares))
    if len(shares) != 3 or min(shares) < 0 or shares[0] == 0 or not all(map(math.isfinite, shares)):
        raise UserError(f"{conversion.where('data_split')}: {split!r} is not three percentages like '95,5,0'. Mend it.")
    plain = sum(shares) == 100 and shares[2] == 0
    conversion.draft.put(
        "data.data_split",
        ",".join(f"{share:g}" for share in shares),
        _split_comment(conversion, plain=plain),
        conversion.default_told("data_split"),
    )


def _split_comment(conversion: Conversion, *, plain: bool) -> str:
    """What is different about a split; ``plain`` is one that sums to 100 without a share for tests."""
    if not plain:
        return OPTIONS["data_split"].says
    return "" if conversion.of_config else "drawn by the seed; the original validated on the last lines of each file"


def _modes(conversion: Conversion) -> None:
    train = conversion.take("train_mode", "sft")
    if not (train == "sft" or is_open(train)):
        how = "Leave it out, and give tokenize_mode pretrain, with load_raw_dataset and directories of JSONL files."
        raise UserError(
            f"{conversion.where('train_mode')}: {train} is not trained here; sft is. "
            f"{how if train == 'sst' else 'Mend it.'}"
        )
    mode = conversion.known("tokenize_mode")
    if mode not in MODES:
        raise UserError(
            f"{conversion.where('tokenize_mode')}: {mode!r} is not done here; sft and pretrain are. Mend it."
        )
    if MODES[mode] != "sft":
        conversion.draft.put("data.tokenize_mode", "pretrain", "" if mode == "pretrain" else f"{mode} in the original")
    padding = conversion.known("padding_mode")
    if padding not in ("padding", "pack", "concat"):
        raise UserError(f"{conversion.where('padding_mode')}: {padding!r} is none of padding, pack, concat. Mend it.")
    if padding == "concat" and MODES[mode] == "sft":
        raise UserError(
            f"{conversion.where('padding_mode')}: concat cuts a stream of tokens into rows, across conversations, "
            "which is for tokenize_mode pretrain here. Use pack."
        )
    says = {
        "padding": "pack trains the same, without work on padding",
        "pack": "whole conversations end to end, isolated from each other; batch sizes count conversations, where the "
        "original counted rows of seq_length, and dropped what did not fill one",
        "concat": "the short last row is kept, and each task has its own rows",
    }
    conversion.draft.put("data.padding_mode", padding, says[padding], conversion.default_told("padding_mode"))


def _batches(conversion: Conversion, devices: int | None) -> None:
    accumulation = conversion.known("gradient_accumulation_steps", 1)
    launched = conversion.take_launched("gradient_accumulation_steps")
    if launched is not None and launched != accumulation:
        raise UserError(
            f"{conversion.launched['gradient_accumulation_steps'].where}: is {launched}, but the configuration's is "
            f"{accumulation}. Make them agree."
        )
    name, per_device = conversion.first("per_device_train_batch_size", "micro_batch_size")
    total = conversion.take("total_train_batch_size")
    if "total_train_batch_size" in conversion.given or (total is not None and per_device is None):
        _from_total(conversion, devices, accumulation)
    else:
        per_device = conversion.known(name)
        _check(per_device, conversion.where(name))
        conversion.draft.put("data.per_device_train_batch_size", per_device, conversion.default_told(name))
        if devices is None:
            conversion.draft.put("data.gradient_accumulation_steps", accumulation)
        else:
            conversion.draft.put("data.total_train_batch_size", per_device * devices * accumulation)
    conversion.copy("per_device_valid_batch_size", "per_device_eval_batch_size")


def _from_total(conversion: Conversion, devices: int | None, accumulation: int) -> None:
    """The original shared its total out over all processes, those of one tensor-parallel group too."""
    total = conversion.known("total_train_batch_size")
    where = conversion.where("total_train_batch_size")
    _check(total, where)
    if devices is None:
        raise UserError(f"{where}: is shared out over devices, and dp does not say how many. Give --dp, or the launch.")
    processes = devices * (conversion.known("tp", 1) or 1)
    per_device, left = divmod(total, processes)
    if not per_device:
        raise UserError(f"{where}: {total} leaves nothing for each of {processes} processes. Mend it.")
    stated = conversion.take("per_device_train_batch_size")
    comments = [f"the original shared {total} out over {processes} processes, and left {left} out" if left else ""]
    if stated is not None and stated != per_device:
        comments.append(f"per_device_train_batch_size was {stated}, which the original overwrote")
    conversion.draft.put("data.per_device_train_batch_size", per_device, *comments)
    changed = total != (whole := per_device * devices * accumulation)
    conversion.draft.put(
        "data.total_train_batch_size",
        whole,
        f"{f'{total} in the original: ' if changed else ''}{OPTIONS['total_train_batch_size'].says}",
        conversion.default_told("total_train_batch_size"),
    )


def _check(value: object, where: str) -> None:
    if not isinstance(value, int) or value < 1:
        raise UserError(f"{where}: {value} is no number of conversations from 1 on. Mend it.")


def _weights(conversion: Conversion) -> None:
    mode = conversion.take("weighted_loss_mode")
    for name in ("task_weights", "data_weights"):
        weights = conversion.take(name)
        if not weights or is_open(weights):
            if weights:
                conversion.draft.put("data.task_weights", weights, OPTIONS[name].says)
            continue
        if name == "data_weights" and conversion.of_config:
            conversion.draft.ignored.append((name, "the original overwrote it with ones; data.task_sampling draws"))
        elif len(set(weights)) == 1:
            conversion.draft.ignored.append((name, "all alike, as they are anyway"))
        elif mode in ("case1", "case2", "coba"):
            conversion.draft.ignored.append((name, f"weighted_loss_mode {mode} takes none, and took none"))
        else:
            _check_weights(conversion, name, weights)
            conversion.draft.put("data.task_weights", weights, OPTIONS[name].says)


def _check_weights(conversion: Conversion, name: str, weights: list[float]) -> None:
    paths = conversion.draft.values["data.data_paths"]
    where = conversion.where(name)
    if isinstance(paths, list) and len(paths) != len(weights):
        raise UserError(f"{where}: gives {len(weights)} weights for {len(paths)} data_paths. Give one for each.")
    if min(weights) <= 0:
        raise UserError(f"{where}: {weights} has one that is not above 0. Leave that task out, or give it one.")
