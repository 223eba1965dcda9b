"""``predict``: a split answered in the order of the data, the same after a kill and on any number of devices."""

from __future__ import annotations

import json
import os
import re
import signal
import time
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from mft_lightning.cli import main
from mft_lightning.commands.answered import write_answers
from mft_lightning.model.generation import Answer
from mft_lightning.training.asking import Asking
from tests.integration import preloaded
from tests.integration.conftest import user_environment
from tests.integration.layouts import in_series

Arguments = Callable[..., list[str]]
ASKED = ("--max_new_tokens", "30", "--batch_size", "4")


@pytest.fixture(scope="module")
def arguments(checkpoint: Path, fit_arguments: Arguments) -> Arguments:
    """``arguments(output, "--option", "value")`` of ``predict``, on the run that all tests of answers share."""

    def of(output: Path, *words: str) -> list[str]:
        shared = fit_arguments(checkpoint.parent, "--evaluation.max_conversations_per_task", "null")
        return ["predict", *shared, "--ckpt_path", "last", "--output", str(output), *ASKED, *words]

    return of


@pytest.fixture(scope="module")
def whole(arguments: Arguments, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What an undisturbed run on one process writes."""
    output = tmp_path_factory.mktemp("whole") / "answers.jsonl"
    assert main(arguments(output, "--limit", "6")) == 0
    return output


def lines(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def source(found: dict[str, Any]) -> list[dict[str, str]]:
    """The turns of the record that a line names, up to its last bot turn."""
    record = json.loads(Path(found["file"]).read_text().splitlines()[found["line"] - 1])
    turns = record["chat_rounds"]
    return turns[: max(place for place, turn in enumerate(turns) if turn["role"] == "bot") + 1]


def test_answers_are_those_of_transformers_alone(whole: Path, checkpoint: Path) -> None:
    model, tokenizer = AutoModelForCausalLM.from_pretrained(checkpoint), AutoTokenizer.from_pretrained(checkpoint)
    answers = lines(whole)
    assert len(answers) == 18 and {found["split"] for found in answers} == {"valid"}
    for found in answers:
        *history, reference = source(found)
        ids = tokenizer.apply_chat_template(history, add_generation_prompt=True, return_tensors="pt", return_dict=True)
        output = model.generate(**ids, max_new_tokens=30, do_sample=False)[0, ids["input_ids"].shape[1] :]
        answer, ended = tokenizer.decode(output, skip_special_tokens=True), tokenizer.eos_token_id in output.tolist()
        assert found["answer"] == answer and found["finish_reason"] == ("stop" if ended else "length")
        assert (found["prompt"], found["reference"]) == (history[-1]["content"], reference["content"])
        assert found["exact_match"] == (ended and answer == reference["content"])
    assert len({found["answer"] for found in answers}) > 9
    assert {found["finish_reason"] for found in answers} == {"stop", "length"}


def test_every_conversation_is_there_once_in_the_order_of_the_data(
    arguments: Arguments, example_tasks: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "all.jsonl"
    words = ("--split", "all", "--max_new_tokens", "1", "--batch_size", "64")
    assert main(arguments(output, *words)) == 0
    expected = []
    for task in map(Path, example_tasks):
        for file in sorted(task.glob("*.jsonl")):
            expected += [(task.name, str(file), n) for n in range(1, len(file.read_text().splitlines()) + 1)]
    answers = lines(output)
    assert [(found["task"], found["file"], found["line"]) for found in answers] == expected
    assert {found["split"] for found in answers} == {"train", "valid"}
    assert "answering 1,240 conversations of train, valid, test" in capsys.readouterr().out


def test_the_summary_counts_the_lines(
    arguments: Arguments, whole: Path, checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of data whose references are, every other time, what the model says."""
    again = []
    for task in ("text_to_code", "code_explanation", "unit_tests"):
        records = []
        for number, found in enumerate(line for line in lines(whole) if line["task"] == task):
            *history, reference = source(found)
            answer = found["answer"] if number % 2 == 0 and found["answer"] else reference["content"]
            records.append({"chat_rounds": [*history, {"role": "bot", "content": answer}]})
        directory = tmp_path / "valid" / task
        directory.mkdir(parents=True)
        (directory / "part.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
        again.append(str(directory))
    output = tmp_path / "out" / "answers.jsonl"
    capsys.readouterr()
    valid = ("--data.valid_data_paths", f"[{','.join(again)}]", "--data.data_split", "null")
    assert main(arguments(output, *valid, "--split", "valid")) == 0
    printed, answers = capsys.readouterr().out, lines(output)
    assert [found["answer"] for found in answers] == [found["answer"] for found in lines(whole)]
    exact = [found["answer"] == found["reference"] and found["finish_reason"] == "stop" for found in answers]
    assert [found["exact_match"] for found in answers] == exact and 0 < sum(exact) < 9
    summary = json.loads((output.parent / "answers.summary.json").read_text())
    assert sum(task["conversations"] for task in summary["tasks"].values()) == len(answers) == 18
    for name, task in summary["tasks"].items():
        of = [found for found in answers if found["task"] == name]
        assert task["exact_match"] == sum(found["exact_match"] for found in of)
        assert task["exact_match_share"] == task["exact_match"] / len(of)
        assert task["cut_at_a_limit"] == sum(found["finish_reason"] == "length" for found in of)
        assert re.search(rf"{name} +{task['exact_match']} of 6 +{task['exact_match_share']:.1%}", printed)
    assert sorted(path.name for path in output.parent.iterdir()) == ["answers.jsonl", "answers.summary.json"]
    assert summary["checkpoint"] == str(checkpoint) and summary["settings"]["max_new_tokens"] == 30


def wait_for(process: BaseProcess, parts: Path, batches: int) -> None:
    deadline = time.monotonic() + 120
    while sum(file.read_bytes().count(b"\n") for file in parts.glob("part-*.jsonl")) < batches:
        assert process.is_alive() and time.monotonic() < deadline
        time.sleep(0.01)


def killed(words: list[str], parts: Path, batches: int) -> None:
    """Start the command, and kill it when so many batches are answered."""
    process = preloaded.start(["-m", "mft_lightning", *words], user_environment())
    wait_for(process, parts, batches)
    process.kill()
    assert preloaded.exit_code(process) == -signal.SIGKILL


DRAWN = ("--limit", "6", "--temperature", "1.5", "--batch_size", "1", "--max_new_tokens", "40")


def test_a_killed_run_goes_on_to_the_same_bytes_on_any_devices(
    arguments: Arguments, whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Killed by SIGKILL, with part of a line left behind; then ended on one process, and on two."""
    expected = tmp_path / "expected.jsonl"
    assert main(arguments(expected, *DRAWN)) == 0
    outputs = [tmp_path / name / "answers.jsonl" for name in ("one", "two")]
    for output in outputs:
        parts = output.parent / ".answers.jsonl.parts"
        killed(arguments(output, *DRAWN), parts, 4)
        assert list(output.parent.iterdir()) == [parts]
        with (parts / "part-00000.jsonl").open("ab") as handle:
            handle.write(b'{"batch": 3, "answ')
    capsys.readouterr()
    assert main(arguments(outputs[0], *DRAWN)) == 0
    already = re.search(r"answering 18 conversations of valid, (\d+) of them already", capsys.readouterr().out)
    assert already and 4 <= int(already[1]) < 18
    sharded, once = tmp_path / "sharded.jsonl", tmp_path / "ddp.jsonl"
    on_two = ("--trainer.devices", "2")
    commands = [
        arguments(outputs[1], *DRAWN, *on_two),
        arguments(once, "--limit", "6", *on_two),
        arguments(sharded, "--limit", "6", *on_two, "--trainer.strategy", "fsdp"),
    ]
    in_series(2, commands, tmp_path)
    for output in outputs:
        assert output.read_bytes() == expected.read_bytes()
        assert sorted(path.name for path in output.parent.iterdir()) == ["answers.jsonl", "answers.summary.json"]
        beside = output.with_name("answers.summary.json")
        assert beside.read_bytes() == expected.with_name("expected.summary.json").read_bytes()
    assert once.read_bytes() == sharded.read_bytes() == whole.read_bytes()


@pytest.mark.parametrize(("signum", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_ends_it_and_says_how_to_go_on(
    arguments: Arguments, tmp_path: Path, signum: signal.Signals, code: int
) -> None:
    said = tmp_path / "said"
    parts = tmp_path / "out" / ".answers.jsonl.parts"
    words = arguments(parts.parent / "answers.jsonl", "--batch_size", "1")
    with said.open("w") as handle:
        process = preloaded.start(
            ["-m", "mft_lightning", *words], user_environment(), 0, handle.fileno(), handle.fileno()
        )
        wait_for(process, parts, 2)
        os.kill(process.pid or 0, signum)
        assert preloaded.exit_code(process) == code
    answered = re.search(
        r"answered (\d+) of 62. What is answered is kept; the same command goes on, without --overwrite.\n",
        said.read_text(),
    )
    assert answered and 2 <= int(answered[1]) < 62 and "Traceback" not in said.read_text()
    assert int(answered[1]) == (parts / "part-00000.jsonl").read_bytes().count(b"\n")


def test_nothing_is_asked_twice(arguments: Arguments, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that was killed when all was answered asks nothing; one that is there is refused, unless told."""
    output, parts = tmp_path / "answers.jsonl", tmp_path / ".answers.jsonl.parts"
    words = ("--limit", "1")
    with monkeypatch.context() as patch:
        patch.setattr(
            "mft_lightning.commands.predict.write_answers", lambda *_: (_ for _ in ()).throw(OSError(28, "full"))
        )
        assert main(arguments(output, *words)) == 1
    assert not output.exists() and parts.is_dir()
    with monkeypatch.context() as patch:
        patch.setattr("mft_lightning.model.evaluated.answer_on_ranks", None)
        assert main(arguments(output, *words)) == 0
    before = output.read_bytes()
    assert main(arguments(output, *words)) == 1 and output.read_bytes() == before
    assert main(arguments(output, *words, "--overwrite", "--max_new_tokens", "3")) == 0
    assert output.read_bytes() != before and not parts.exists()


def test_parts_of_another_run_are_not_taken_for_its_own(
    arguments: Arguments, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output, parts = tmp_path / "answers.jsonl", tmp_path / ".answers.jsonl.parts"
    words = ("--limit", "6", "--batch_size", "1")
    killed(arguments(output, *words), parts, 3)
    kept = (parts / "part-00000.jsonl").read_bytes()
    for other, named in (
        (("--temperature", "1"), "--temperature was 0.0, is 1.0"),
        (("--limit", "5"), "--limit was 6, is 5"),
        (("--seed_everything", "7"), "conversations (digest) was "),
        (("--trainer.precision", "bf16-true"), "trainer.precision was "),
    ):
        capsys.readouterr()
        assert main(arguments(output, *words, *other)) == 1
        message = capsys.readouterr().err
        assert "some answers are there already, of another run" in message and named in message
        assert "Set that back to go on, start anew with --overwrite, or give another --output." in message
        assert list(tmp_path.iterdir()) == [parts] and (parts / "part-00000.jsonl").read_bytes() == kept
    (parts / "part-00000.jsonl").write_bytes(b"{" + kept)
    assert main(arguments(output, *words)) == 1
    assert "part-00000.jsonl:1: is damaged" in capsys.readouterr().err
    assert main(arguments(output, *words, "--limit", "1", "--overwrite")) == 0
    assert len(lines(output)) == 3 and not parts.exists()


def test_only_a_regular_file_is_replaced(
    arguments: Arguments, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output, beside = tmp_path / "pipe.jsonl", tmp_path / "file.summary.json"
    os.mkfifo(output)
    beside.symlink_to(output)
    assert main(arguments(output, "--overwrite")) == 1
    assert f"--output {output}: is no regular file" in capsys.readouterr().err
    assert main(arguments(tmp_path / "file.jsonl", "--overwrite")) == 1
    assert f"--output {beside}: is a link" in capsys.readouterr().err
    assert output.is_fifo() and beside.is_symlink() and len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--split", "tests"), "--split: 'tests' is none of train, valid, test, all"),
        (("--split", "test"), "no conversation to evaluate (test) is left of"),
        (("--limit", "0"), "--limit: 0 is less than 1"),
        (("--batch_size", "0"), "--batch_size: 0 is less than 1"),
        (("--top_p", "0.5"), "top_p: 0.5 has no effect at temperature 0"),
        (("--preset", "poem"), "--preset: 'poem' is none of greedy, beam, code"),
        (("--data.tokenize_mode", "pretrain"), "data.tokenize_mode pretrain has no answers to ask for"),
        (("--ckpt_path", "null"), "--ckpt_path: is missing. Give last, best or a checkpoint directory"),
        (("--ckpt_path", "best"), "--ckpt_path best: no checkpoint"),
        (
            ("--trainer.limit_predict_batches", "1"),
            "limit_predict_batches: 1 has no effect here. Use --limit of predict",
        ),
        (("--output", "docs"), "--output docs: is a directory"),
        (("--output", "~nosuchuser/x"), "--output ~nosuchuser/x: nobody has that home directory"),
        (("--output", "x" * 250), "cannot be used (File name too long)"),
        (("--output", "x.jsonl.gz"), "is written uncompressed"),
        (("--output", "/dev/null/x.jsonl"), "--output: /dev/null/.x.jsonl.parts cannot be written"),
        (("--maxnewtokens", "3"), "maxnewtokens: there is no such key. The nearest is max_new_tokens"),
    ],
    ids=str,
)
def test_what_cannot_be_predicted_is_refused_and_named(
    arguments: Arguments, tmp_path: Path, capsys: pytest.CaptureFixture[str], words: tuple[str, ...], message: str
) -> None:
    assert main(arguments(tmp_path / "answers.jsonl", *words)) == 1
    said = capsys.readouterr().err
    assert said.startswith("error: ") and message in said and said.count("\n") <= 2
    assert not list(tmp_path.iterdir())


def test_the_test_split_is_asked_where_there_is_one_and_the_callback_of_validations_is_not(
    arguments: Arguments, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Asking, "_ask", None)
    words = arguments(tmp_path / "x", "--data.data_split", "90,5,5", "--limit", "1", "--max_new_tokens", "1")
    words += ["--evaluation.exact_match_per_task", "2"]
    del words[words.index("--output") : words.index("--output") + 2]
    assert main(words) == 0
    output = checkpoint.parent / "predictions" / "step-00000060-test.jsonl"
    assert [found["split"] for found in lines(output)] == ["test"] * 3


def copied(example_tasks: list[str], directory: Path) -> list[str]:
    """The first conversations of each task in a directory of its own."""
    found = []
    for task in map(Path, example_tasks):
        (directory / task.name).mkdir(parents=True)
        text = (task / "part_0.jsonl").read_text().splitlines(keepends=True)[:2]
        (directory / task.name / "part.jsonl").write_text("".join(text))
        found.append(str(directory / task.name))
    return found


def test_data_that_change_meanwhile_are_noticed(
    arguments: Arguments,
    example_tasks: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    valid, output = copied(example_tasks, tmp_path / "valid"), tmp_path / "out" / "answers.jsonl"
    file = Path(valid[1]) / "part.jsonl"
    before = file.read_text()
    records = [json.loads(line) for line in before.splitlines()]
    question, answer = records[1]["chat_rounds"][-2:]
    turns = {
        "another answer": [question, {**answer, "content": answer["content"] + "x"}],
        "another question": [{**question, "content": "x"}, answer],
        "more before": [question, answer, question, answer],
        "no turn": None,
    }
    words = arguments(output, "--data.valid_data_paths", f"[{','.join(valid)}]", "--data.data_split", "null")
    words += ["--split", "valid", "--max_new_tokens", "2"]
    for rounds in turns.values():
        changed = {"text": "x"} if rounds is None else {"chat_rounds": rounds}

        def write_after(*given: Any, changed: dict[str, Any] = changed) -> Path:
            file.write_text(json.dumps(records[0]) + "\n" + json.dumps(changed) + "\n")
            return write_answers(*given)

        with monkeypatch.context() as patch:
            patch.setattr("mft_lightning.commands.predict.write_answers", write_after)
            assert main(words) == 1
        assert f"{file}:2: has changed since it was read" in capsys.readouterr().err
        assert [path.name for path in output.parent.iterdir()] == [".answers.jsonl.parts"]
        file.write_text(before)
    assert main(words) == 0 and len(lines(output)) == 6


def test_what_is_compared_is_what_is_shown(
    arguments: Arguments, example_tasks: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Under data.normalize_punctuation, of a model that says the reference as it is learnt."""
    valid, output = copied(example_tasks, tmp_path / "valid"), tmp_path / "answers.jsonl"
    for task in map(Path, valid):
        record = {"prompt": "a\uff0cb\uff1f", "answer": "x\uff08y\uff09"}
        (task / "part.jsonl").write_text(json.dumps(record) + "\n")

    def learnt(self: Any, batch: int, *_: Any) -> list[Answer]:
        return [Answer(held.reference, True) for held in self.datamodule.questions.batch(batch)]

    monkeypatch.setattr("mft_lightning.model.module.MFTModule.predict_step", learnt)
    words = arguments(output, "--data.valid_data_paths", f"[{','.join(valid)}]", "--data.data_split", "null")
    assert main([*words, "--split", "valid", "--data.normalize_punctuation", "true"]) == 0
    for found in lines(output):
        assert (found["prompt"], found["answer"], found["reference"]) == ("a,b?", "x(y)", "x(y)")
        assert found["exact_match"]
