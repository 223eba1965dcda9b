"""A run that is out of memory ends with what to change, and with the command that tells how much that saves."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from mft_lightning.cli import main
from mft_lightning.commands import evaluate, fit


def no_gpu_memory(_: list[str]) -> None:
    raise torch.OutOfMemoryError(
        "CUDA out of memory. Tried to allocate 20.00 MiB. GPU 0 has a total capacity of 79.10 GiB. Of the allocated "
        "memory 77.00 GiB is allocated by PyTorch."
    )


def no_host_memory(_: list[str]) -> None:
    torch.empty(10**15)


@pytest.mark.parametrize("command", ["fit", "validate"])
@pytest.mark.parametrize(
    ("fails", "said"), [(no_gpu_memory, "CUDA out of memory"), (no_host_memory, "you tried to allocate")]
)
def test_it_is_one_message(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    command: str,
    fails: Callable[..., None],
    said: str,
) -> None:
    monkeypatch.setattr(fit if command == "fit" else evaluate, command, fails)
    assert main([command, "--config", "full.yaml", "--data.data_paths", "[a, b]"]) == 1
    message = capsys.readouterr().err
    assert message.startswith("error: out of memory: ") and message.count("\n") == 1 and said in message
    assert "Of the allocated" not in message and "enforce fail" not in message
    assert "model.checkpoint_activations: true" in message and "data.per_device_train_batch_size" in message
    assert message.endswith("mft_lightning estimate --config full.yaml --data.data_paths '[a, b]'\n")


def test_another_error_is_a_defect_as_before(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(_: list[str]) -> None:
        raise RuntimeError("shapes do not match")

    monkeypatch.setattr(fit, "fit", fails)
    with pytest.raises(RuntimeError, match="shapes"):
        main(["fit"])
