"""Library chatter that says nothing about the user's run. Warnings that might are kept."""

import logging
import warnings

import transformers

_WARNINGS = (
    r".*isinstance\(treespec, LeafSpec\).*",  # lightning/pytorch/utilities/_pytree.py in 2.6 uses a deprecated API
    r"`is_gradient_checkpointing` is deprecated.*",  # peft 0.21 asks transformers 5.23 by the old name
    r".*does not have many workers which may be a bottleneck.*",  # the plan's batches are cut from memory
)


def quieten() -> None:
    """Leave out Lightning's announcements and transformers' bars for files."""
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    transformers.utils.logging.disable_progress_bar()
    for message in _WARNINGS:
        warnings.filterwarnings("ignore", message=message)
