"""What comes from the original and from other programs is trained on, merged and asked."""

from __future__ import annotations

import argparse
import gzip
import json
import shutil
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GPTNeoXForCausalLM

from mft_lightning.cli import main
from mft_lightning.run_config import RunConfig
from tests.integration.conftest import everything, weights
from tests.moving_over.launches import KINDS, config, script

TARGETS = ["query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"]
QUICK = {
    "--trainer.max_steps": "1",
    "--trainer.devices": "1",
    "--trainer.strategy": "auto",
    "--data.seq_length": "256",
    "--data.num_workers": "0",
    "--model.num_warmup_steps": "0",
    "--evaluation.max_conversations_per_task": "4",
    "--evaluation.at_start": "false",
}
PROMPT = torch.tensor([[5, 9, 11, 3, 7]])


@pytest.fixture(scope="module")
def base(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A GPT-NeoX with weights, written by transformers."""
    directory = tmp_path_factory.mktemp("base")
    torch.manual_seed(0)
    model = GPTNeoXForCausalLM(AutoConfig.from_pretrained(tiny_model))
    model.float().save_pretrained(directory)
    AutoTokenizer.from_pretrained(tiny_model).save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def alpaca_task(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A task that ``convert-data`` made of an Alpaca and a ShareGPT file."""
    directory = tmp_path_factory.mktemp("others")
    alpaca = [{"instruction": f"Add one to {i}.", "input": "", "output": str(i + 1), "text": "."} for i in range(30)]
    (directory / "alpaca.json").write_text(json.dumps(alpaca))
    turns = [{"from": "human", "value": "Hello"}, {"from": "gpt", "value": "Hello yourself."}]
    lines = "".join(json.dumps({"conversations": turns}) + "\n" for _ in range(10))
    (directory / "sharegpt.json.gz").write_bytes(gzip.compress(lines.encode()))
    files = [str(directory / "alpaca.json"), str(directory / "sharegpt.json.gz")]
    assert main(["convert-data", *files, "--output", str(directory / "general")]) == 0
    return directory / "general"


def quick(*words: str) -> list[str]:
    return [*(word for pair in QUICK.items() for word in pair), *words]


def variables(base: Path, output: Path, *tasks: str | Path) -> list[str]:
    """What a launch leaves open, given."""
    given = {
        "DATA_PATHS": f"[{','.join(map(str, tasks))}]",
        "MODEL_NAME_OR_PATH": base,
        "OUTPUT_DIR": output,
        "TensorBoard_DIR": output / "tb",
    }
    return [word for name, value in given.items() for word in ("--set", f"{name}={value}")]


# ---------------------------------------------------------------- configurations


def test_a_converted_script_trains(
    tmp_path: Path, base: Path, alpaca_task: Path, example_tasks: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "run_gpt_mft_peft.sh").write_text(script())
    words = [str(tmp_path / "run_gpt_mft_peft.sh"), "2", "1", "1", "1", "--output", str(tmp_path / "lora.yaml")]
    assert main(["convert-config", *words, *variables(base, tmp_path / "out", alpaca_task, example_tasks[0])]) == 0
    told = capsys.readouterr()
    assert told.out == f"written: {tmp_path / 'lora.yaml'}\n" and not told.err
    assert main(["fit", "--config", str(tmp_path / "lora.yaml"), *quick("--model.lora.r", "4")]) == 0
    trained = json.loads((tmp_path / "out" / "step-00000001" / "adapter_config.json").read_text())
    assert (trained["lora_alpha"], sorted(trained["target_modules"])) == (32, sorted(TARGETS))
    assert (tmp_path / "out" / "tb").is_dir()


def test_a_converted_json_file_trains_and_goes_on(tmp_path: Path, base: Path, alpaca_task: Path) -> None:
    (tmp_path / "full_train_config.json").write_text(config("full", seed=7))
    words = [str(tmp_path / "full_train_config.json"), "--output", str(tmp_path / "full.yaml")]
    assert main(["convert-config", *words, *variables(base, tmp_path / "out", alpaca_task)]) == 0
    assert main(["fit", "--config", str(tmp_path / "full.yaml"), *quick()]) == 0
    assert (tmp_path / "out" / "step-00000001" / "model.safetensors").is_file()
    assert (
        main(["fit", "--config", str(tmp_path / "full.yaml"), *quick("--trainer.max_steps", "2")]) == 0
    )  # auto_resume
    assert (tmp_path / "out" / "step-00000002").is_dir()


@pytest.mark.parametrize("kind", [*KINDS, "script"])
def test_the_parser_of_a_run_takes_every_kind(
    tmp_path: Path, base: Path, alpaca_task: Path, example_tasks: list[str], kind: str
) -> None:
    file = tmp_path / ("run.sh" if kind == "script" else f"{kind}_train_config.json")
    file.write_text(script() if kind == "script" else config(kind))
    values = ["10", "1", "8", "5"] if kind == "script" else []
    words = [str(file), *values, "--output", str(tmp_path / "a.yaml")]
    assert main(["convert-config", *words, *variables(base, tmp_path / "out", alpaca_task, example_tasks[0])]) == 0
    run = RunConfig(["--config", str(tmp_path / "a.yaml")], "fit")
    model, data = run.config["model"], run.datamodule
    if kind == "script":
        assert (data.devices, data.batch_sizes.total, data.batch_sizes.per_device) == (8, 80, 10)
        assert run.trainer_config["strategy"].short_name == "fsdp"
    else:
        assert model.peft_type == (kind if kind in ("lora", "qlora") else None)
        assert model.weighted_loss_mode == ("coba" if kind == "coba" else "case3")
    assert data.task_names == ["general", "text_to_code"]


def test_what_is_left_open_is_taken_from_the_environment(
    tmp_path: Path, base: Path, alpaca_task: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "run.sh").write_text(script(learning_rate="$RATE"))
    assert main(["convert-config", str(tmp_path / "run.sh"), "2", "1", "1", "1", "--output", f"{tmp_path}/a.yaml"]) == 0
    given = variables(base, tmp_path / "out", alpaca_task)[1::2]
    for name, value in (setting.split("=", 1) for setting in [*given, "RATE=2e-4"]):
        monkeypatch.setenv(name, value)
    run = RunConfig(["--config", f"{tmp_path}/a.yaml"], "fit")
    assert (run.datamodule.task_names, run.model.optim.learning_rate) == (["general"], 2e-4)
    assert run.output_dir == tmp_path / "out"


def test_a_number_that_is_left_open_is_refused_until_it_is_there(
    tmp_path: Path, base: Path, alpaca_task: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "run.sh").write_text(script(learning_rate="$LR_THAT_IS_OPEN"))
    words = [str(tmp_path / "run.sh"), "2", "1", "1", "1", "--output", str(tmp_path / "a.yaml")]
    assert main(["convert-config", *words, *variables(base, tmp_path / "out", alpaca_task)]) == 0
    assert "LR_THAT_IS_OPEN is left open: model.learning_rate needs it." in capsys.readouterr().err
    assert main(["fit", "--config", str(tmp_path / "a.yaml"), *quick()]) == 1
    message = capsys.readouterr().err
    assert "LR_THAT_IS_OPEN" in message and "model.learning_rate" in message


def test_yaml_goes_to_standard_output_and_what_is_open_to_standard_error(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "lora_train_config.json").write_text(config("lora"))
    assert main(["convert-config", str(tmp_path / "lora_train_config.json")]) == 0
    told = capsys.readouterr()
    assert told.out.startswith("# Converted from lora_train_config.json by convert-config.")
    assert "note: OUTPUT_DIR is left open: output_dir needs it." in told.err


@pytest.mark.parametrize(
    ("words", "why"),
    [
        (["missing.sh"], "missing.sh: cannot be read (No such file or directory)"),
        (["bad.sh"], "bad.sh: is not UTF-8 text (byte 0)"),
        ([""], ": cannot be read"),
        (["a.json", "--output", "there.yaml"], "there.yaml: is there already. Give a new file, or --overwrite."),
        (["a.json", "--output", "."], "is a directory"),
        (["a.json", "--set", "A"], "--set A: is not NAME=VALUE."),
        (["a.json", "--outptu", "x"], "--outptu: convert-config has no such option. The nearest is --output."),
        (["a.sh", "--seed=7"], "stands after --, as in: convert-config run.sh -- --seed=7"),
        (["refused.json", "--output", "new.yaml"], "refused.json: xxpo: is of preference alignment"),
        ([], "config"),
    ],
)
def test_bad_input_is_one_message_and_nothing_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], words: list[str], why: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("bad.sh").write_bytes(b"\xff\xfe")
    Path("a.json").write_text(config())
    Path("refused.json").write_text(config(xxpo="dpo"))
    Path("there.yaml").write_text("")
    before = everything(tmp_path)
    assert main(["convert-config", *words]) == 1
    message = capsys.readouterr().err
    assert message.startswith("error: ") and why in message and message.count("\n") <= 3
    assert everything(tmp_path) == before


# ---------------------------------------------------------------- models and adapters


def saved_adapter(base: Path, directory: Path, bias: str) -> PeftModel:
    """An adapter of the original's shape, saved by peft."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    settings = LoraConfig(
        r=96, lora_alpha=32, lora_dropout=0.05, bias=bias, target_modules=TARGETS, task_type="CAUSAL_LM"
    )
    adapted = get_peft_model(model, settings)
    torch.manual_seed(1)
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            parameter.data.normal_(0, 0.05)
    adapted.save_pretrained(directory)
    return adapted


@pytest.fixture(scope="module")
def atorch_adapter(base: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, torch.Tensor]:
    """An adapter as mft_atorch left it, in a .bin file and with its own task type; and its logits, by peft."""
    directory = tmp_path_factory.mktemp("atorch")
    adapted = saved_adapter(base, directory, "none")
    torch.save(load_file(directory / "adapter_model.safetensors"), directory / "adapter_model.bin")
    (directory / "adapter_model.safetensors").unlink()
    written = {
        "base_model_name_or_path": str(base),
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "layers_pattern": None,
        "layers_to_transform": None,
        "lora_alpha": 32,
        "lora_dropout": 0.05,
        "modules_to_save": None,
        "peft_type": "LORA",
        "r": 96,
        "revision": None,
        "target_modules": TARGETS,
        "task_type": "ANT_CAUSAL_LM",
    }
    (directory / "adapter_config.json").write_text(json.dumps(written))
    return directory, logits(adapted)


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(PROMPT).logits


def test_an_adapter_of_mft_atorch_starts_a_run(
    tmp_path: Path, base: Path, alpaca_task: Path, atorch_adapter: tuple[Path, torch.Tensor]
) -> None:
    directory, _ = atorch_adapter
    (tmp_path / "a.json").write_text(config("lora", resume_from_checkpoint=str(directory)))
    words = [str(tmp_path / "a.json"), "--output", str(tmp_path / "a.yaml")]
    assert main(["convert-config", *words, *variables(base, tmp_path / "out", alpaca_task)]) == 0
    slow = quick("--model.learning_rate", "1e-12", "--model.min_lr", "0", "--trainer.precision", "32-true")
    assert main(["fit", "--config", str(tmp_path / "a.yaml"), *slow]) == 0
    ours = weights(tmp_path / "out" / "step-00000001")
    theirs = torch.load(directory / "adapter_model.bin", weights_only=True)
    assert ours.keys() == theirs.keys()
    assert all(torch.allclose(ours[name], theirs[name], atol=1e-6) for name in ours)


def test_an_adapter_of_mft_atorch_is_merged_and_asked(
    tmp_path: Path, base: Path, atorch_adapter: tuple[Path, torch.Tensor], capsys: pytest.CaptureFixture[str]
) -> None:
    directory, expected = atorch_adapter
    words = ["--adapter", str(directory), "--output", str(tmp_path / "merged"), "--base", str(base)]
    assert main(["merge", *words]) == 0
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(logits(merged), expected, atol=1e-5, rtol=1e-4)
    capsys.readouterr()
    assert main(["generate", "--model", str(directory), "--prompt", "Hello", "--max_new_tokens", "3"]) == 0
    answer = capsys.readouterr().out
    moved = shutil.copytree(base, tmp_path / "moved")
    words = ["--base", str(moved), "--prompt", "Hello", "--max_new_tokens", "3"]
    assert main(["generate", "--model", str(directory), *words]) == 0
    told = capsys.readouterr()
    assert told.out == answer and "does not tell its base from others" in told.err


def test_an_adapter_with_trained_biases_is_merged_and_not_trained_on(
    tmp_path: Path, base: Path, alpaca_task: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of the accelerate edition's last versions."""
    expected = logits(saved_adapter(base, tmp_path / "adapter", "lora_only"))
    assert main(["merge", "--adapter", str(tmp_path / "adapter"), "--output", str(tmp_path / "merged")]) == 0
    torch.testing.assert_close(
        logits(AutoModelForCausalLM.from_pretrained(tmp_path / "merged")), expected, atol=1e-5, rtol=1e-4
    )
    (tmp_path / "a.json").write_text(config("lora", resume_from_checkpoint=str(tmp_path / "adapter")))
    words = [str(tmp_path / "a.json"), "--output", str(tmp_path / "a.yaml")]
    assert main(["convert-config", *words, *variables(base, tmp_path / "out", alpaca_task)]) == 0
    capsys.readouterr()
    assert main(["fit", "--config", str(tmp_path / "a.yaml"), *quick()]) == 1
    assert "has bias, which cannot be trained here." in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_a_full_checkpoint_of_mft_atorch_is_a_base(tmp_path: Path, base: Path, alpaca_task: Path) -> None:
    """Parts of .bin, in bfloat16, with buffers that transformers knows no more, beside files that are not opened."""
    old = tmp_path / "checkpoint-500"
    shutil.copytree(base, old, ignore=shutil.ignore_patterns("model.safetensors"))
    state = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16).state_dict()
    state = {name.replace("lm_head", "embed_out"): value for name, value in state.items()}
    for layer in range(2):
        state[f"gpt_neox.layers.{layer}.attention.bias"] = torch.ones(1, 1, 8, 8, dtype=torch.bool)
        state[f"gpt_neox.layers.{layer}.attention.masked_bias"] = torch.tensor(-1e9)
        state[f"gpt_neox.layers.{layer}.attention.rotary_emb.inv_freq"] = torch.ones(1)
    names, parts = sorted(state), {}
    for number, part in enumerate((names[::2], names[1::2]), start=1):
        file = f"pytorch_model-0000{number}-of-00002.bin"
        torch.save({name: state[name] for name in part}, old / file)
        parts |= dict.fromkeys(part, file)
    (old / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": parts}))
    for name in ("training_args.bin", "atorch_checkpoint.bin", "scheduler.pt", "rng_state_0.pth"):
        (old / name).write_bytes(b"no tensors")
    (old / "trainer_state.json").write_text('{"global_steps": 500}')
    (tmp_path / "a.json").write_text(config("full", resume_from_checkpoint=str(old)))
    words = [str(tmp_path / "a.json"), "--output", str(tmp_path / "a.yaml")]
    assert main(["convert-config", *words, *variables(base, tmp_path / "out", alpaca_task)]) == 0
    slow = quick("--model.learning_rate", "1e-12", "--model.min_lr", "0", "--trainer.precision", "32-true")
    assert main(["fit", "--config", str(tmp_path / "a.yaml"), *slow]) == 0
    ours = weights(tmp_path / "out" / "step-00000001")
    assert all(torch.allclose(ours[name], state[name].float(), atol=1e-6) for name in ours)
    assert len(ours) > 20 and all(name in state for name in ours)


@pytest.mark.parametrize("kind", ["more than tensors", "cut off", "no eos", "unknown adapter"])
def test_what_cannot_be_asked_is_told_in_one_message(
    tmp_path: Path, base: Path, capsys: pytest.CaptureFixture[str], kind: str
) -> None:
    model, words = shutil.copytree(base, tmp_path / "model"), []
    if kind == "no eos":
        settings = json.loads((model / "tokenizer_config.json").read_text())
        (model / "tokenizer_config.json").write_text(json.dumps({**settings, "eos_token": None}))
    elif kind == "unknown adapter":
        (model / "adapter_config.json").write_text('{"peft_type": "ROEM", "enable_lora": null}')
        save_file({"a.lora_A.weight": torch.ones(1)}, model / "adapter_model.safetensors")
        words = ["--base", str(base)]
    else:
        state = load_file(model / "model.safetensors")
        (model / "model.safetensors").unlink()
        torch.save({**state, "settings": argparse.Namespace()}, model / "pytorch_model.bin")
        if kind == "cut off":
            file = model / "pytorch_model.bin"
            file.write_bytes(file.read_bytes()[:-1000])
    expected = {
        "more than tensors": "cannot be loaded (a file of its weights is damaged, or holds more than tensors and is",
        "cut off": "cannot be loaded (a file of its weights is damaged, or",
        "no eos": "its tokenizer has no eos token, which ends an answer. Name one of its tokens as eos_token",
        "unknown adapter": "(peft_type: 'ROEM' is no kind of adapter that peft knows)",
    }
    assert main(["generate", "--model", str(model), "--prompt", "a", *words]) == 1
    message = capsys.readouterr().err.splitlines()[-1]
    assert message.startswith(f"error: --model {model}: ") and expected[kind] in message


# ---------------------------------------------------------------- data


def test_what_convert_data_tells(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    records = [{"instruction": "a", "output": "b", "id": 1}, {"instruction": "a", "output": "", "tag": "x"}]
    (tmp_path / "a.json").write_text(json.dumps([*records, {"instruction": "c", "output": "d", "tag": "x"}], indent=1))
    words = ["convert-data", str(tmp_path / "a.json"), "--output", str(tmp_path / "tasks" / "mine")]
    assert main(words) == 1
    message = capsys.readouterr().err
    assert message.startswith(
        f"error: {tmp_path / 'a.json'}:7 (record 2): as chat_rounds, chat_rounds[1]: the bot's answer is empty"
    )
    assert not (tmp_path / "tasks").exists()
    assert main([*words, "--on_bad_record", "skip"]) == 0
    told = capsys.readouterr().out
    assert told.splitlines()[1].split() == ["a.json", "Alpaca", "3", "2", "1"]
    assert "skipped of a.json: 1 empty-answer" in told and "left out of a.json: the fields tag (1)" in told
    lines = (tmp_path / "tasks" / "mine" / "a.jsonl").read_text().splitlines()
    assert [json.loads(line).get("id") for line in lines] == [1, None]
    assert main(words) == 1
    assert "a.jsonl: is there already. Give another --output, or --overwrite." in capsys.readouterr().err


def test_all_files_of_a_command_come_to_be_or_none(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text('[{"instruction": "a", "output": "b"}]')
    (tmp_path / "b.json").write_text('[{"instruction": "a"}]')
    files = [str(tmp_path / "a.json"), str(tmp_path / "b.json")]
    assert main(["convert-data", *files, "--output", str(tmp_path / "tasks" / "mine")]) == 1
    assert not (tmp_path / "tasks").exists()
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "a.jsonl").write_text("kept\n")
    assert main(["convert-data", *files, "--output", str(tmp_path / "mine"), "--overwrite"]) == 1
    assert [(path.name, path.read_text()) for path in (tmp_path / "mine").iterdir()] == [("a.jsonl", "kept\n")]


def test_a_file_is_not_written_over_itself_and_names_do_not_meet(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    own = tmp_path / "a.jsonl"
    own.write_text('{"instruction": "a", "output": "b"}\n')
    assert main(["convert-data", str(own), "--output", str(tmp_path), "--overwrite"]) == 1
    assert "would be written over itself" in capsys.readouterr().err
    assert main(["convert-data", str(own), f"{own}", "--output", str(tmp_path / "t")]) == 1
    assert "would both be" in capsys.readouterr().err
    (tmp_path / "linked").mkdir()
    (tmp_path / "linked" / "a.jsonl").symlink_to(tmp_path / "elsewhere.jsonl")
    assert main(["convert-data", str(own), "--output", str(tmp_path / "linked"), "--overwrite"]) == 1
    assert "is a link, which would be replaced" in capsys.readouterr().err
    assert main(["convert-data", str(own), "--output", str(own)]) == 1
    assert "is no directory. Give the task's directory." in capsys.readouterr().err


def test_a_task_with_alpaca_lines_in_it_says_what_to_do(
    tmp_path: Path, base: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "task").mkdir()
    (tmp_path / "task" / "a.jsonl").write_text('{"instruction": "a", "output": "b"}\n')
    words = ["--data.data_paths", str(tmp_path / "task"), "--model.pretrained_model_path", str(base)]
    assert main(["fit", *words, "--output_dir", str(tmp_path / "out"), *quick()]) == 1
    assert "it looks like Alpaca, which convert-data converts" in capsys.readouterr().err
