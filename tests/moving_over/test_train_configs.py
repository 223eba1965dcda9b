"""The original's ``*_train_config.json`` files, by themselves and by the launches that name them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from mft_lightning.errors import UserError
from mft_lightning.moving_over.original import convert
from tests.moving_over.launches import config, converted, keys, refusal

LAUNCH = """\
N_GPU_PER_NODE=8
TODAY=$(date +%Y-%m%d)
accelerate launch \\
    --num_machines 2 \\
    --num_processes $((2*$N_GPU_PER_NODE)) \\
    --use_deepspeed \\
    --zero_stage 2 \\
    --offload_optimizer_device 'cpu' \\
    --offload_param_device 'none' \\
    --gradient_accumulation_steps 1 \\
    --gradient_clipping 0.5 \\
    --mixed_precision 'bf16' \\
    --machine_rank $RANK \\
    --same_network \\
    pefts/mft_accelerate.py --train_config configs/"full_train_config.json" \\
      --distributed_type "deepspeed" > training-"$TODAY".log 2>&1 &
"""


@pytest.mark.parametrize("kind", ["full", "lora", "qlora", "coba"])
def test_each_kind(tmp_path: Path, kind: str) -> None:
    found = keys(tmp_path, config(kind))
    lora = kind in ("lora", "qlora")
    expected = {
        "seed_everything": 1234,
        "ckpt_path": "last",
        "data.data_paths": "${DATA_PATHS}",
        "data.data_split": "98,2,0",
        "data.per_device_train_batch_size": 2,
        "data.gradient_accumulation_steps": 1,
        "model.peft_type": kind if lora else None,
        "model.lora.r": 96 if lora else None,
        "model.lora.dropout": 0.05 if lora else None,
        "model.qlora.bits": 4 if kind == "qlora" else None,
        "model.weighted_loss_mode": "coba" if kind == "coba" else "case3",
        "model.coba.history_length": 200 if kind == "coba" else None,
        "model.checkpoint_activations": True,
        "model.attn_implementation": "sdpa",
        "model.weight_decay": 0.1,
        "trainer.precision": "bf16-mixed",
        "trainer.max_epochs": 4,
        "trainer.max_steps": None,
        "trainer.devices": None,
        "evaluation.steps": 100,
        "checkpoint.save_total_limit": None if lora else 3,
        "checkpoint.extra_save_by_epoch": True,
        "early_stopping.patience": 5,
    }
    assert {key: found.get(key) for key in expected} == expected
    assert ("checkpoint.save_total_limit" in found) and ("model.peft_type" in found) == lora


def test_what_is_left_out_is_what_the_original_took(tmp_path: Path) -> None:
    short = {
        "data_paths": "[a,b]",
        "output_dir": "o",
        "tb_dir": "t",
        "pretrained_model_path": "m",
        "model_type": "gpt_neox",
    }
    found = converted(tmp_path, json.dumps(short))
    expected = {
        "model.peft_type": "qlora",
        "model.qlora.bits": 4,
        "model.lora.r": 96,
        "model.learning_rate": 5e-5,
        "model.weight_decay": 0.01,
        "data.data_split": "98,2,0",
        "data.seq_length": 4096,
        "seed_everything": 1234,
        "early_stopping.patience": 5,
        "model.adam_beta2": 0.999,
    }
    assert "fixed in the original: at 0.999, in its first versions at 0.95" in found.text
    assert {key: found.draft.values[key] for key in expected} == expected
    assert "not given; the original's default, which was 0.05 of the run in its last versions" in found.text


def test_a_quantised_base_of_lora_is_told(tmp_path: Path) -> None:
    found = converted(tmp_path, config("lora", quantization="4bit"))
    assert found.draft.values["model.peft_type"] == "lora" and "model.qlora.bits" not in found.draft.values
    assert any(
        comment.startswith("quantization 4bit: the original's") for comment in found.draft.comments["model.peft_type"]
    )
    assert ("quantization", "4bit: of qlora alone") in found.draft.ignored
    assert "quantization 4bit" not in converted(tmp_path, config("lora")).text


def test_a_full_run_keeps_two_checkpoints_where_no_number_was_given(tmp_path: Path) -> None:
    assert keys(tmp_path, config("full", saving_limit=None))["checkpoint.save_total_limit"] == 2
    assert keys(tmp_path, config("lora", saving_limit=None))["checkpoint.save_total_limit"] is None


def test_early_stopping_is_off_by_its_switch(tmp_path: Path) -> None:
    assert keys(tmp_path, config(early_stopping=False))["early_stopping.patience"] == -1


def test_resuming_starts_from_the_weights(tmp_path: Path) -> None:
    adapters = keys(tmp_path, config("lora", resume_from_checkpoint="out/step_100"))
    assert adapters["model.lora.start_from"] == "out/step_100"
    assert "model.lora.r" not in adapters and adapters["model.lora.dropout"] == 0.05 and "ckpt_path" not in adapters
    full = keys(tmp_path, config("full", resume_from_checkpoint="out/step_100"))
    assert full["model.pretrained_model_path"] == "out/step_100"


def test_names_of_the_first_edition(tmp_path: Path) -> None:
    found = keys(tmp_path, config(evaluation_steps=..., evalation_steps=70, checkpoint_activations=False))
    assert (found["evaluation.steps"], found["model.checkpoint_activations"]) == (70, False)


def test_task_weights_and_targets(tmp_path: Path) -> None:
    found = keys(tmp_path, config("lora", data_paths="[a,b]", task_weights="[1.0,2.0]", target_modules=["dense"]))
    assert (found["data.task_weights"], found["model.lora.target_modules"]) == ([1.0, 2.0], ["dense"])
    coba = converted(tmp_path, config("coba", data_paths="[a,b]", task_weights="[1.0,2.0]"))
    assert "data.task_weights" not in coba.draft.values
    assert "model.lora.target_modules" not in keys(tmp_path, config("lora", target_modules="all-linear"))
    message = refusal(tmp_path, config("lora", model_type="llama"))
    assert "all linear layers of a llama" in message


def test_no_step_checkpoints(tmp_path: Path) -> None:
    assert keys(tmp_path, config(checkpointing_steps=0))["checkpoint.save_strategy"] == "epoch"


@pytest.mark.parametrize(
    ("changed", "why"),
    [
        ({"quantization": "3bit", "peft_type": "qlora"}, "quantization: '3bit' is neither 4bit nor 8bit."),
        ({"num_warmup_steps": 0.05}, "num_warmup_steps: 0.05 is a share of the run"),
        ({"num_warmup_steps": "300"}, "num_warmup_steps: is '300', where a number must stand."),
        ({"seq_length": "4096"}, "seq_length: is '4096', where a whole number must stand."),
        ({"seq_length": 1.5}, "seq_length: is 1.5, where a whole number must stand."),
        ({"seed": True}, "seed: is True, where a whole number must stand."),
        ({"early_stopping": "true"}, "early_stopping: is 'true', where true or false must stand."),
        ({"tokenize_mode": 1}, "tokenize_mode: is 1, where a text must stand."),
        ({"data_paths": [1]}, "each of a list must be a text"),
        ({"data_paths": {"a": 1}}, "data_paths: is an object, no list."),
        ({"load_raw_dataset": False}, "load_raw_dataset: false reads binary files"),
        ({"weighted_loss_mode": "selfpaced"}, "'selfpaced' is none of case1, case2, case3, case4, coba"),
        ({"role_markers": {"user": "### "}}, "role_markers: the role markers are fixed here"),
        ({"xxpo": "dpo"}, "xxpo: is of preference alignment"),
        ({"model_parallel_size": 4}, "model_parallel_size: layers are shared by parallel.tensor_parallel_size"),
        ({"attn_implementation": "ring"}, "'ring' is none of sdpa"),
        ({"distributed_type": "megatron"}, "'megatron' is neither deepspeed nor fsdp"),
        ({"leraning_rate": 1e-4}, "leraning_rate: the original has no such option. The nearest is learning_rate."),
        ({"_comment": "mine"}, "_comment: the original has no such option."),
        ({"per_device_train_batch_size": 0}, "0 is no number of conversations from 1 on"),
        ({"tb_dir": "a", "tensorboard_dir": "b"}, "and both say one thing. Leave one out."),
    ],
)
def test_what_cannot_be_kept_is_refused_by_its_key(tmp_path: Path, changed: dict[str, object], why: str) -> None:
    message = refusal(tmp_path, config(**changed))
    assert message.startswith("lora_train_config.json: ") or "both say" in message
    assert why in message


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ('{\n  // the data\n  "data_paths": "a"\n}', ":2: is not valid JSON (Expecting property name"),
        ('{\n  "seed": 1, # mine\n  "data_paths": "a"\n}', "JSON has no comments: take them out."),
        ('{\n  "seed": 1,\n}', "JSON has no comma after the last value: take it out."),
        (
            '{\n  "seed": 1,\n  2}',
            ":3: is not valid JSON (Expecting property name enclosed in double quotes, column 3).",
        ),
        ('{"seed": NaN}', "NaN is no number of JSON"),
        ('{"seed": 1, "seed": 2}', "seed stands twice"),
        ("{", ":1: is not valid JSON"),
        ('{"a":\n', ":2: is not valid JSON"),
        ("{" + '"a": {' * 100_000, "is not valid JSON"),
    ],
)
def test_what_is_no_json_is_told_with_its_line(tmp_path: Path, text: str, why: str) -> None:
    assert why in refusal(tmp_path, text)


def test_a_json_file_that_is_a_list_or_has_values_beside_it(tmp_path: Path) -> None:
    assert "is a JSON list, not an object of options" in refusal(tmp_path, "[]", name="a.json")
    assert "is JSON, which takes no values" in refusal(tmp_path, config(), "10")


# ---------------------------------------------------------------- with their launch


def launched(directory: Path, launch: str, **changed: object) -> dict[str, object]:
    (directory / "configs").mkdir(exist_ok=True)
    (directory / "configs" / "full_train_config.json").write_text(config("full", **changed))
    file = directory / "launch.sh"
    file.write_text(launch)
    return convert(file, (), {}).draft.values


def test_a_launch_says_devices_precision_and_sharding(tmp_path: Path) -> None:
    found = launched(tmp_path, LAUNCH)
    expected = {
        "trainer.devices": 8,
        "trainer.num_nodes": 2,
        "trainer.strategy": "fsdp",
        "trainer.precision": "bf16-mixed",
        "trainer.gradient_clip_val": 0.5,
        "parallel.reshard_after_forward": False,
        "parallel.cpu_offload": True,
        "data.per_device_train_batch_size": 2,
        "data.total_train_batch_size": 32,
    }
    assert {key: found.get(key) for key in expected} == expected


def test_a_number_of_devices_that_a_command_says_is_left_open(tmp_path: Path) -> None:
    counted = LAUNCH.replace("N_GPU_PER_NODE=8", "N_GPU=$(nvidia-smi -L | wc -l)").replace("machines 2", "machines 1")
    counted = counted.replace("$((2*$N_GPU_PER_NODE))", "$N_GPU")
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "full_train_config.json").write_text(config("full"))
    found = converted(tmp_path, counted, name="launch.sh")
    assert found.draft.values["trainer.devices"] == "${N_GPU}" and "N_GPU" in found.draft.left_open()
    assert "--num_processes" not in dict(found.draft.ignored)
    given = converted(tmp_path, counted, name="launch.sh", N_GPU="4").draft.values
    assert (given["trainer.devices"], given["data.total_train_batch_size"]) == (4, 8)


def test_what_a_launch_says_of_sharing_is_told_where_nothing_is_shared(tmp_path: Path) -> None:
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "full_train_config.json").write_text(config("full"))
    alone = LAUNCH.replace("--num_machines 2", "--num_machines 1").replace("$((2*$N_GPU_PER_NODE))", "1")
    found = converted(tmp_path, alone, name="launch.sh")
    assert "trainer.strategy" not in found.draft.values
    told = dict(found.draft.ignored)
    assert told["--offload_optimizer_device"].startswith("cpu: of fsdp alone (parallel.*), which this run is without")
    assert told["--offload_param_device"].startswith("none: nothing moves") and "--zero_stage" in told
    shared = dict(converted(tmp_path, LAUNCH, name="launch.sh").draft.ignored)
    assert not {"--zero_stage", "--offload_optimizer_device", "--use_deepspeed"} & shared.keys()


def test_what_a_launch_puts_in_the_place_of_the_files_keys(tmp_path: Path) -> None:
    more = ' --data_paths "[x,y]" --micro_batch_size 6 --output_dir other > training'
    found = launched(tmp_path, LAUNCH.replace(" > training", more))
    assert (found["data.data_paths"], found["output_dir"]) == (["x", "y"], "other")
    assert (found["data.per_device_train_batch_size"], found["data.per_device_valid_batch_size"]) == (6, 6)


def test_fsdp_and_zero_stages(tmp_path: Path) -> None:
    fsdp = LAUNCH.replace("--use_deepspeed", "--use_fsdp --fsdp_sharding_strategy=1").replace('"deepspeed"', '"fsdp"')
    fsdp = fsdp.replace("    --zero_stage 2 \\\n    --offload_optimizer_device 'cpu' \\\n", "")
    found = launched(tmp_path, fsdp)
    assert found["trainer.strategy"] == "fsdp" and "parallel.reshard_after_forward" not in found
    third = launched(tmp_path, LAUNCH.replace("--zero_stage 2", "--zero_stage 3"))
    assert third["trainer.strategy"] == "fsdp" and "parallel.reshard_after_forward" not in third
    assert launched(tmp_path, LAUNCH.replace("--zero_stage 2", "--zero_stage 0"))["trainer.strategy"] == "ddp"
    assert launched(tmp_path, LAUNCH, peft_type="qlora")["trainer.strategy"] == "ddp"


def test_a_launchers_own_configuration_is_read(tmp_path: Path) -> None:
    (tmp_path / "ds.yaml").write_text(
        "distributed_type: DEEPSPEED\ndeepspeed_config:\n  zero_stage: 3\nnum_machines: 1\nnum_processes: 4\n"
        "mixed_precision: 'no'\nuse_cpu: false\n"
    )
    launch = (
        "accelerate launch --config_file ds.yaml pefts/mft_accelerate.py --train_config configs/full_train_config.json"
    )
    found = launched(tmp_path, launch)
    assert (found["trainer.devices"], found["trainer.strategy"]) == (4, "fsdp")
    assert found["trainer.precision"] == "bf16-true"


@pytest.mark.parametrize(
    ("old", "new", "why"),
    [
        ("full_train_config", "other_train_config", "other_train_config.json is neither beside the script nor here"),
        ('configs/"full', '$DIR/"full', "is left open. Give it by --set NAME=VALUE"),
        ("steps 1", "steps 4", "gradient_accumulation_steps: is 4, but the configuration's is 1"),
        ("$((2*$N_GPU_PER_NODE))", "9", "9 cannot be shared out over 2 nodes"),
        ("'bf16'", "'fp8'", "'fp8' is none of bf16, fp16, no"),
        ("'bf16'", "'fp16'", "fp16 scales losses"),
        ("--distributed_type", "--seq_length 4 --distributed_type", "has no such option beside --train_config"),
    ],
)
def test_launches_that_cannot_be_kept(tmp_path: Path, old: str, new: str, why: str) -> None:
    with pytest.raises(UserError) as caught:
        launched(tmp_path, LAUNCH.replace(old, new))
    assert why in str(caught.value)
