"""LoRA's relatives, each by its key: a run trains, saves, goes on with the same bits, and merges as peft merges it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from mft_lightning.cli import main
from tests.integration.conftest import metrics, same_weights, weights
from tests.integration.layouts import apart, differ, in_series

STEPS = ("--evaluation.strategy", "none", "--checkpoint.save_total_limit", "null", "--trainer.max_steps", "6")
SAVED = ("--checkpoint.checkpointing_steps", "3", "--model.learning_rate", "2e-2")
NO_DROPOUT = ("--model.lora.dropout", "0")
PATTERNS = ("--model.lora.rank_pattern", '{"dense": 2, "0.attention.query_key_value": 8}')
KINDS: dict[str, tuple[str, ...]] = {
    "use_rslora": ("--model.lora.use_rslora", "true"),
    "use_dora": ("--model.lora.use_dora", "true"),
    "pissa": ("--model.lora.init", "pissa", *NO_DROPOUT),
    "pissa_niter": ("--model.lora.init", "pissa_niter_4", *NO_DROPOUT),
    "olora": ("--model.lora.init", "olora", *NO_DROPOUT),
    "loraplus": ("--model.lora.loraplus_lr_ratio", "8"),
    "patterns": (*PATTERNS, "--model.lora.alpha_pattern", '{"mlp.dense_h_to_4h": 2.5}'),
}
TENSOR_PARALLEL = ("--trainer.strategy", "fsdp", "--trainer.devices", "2", "--parallel.tensor_parallel_size", "2")
ADDED = ("--data.role_tokens", "added")
R_UNSET = ("--model.lora.r", "96")
STILL = ("--trainer.max_steps", "1", "--model.learning_rate", "1e-30", "--model.min_lr", "0")
TARGETS = ["query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"]


@pytest.fixture(scope="module")
def trained(fit: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The run of a kind, made when it is first asked for."""
    runs: dict[str, Path] = {}

    def run(kind: str) -> Path:
        if kind not in runs:
            directory = tmp_path_factory.mktemp("run") / "run"
            runs[kind] = fit(directory, *STEPS, *SAVED, *KINDS.get(kind, ()), config="lora.yaml")
        return runs[kind]

    return run


@pytest.mark.parametrize("kind", KINDS)
def test_it_learns_and_goes_on_with_the_same_bits(
    kind: str, trained: Callable[[str], Path], fit: Callable[..., Path], tmp_path: Path
) -> None:
    whole = trained(kind)
    losses = [float(row["train/loss"]) for row in metrics(whole)]
    assert losses[-1] < losses[0] - 0.2
    start = str(whole / "step-00000003")
    part = fit(tmp_path / "part", *STEPS, *SAVED, *KINDS[kind], "--ckpt_path", start, config="lora.yaml")
    assert same_weights(part / "step-00000006", whole / "step-00000006")
    assert same_weights(part / "base", whole / "base")
    ours, theirs = (torch.load(run / "step-00000006" / "trainer.pt", weights_only=True) for run in (part, whole))
    assert str(ours["optimizer_states"]) == str(theirs["optimizer_states"])
    assert metrics(part) == metrics(whole)[3:]


@pytest.mark.parametrize("kind", KINDS)
def test_it_is_merged_as_peft_merges_it(kind: str, trained: Callable[[str], Path], tmp_path: Path) -> None:
    run = trained(kind)
    checkpoint, merged = run / "step-00000006", tmp_path / "merged"
    assert main(["merge", "--adapter", str(checkpoint), "--output", str(merged)]) == 0
    base = AutoModelForCausalLM.from_pretrained(run / "base")
    theirs: Any = PeftModel.from_pretrained(base, checkpoint).merge_and_unload()
    theirs.save_pretrained(tmp_path / "theirs")
    ours, expected = weights(merged), weights(tmp_path / "theirs")
    assert ours.keys() == expected.keys()
    for name in ours:
        torch.testing.assert_close(ours[name], expected[name], rtol=0, atol=1e-6)
    plain = weights(run / "base")
    changed = {name for name in ours if (ours[name] - plain[name]).abs().max() > 1e-4}
    assert len(changed) == 8 and all(name.split(".")[-2] in TARGETS for name in changed)


def test_what_a_run_starts_from_is_its_base(trained: Callable[[str], Path]) -> None:
    """Whatever part of it the adapters begin with: it is the base of a run with plain adapters."""
    for kind in ("pissa", "olora", "use_dora"):
        assert same_weights(trained(kind) / "base", trained("plain") / "base")


def test_its_losses_are_those_of_the_model_that_opens(
    trained: Callable[[str], Path], fit_arguments: Callable[..., list[str]], tmp_path: Path
) -> None:
    """A validation over the rest of the base gives what a merged model gives, to float32's rounding."""
    measured = []
    run = trained("pissa")
    merged = tmp_path / "merged"
    assert main(["merge", "--adapter", str(run / "step-00000006"), "--output", str(merged)]) == 0
    for words in (
        [*KINDS["pissa"], "--ckpt_path", str(run / "step-00000006")],
        ["--model.peft_type", "null", "--model.pretrained_model_path", str(merged), "--model.init", "pretrained"],
    ):
        config = "lora.yaml" if "--ckpt_path" in words else "full.yaml"
        table = tmp_path / "table"
        with table.open("w") as handle, pytest.MonkeyPatch.context() as patch:
            patch.setattr("sys.stdout", handle)
            assert main(["validate", *fit_arguments(tmp_path / "out", *words, config=config)]) == 0
        measured.append(float(table.read_text().split()[-1]))
    assert abs(measured[0] - measured[1]) < 1e-5


# ---------------------------------------------------------------- starting from another adapter


def test_a_run_starts_from_a_checkpoint_of_another_kind_of_run(
    trained: Callable[[str], Path], fit: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its shape comes along, its weights are the first, the optimizer begins anew; the run resumes without it."""
    source = tmp_path / "source"
    shutil.copytree(trained("patterns") / "step-00000006", source)
    words = (*STEPS, *SAVED, "--model.lora.start_from", str(source))
    capsys.readouterr()
    whole = fit(tmp_path / "whole", *words, config="lora.yaml")
    assert "'dense': 2" in (said := capsys.readouterr().out) and f"from {source}" in said
    still = fit(tmp_path / "still", *words, *STILL, config="lora.yaml")
    assert same_weights(still / "step-00000001", source)
    first = json.loads((whole / "step-00000003" / "adapter_config.json").read_text())
    then = json.loads((source / "adapter_config.json").read_text())
    assert set(first.pop("target_modules")) == set(then.pop("target_modules"))
    assert first | {"base_model_name_or_path": ""} == then | {"base_model_name_or_path": ""}
    state = torch.load(whole / "step-00000003" / "trainer.pt", weights_only=True)
    assert state["global_step"] == 3 and state["optimizer_states"][0]["state"][0]["step"] == 3
    part = fit(tmp_path / "part", *words, "--ckpt_path", str(whole / "step-00000003"), config="lora.yaml")
    assert same_weights(part / "step-00000006", whole / "step-00000006")
    losses = [float(row["train/loss"]) for run in (trained("plain"), whole) for row in metrics(run)[:1]]
    assert losses[1] < losses[0] - 0.2


def test_a_run_starts_from_an_adapter_that_peft_alone_made(
    trained: Callable[[str], Path], fit: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """On one layer only, which a key of peft's own chooses; in the file of older versions."""
    config = LoraConfig(r=3, lora_alpha=5, target_modules=["attention.dense"], layers_to_transform=[1], use_rslora=True)
    config.init_lora_weights = False
    base = AutoModelForCausalLM.from_pretrained(trained("plain") / "base")
    theirs: Any = get_peft_model(base, config)
    theirs.save_pretrained(tmp_path / "theirs", safe_serialization=False)
    words = (*STEPS, *STILL, *R_UNSET, "--model.lora.start_from", str(tmp_path / "theirs"))
    run = fit(tmp_path / "run", *words, config="lora.yaml")
    assert "was trained on this base is not known (it does not tell)" in capsys.readouterr().out
    ours = weights(run / "step-00000001")
    saved = torch.load(tmp_path / "theirs" / "adapter_model.bin", weights_only=True)
    assert ours.keys() == saved.keys() and len(ours) == 2
    assert all(torch.equal(ours[name], saved[name]) for name in ours)


@pytest.mark.parametrize("kind", ["pissa", "use_dora"])
def test_a_run_starts_from_an_adapter_with_copies(
    kind: str, fit: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Embeddings and head with rows for new tokens: the source's to the bit, then they train, resume and merge."""
    common = (*STEPS, *SAVED, *ADDED, "--trainer.max_steps", "2", "--checkpoint.checkpointing_steps", "1")
    source = fit(tmp_path / "source", *common, *KINDS[kind], config="lora.yaml") / "step-00000002"
    words = (*common, *R_UNSET, *KINDS["loraplus"], "--model.lora.start_from", str(source))
    capsys.readouterr()
    whole = fit(tmp_path / "whole", *words, config="lora.yaml")
    assert "whole       embed_in, lm_head (model.lora.start_from)\n" in (said := capsys.readouterr().out)
    assert f"8 times that for lora_B{' and what is no matrix' if kind == 'use_dora' else ''}\n" in said
    still = fit(tmp_path / "still", *words, *STILL, config="lora.yaml")
    assert same_weights(still / "step-00000001", source)
    part = fit(tmp_path / "part", *words, "--ckpt_path", str(whole / "step-00000001"), config="lora.yaml")
    assert same_weights(part / "step-00000002", whole / "step-00000002")
    assert apart(weights(whole / "step-00000002"), weights(source)) > 1e-3

    merged = tmp_path / "merged"
    assert main(["merge", "--adapter", str(whole / "step-00000002"), "--output", str(merged)]) == 0
    base = AutoModelForCausalLM.from_pretrained(whole / "base")
    theirs: Any = PeftModel.from_pretrained(base, whole / "step-00000002").merge_and_unload()
    ours = AutoModelForCausalLM.from_pretrained(merged)
    assert all(torch.equal(tensor, theirs.state_dict()[name]) for name, tensor in ours.state_dict().items())

    fit(tmp_path / "text", *words, "--data.role_tokens", "text", *STILL, config="lora.yaml")
    assert "was trained with data.role_tokens added, here text" in capsys.readouterr().out


def test_starting_from_what_does_not_fit_is_refused(
    trained: Callable[[str], Path], refused: Callable[..., str], tmp_path: Path
) -> None:
    def message(directory: Path, *words: str) -> str:
        return refused(tmp_path / "out", "--model.lora.start_from", str(directory), *words, config="lora.yaml")

    adapter = trained("plain") / "step-00000006"
    assert "model.lora.r: is 8, but 4 in" in message(adapter, "--model.lora.r", "8")
    assert "model.lora.use_dora: is True, but False in" in message(adapter, *KINDS["use_dora"])
    assert "says what adapters start with" in message(adapter, *KINDS["pissa"])
    assert "was trained on another base (digest" in message(adapter, "--seed_everything", "7")
    assert "start_from: " in (wide := message(adapter, "--model.pretrained_model_path", "examples/model"))
    assert "holds other weights than this run's model" in wide
    assert "holds no adapter" in message(adapter.parent)
    damaged = tmp_path / "damaged"
    shutil.copytree(adapter, damaged)
    tensors = load_file(damaged / "adapter_model.safetensors")
    save_file({name: tensor + 1 for name, tensor in tensors.items()}, damaged / "adapter_model.safetensors")
    assert "adapter_model.safetensors" in message(damaged)
    (damaged / "checkpoint.json").unlink()  # which told it
    first, *_ = sorted(tensors)
    save_file({**tensors, first: tensors[first] * float("nan")}, damaged / "adapter_model.safetensors")
    assert "is not finite; the weights are damaged" in message(damaged)
    config = json.loads((damaged / "adapter_config.json").read_text())
    for change, text in (
        ({"bias": "all", "trainable_token_indices": [1]}, "has bias, trainable_token_indices, which cannot be trained"),
        ({"init_lora_weights": "pissa"}, "path_initial_model_for_weight_conversion"),
        ({"peft_type": "LOHA"}, "only LoRA's can be trained"),
        ({"target_modules": ["nothing"]}, "Target modules"),
        ({"r": "four"}, "cannot be used ("),
        ({"lora_alpha": 0}, "cannot be used (model.lora.alpha: 0 is no number above 0"),
        ({"target_modules": 5}, "cannot be used ("),
        ({"rank_pattern": {"den(se": 2}}, "cannot be used (model.lora.rank_pattern: 'den(se' is no regular"),
        ({"rank_pattern": [1]}, "cannot be used ("),
        ({"of_tomorrow": True}, "has of_tomorrow, which this version of peft does not know"),
    ):
        (damaged / "adapter_config.json").write_text(json.dumps(config | change))
        assert text in message(damaged, *R_UNSET)


# ---------------------------------------------------------------- other settings on resume, other layouts


@pytest.mark.parametrize(
    ("kind", "words", "said"),
    [
        ("plain", KINDS["use_rslora"], "query_key_value, use_rslora'"),
        ("plain", ("--model.lora.alpha_pattern", '{"dense": 3}'), "alpha_pattern"),
        ("plain", KINDS["loraplus"], "model.lora.loraplus_lr_ratio was None, is 'set'"),
        ("plain", KINDS["use_dora"], "Check model.peft_type and model.lora"),
        ("plain", KINDS["pissa"], "Check model.peft_type and model.lora"),
        ("pissa", KINDS["olora"], "init pissa', is"),
        ("pissa", ("--model.lora.r", "8", "--model.lora.alpha", "64"), "model.lora was"),
    ],
)
def test_going_on_with_other_adapters_is_refused(
    kind: str,
    words: tuple[str, ...],
    said: str,
    trained: Callable[[str], Path],
    refused: Callable[..., str],
    tmp_path: Path,
) -> None:
    checkpoint = str(trained(kind) / "step-00000003")
    assert said in refused(tmp_path / "out", *words, "--ckpt_path", checkpoint, config="lora.yaml")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--model.lora.init", "pissa"), "Set model.lora.dropout: 0"),
        (("--model.lora.init", "pisa"), "is none of default, pissa, pissa_niter_16, olora"),
        ((*KINDS["pissa"], "--model.lora.r", "40"), "model.lora.r: 40 is more than gpt_neox.layers.0"),
        ((*KINDS["pissa"], "--model.peft_type", "qlora"), "model.lora.init: needs the base's own weights"),
        ((*KINDS["pissa"], "--model.lora.rank_pattern", '{"dense": 40}'), "rank_pattern: 40 is more than gpt_neox"),
        (("--model.lora.rank_pattern", '{"nothing": 2}'), "model.lora.rank_pattern: 'nothing' is no name"),
        (("--model.lora.rank_pattern", '{"dense": 0}'), "model.lora.rank_pattern: 'dense' has 0"),
        (("--model.lora.alpha_pattern", '{"den(se": 1}'), "model.lora.alpha_pattern: 'den(se' is no regular"),
        (("--model.lora.alpha_pattern", '{"dense": 0}'), "no number above 0"),
        (("--model.lora.loraplus_lr_ratio", "0.5"), "model.lora.loraplus_lr_ratio: 0.5 is no number from 1 on"),
        (("--model.peft_type", "null", *KINDS["use_dora"]), "Set model.peft_type: lora"),
        ((*KINDS["pissa"], "--trainer.strategy", "fsdp", "--checkpoint.sharded", "true"), "checkpoint.sharded: has no"),
        ((*KINDS["use_dora"], *TENSOR_PARALLEL), "model.lora.use_dora: needs the norms of whole matrices"),
    ],
)
def test_what_cannot_work_is_refused_at_once(
    words: tuple[str, ...], said: str, refused: Callable[..., str], tmp_path: Path
) -> None:
    assert said in refused(tmp_path / "out", *words, config="lora.yaml")


ON_TWO_RANKS: dict[str, tuple[str, str, tuple[str, ...]]] = {
    "ddp dora": ("dora", "ddp", ()),
    "fsdp pissa": ("pissa", "fsdp", ()),
    "fsdp dora": ("dora", "fsdp", ("--checkpoint.sharded", "true")),
    "tensor pissa": ("pissa", "fsdp", ("--parallel.tensor_parallel_size", "2")),
}


def test_two_ranks_take_the_steps_of_one(
    fit: Callable[..., Path], fit_arguments: Callable[..., list[str]], tmp_path: Path
) -> None:
    """With patterns, rsLoRA and LoRA+ too, from a sketch or whole; and one process goes on from any of them."""
    common = (*STEPS, *SAVED, *NO_DROPOUT, *PATTERNS, *KINDS["use_rslora"], *KINDS["loraplus"])
    common += ("--trainer.precision", "64-true", "--trainer.max_steps", "4", "--checkpoint.checkpointing_steps", "2")
    kinds = {"pissa": KINDS["pissa"], "dora": KINDS["use_dora"]}
    for kind, words in kinds.items():
        fit(tmp_path / kind, *common, *words, config="lora.yaml")
    lines = []
    for name, (kind, strategy, words) in ON_TWO_RANKS.items():
        all_words = (*common, *kinds[kind], "--trainer.strategy", strategy, *words)
        lines.append(["fit", *fit_arguments(tmp_path / name, *all_words, config="lora.yaml")])
    in_series(2, lines, tmp_path)
    for name, (kind, _, words) in ON_TWO_RANKS.items():
        assert differ(metrics(tmp_path / kind), metrics(tmp_path / name)) < 1e-5, name
        assert same_weights(tmp_path / kind / "base", tmp_path / name / "base")
        whole, part = tmp_path / kind, tmp_path / name
        if words:
            start = ("--ckpt_path", str(part / "step-00000002"))
            part = fit(tmp_path / f"from {name}", *common, *kinds[kind], *start, config="lora.yaml")
        assert apart(weights(whole / "step-00000004"), weights(part / "step-00000004")) < 1e-9, name
    sharded = str(tmp_path / "fsdp dora" / "step-00000004")
    still = fit(tmp_path / "still", *common, "--model.lora.start_from", sharded, *R_UNSET, *STILL, config="lora.yaml")
    assert apart(weights(tmp_path / "dora" / "step-00000004"), weights(still / "step-00000001")) < 1e-9
