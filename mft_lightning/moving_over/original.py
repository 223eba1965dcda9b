"""The original's configurations, scripts and JSON files, to configurations of this program."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from mft_lightning.errors import UserError, first_line
from mft_lightning.moving_over.conversion import Conversion
from mft_lightning.moving_over.draft import Draft
from mft_lightning.moving_over.launch import Launch, find_launch
from mft_lightning.moving_over.old_options import CONFIG, SCRIPT
from mft_lightning.moving_over.old_values import Given
from mft_lightning.moving_over.rules_data import convert_data
from mft_lightning.moving_over.rules_devices import convert_devices
from mft_lightning.moving_over.rules_model import convert_model
from mft_lightning.moving_over.rules_run import convert_run
from mft_lightning.moving_over.settings import Settings
from mft_lightning.moving_over.shell_expansion import as_written, open_names
from mft_lightning.moving_over.shell_script import read_script
from mft_lightning.moving_over.train_config import read_config, read_text

FORMAT = (
    "Conversations were laid out otherwise (markers, line ends, punctuation), and a step's loss was another: see "
    "docs/moving_over.md."
)
# what a script asks of Slurm in its comments: names and values
_SBATCH = re.compile(
    r"^#SBATCH\s+(--nodes|-N|--ntasks-per-node|--gpus-per-node|--gpus|--gres)(?:=|\s+|(?<=-N))(\S+)", re.MULTILINE
)


@dataclass(frozen=True)
class Converted:
    """A configuration: its text, and the draft that it was written from."""

    text: str
    draft: Draft


def convert(file: Path, values: Sequence[str], known: Mapping[str, str]) -> Converted:
    """An original configuration as YAML.

    Args:
        file: a launch script, or a ``*_train_config.json``.
        values: what stands after the script's name on its command line.
        known: variables: those that the script or the JSON leaves to the environment, or that the script sets.

    Raises:
        UserError: it cannot be read, or has what cannot be kept.
    """
    text, settings = read_text(file), Settings(known)
    if text.lstrip().startswith("{") or file.suffix == ".json":
        if values:
            raise UserError(f"{' '.join(values)}: {file.name} is JSON, which takes no values. Leave them out.")
        conversion = Conversion(CONFIG, read_config(text, file.name, settings))
    else:
        conversion = _of_script(text, file, values, settings)
    settings.check_asked(file.name)
    return _converted(conversion, f"Converted from {' '.join([file.name, *values])} by convert-config.")


def _converted(conversion: Conversion, title: str) -> Converted:
    devices = convert_devices(conversion)
    convert_data(conversion, devices)
    convert_model(conversion)
    convert_run(conversion)
    conversion.finish()
    conversion.draft.remarks.append(FORMAT)
    return Converted(conversion.draft.text(title), conversion.draft)


def _of_script(text: str, file: Path, values: Sequence[str], known: Mapping[str, str]) -> Conversion:
    script = read_script(text, file.name, values, known)
    launch = find_launch(script)
    if len(values) > (most := max(script.variables.asked, default=0)):
        raise UserError(
            f"{file.name}: the script takes {most or 'no'} values, and {len(values)} are given. Leave out what it does "
            "not take."
        )
    options, form = launch.options, SCRIPT
    launched = dict(launch.launched)
    if "config_file" in launched:
        launched = _launcher_config(launched.pop("config_file"), file) | launched
    if "train_config" in options:
        options, form = _of_train_config(launch, file, known), CONFIG
    conversion = Conversion(form, options, launched)
    conversion.draft.remarks += [*_remarks(launch, script), *_of_slurm(text, launch)]
    return conversion


def _remarks(launch: Launch, script: Any) -> list[str]:
    found = [f"{name} is given twice, and the last counts, as in the original." for name in dict.fromkeys(launch.twice)]
    if script.exported:
        found.append(f"The script exports {', '.join(script.exported)}, which is not kept here.")
    for name, value in script.variables.defaulted.items():
        found.append(f"{name} is not given (--set), and the script's default for it is taken: {as_written(value)}.")
    for command in script.commands:
        words = [word for word, _ in command.words]
        if words[0] == "cd" and len(words) > 1 and command.line < launch.line:
            where = words[1] if not open_names(words[1]) else "another directory"
            found.append(f"The script first goes to {where}: relative paths are meant from there.")
        if words[0] in (".", "source") and len(words) > 1:
            found.append(f"The script reads {words[1]}, which is not read here: what it sets is left open.")
    return found


def _of_slurm(text: str, launch: Launch) -> list[str]:
    """What the script asks of Slurm, where that is several nodes and no other launcher says how many."""
    asked = _SBATCH.findall(text)
    asked += [(f"--{name}", given.value) for name, given in launch.launched.items() if name in ("nodes", "ntasks")]
    several = [value for name, value in asked if name in ("--nodes", "-N") and value != "1"]
    if not several or {"nnodes", "num_nodes", "num_machines"} & launch.launched.keys():
        return []
    told = ", ".join(f"{name} {as_written(value)}" for name, value in asked)
    return [
        f"The script asks Slurm for several nodes ({told}), which is not kept here: set trainer.num_nodes, and "
        "trainer.devices of each, as in docs/parallel.md."
    ]


def _of_train_config(launch: Launch, script: Path, known: Mapping[str, str]) -> dict[str, Given]:
    """The options of the JSON file that a launch names, and those that the launch puts in their place."""
    own = dict(launch.options)
    given = own.pop("train_config")
    file = _beside(given, script, "Convert it by itself, or give its place: convert-config FILE.json")
    options = read_config(read_text(file), file.name, known)
    for other in ("data_paths", "output_dir", "tb_dir", "pretrained_model_path", "micro_batch_size", "model_type"):
        if other in own and own[other].value:
            replaced = ("per_device_train_batch_size", "per_device_eval_batch_size")
            for name in replaced if other == "micro_batch_size" else (other,):
                options[name] = own.pop(other) if name == other else own[other]
    own.pop("micro_batch_size", None)
    if "distributed_type" in own:
        options["distributed_type"] = own.pop("distributed_type")
    if own:
        name, wrong = next(iter(own.items()))
        raise UserError(f"{wrong.where}: {launch.program} has no such option beside --train_config. Put it in there.")
    return options


def _launcher_config(given: Given, script: Path) -> dict[str, Given]:
    """The keys of accelerate's own YAML, which its command line would give as options."""
    file = _beside(given, script, "Leave --config_file out, and set trainer.devices and trainer.strategy by hand.")
    try:
        read = yaml.safe_load(read_text(file))
    except yaml.YAMLError as error:
        raise UserError(f"{file}: is not valid YAML ({first_line(error)}). Mend it.") from error
    if not isinstance(read, dict):
        raise UserError(f"{file}: is no configuration of accelerate. Give one.")
    keys: dict[str, Any] = {}
    for name, value in read.items():
        keys |= value if isinstance(value, dict) else {name: value}
    kind = str(keys.pop("distributed_type", "")).lower()
    if kind in ("deepspeed", "fsdp"):
        keys[f"use_{kind}"] = "true"
    return {
        name: Given(str(value).lower() if isinstance(value, bool) else str(value), f"{file.name}: {name}")
        for name, value in keys.items()
        if value is not None
    }


def _beside(given: Given, script: Path, instead: str) -> Path:
    """A file that a script names, from where the script stands, or from here."""
    if open_names(given.value):
        raise UserError(f"{given.where}: is left open. Give it by --set NAME=VALUE. Or: {instead}")
    for directory in (script.parent, script.parent.parent, Path()):
        if (file := directory / given.value).is_file():
            return file
    raise UserError(f"{given.where}: {given.value} is neither beside the script nor here. {instead}")
