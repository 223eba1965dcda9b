"""AdamW by bitsandbytes, whose moments CUDA moves to the host when a GPU is full, in the form of torch's.

Imported only where it is asked for. What pages are, and what CUDA does with them, was not yet run on a GPU; without
one, bitsandbytes keeps plain tensors, by which the rest is tested.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from bitsandbytes.optim import PagedAdamW32bit

NAMES = {"exp_avg": "state1", "exp_avg_sq": "state2"}  # of the moments: torch's, and those of bitsandbytes


class PagedAdamW(PagedAdamW32bit):
    """``PagedAdamW32bit``; its state is saved as torch's AdamW saves its own, so that each goes on from the other's."""

    def state_dict(self) -> dict[str, Any]:
        saved = torch.optim.Optimizer.state_dict(self)
        saved["state"] = {
            number: {"step": torch.tensor(float(state["step"])), **{name: state[own] for name, own in NAMES.items()}}
            for number, state in saved["state"].items()
        }
        return saved

    def load_state_dict(self, state_dict: Mapping[str, Any], move_to_device: bool = True) -> None:
        state = {
            number: {"step": int(values["step"]), **{own: values[name] for name, own in NAMES.items()}}
            for number, values in state_dict["state"].items()
        }
        super().load_state_dict({**state_dict, "state": state}, move_to_device)

    def to_gpu(self) -> None:
        """Give moments pages again; called before the first step, by when loading has made plain tensors of them.

        Without it they would stay plain (https://github.com/bitsandbytes-foundation/bitsandbytes/issues/782).
        """
        for parameter, state in self.state.items():
            for own in NAMES.values():
                if not getattr(state[own], "is_paged", False):
                    state[own] = self.get_state_buffer(parameter).copy_(state[own])
