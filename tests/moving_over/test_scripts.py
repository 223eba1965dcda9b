"""The original's launch scripts with their four values."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from tests.moving_over.launches import VALUES, converted, keys, refusal, script


def test_a_lora_launch_with_its_four_values(tmp_path: Path) -> None:
    found = converted(tmp_path, script(), *VALUES)
    assert yaml.safe_load(found.text) == {
        "seed_everything": 42,
        "output_dir": "${OUTPUT_DIR}",
        "tensorboard_dir": "${TensorBoard_DIR}",
        "data": {
            "data_paths": "${DATA_PATHS}",
            "data_split": "90,10,0",
            "padding_mode": "padding",
            "seq_length": 4096,
            "per_device_train_batch_size": 10,
            "total_train_batch_size": 80,
            "per_device_valid_batch_size": 10,
            "num_workers": 8,
            "preprocessing_num_workers": 6,
        },
        "model": {
            "pretrained_model_path": "${MODEL_NAME_OR_PATH}",
            "model_type": "gpt_neox",
            "peft_type": "lora",
            "checkpoint_activations": True,
            "pad_vocab_to_multiple_of": 128,
            "learning_rate": 5e-5,
            "min_lr": 1e-6,
            "lr_scheduler_type": "cosine",
            "num_warmup_steps": 30,
            "weight_decay": 0.0,
            "weighted_loss_mode": "case3",
            "lora": {"r": 96, "alpha": 32, "dropout": 0.05},
        },
        "trainer": {
            "devices": 8,
            "strategy": "fsdp",
            "precision": "bf16-mixed",
            "max_epochs": 5,
            "log_every_n_steps": 10,
            "gradient_clip_val": 1.0,
        },
        "evaluation": {"strategy": "steps,epoch", "steps": 500, "max_conversations_per_task": 4000},
        "checkpoint": {
            "save_strategy": "steps",
            "checkpointing_steps": 500,
            "save_total_limit": 2,
            "extra_save_by_epoch": True,
            "monitor": "val/loss",
            "mode": "min",
        },
        "early_stopping": {"patience": 5},
    }


def test_full_fine_tuning_has_no_adapters(tmp_path: Path) -> None:
    found = keys(tmp_path, script(without=("peft_type",)), *VALUES)
    assert not [key for key in found if "lora" in key or "peft" in key]


def test_every_change_of_meaning_has_a_comment_and_every_option_without_a_key_is_named(tmp_path: Path) -> None:
    text = converted(tmp_path, script(), *VALUES).text
    for said in ("min_lr: 1.0e-06 # where the decay ends", "# valid_iters: 400 batches of 10", "of one optimizer step"):
        assert said in text
    assert "not given; the original's default" in text  # of weight_decay
    _, ignored = text.split("# Without a key here:")
    for name in ("train_iters", "vocab_file", "padding", "skip_atorch_autoacc_dryrun", "ignore_mismatched_sizes"):
        assert f"#   {name}: " in ignored
    for name in (
        "tp: 1 is",
        "tokenize_mode: sft is",
        "resume_from_checkpoint: false: ",
        "--nproc_per_node: $(nvidia-smi",
    ):
        assert f"#   {name}" in ignored
    assert all(len(line) <= 112 for line in text.splitlines())


def test_variables_left_open_are_named_with_what_needs_them(tmp_path: Path) -> None:
    draft = converted(tmp_path, script(learning_rate="$LR"), *VALUES).draft
    assert draft.left_open() == {
        "DATA_PATHS": ["data.data_paths"],
        "MODEL_NAME_OR_PATH": ["model.pretrained_model_path"],
        "LR": ["model.learning_rate"],
        "OUTPUT_DIR": ["output_dir"],
        "TensorBoard_DIR": ["tensorboard_dir"],
    }
    told = converted(tmp_path, script(learning_rate="$LR"), *VALUES).text
    assert "LR (model.learning_rate)" in told and "learning_rate: ${LR}" in told


def test_variables_that_are_given_are_put_in(tmp_path: Path) -> None:
    found = keys(tmp_path, script(learning_rate="$LR"), *VALUES, LR="1e-3", DATA_PATHS="[/d/a,/d/b]", OUTPUT_DIR="o")
    assert (found["model.learning_rate"], found["data.data_paths"], found["output_dir"]) == (
        1e-3,
        ["/d/a", "/d/b"],
        "o",
    )


@pytest.mark.parametrize(
    ("values", "changed", "expected"),
    [
        # the original's total had tensor parallelism in it; one device of a group counts once here
        (("10", "2", "4", "5"), {}, (10, 40, 8)),
        # and no accumulation
        (("10", "1", "8", "5"), {"gradient_accumulation_steps": "4"}, (10, 320, 8)),
        # what did not divide was left out
        (("10", "1", "8", "5"), {"total_train_batch_size": "83"}, (10, 80, 8)),
        (("3", "1", "1", "5"), {}, (3, 3, 1)),
    ],
)
def test_batch_sizes(
    tmp_path: Path, values: tuple[str, ...], changed: dict[str, str], expected: tuple[int, int, int]
) -> None:
    found = keys(tmp_path, script(**changed), *values)
    names = ("data.per_device_train_batch_size", "data.total_train_batch_size", "trainer.devices")
    assert tuple(found[name] for name in names) == expected


def test_the_original_validated_on_100_batches_where_none_were_given(tmp_path: Path) -> None:
    found = converted(tmp_path, script(without=("valid_iters",)), *VALUES)
    assert found.draft.values["evaluation.max_conversations_per_task"] == 1000
    assert "not given; the original's default" in found.draft.comments["evaluation.max_conversations_per_task"]


def test_a_total_that_changed_says_what_it_was(tmp_path: Path) -> None:
    text = converted(tmp_path, script(gradient_accumulation_steps="4"), *VALUES).text
    assert "# 80 in the original: conversations of one optimizer step, accumulation included" in text
    assert "in optimizer steps; the original counted micro-batches where gradients accumulate" in text


def test_devices_and_their_strategy(tmp_path: Path) -> None:
    one = keys(tmp_path, script(), "10", "1", "1", "5")
    assert one["trainer.devices"] == 1 and "trainer.strategy" not in one
    assert keys(tmp_path, script(), "10", "2", "4", "5")["parallel.tensor_parallel_size"] == 2
    quantised = keys(tmp_path, script(peft_type="qlora", bits="8"), *VALUES)
    assert (quantised["trainer.strategy"], quantised["model.qlora.bits"]) == ("ddp", 8)
    nodes = script().replace(
        "--nproc_per_node=$(nvidia-smi -L | wc -l)", "--nnodes 2 --nproc_per_node 4 --node_rank $RANK"
    )
    found = keys(tmp_path, nodes, *VALUES)
    assert (found["trainer.devices"], found["trainer.num_nodes"]) == (4, 2)
    message = refusal(tmp_path, nodes.replace("--nnodes 2", "--nnodes $NODES"), *VALUES)
    assert (
        "--nnodes: is $NODES, and trainer.num_nodes is a number that does not change. Give it: --set NODES" in message
    )


def test_lengths_and_schedules(tmp_path: Path) -> None:
    found = keys(tmp_path, script(max_steps="70"), *VALUES)
    assert found["trainer.max_steps"] == 70 and "trainer.max_epochs" not in found
    assert keys(tmp_path, script(max_steps="-1"), *VALUES)["trainer.max_epochs"] == 5
    plain = keys(tmp_path, script(without=("custom_lr_scheduler_type", "num_warmup_steps")), *VALUES)
    assert (plain["model.lr_scheduler_type"], plain["model.num_warmup_steps"]) == ("linear", 100)
    both = converted(tmp_path, script(lr_scheduler_type="linear"), *VALUES)
    assert both.draft.values["model.lr_scheduler_type"] == "cosine"
    assert ("lr_scheduler_type", "custom_lr_scheduler_type is cosine, which came first") in both.draft.ignored


def test_splits(tmp_path: Path) -> None:
    for given, expected in (("95", "95,5,0"), ("99/1", "99,1,0"), ("8,1,1", "8,1,1"), ("90.5,9.5,0", "90.5,9.5,0")):
        assert keys(tmp_path, script(data_split=given), *VALUES)["data.data_split"] == expected
    nothing = keys(tmp_path, script(data_split="100,0,0"), *VALUES)
    assert (nothing["evaluation.strategy"], nothing["early_stopping.patience"]) == ("none", -1)


def test_weights_of_tasks(tmp_path: Path) -> None:
    paths = {"data_paths": "[a,b]"}
    found = converted(tmp_path, script(**paths, data_weights="[1.,3.]"), *VALUES)
    assert found.draft.values["data.task_weights"] == [1.0, 3.0]
    assert "weights of the tasks' losses; the original used none" in found.text
    one = converted(tmp_path, script(**paths, data_weights="[1.,3.]", weighted_loss_mode="case1"), *VALUES)
    assert "data.task_weights" not in one.draft.values and any(name == "data_weights" for name, _ in one.draft.ignored)
    assert "gives 3 weights for 2 data_paths" in refusal(tmp_path, script(**paths, data_weights="[1,2,3]"), *VALUES)


def test_resuming_in_the_output_directory(tmp_path: Path) -> None:
    assert keys(tmp_path, script(resume_from_checkpoint="true"), *VALUES)["ckpt_path"] == "last"
    assert "neither true nor false" in refusal(tmp_path, script(resume_from_checkpoint="out/x"), *VALUES)


def test_from_scratch_a_config_and_pretraining(tmp_path: Path) -> None:
    found = keys(
        tmp_path,
        script(without=("pretrained_model_path",), config_path="../model/gpt_neox", tokenize_mode="pretrain"),
        *VALUES,
    )
    assert found["model.pretrained_model_path"] == "../model/gpt_neox" and found["model.init"] == "random"
    assert found["data.tokenize_mode"] == "pretrain"


def test_options_may_be_cut_short_written_with_an_equals_sign_or_given_twice(tmp_path: Path) -> None:
    found = converted(tmp_path, script("--seq=2048", "--learning_rate=1e-3", "--custom_lr linear"), *VALUES)
    values = found.draft.values
    assert (values["data.seq_length"], values["model.learning_rate"]) == (2048, 1e-3)
    assert "seq_length is given twice, and the last counts" in found.text
    assert values["model.lr_scheduler_type"] == "linear"


@pytest.mark.parametrize(
    "launcher",
    [
        "python run_train.py",
        "CUDA_VISIBLE_DEVICES=0,1 nohup python3 -u train/run_train.py",
        "torchrun --nproc-per-node 8 --standalone run_train.py",
        "deepspeed --num_gpus=8 --master_port 29500 run_train.py",
        "accelerate launch --num_processes 8 run_train.py",
        "python -m torch.distributed.launch --nproc_per_node 8 --use_env run_train.py",
        "python -m train.run_train",
        "exec env A=1 python run_train.py",
    ],
)
def test_launchers(tmp_path: Path, launcher: str) -> None:
    begin, rest = script().split("python -m atorch.distributed.launch")
    text = f"{begin}{launcher} {rest.split('run_train.py', 1)[1]}"
    found = keys(tmp_path, text, *VALUES)
    assert (found["trainer.devices"], found["data.total_train_batch_size"]) == (8, 80)


def test_what_stands_around_a_launch_is_told(tmp_path: Path) -> None:
    text = "cd /data/launches\nexport NCCL_DEBUG=INFO\nsource env.sh\n" + script()
    told = " ".join(converted(tmp_path, text, *VALUES).text.replace("\n# ", " ").split())
    assert "The script exports NCCL_DEBUG, which is not kept here." in told
    assert "The script first goes to /data/launches: relative paths are meant from there." in told
    assert "The script reads env.sh, which is not read here" in told


def test_what_commands_say_can_be_given(tmp_path: Path) -> None:
    text = script(dp="$DEVICES", learning_rate="$RATE").replace("DP=$3", "DEVICES=`nvidia-smi -L | wc -l`; DP=$3")
    text = text.replace("TP=$2", 'TP=$2; RATE=$([ "$PEFT" = lora ] && echo 1e-4 || echo 1e-5)')
    assert "Give it: --set DEVICES=VALUE" in refusal(tmp_path, text, *VALUES)
    found = keys(tmp_path, text, *VALUES, DEVICES="8", RATE="1e-4")
    assert (found["trainer.devices"], found["model.learning_rate"]) == (8, 1e-4)
    total = script(total_train_batch_size="$((4 * $DEVICES))")
    assert "Write what it comes to, or give its variables: --set" in refusal(tmp_path, total, *VALUES)


def test_what_nothing_asks_for_is_refused(tmp_path: Path) -> None:
    message = refusal(tmp_path, script(), *VALUES, OUT_DIR="o")
    assert message.startswith("--set OUT_DIR: nothing in run_gpt_mft_peft.sh asks for it. The nearest is OUTPUT_DIR.")
    undecided = 'if [ "$MODE" = x ]; then mkdir a; fi\n' + script()
    assert keys(tmp_path, undecided, *VALUES, MODE="$X")


def test_nodes_that_slurm_is_asked_for_are_told(tmp_path: Path) -> None:
    head = "#!/bin/bash\n#SBATCH --job-name=mft\n#SBATCH --nodes=2\n#SBATCH --gres gpu:8\n"
    launch = script().replace("python -m atorch.distributed.launch", "srun python -m atorch.distributed.launch")
    said = "The script asks Slurm for several nodes (--nodes 2, --gres gpu:8), which is not kept here"
    assert said in converted(tmp_path, head + launch, *VALUES).text.replace("\n# ", " ")
    assert "Slurm" not in converted(tmp_path, head.replace("nodes=2", "nodes=1") + launch, *VALUES).text
    short = converted(tmp_path, launch.replace("srun", "srun --nodes=2"), *VALUES)
    assert "several nodes (--nodes 2)" in short.text
    known = launch.replace("launch \\\n", "launch --nnodes 2 \\\n")
    assert "Slurm" not in converted(tmp_path, head + known, *VALUES).text


def test_no_secret_is_written(tmp_path: Path) -> None:
    text = "export HF_TOKEN=hf_secret\n" + script(hub_token="hf_secret", hub_model_id="me/model")
    found = converted(tmp_path, text, *VALUES).text
    assert "HF_TOKEN" in found and "hub_token" in found and "hf_secret" not in found


def test_a_default_of_the_script_is_taken_and_told(tmp_path: Path) -> None:
    text = script(learning_rate="${LR:-3e-4}", seed="${SEED:-7}")
    found = converted(tmp_path, text, *VALUES, SEED="8")
    assert (found.draft.values["model.learning_rate"], found.draft.values["seed_everything"]) == (3e-4, 8)
    assert "LR is not given (--set), and the script's default for it is taken: 3e-4." in found.text
    either = converted(tmp_path, script("${QUANTISED:+--peft_type qlora}"), *VALUES)
    assert "QUANTISED is not given (--set), and the script's default for it is taken: nothing." in either.text
    assert either.draft.values["model.peft_type"] == "lora"
    known = converted(tmp_path, script("${QUANTISED:+--peft_type qlora}"), *VALUES, QUANTISED="1")
    assert known.draft.values["model.peft_type"] == "qlora"


@pytest.mark.parametrize(
    ("changed", "why"),
    [
        (
            {"train_mode": "sst"},
            ":31: --train_mode: sst is not trained here; sft is. Leave it out, and give tokenize_mode pretrain",
        ),
        ({"tokenize_mode": "coh"}, "--tokenize_mode: 'coh' is not done here"),
        ({"padding_mode": "concat"}, "--padding_mode: concat cuts a stream"),
        ({"padding_mode": "rows"}, "'rows' is none of padding, pack, concat"),
        ({"load_raw_dataset": "False"}, "--load_raw_dataset: false reads binary files"),
        ({"peft_type": "roem"}, "--peft_type: 'roem' is not trained here; lora and qlora are."),
        ({"weighted_loss_mode": "case3focalloss"}, "--weighted_loss_mode: 'case3focalloss' is none of case1"),
        ({"custom_lr_scheduler_type": "inverse_sqrt"}, "'inverse_sqrt' is none of cosine"),
        ({"metric_for_best_model": "accuracy"}, "'accuracy' is not measured here"),
        ({"greater_is_better": "maybe"}, "neither true nor false"),
        ({"evaluation_strategy": "often"}, "--evaluation_strategy: 'often' is none of steps; epoch; steps,epoch"),
        ({"pipe_parallel_size": "2"}, "--pipe_parallel_size: there is no pipeline parallelism here"),
        ({"model_parallel_size": "2"}, "--model_parallel_size: layers are shared by parallel.tensor_parallel_size"),
        ({"split_before_read": ""}, "--split_before_read: one task's directory with train/"),
        ({"seq_length": "4k"}, "--seq_length: is '4k', where a whole number must stand."),
        ({"learning_rate": "nan"}, "--learning_rate: is 'nan', where a number must stand."),
        ({"seq_length": ""}, "--seq_length has no value."),
        ({"sequence_length": "10"}, "--sequence_length: the original has no such option. The nearest is seq_length."),
        ({"data_split": "0,1,2"}, "'0,1,2' is not three percentages"),
        ({"data_split": "a,b"}, "'a,b' is not three percentages"),
        ({"min_lr": "1"}, "--min_lr: 1.0 is above learning_rate 5e-05"),
        ({"evalation_steps": "7"}, "--evalation_steps: is 7, but valid_interval is 500, and both say one thing."),
        ({"total_train_batch_size": "4"}, "4 leaves nothing for each of 8 processes"),
        (
            {"total_train_batch_size": "$B"},
            "is left open (${B}), and other values follow from it. Give it: --set B=VALUE",
        ),
        ({"seed": "$(date +%s)"}, "--seed: is $(date +%s), and $(date +%s) is not run. Write what it comes to."),
        ({"fp16": "", "bf16": "false"}, "--fp16: fp16 scales losses"),
        ({"peft_type": "qlora", "tp": "2", "dp": "4"}, "--tp: is 2, and quantised weights cannot be shared out."),
        ({"valid_iters": "0"}, "--valid_iters: 0 validates on nothing."),
        ({"deepspeed": "ds.json"}, "--deepspeed: the original has no such option."),
        ({"num_train_epochs": "-1"}, "--num_train_epochs: -1 trains nothing. Give epochs, or max_steps."),
        ({"pa": "1"}, "--pa: is short for several options: padding_mode, pad"),
    ],
)
def test_what_cannot_be_kept_is_refused_with_its_line(tmp_path: Path, changed: dict[str, str], why: str) -> None:
    message = refusal(tmp_path, script(**changed), *VALUES)
    assert message.startswith("run_gpt_mft_peft.sh:") and why in message


@pytest.mark.parametrize(
    ("text", "values", "why"),
    [
        (script(), ("10", "1", "8"), ":19: $4 is not given. Give the script's values after it"),
        (script(without=("data_paths",)), VALUES, "data_paths: is missing"),
        (script(without=("pretrained_model_path",)), VALUES, "pretrained_model_path: is missing"),
        ("echo hello\n", (), "starts no training of the original"),
        (script() + script(), VALUES, "starts several trainings, in the lines 28 and 103"),
        ("python xxpo_accelerate.py --train_config a.json", (), "is no training that is done here"),
        (script("--bf16 $EXTRA"), VALUES, "$EXTRA is left open, and may hold options. Give what it holds, or nothing:"),
        (script("--bf16", '"${EXTRA[@]}"'), VALUES, "nothing: --set EXTRA= on"),
        (script("extra"), VALUES, "'extra' stands where an option of the program must"),
        ("exit 0\n" + script(), VALUES, "It comes to the exit in line 1 before, where 4 of its values are given."),
        (
            '[ -z "${OUT:-}" ] && { echo "OUT unset"; exit 1; }\n' + script(),
            VALUES,
            "It comes to the exit in line 1 before, where OUT is not given: --set NAME=VALUE.",
        ),
        ("if [ $# -lt 4 ]; then\n exit 1; fi\n" + script(), (), "exit in line 2 before, where none of its values are"),
        (script().replace("$(nvidia-smi -L | wc -l)", "4"), VALUES, "tp 1 x dp 8 is 8, but the launcher starts 4"),
    ],
)
def test_launches_that_are_none(tmp_path: Path, text: str, values: tuple[str, ...], why: str) -> None:
    assert why in refusal(tmp_path, text, *values)


def test_options_may_stand_in_what_is_empty_or_given(tmp_path: Path) -> None:
    plain = keys(tmp_path, script(), *VALUES)
    assert keys(tmp_path, script('"$@"').replace("EPOCH=$4", "EPOCH=$4; shift 4"), *VALUES) == plain
    assert keys(tmp_path, script('"${@:5}"'), *VALUES) == plain
    assert keys(tmp_path, script('"${A[@]}"').replace("EPOCH=$4", "EPOCH=$4; A=()"), *VALUES) == plain
    for given in ("$EXTRA", '"${EXTRA[@]}"'):
        assert keys(tmp_path, script(given), *VALUES, EXTRA="") == plain
        assert keys(tmp_path, script(given), *VALUES, EXTRA="--seed 3")["seed_everything"] == 3


def test_values_beyond_those_of_the_script_are_refused(tmp_path: Path) -> None:
    assert "the script takes 4 values, and 5 are given" in refusal(tmp_path, script(), *VALUES, "6")


def test_no_name_leaves_its_comment(tmp_path: Path) -> None:
    found = converted(tmp_path, script(), *VALUES, name="run\u2028hostile: x.sh")  # a line's end in YAML
    assert "hostile: x.sh" in found.text and "hostile" not in yaml.safe_load(found.text)
