"""Whether two output directories tell of one and the same run, to the bit, apart from what a clock decides."""

from __future__ import annotations

import json
import logging
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from mft_lightning.training.checkpoint_dirs import METADATA
from tests.integration.conftest import TIMED, metrics

CURVES = "runs"  # where TensorBoard's files are, as many as the run had parts


def differences(whole: Path, other: Path) -> list[str]:
    """A line for each thing in which ``other`` is not as ``whole``: files, weights, states, metrics and curves."""
    ours, theirs = _entries(whole), _entries(other)
    found = [f"{name}: is missing" for name in sorted(ours - theirs)]
    found += [f"{name}: is left over" for name in sorted(theirs - ours)]
    found += [f"{name}: is unfinished" for name in sorted(ours & theirs) if Path(name).name.startswith(".step-")]
    for name in sorted(ours & theirs):
        if (whole / name).is_file() or (whole / name).is_symlink():
            found += [f"{name}{line}" for line in _in_file(whole, other, name)]
    return found + [f"{CURVES}/{line}" for line in _in_curves(whole / CURVES, other / CURVES)]


def _entries(directory: Path) -> set[str]:
    """All files and directories, by their relative path."""
    names = {str(path.relative_to(directory)) for path in directory.rglob("*")}
    return {name for name in names if not name.startswith(f"{CURVES}/")}


def _in_file(whole: Path, other: Path, name: str) -> list[str]:
    ours, theirs = whole / name, other / name
    if ours.is_symlink():
        return list(in_values(str(ours.readlink()), str(theirs.readlink())))
    if ours.name == METADATA:
        return list(in_values(_described(ours), _described(theirs)))
    if ours.suffix == ".safetensors":
        return list(in_values(load_file(ours), load_file(theirs)))
    if ours.suffix == ".pt":
        return list(in_values(*(torch.load(file, weights_only=True) for file in (ours, theirs))))
    if name == "metrics.csv":
        return list(_in_rows(metrics(whole), metrics(other)))
    if name == "config.yaml":
        return list(in_values(_config(whole), _config(other)))
    same = _without_place(whole, ours.read_bytes()) == _without_place(other, theirs.read_bytes())
    return [] if same else [": holds other bytes"]


def _described(file: Path) -> Any:
    """Without the files' checksums, which are compared themselves; equal states may be pickled in other bytes."""
    metadata = json.loads(file.read_text())
    metadata.pop("sha256")
    return {**metadata, "files": list(metadata["files"])}


def _without_place(directory: Path, content: bytes) -> bytes:
    """An adapter names its base by its path."""
    return content.replace(str(directory).encode(), b"OUTPUT_DIR")


def _config(directory: Path) -> Any:
    """Without the callbacks, among which is what ended the run's parts."""
    config = yaml.safe_load(_without_place(directory, (directory / "config.yaml").read_bytes()))
    config["trainer"].pop("callbacks", None)
    return config


def in_values(ours: Any, theirs: Any) -> Iterator[str]:
    """Where two values, of containers, tensors and plain values, differ: the way to the place and what is there."""
    if type(ours) is not type(theirs):
        yield f": is of {type(theirs).__name__}, not {type(ours).__name__}"
    elif isinstance(ours, dict):
        yield from (f"[{key!r}]: is missing" for key in ours if key not in theirs)
        yield from (f"[{key!r}]: is left over" for key in theirs if key not in ours)
        for key in ours:
            if key in theirs:
                yield from (f"[{key!r}]{line}" for line in in_values(ours[key], theirs[key]))
    elif isinstance(ours, (list, tuple)):
        if len(ours) != len(theirs):
            yield f": has {len(theirs)} items, not {len(ours)}"
        for number, pair in enumerate(zip(ours, theirs, strict=False)):
            yield from (f"[{number}]{line}" for line in in_values(*pair))
    elif isinstance(ours, torch.Tensor):
        if (ours.dtype, ours.shape) != (theirs.dtype, theirs.shape):
            yield f": is {theirs.dtype} {list(theirs.shape)}, not {ours.dtype} {list(ours.shape)}"
        elif wrong := int((_bits(ours) != _bits(theirs)).any(-1).sum()):
            yield f": differs in {wrong} of {ours.numel()} numbers"
    elif isinstance(ours, float):
        if struct.pack("d", ours) != struct.pack("d", theirs):
            yield f": is {theirs!r}, not {ours!r}"
    elif ours != theirs:
        yield f": is {theirs!r}, not {ours!r}"


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    """The bytes of each number."""
    flat = tensor.detach().contiguous().flatten()
    return flat.view(torch.uint8).reshape(flat.numel(), flat.element_size())


def _in_rows(ours: list[dict[str, str]], theirs: list[dict[str, str]]) -> Iterator[str]:
    steps = [row["step"] for row in ours], [row["step"] for row in theirs]
    if steps[0] != steps[1]:
        yield f": has rows of steps {', '.join(steps[1])}, not {', '.join(steps[0])}"
        return
    for row, other in zip(ours, theirs, strict=True):
        yield from (f" at step {row['step']}{line}" for line in in_values(row, other))


def _in_curves(ours: Path, theirs: Path) -> Iterator[str]:
    curves, others = _curves(ours), _curves(theirs)
    for tag in sorted(curves.keys() | others.keys()):
        points, other = curves.get(tag, []), others.get(tag, [])
        steps, other_steps = [step for step, _ in points], [step for step, _ in other]
        for run, found in (("", steps), (" of the other run", other_steps)):
            if twice := sorted({step for step in found if found.count(step) > 1}):
                yield f"{tag}{run}: has steps {twice} more than once"
        if missing := sorted(set(steps) - set(other_steps)):
            yield f"{tag}: has no points at steps {missing}"
        if more := sorted(set(other_steps) - set(steps)):
            yield f"{tag}: has points at steps {more} that are left over"
        values = dict(other)
        if wrong := [step for step, value in points if tag not in TIMED and value != values.get(step, value)]:
            yield f"{tag}: has other values at steps {wrong}"


def _curves(directory: Path) -> dict[str, list[tuple[int, float]]]:
    """The points of each curve, as TensorBoard shows them."""
    logging.getLogger("tensorboard").setLevel(logging.ERROR)  # it tells of the points that a resumed run takes back
    events = EventAccumulator(str(directory), size_guidance={"scalars": 0})
    events.Reload()
    return {tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}
