"""What a checkpoint may hold beside weights: what ``torch.load`` takes with ``weights_only``."""

from __future__ import annotations

import io
import pickle
from collections.abc import Mapping
from typing import Any

import torch

from mft_lightning.errors import UserError

# what torch says of a state that it cannot write (pickle's words for it are three), or not read again
REFUSALS = (pickle.PickleError, AttributeError, TypeError)


def check_states(states: Mapping[str, Any]) -> None:
    """Refuse what no resume could load: an object in the state of a user's callback, say.

    Args:
        states: by the names of those that they are of.

    Raises:
        UserError: naming whose states hold other things than ``weights_only`` takes.
    """
    if faulty := [name for name, state in states.items() if not _loads(state)]:
        raise UserError(
            f"a checkpoint of this run could not be loaded again: the state of {', '.join(faulty)} holds other things "
            "than numbers, text, tensors, lists and dictionaries, which weights_only refuses. Mend its state_dict, or "
            "leave it out."
        )


def of_callback(state_key: str) -> str:
    """How the state of a callback is named, by the key that it has in a checkpoint."""
    return f"{state_key} (trainer.callbacks)"


def _loads(state: Any) -> bool:
    stream = io.BytesIO()
    try:
        torch.save(state, stream)
        stream.seek(0)
        torch.load(stream, weights_only=True)
    except REFUSALS:
        return False
    return True
