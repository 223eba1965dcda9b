"""Names of other trainers are told with the key that is meant."""

from __future__ import annotations

import pytest

from mft_lightning.documented import page
from mft_lightning.errors import UserError
from mft_lightning.moving_over.old_options import OPTIONS
from mft_lightning.moving_over.other_names import OTHER_NAMES, key_here
from mft_lightning.run_config import RunConfig
from mft_lightning.schema import keys_of


@pytest.fixture(scope="module")
def config() -> RunConfig:
    """Of a command, with all keys there are."""
    return RunConfig(["--config", "quickstart.yaml"], "fit")


def test_every_name_means_a_key_that_takes_it(config: RunConfig) -> None:
    nodes = dict(keys_of(config.parser.schema()))
    for name, (key, _) in OTHER_NAMES.items():
        assert key in nodes and "deprecated" not in nodes[key], name
        assert name not in nodes
    for name, option in OPTIONS.items():
        if option.fate == "mapped" and (found := key_here(name)):
            assert found[0] in nodes, name
            if name in OTHER_NAMES:  # not said twice, or to say more
                assert found[0] in option.key and found[1], name


@pytest.mark.parametrize(
    ("given", "key"),
    [
        ("lr", "model.learning_rate"),
        ("training.lr", "model.learning_rate"),
        ("lora.rank", "model.lora.r"),
        ("model.lora.rank", "model.lora.r"),
        ("lora_r", "model.lora.r"),
        ("lora_alpha", "model.lora.alpha"),
        ("num_train_epochs", "trainer.max_epochs"),
        ("data.batch_size", "data.total_train_batch_size (of a step, on all devices)"),
        ("gradient_accumulation_steps", "data.gradient_accumulation_steps"),
        ("per_device_train_batch_size", "data.per_device_train_batch_size"),
        ("max_length", "data.seq_length"),
        ("warmup_ratio", "model.num_warmup_steps (in steps, no share of the run)"),
        ("bf16", "trainer.precision (bf16-mixed)"),
        ("seed", "seed_everything"),
        ("resume_from_checkpoint", "ckpt_path"),
        ("save_steps", "checkpoint.checkpointing_steps"),
        ("trainer.gpus", "trainer.devices"),
    ],
)
def test_a_name_of_another_trainer(config: RunConfig, given: str, key: str) -> None:
    message = f"{given}: there is no such key. Here it is {key}. See {page(key.partition(' ')[0])}."
    with pytest.raises(UserError) as caught:
        config.parser.keys([f"--{given}", "1"])
    assert str(caught.value) == message


@pytest.mark.parametrize(
    ("given", "near"),
    [("max_epoch", "trainer.max_epochs"), ("seq_len", "data.seq_length"), ("min_epoch", "trainer.max_epochs")],
)
def test_a_key_that_is_refused_is_not_the_nearest(config: RunConfig, given: str, near: str) -> None:
    with pytest.raises(UserError, match=f"{given}: there is no such key. The nearest is {near}. See"):
        config.parser.keys([f"--{given}", "1"])
