"""``generate``: a prompt's answer, or one for every conversation of a file, in order, however they are batched."""

from __future__ import annotations

import gzip
import json
import os
import pty
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from mft_lightning.cli import main
from mft_lightning.training.checkpoint_dirs import read_metadata, write_metadata
from tests.integration import preloaded
from tests.integration.conftest import read_terminal, user_environment

ROOT = Path(__file__).resolve().parents[2]
Ask = Callable[..., str]


@pytest.fixture(scope="module")
def adapter(fit: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    words = ("--trainer.max_steps", "4", "--evaluation.strategy", "none", "--model.learning_rate", "0.1")
    return fit(tmp_path_factory.mktemp("lora"), *words, config="lora.yaml") / "step-00000004"


@pytest.fixture
def ask(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> Ask:
    """``ask("--prompt", "…")``: what ``generate`` prints, with nothing on stderr."""

    def run(*words: str, model: Path = checkpoint, max_new_tokens: int = 40) -> str:
        capsys.readouterr()
        asked = ["generate", "--model", str(model), "--max_new_tokens", str(max_new_tokens), "--device", "cpu", *words]
        assert main(asked) == 0
        printed = capsys.readouterr()
        assert not printed.err
        return printed.out

    return run


@pytest.fixture
def refuse(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """The one message with which ``generate`` refuses; nothing is printed to stdout."""

    def run(*words: str) -> str:
        capsys.readouterr()
        assert main(["generate", "--model", str(checkpoint), "--max_new_tokens", "4", *words]) == 1
        printed = capsys.readouterr()
        assert not printed.out
        assert printed.err.startswith("error: ") and "Traceback" not in printed.err
        return printed.err

    return run


def conversations() -> list[dict[str, Any]]:
    """Of all examples and forms, short and long, with and without a reference; the last is near the last position."""
    found: list[dict[str, Any]] = []
    for task in ("text_to_code", "code_explanation", "unit_tests"):
        lines = (ROOT / "examples" / "quickstart" / task / "part_0.jsonl").read_text().splitlines()[:8]
        found += [json.loads(line) for line in lines]
    for record in found[::3]:
        record["chat_rounds"] = record["chat_rounds"][:-1]
    found.insert(5, {"messages": [{"role": "user", "content": "Write a test."}]})
    found.insert(0, {"prompt": "Write a test for this function:\n\ndef check_size(size):\n    return size != 7"})
    found.insert(9, {"system": "Be brief.", "prompt": "Explain `price`.", "answer": "It is\u2028a price, été."})
    found.insert(14, {"prompt": "a b " * 110, "answer": "no room"})
    return found


def question(record: dict[str, Any]) -> tuple[list[dict[str, str]], str | None]:
    """The turns to answer, and the reference."""
    if "prompt" in record:
        system = [{"role": "system", "content": record["system"]}] if "system" in record else []
        return [*system, {"role": "user", "content": record["prompt"]}], record.get("answer")
    turns = record.get("chat_rounds") or record["messages"]
    return (turns[:-1], turns[-1]["content"]) if turns[-1]["role"] == "bot" else (turns, None)


def written(file: Path, records: list[dict[str, Any]]) -> Path:
    """A record in every other line, from the second on."""
    lines = ["\n" + json.dumps(record) + "\n" for record in records]
    file.parent.mkdir(exist_ok=True)
    file.write_text("".join(lines))
    return file


def alone(checkpoint: Path, turns: list[dict[str, str]], limit: int) -> tuple[str, str]:
    """The answer and finish reason as transformers gives them, through the chat template of the checkpoint."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(checkpoint), AutoTokenizer.from_pretrained(checkpoint)
    text = tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)
    ids = tokenizer(text, return_tensors="pt", add_special_tokens=False)
    room = 512 - ids["input_ids"].shape[1]
    output = model.generate(**ids, max_new_tokens=min(limit, room), do_sample=False)[0, ids["input_ids"].shape[1] :]
    finished = tokenizer.eos_token_id in output.tolist()
    return tokenizer.decode(output, skip_special_tokens=True), "stop" if finished else "length"


def test_every_conversation_is_answered_in_order_whatever_the_batch(ask: Ask, checkpoint: Path, tmp_path: Path) -> None:
    records = conversations()
    file = written(tmp_path / "asked.jsonl", records)
    outputs = [ask("--input", str(file), "--batch_size", size) for size in ("1", "3", "64")]
    assert outputs[0] == outputs[1] == outputs[2] == ask("--input", str(file))
    answers = [json.loads(line) for line in outputs[0].rstrip("\n").split("\n")]
    assert [found["line"] for found in answers] == [2 * (i + 1) for i in range(len(records))]
    for record, found in zip(records, answers, strict=True):
        turns, reference = question(record)
        answer, reason = alone(checkpoint, turns, 40)
        expected = {"line": found["line"], "prompt": turns[-1]["content"], "answer": answer, "finish_reason": reason}
        assert found == expected | ({} if reference is None else {"reference": reference})
    assert {found["finish_reason"] for found in answers} == {"stop", "length"}
    assert len({found["answer"] for found in answers}) > len(answers) // 2
    assert "été" in outputs[0]  # readable as it is


def test_a_file_answers_as_one_prompt_each_does(ask: Ask, tmp_path: Path) -> None:
    records = [record for record in conversations() if len(question(record)[0]) == 1][::2]
    records.append({"system": "Be brief.", "prompt": "Explain `price`."})
    file = written(tmp_path / "asked.jsonl", records)
    answers = [json.loads(line)["answer"] for line in ask("--input", str(file)).splitlines()]
    for record, answer in zip(records, answers, strict=True):
        system = ["--system", record["system"]] if "system" in record else []
        assert ask("--prompt", question(record)[0][-1]["content"], *system) == answer + "\n"
    assert len(answers) > 4


def test_a_gzip_file_is_read_like_plain_text(ask: Ask, tmp_path: Path) -> None:
    file = written(tmp_path / "asked.jsonl", conversations()[:4])
    packed = tmp_path / "asked.jsonl.gz"
    packed.write_bytes(gzip.compress(file.read_bytes()))
    assert ask("--input", str(packed)) == ask("--input", str(file))


@pytest.mark.parametrize("settings", [("--repetition_penalty", "1.8"), ("--num_beams", "3")], ids=str)
def test_a_penalty_and_beams_lead_to_other_answers_and_batches_to_the_same(
    ask: Ask, tmp_path: Path, settings: tuple[str, str]
) -> None:
    file = str(written(tmp_path / "asked.jsonl", conversations()[:6]))
    found = ask("--input", file, "--batch_size", "6", *settings)
    assert found == ask("--input", file, "--batch_size", "1", *settings)
    assert found != ask("--input", file)


def test_a_draw_depends_on_its_seed_and_its_conversation_alone(ask: Ask, tmp_path: Path) -> None:
    records = conversations()[:6]
    file, turned = written(tmp_path / "asked.jsonl", records), written(tmp_path / "turned.jsonl", records[3::-1])
    how = ("--temperature", "1.5", "--top_k", "50")
    draws = [ask("--input", str(file), *how, "--seed", seed) for seed in ("1", "1", "2")]
    assert draws[0] == draws[1] != draws[2]
    assert draws[0] != ask("--input", str(file))
    found = [json.loads(line)["answer"] for line in draws[0].splitlines()]
    other = ask("--input", str(turned), *how, "--seed", "1", "--batch_size", "3")
    assert [json.loads(line)["answer"] for line in other.splitlines()] == found[3::-1]
    assert ask("--prompt", records[0]["prompt"], *how, "--seed", "1") == found[0] + "\n"


@pytest.mark.parametrize("command", ["generate", "chat", "predict"])
def test_the_help_lists_the_presets(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main([command, "--help"])
    assert end.value.code == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "greedy: the likeliest token every time; beam: num_beams 3; code: temperature 0.1, top_p 0.95." in said
    assert "0 takes the likeliest token every time; above, tokens are drawn. Default: 0.0, or the preset's." in said


def test_a_preset_is_a_start_that_single_options_override(ask: Ask, tmp_path: Path) -> None:
    file = str(written(tmp_path / "asked.jsonl", conversations()[:6]))
    asked = ("--input", file)
    assert ask(*asked, "--preset", "greedy") == ask(*asked)
    beams = ask(*asked, "--preset", "beam")
    assert beams == ask(*asked, "--num_beams", "3") != ask(*asked)
    assert ask(*asked, "--preset", "beam", "--num_beams", "1") == ask(*asked)
    code = ask(*asked, "--preset", "code", "--temperature", "2")
    assert code == ask(*asked, "--temperature", "2", "--top_p", "0.95") != ask(*asked, "--temperature", "2")


def test_an_adapter_answers_in_batches_as_alone_and_otherwise_than_its_base(
    ask: Ask, adapter: Path, tmp_path: Path
) -> None:
    file = str(written(tmp_path / "asked.jsonl", conversations()[:6]))
    outputs = [ask("--input", file, "--batch_size", size, model=adapter) for size in ("1", "4")]
    assert outputs[0] == outputs[1]
    prompt = conversations()[0]["prompt"]
    answer = ask("--prompt", prompt, model=adapter)
    assert json.loads(outputs[0].splitlines()[0])["answer"] + "\n" == answer
    base = AutoModelForCausalLM.from_pretrained(adapter.parent / "base")
    tokenizer = AutoTokenizer.from_pretrained(adapter)
    text = tokenizer.apply_chat_template([{"role": "user", "content": prompt}], add_generation_prompt=True, tokenize=0)
    ids = tokenizer(text, return_tensors="pt", add_special_tokens=False)
    plain = base.generate(**ids, max_new_tokens=40, do_sample=False)[0, ids["input_ids"].shape[1] :]
    assert tokenizer.decode(plain, skip_special_tokens=True) + "\n" != answer


def test_punctuation_is_normalized_where_training_did(ask: Ask, checkpoint: Path, tmp_path: Path) -> None:
    prompt = "Write a test for this function:\n\ndef check_size(size):\n    return size != 7"
    full = prompt.translate(str.maketrans(":()!", "\uff1a\uff08\uff09\uff01"))
    asked = ("--prompt", full)
    assert ask(*asked) != ask("--prompt", prompt)
    model = tmp_path / "normalizing"
    shutil.copytree(checkpoint, model)
    metadata = read_metadata(model)
    metadata["chat_format"]["normalize_punctuation"] = True
    write_metadata(model, metadata)
    assert ask(*asked, model=model) == ask("--prompt", prompt)
    file = written(tmp_path / "asked.jsonl", [{"prompt": full}])
    assert json.loads(ask("--input", str(file), model=model))["prompt"] == full


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_the_weights_may_be_held_in_another_dtype(ask: Ask, dtype: str) -> None:
    answer = ask("--prompt", conversations()[0]["prompt"], "--dtype", dtype, max_new_tokens=3)
    assert answer == ask("--prompt", conversations()[0]["prompt"], max_new_tokens=3) != "\n"


# --- refusals


BAD_LINES = {
    "not JSON": ('{"prompt": "a"', "not valid JSON", "invalid-json"),
    "text": ('{"text": "a"}', "text: is plain text", "text"),
    "system alone": ('{"messages": [{"role": "system", "content": "a"}]}', "no human turn to answer", "no-question"),
    "no content": ('{"messages": [{"role": "user"}]}', "messages[0].content: is missing", "missing-content"),
}


@pytest.mark.parametrize(("line", "detail", "reason"), BAD_LINES.values(), ids=BAD_LINES.keys())
def test_a_bad_line_is_refused_by_file_and_line_before_any_answer(
    refuse: Callable[..., str], tmp_path: Path, line: str, detail: str, reason: str
) -> None:
    file = written(tmp_path / "asked.jsonl", conversations()[:2])
    with file.open("a") as handle:
        handle.write(f"\n\n{line}\n")
    message = refuse("--input", str(file))
    assert f"{file}:7: " in message and detail in message and f"[{reason}]" in message


def test_a_prompt_without_room_for_an_answer_is_refused_by_file_and_line(
    refuse: Callable[..., str], ask: Ask, checkpoint: Path, tmp_path: Path
) -> None:
    """512 positions: a prompt of 511 tokens still has room for one."""
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)

    def count(content: str) -> int:
        turns = [{"role": "user", "content": content}]
        return len(
            tokenizer(tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)).input_ids
        )

    content = next("~" * n for n in range(300, 512) if count("~" * n) == 511)
    file = written(tmp_path / "asked.jsonl", [{"prompt": "a"}, {"prompt": content}])
    assert json.loads(ask("--input", str(file)).splitlines()[1])["line"] == 4
    written(file, [{"prompt": "a"}, {"prompt": content + "~"}])
    message = refuse("--input", str(file))
    assert f"{file}:4: has 512 tokens; the model has 512 positions" in message
    assert "--prompt: has 512 tokens" in refuse("--prompt", content + "~")


@pytest.mark.parametrize("content", ["", "\n \n\n", "\ufeff\n"], ids=repr)
def test_a_file_without_a_conversation_is_refused(refuse: Callable[..., str], tmp_path: Path, content: str) -> None:
    file = tmp_path / "asked.jsonl"
    file.write_text(content)
    assert f"--input {file}: holds no conversation" in refuse("--input", str(file))


def test_a_file_that_is_not_there_is_refused(refuse: Callable[..., str], tmp_path: Path) -> None:
    assert str(tmp_path / "none.jsonl") in refuse("--input", str(tmp_path / "none.jsonl"))


@pytest.mark.parametrize(
    ("words", "names"),
    [
        ((), "either --prompt TEXT or --input"),
        (("--prompt", "a", "--input", "asked.jsonl"), "either --prompt TEXT or --input"),
        (("--input", "asked.jsonl", "--system", "Be brief."), "--system: goes with --prompt"),
        (("--prompt", "a", "--device", "gpu"), "--device gpu: "),
        (("--prompt", "a", "--device", "cuda:77"), "--device cuda:77: "),
        (("--prompt", "a", "--device", "meta"), "--device meta: computes nothing"),
        (("--prompt", "a", "--seed", "99999999999999999999999"), "seed: 99999999999999999999999 is no number"),
        (("--prompt", "a\udcff"), "--prompt: is not UTF-8 (character 1)"),
        (("--prompt", "a", "--system", "\udcff"), "--system: is not UTF-8"),
        (("--prompt", "null", "--input", "asked.jsonl"), "either --prompt TEXT or --input"),
        (("--prompt", "a", "--dtype", "int8"), "--dtype: 'int8' is none of auto, float32, bfloat16, float16"),
        (("--prompt", "a", "--batch_size", "0"), "--batch_size: 0 is less than 1"),
        (("--prompt", "a", "--batch_size", "two"), "batch_size"),
        (("--prompt", "a", "--max_new_tokens", "0"), "max_new_tokens: 0 is less than 1"),
        (("--prompt", "a", "--temperature", "-1"), "temperature: -1.0"),
        (("--prompt", "a", "--top_p", "0.9"), "top_p: 0.9 has no effect at temperature 0"),
        (("--prompt", "a", "--preset", "cod"), "--preset: 'cod' is none of greedy, beam, code"),
        (
            ("--prompt", "a", "--preset", "code", "--temperature", "0"),
            "nothing is drawn. Set temperature too. (--preset code: temperature 0.1, top_p 0.95.)",
        ),
        (("--prompt", "a", "--preset", "beam", "--temperature", "1"), "num_beams: 3 searches for the likeliest"),
        (("--prompt", "a", "--num_beams", "0"), "num_beams: 0 is less than 1"),
        (("--prompt", "a", "--repetition_penalty", "0"), "repetition_penalty: 0.0"),
        (("--prompt", "a", "--temprature", "1"), "temprature: there is no such key. The nearest is temperature"),
        (("--prompt", "a", "--batchsize", "1"), "The nearest is batch_size"),
        (("--input", "~nosuchuser/x"), "--input ~nosuchuser/x: nobody has that home directory"),
        (("--prompt", "a", "--model", "~nosuchuser/x"), "--model ~nosuchuser/x: nobody has that home directory"),
        (("--prompt", "a", "--model", "x" * 300), "cannot be used (File name too long)"),
        (("--prompt", "a", "--model", "/no/such"), "--model /no/such: is no directory"),
        (("--prompt", "a", "--model", str(ROOT / "docs")), f"--model {ROOT / 'docs'}: holds no model"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_what_cannot_be_asked_is_refused_and_named(
    refuse: Callable[..., str], words: tuple[str, ...], names: str
) -> None:
    if "cuda:77" in words and torch.cuda.device_count() > 77:
        pytest.skip("there is such a device")
    assert names in refuse(*words)


def test_an_adapter_on_another_base_than_its_run_s_is_refused(
    adapter: Path, checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    shutil.copytree(adapter, run / adapter.name)
    shutil.copytree(checkpoint, run / "base")
    config = run / adapter.name / "adapter_config.json"
    config.write_text(config.read_text().replace(str(adapter.parent), str(run)))
    assert main(["generate", "--model", str(run / adapter.name), "--prompt", "a"]) == 1
    assert "is not the base that" in capsys.readouterr().err


def test_what_yaml_reads_as_nothing_can_be_asked(ask: Ask) -> None:
    assert ask("--prompt", "null") and ask("--prompt", "~")


def test_an_adapter_whose_base_is_gone_is_refused_until_it_is_given(
    adapter: Path, checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    moved = tmp_path / "step-00000004"
    moved.mkdir()
    for file in adapter.iterdir():
        text = file.read_bytes()
        (moved / file.name).write_bytes(text.replace(str(adapter.parent).encode(), b"/no/such"))
    words = ["generate", "--model", str(moved), "--prompt", "a", "--max_new_tokens", "4"]
    assert main(words) == 1
    assert "/no/such/base, which is not there. Say where it is with --base." in capsys.readouterr().err
    assert main(["generate", "--model", str(adapter), *words[3:]]) == 0
    expected = capsys.readouterr()
    assert main([*words, "--base", str(adapter.parent / "base")]) == 0
    assert capsys.readouterr() == expected
    assert main([*words, "--base", str(checkpoint)]) == 1
    assert f"--base {checkpoint}: is not the base that step-00000004 was trained on" in capsys.readouterr().err
    assert main(["generate", "--model", str(checkpoint), *words[3:], "--base", str(checkpoint)]) == 1
    assert "is of an adapter, and --model" in capsys.readouterr().err


def test_a_reader_that_has_enough_ends_the_command_in_peace(checkpoint: Path, tmp_path: Path) -> None:
    file = written(tmp_path / "asked.jsonl", [{"prompt": "a"}] * 200)
    words = ["--model", str(checkpoint), "--input", str(file), "--max_new_tokens", "1", "--batch_size", "1"]
    (answers, theirs), errors = os.pipe(), tmp_path / "errors"
    with os.fdopen(answers) as output, errors.open("w") as handle:
        process = preloaded.start(
            ["-m", "mft_lightning", "generate", *words], user_environment(), 0, theirs, handle.fileno()
        )
        os.close(theirs)
        assert json.loads(output.readline())["line"] == 2
    assert preloaded.exit_code(process) == 0
    assert not errors.read_text()


def test_answers_go_to_standard_output_while_a_bar_is_on_the_terminal(checkpoint: Path, tmp_path: Path) -> None:
    file = written(tmp_path / "asked.jsonl", [{"prompt": "a"}] * 20)
    words = ["--model", str(checkpoint), "--input", str(file), "--max_new_tokens", "1", "--batch_size", "1"]
    environment = {**user_environment(), "TERM": "xterm-256color"}
    mine, theirs = pty.openpty()
    with (tmp_path / "answers.jsonl").open("w") as answers:
        process = preloaded.start(["-m", "mft_lightning", "generate", *words], environment, 0, answers.fileno(), theirs)
        os.close(theirs)
        shown = read_terminal(mine)
        assert preloaded.exit_code(process) == 0
    found = [json.loads(text)["line"] for text in (tmp_path / "answers.jsonl").read_text().splitlines()]
    assert found == list(range(2, 42, 2))
    assert "answering" in shown and "100%" in shown and "finish_reason" not in shown
