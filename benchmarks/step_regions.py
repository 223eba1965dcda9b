"""An optimizer step's parts as regions of torch's profiler, and its time by them."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import wraps
from typing import Any

from lightning.pytorch.profilers import Profiler
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile, record_function

from benchmarks.roofline import ATTENTION, CLIPPING, EMBEDDING, HEAD, MLP, NORMS, OPTIMIZER, PROJECTIONS, ROTARY

WAITING, LOGGING, REST = "data", "logging", "the rest"
PARTS = (EMBEDDING, PROJECTIONS, ROTARY, ATTENTION, MLP, NORMS, HEAD, CLIPPING, OPTIMIZER, WAITING, LOGGING, REST)
ACTIONS = {  # parts by words of the names of Lightning's actions, and of torch's own regions
    "train_dataloader_next": WAITING,
    "batch_transfer": WAITING,
    "transfer_batch": WAITING,
    "batch_to_device": WAITING,
    "configure_gradient_clipping": CLIPPING,
    "Optimizer.step#": OPTIMIZER,
    "Optimizer.zero_grad#": OPTIMIZER,
    "StepLogging": LOGGING,
    "[Strategy]": REST,
    "[LightningModule]": REST,
    "[Callback]": REST,
}
STEP, PART, NODE = "a step", "part: ", "autograd::engine::evaluate_function: "
WARM_UP = 3  # steps, the first of which is not timed


class Regions(Profiler):
    """Lightning's actions as regions of torch's profiler, in every second step.

    Args:
        activities: to profile.
        settle: waits for the device.
        between: is called between two steps.

    Attributes:
        plain: seconds of the steps that were not profiled, by their numbers from 0.
        profiled: of the others, and their events.
    """

    def __init__(
        self, activities: list[ProfilerActivity], settle: Callable[[], None], between: Callable[[], None]
    ) -> None:
        super().__init__()
        self.plain: dict[int, float] = {}
        self.profiled: dict[int, tuple[float, list[Any]]] = {}
        self._activities, self._settle, self._between = activities, settle, between
        self._step, self._begun = -1, 0.0
        self._profile: profile | None = None
        self._open: dict[str, AbstractContextManager[Any]] = {}

    def start(self, action_name: str) -> None:
        if action_name.endswith("train_dataloader_next"):
            self._next_step()
        if self._profile is not None:
            self._enter(action_name)

    def stop(self, action_name: str) -> None:
        if action_name in self._open:
            self._open.pop(action_name).__exit__(None, None, None)

    def _enter(self, name: str) -> None:
        self._open[name] = record_function(name)
        self._open[name].__enter__()

    def _next_step(self) -> None:
        self._settle()
        seconds = time.perf_counter() - self._begun
        if self._profile is not None:
            self.stop(STEP)
            self._profile.__exit__(None, None, None)
            self.profiled[self._step] = seconds, list(self._profile.events() or ())
            self._profile = None
        elif self._step >= 1:
            self.plain[self._step] = seconds
        self._between()
        self._step += 1
        profiles = self._step >= WARM_UP and (self._step - WARM_UP) % 2 == 0
        if profiles:
            self._profile = profile(activities=self._activities)
            self._profile.__enter__()
        self._begun = time.perf_counter()
        if profiles:
            self._enter(STEP)


def name_parts(backbone: Any) -> None:
    """Make regions of a GPT-NeoX's modules."""
    parts = {backbone.embed_in: EMBEDDING, backbone.rotary_emb: ROTARY, backbone.final_layer_norm: NORMS}
    for layer in backbone.layers:
        parts |= {layer: NORMS, layer.attention: ROTARY, layer.mlp: MLP}
        parts |= {layer.attention.query_key_value: PROJECTIONS, layer.attention.dense: PROJECTIONS}
    for module, part in parts.items():
        regions: list[Any] = []

        def enter(*_: Any, part: str = part, regions: list[Any] = regions) -> None:
            regions.append(record_function(PART + part))
            regions[-1].__enter__()

        def leave(*_: Any, regions: list[Any] = regions) -> None:
            regions.pop().__exit__(None, None, None)

        module.register_forward_pre_hook(enter)
        module.register_forward_hook(leave)


def labelled(part: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """A function as a region."""

    @wraps(function)
    def inside(*args: Any, **kwargs: Any) -> Any:
        with record_function(PART + part):
            return function(*args, **kwargs)

    return inside


def began(event: Any) -> tuple[float, float]:
    """The order of events, those around others before them."""
    return event.time_range.start, -event.time_range.end


def attribute(events: list[Any], *, cuda: bool) -> tuple[Counter[Any], Counter[Any]]:
    """Seconds of each part and way, and of each operator in them, of a step's events."""
    ordered = sorted((one for one in events if one.device_type == DeviceType.CPU), key=began)
    places: dict[int, tuple[str, str]] = {}  # of events: part and way
    made_in: dict[int, str] = {}  # the part by the number of what autograd will do on the way back
    spent, operators, last = Counter[tuple[str, str]](), Counter[tuple[str, str, str]](), REST
    for event in ordered:
        part, way = places[id(event.cpu_parent)] if event.cpu_parent is not None else (REST, "forward")
        if event.name.startswith(NODE):  # of what has no number, a weight's gradient is put where it was made
            part, way = made_in.get(event.sequence_nr, last) if event.sequence_nr >= 0 else last, "backward"
            last = part
        elif event.name.startswith(PART):
            part = event.name.removeprefix(PART)
        else:
            part = next((value for word, value in ACTIONS.items() if word in event.name), part)
        if event.sequence_nr >= 0 and way == "forward":
            made_in[event.sequence_nr] = part
        places[id(event)] = part, way
        taken = event.self_device_time_total if cuda else event.self_cpu_time_total
        if event.name != STEP or not cuda:
            spent[part, way] += taken / 1e6
            operators[part, way, event.name.removeprefix(PART)] += taken / 1e6
    return spent, operators
