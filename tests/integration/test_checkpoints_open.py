"""A checkpoint is a Hugging Face directory: it opens with no code of this project, and it answers."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import lightning as L
import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from mft_lightning.cli import main
from mft_lightning.model.source import ModelSource, build_causal_lm
from tests.integration.conftest import command, weights

PROMPT = "Write a function `lower_size` that takes a size and subtracts 3 from it if it is below 7."


def opened(checkpoint: Path) -> torch.nn.Module:
    """As a stranger opens it; peft would compute with bfloat16 adapters in float32 if it were not told otherwise."""
    if (checkpoint / "adapter_config.json").is_file():
        base = AutoModelForCausalLM.from_pretrained(checkpoint.parent / "base")
        return PeftModel.from_pretrained(base, checkpoint, autocast_adapter_dtype=False).eval()
    return AutoModelForCausalLM.from_pretrained(checkpoint).eval()


IDS = torch.arange(3, 43)[None]  # positions whose angles tell a rounded frequency from an exact one


class KeepLogits(L.Callback):
    """What the model that trained computes at the end of its run."""

    def __init__(self, file: str) -> None:
        self.file = file

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        model = pl_module.network.model.eval()
        with torch.no_grad():
            torch.save(model(input_ids=IDS).logits, self.file)


@pytest.mark.parametrize("precision", ["32-true", "bf16-true"])
@pytest.mark.parametrize("config", ["full.yaml", "lora.yaml"])
def test_its_logits_are_those_of_the_trained_model_to_the_bit(
    fit: Callable[..., Path], tmp_path: Path, config: str, precision: str
) -> None:
    key, file = "--trainer.callbacks", tmp_path / "logits.pt"
    kept = (f"{key}+={__name__}.KeepLogits", f"{key}.file", str(file), "--trainer.precision", precision)
    run = fit(tmp_path / "run", *kept, "--trainer.max_steps", "3", config=config)
    with torch.no_grad():
        assert torch.equal(opened(run / "step-00000003")(input_ids=IDS).logits, torch.load(file))


@pytest.mark.parametrize("config", ["full.yaml", "lora.yaml"])
def test_it_opens_with_transformers_and_answers_as_generate_does(
    fit: Callable[..., Path], tmp_path: Path, config: str, capsys: pytest.CaptureFixture[str]
) -> None:
    run = fit(tmp_path / "run", config=config)
    checkpoint = run / "step-00000008"
    model, tokenizer = opened(checkpoint), AutoTokenizer.from_pretrained(checkpoint)
    messages = [{"role": "system", "content": "Be brief."}, {"role": "human", "content": PROMPT}]
    text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    ids = tokenizer(text, return_tensors="pt", add_special_tokens=False)
    expected = model.generate(**ids, max_new_tokens=12, do_sample=False)[0, ids["input_ids"].shape[1] :]
    capsys.readouterr()
    asked = ["generate", "--model", str(checkpoint), "--prompt", PROMPT, "--system", "Be brief."]
    assert main([*asked, "--max_new_tokens", "12"]) == 0
    assert capsys.readouterr().out == tokenizer.decode(expected, skip_special_tokens=True) + "\n"


def test_its_tokenizer_is_the_runs_in_fewer_bytes(fit: Callable[..., Path], tmp_path: Path, tiny_model: Path) -> None:
    checkpoint = fit(tmp_path / "run", "--trainer.max_steps", "1") / "step-00000001"
    source, saved = (AutoTokenizer.from_pretrained(directory) for directory in (tiny_model, checkpoint))
    assert saved.backend_tokenizer.to_str() == source.backend_tokenizer.to_str()
    source.save_pretrained(tmp_path)
    compact, indented = (directory / "tokenizer.json" for directory in (checkpoint, tmp_path))
    assert compact.stat().st_size < indented.stat().st_size / 2


def test_a_small_adapters_checkpoint_is_under_four_times_the_adapter(
    fit: Callable[..., Path], tmp_path: Path, pythia: Path
) -> None:
    """Of a real model with its tokenizer, from r 8; the optimizer's two moments make it three times."""
    words = ("--model.pretrained_model_path", str(pythia), "--trainer.max_steps", "1", "--evaluation.strategy", "none")
    checkpoint = fit(tmp_path / "run", *words, "--model.lora.r", "8", config="lora.yaml") / "step-00000001"
    sizes = {file.name: file.stat().st_size for file in checkpoint.iterdir()}
    assert 3 * sizes["adapter_model.safetensors"] < sum(sizes.values()) < 4 * sizes["adapter_model.safetensors"]


def test_sampling_repeats_with_its_seed_and_differs_with_another(
    fit: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = fit(tmp_path / "run", "--trainer.max_steps", "2")
    answers = []
    for seed in ("1", "1", "2"):
        capsys.readouterr()
        asked = ["generate", "--model", str(run / "step-00000002"), "--prompt", PROMPT, "--max_new_tokens", "16"]
        assert main([*asked, "--temperature", "1.0", "--top_p", "0.95", "--seed", seed]) == 0
        answers.append(capsys.readouterr().out)
    assert answers[0] == answers[1] != answers[2]


def test_generate_is_a_command_that_prints_the_answer_alone(fit: Callable[..., Path], tmp_path: Path) -> None:
    run = fit(tmp_path / "run", "--trainer.max_steps", "2", config="lora.yaml")
    result = command("generate", "--model", str(run / "step-00000002"), "--prompt", PROMPT, "--max_new_tokens", "5")
    assert result.returncode == 0 and result.stdout.strip() and not result.stderr


def test_a_lora_checkpoint_holds_the_adapter_alone_over_an_untouched_base(
    fit: Callable[..., Path], tmp_path: Path, tiny_model: Path
) -> None:
    run = fit(tmp_path / "run", config="lora.yaml")
    saved = weights(run / "step-00000008")
    assert saved and all("lora_" in name for name in saved)
    assert not (run / "step-00000008" / "model.safetensors").exists()
    drawn = ModelSource(
        path=str(tiny_model),
        init="random",
        model_type="gpt_neox",
        dtype=torch.float32,
        attn_implementation="sdpa",
        trust_remote_code=False,
        seed=42,
    )
    base = AutoModelForCausalLM.from_pretrained(run / "base").state_dict()
    assert all(torch.equal(base[name], tensor) for name, tensor in build_causal_lm(drawn).state_dict().items())
    moved = [name for name, tensor in saved.items() if "lora_B" in name and tensor.any()]
    assert len(moved) == sum("lora_B" in name for name in saved)


def test_a_trained_checkpoint_is_a_base_for_the_next_run(fit: Callable[..., Path], tmp_path: Path) -> None:
    first = fit(tmp_path / "first", "--trainer.max_steps", "2") / "step-00000002"
    pretrained = ("--model.pretrained_model_path", str(first), "--model.init", "pretrained")
    second = fit(tmp_path / "second", *pretrained, "--trainer.max_steps", "2", config="lora.yaml")
    adapter = second / "step-00000002"
    assert not (second / "base").exists()
    assert f'"base_model_name_or_path": "{first}"' in (adapter / "adapter_config.json").read_text()
    assert main(["generate", "--model", str(adapter), "--prompt", "hello", "--max_new_tokens", "2"]) == 0


def test_a_moved_lora_run_answers_with_the_base_that_moved_along(
    fit: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = fit(tmp_path / "run", "--trainer.max_steps", "2", config="lora.yaml")
    asked = ["generate", "--prompt", PROMPT, "--max_new_tokens", "4", "--model"]
    capsys.readouterr()
    assert main([*asked, str(run / "step-00000002")]) == 0
    answer = capsys.readouterr().out
    run.rename(tmp_path / "moved")
    assert main([*asked, str(tmp_path / "moved" / "step-00000002")]) == 0
    assert capsys.readouterr().out == answer
    shutil.rmtree(tmp_path / "moved" / "base")
    assert main([*asked, str(tmp_path / "moved" / "step-00000002")]) == 1
    assert str(run / "base") in capsys.readouterr().err


def test_the_trainer_state_loads_without_unpickling_code(fit: Callable[..., Path], tmp_path: Path) -> None:
    run = fit(tmp_path / "run", "--trainer.max_steps", "2")
    state = torch.load(run / "step-00000002" / "trainer.pt", weights_only=True)
    assert state["global_step"] == 2 and "state_dict" not in state and state["optimizer_states"]
