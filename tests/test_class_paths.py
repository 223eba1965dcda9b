"""The class that a wrong path means."""

from __future__ import annotations

import importlib

import pytest

from mft_lightning.class_paths import HOMES, class_at, names_of, nearest_path
from mft_lightning.refusals import refusal
from mft_lightning.schema import allowed, arguments

CALLBACKS = "lightning.pytorch.callbacks"


@pytest.mark.parametrize(
    ("path", "kind", "right"),
    [
        (f"{CALLBACKS}.LearningRateMonitr", "Callback", f"{CALLBACKS}.LearningRateMonitor"),
        ("lightning.pytorch.callback.Timer", "Callback", f"{CALLBACKS}.Timer"),
        ("lightning.pytorch.Timer", "Callback", f"{CALLBACKS}.Timer"),  # and no Trainer, which is none
        ("pytorch_lightning.callbacks.EarlyStopping", "Callback", f"{CALLBACKS}.EarlyStopping"),
        ("torch.optm.SGD", "Optimizer", "torch.optim.SGD"),
        ("torch.optim.sgd.SDG", "Optimizer", "torch.optim.sgd.SGD"),
        ("torch.optim.SGD", "Callback", None),
        ("mft_lightning.wieghting.balancr.FixdWeights", "Balancer", "mft_lightning.weighting.balancer.FixedWeights"),
        ("tests.faults.Unmad", "Callback", None),  # whose module is not imported
        ("tests.integration.faultss.Unmad", "Callback", "tests.integration.faults.Unmade"),
        ("Timr", "Callback", f"{CALLBACKS}.Timer"),
    ],
)
def test_the_nearest_class(path: str, kind: str, right: str | None) -> None:
    importlib.import_module("tests.integration.faults")
    assert nearest_path(path, kind) == right
    assert right is None or class_at(right) is not None


@pytest.mark.parametrize("kind", HOMES)
def test_what_goes_by_its_bare_name_is_told_with_what_its_arguments_take(kind: str) -> None:
    """All there are, whatever their annotations hold."""
    for name in names_of(kind):
        found = class_at(f"{HOMES[kind]}.{name}")
        assert found is not None
        for node in arguments(found).values():
            assert allowed(node) in refusal("key", "no such word", node, lambda key: "here")
    assert names_of("Precision") == []
