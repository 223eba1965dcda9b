"""The options that ``generate``, ``chat`` and ``predict`` share: how to answer, and which model on which device."""

from __future__ import annotations

import argparse
from typing import Any

import torch
from jsonargparse import ArgumentParser, Namespace

from mft_lightning.commands.devices import check_device
from mft_lightning.commands.loading import DTYPES, LoadedModel, load_model
from mft_lightning.errors import UserError, first_line
from mft_lightning.model.generation import PRESETS, GenerationSettings
from mft_lightning.model.quantized import gather_scales
from mft_lightning.paths import given_path

FIELDS = tuple(GenerationSettings.__dataclass_fields__)


def add_generation_options(parser: ArgumentParser) -> None:
    """``--preset``, and an option for each setting, which overrides it."""
    said = "; ".join(f"{name}: {_said(preset)}" for name, preset in PRESETS.items())
    parser.add_argument(
        "--preset",
        type=str,
        default="greedy",
        help=f"What the options below start from, each of which overrides it. {said}.",
    )
    parser.add_class_arguments(GenerationSettings, instantiate=False)
    own = GenerationSettings()
    in_presets = {name for preset in PRESETS.values() for name in preset}
    for action in parser._actions:
        if action.dest in FIELDS:
            action.default = argparse.SUPPRESS  # what was not said is not there
            or_preset = ", or the preset's" if action.dest in in_presets else ""
            action.help = f"{action.help} Default: {getattr(own, action.dest)}{or_preset}."


def generation_settings(options: Any) -> GenerationSettings:
    """The preset with what was said besides.

    Raises:
        UserError: no such preset, or settings that do not go together.
    """
    if options["preset"] not in PRESETS:
        raise UserError(f"--preset: {options['preset']!r} is none of {', '.join(PRESETS)}.")
    preset = PRESETS[options["preset"]]
    given = {name: options[name] for name in FIELDS if name in options}
    try:
        return GenerationSettings(**{**preset, **given})
    except UserError as error:
        if not preset.keys() - given.keys():
            raise
        raise UserError(f"{error} (--preset {options['preset']}: {_said(preset)}.)") from error


def _said(preset: dict[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in preset.items()) or "the likeliest token every time"


def add_model_options(parser: ArgumentParser) -> None:
    """``--model``, ``--base``, ``--device`` and ``--dtype``."""
    parser.add_argument("--model", type=str, required=True, help="Checkpoint directory, full or LoRA.")
    parser.add_argument("--base", type=str, help="An adapter's base model. Default: the one that it names.")
    parser.add_argument("--device", type=str, default="cuda" if torch.cuda.is_available() else "cpu", help="cpu, cuda.")
    parser.add_argument(
        "--dtype",
        type=str,
        default="float32",
        help=f"Of the weights: {', '.join(DTYPES)}. auto: as saved. Below float32 an answer may depend on its batch.",
    )


def check_model_options(options: Namespace) -> None:
    """Refuse what can be known to be wrong before a model is loaded.

    Raises:
        UserError: naming the option.
    """
    if options.dtype not in DTYPES:
        raise UserError(f"--dtype: {options.dtype!r} is none of {', '.join(DTYPES)}.")
    check_device(options.device)


def check_text(options: Namespace, *keys: str) -> None:
    """Refuse what was typed and is no text.

    Raises:
        UserError: naming the option.
    """
    for key in keys:
        try:
            (options[key] or "").encode()
        except UnicodeEncodeError as error:
            raise UserError(f"--{key}: is not UTF-8 (character {error.start}).") from error


def load_asked(options: Namespace) -> LoadedModel:
    """The model of ``--model``, on its device."""
    loaded = load_model(given_path(options.model, "--model"), "--model", base=options.base, dtype=options.dtype)
    try:
        gather_scales(loaded.model.to(options.device))
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"--device {options.device}: {first_line(error)}") from error
    return loaded
