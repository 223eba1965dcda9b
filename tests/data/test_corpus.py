"""Task directories to tables: every record is in a table, or counted with the reason it is not."""

import json
from collections import Counter
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerBase

from mft_lightning.data import token_cache
from mft_lightning.data.admission import RecordPolicy, TaskReport
from mft_lightning.data.chat_format import ChatFormat
from mft_lightning.data.lines import read_blocks
from mft_lightning.data.splits import SPLITS, parse_shares
from mft_lightning.data.tasks import Task
from mft_lightning.data.token_table import TokenTable
from mft_lightning.errors import UserError
from tests.data.tables import loaded, split_tables

SEQ_LENGTH = 120  # a question and a short answer take about 40 tokens of the small tokenizer
ALL_TRAIN = (1.0, 0.0, 0.0)
LONG = "zq" * SEQ_LENGTH


@dataclass(frozen=True)
class Kind:
    """A kind of line, with ``#`` for a number that makes it unique; ``reason`` is None where it is kept."""

    line: str
    reason: str | None = None
    bad: bool = False


def rounds(*contents: str, bot: str = "bot") -> str:
    return json.dumps(
        {"messages": [{"role": ["human", bot][i % 2], "content": text} for i, text in enumerate(contents)]}
    )


SHORT = Kind(rounds("ask #", "reply #"))
TWO = Kind(rounds("ask #", "reply #", "more #", "last #"))
LONG_QUESTION = Kind(rounds(LONG, "reply #"), "overlong")
LONG_ANSWER = Kind(rounds("ask #", LONG), "overlong")
LONG_LATER_ANSWER = Kind(rounds("ask #", "reply #", "more #", LONG), "overlong")
BLANK = Kind("  ")
BAD = [
    Kind('{"prompt": "#", ', "invalid-json", bad=True),
    Kind('{"prompt": "#"}', "missing-content", bad=True),
    Kind('{"prompt": "#", "answer": ""}', "empty-answer", bad=True),
    Kind('{"text": "#"}', "text-in-sft", bad=True),
    Kind(rounds("ask #", "reply #", bot="robot"), "unknown-role", bad=True),
]
FILE = st.lists(st.sampled_from([SHORT, TWO, LONG_QUESTION, LONG_ANSWER, LONG_LATER_ANSWER, BLANK, *BAD]), max_size=5)


def policy(**changes: Any) -> RecordPolicy:
    defaults = {"seq_length": SEQ_LENGTH, "on_overlong": "drop", "on_bad_record": "skip", "max_skipped_share": 1.0}
    return RecordPolicy(**{**defaults, **changes})


def write_task(directory: Path, *files: list[str]) -> Task:
    directory.mkdir()
    for number, lines in enumerate(files):
        (directory / f"part_{number}.jsonl").write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return Task(directory.name, directory)


def lines_of(kinds: list[Kind], first: int = 0) -> list[str]:
    return [kind.line.replace("#", str(number)) for number, kind in enumerate(kinds, start=first)]


def one_table(tokenizer: PreTrainedTokenizerBase, task: Task, **changes: Any) -> tuple[TokenTable, TaskReport]:
    corpus = loaded([task], ALL_TRAIN, ChatFormat(tokenizer), policy(**changes), task.directory.parent / "cache")
    return corpus.table("train"), corpus.reports[0]


def answers_of(tokenizer: PreTrainedTokenizerBase, table: TokenTable, index: int) -> list[str]:
    pairs = zip(*(part.tolist() for part in table.row(index)), strict=True)
    runs = [[token for token, _ in run] for supervised, run in groupby(pairs, lambda pair: pair[1]) if supervised]
    return [str(tokenizer.decode(run)) for run in runs]


# --- nothing is lost


@given(
    kinds=st.lists(st.lists(FILE, min_size=1, max_size=2), min_size=1, max_size=3),
    shares=st.sampled_from(["100,0,0", "95,5,0", "60,20,20"]),
    on_overlong=st.sampled_from(["drop", "truncate"]),
    block=st.sampled_from([1, 150, 1 << 20]),
)
@settings(deadline=None, max_examples=60)
def test_every_record_is_kept_or_counted_with_its_reason(
    small_tokenizer: PreTrainedTokenizerBase,
    tmp_path_factory: pytest.TempPathFactory,
    kinds: list[list[list[Kind]]],
    shares: str,
    on_overlong: str,
    block: int,
) -> None:
    root = tmp_path_factory.mktemp("tasks")
    tasks = [
        write_task(root / f"task_{t}", *(lines_of(file, 100 * f) for f, file in enumerate([*files, [SHORT]])))
        for t, files in enumerate(kinds)
    ]
    truncates = on_overlong == "truncate"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(token_cache, "read_blocks", partial(read_blocks, size=block))
        judged, encoder = policy(on_overlong=on_overlong), ChatFormat(small_tokenizer)
        tables, reports = split_tables(loaded(tasks, parse_shares(shares), encoder, judged, root / "cache"))
    for number, (files, report) in enumerate(zip(kinds, reports, strict=True)):
        lines = [kind for file in files for kind in file if kind is not BLANK] + [SHORT]
        cut = [kind for kind in lines if truncates and kind is LONG_LATER_ANSWER]
        dropped = [kind for kind in lines if kind.reason and kind not in cut]
        assert report.task == f"task_{number}"
        assert report.records == len(lines) == sum(report.conversations.values()) + sum(report.dropped.values())
        assert report.dropped == Counter(kind.reason for kind in dropped)
        assert report.bad == sum(kind.bad for kind in dropped)
        assert report.truncated == len(cut)
        assert set(report.first_of) == {kind.reason for kind in dropped}
        mine = {split: table.tasks == number for split, table in tables.items()}
        assert report.conversations == {split: int(rows.sum()) for split, rows in mine.items()}
        assert report.tokens == sum(int(table.lengths[mine[split]].sum()) for split, table in tables.items())
        assert report.supervised_tokens == sum(
            int(table.n_supervised[mine[split]].sum()) for split, table in tables.items()
        )
    rows = [(table, index) for table in tables.values() for index in range(len(table))]
    kept = [(int(table.tasks[index]), answers_of(small_tokenizer, table, index)[0]) for table, index in rows]
    assert sorted(kept) == sorted(
        (number, f"reply {place}<|endoftext|>")
        for number, files in enumerate(kinds)
        for f, file in enumerate([*files, [SHORT]])
        for place, kind in enumerate(file, start=100 * f)
        if (kind.reason is None and kind is not BLANK) or (truncates and kind is LONG_LATER_ANSWER)
    )
    for table, index in rows:
        ids, supervised = table.row(index)
        assert len(ids) == len(supervised) == table.lengths[index] <= SEQ_LENGTH
        assert supervised.sum() == table.n_supervised[index] >= 1


def test_the_table_holds_what_the_encoder_gives_in_the_order_of_files_and_lines(
    small_tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    files = [lines_of([SHORT, BLANK, TWO]), lines_of([BAD[0], SHORT], 10)]
    table, _ = one_table(small_tokenizer, write_task(tmp_path / "task", *files))
    answers = [answers_of(small_tokenizer, table, index) for index in range(len(table))]
    eos = "<|endoftext|>"
    assert answers == [[f"reply 0{eos}"], [f"reply 2{eos}", f"last 2{eos}"], [f"reply 11{eos}"]]
    assert small_tokenizer.decode(table.row(2)[0]) == (
        f"<|role_start|>human<|role_end|>ask 11<|role_start|>bot<|role_end|>reply 11{eos}"
    )


def test_the_first_of_each_reason_is_told_with_its_file_and_line(
    small_tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    task = write_task(tmp_path / "task", lines_of([SHORT, BLANK, BAD[1]]), lines_of([BAD[1], LONG_ANSWER]))
    _, report = one_table(small_tokenizer, task)
    assert report.dropped == {"missing-content": 2, "overlong": 1}
    assert report.first_of["missing-content"].startswith(f"{task.directory / 'part_0.jsonl'}:3 answer: is missing")
    assert report.first_of["overlong"].startswith(f"{task.directory / 'part_1.jsonl'}:2 has ")


def test_a_tasks_split_does_not_depend_on_the_other_tasks(
    small_tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    first, second = (write_task(tmp_path / name, lines_of([SHORT] * 30)) for name in ["first", "second"])
    shares, encoder = parse_shares("60,20,20"), ChatFormat(small_tokenizer)
    alone, _ = split_tables(loaded([second], shares, encoder, policy(), tmp_path / "cache"))
    beside, _ = split_tables(loaded([first, second], shares, encoder, policy(), tmp_path / "cache"))
    for split, table in alone.items():
        rows = [row for row in range(len(beside[split])) if beside[split].tasks[row] == 1]
        assert [beside[split].row(row)[0].tolist() for row in rows] == [
            table.row(row)[0].tolist() for row in range(len(table))
        ]


def test_a_task_without_a_line_is_an_error_that_names_it(
    small_tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    task = write_task(tmp_path / "hollow", ["", "  "])
    with pytest.raises(UserError, match=r"task 'hollow' is empty .*part_0\.jsonl"):
        one_table(small_tokenizer, task)


# --- long conversations


def test_a_conversation_of_exactly_seq_length_is_kept_whole(
    small_tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    task = write_task(tmp_path / "task", lines_of([TWO]))
    length = int(one_table(small_tokenizer, task)[0].lengths[0])
    for on_overlong in ["drop", "truncate", "error"]:
        kept, report = one_table(small_tokenizer, task, seq_length=length, on_overlong=on_overlong)
        assert kept.lengths.tolist() == [length] and report.truncated == 0
    dropped, report = one_table(small_tokenizer, task, seq_length=length - 1)
    assert len(dropped) == 0 and report.dropped == {"overlong": 1} and report.bad == 0


def test_truncate_cuts_a_later_answer_and_keeps_the_front(
    small_tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    task = write_task(tmp_path / "task", lines_of([LONG_LATER_ANSWER]))
    whole = one_table(small_tokenizer, task, seq_length=10_000)[0]
    cut, report = one_table(small_tokenizer, task, on_overlong="truncate")
    assert report.truncated == 1 and not report.dropped
    for part, kept in zip(whole.row(0), cut.row(0), strict=True):
        assert kept.tolist() == part[:SEQ_LENGTH].tolist()
    first, second = answers_of(small_tokenizer, cut, 0)
    assert first == "reply 0<|endoftext|>" and LONG.startswith(second)


@pytest.mark.parametrize("kind", [LONG_ANSWER, LONG_QUESTION], ids=["answer", "question"])
def test_truncate_drops_a_conversation_whose_first_answer_does_not_fit(
    small_tokenizer: PreTrainedTokenizerBase, tmp_path: Path, kind: Kind
) -> None:
    table, report = one_table(small_tokenizer, write_task(tmp_path / "task", lines_of([kind])), on_overlong="truncate")
    assert len(table) == 0 and report.truncated == 0 and report.dropped == {"overlong": 1} and report.bad == 0


def test_truncate_keeps_a_first_answer_that_fits_to_the_token_with_its_eos(
    small_tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    short = write_task(tmp_path / "short", lines_of([SHORT]))
    fits = int(one_table(small_tokenizer, short)[0].lengths[0])
    task = write_task(tmp_path / "task", lines_of([TWO]))
    table, report = one_table(small_tokenizer, task, seq_length=fits, on_overlong="truncate")
    assert report.truncated == 1 and answers_of(small_tokenizer, table, 0) == ["reply 0<|endoftext|>"]
    table, report = one_table(small_tokenizer, task, seq_length=fits - 1, on_overlong="truncate")
    assert len(table) == 0 and report.dropped == {"overlong": 1}


def test_pretrain_truncates_any_long_text(small_tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    task = write_task(tmp_path / "task", [json.dumps({"text": LONG}), LONG_ANSWER.line])
    encoder = ChatFormat(small_tokenizer, tokenize_mode="pretrain")
    cut = loaded([task], ALL_TRAIN, encoder, policy(on_overlong="truncate"), tmp_path / "cache")
    tables, (report,) = split_tables(cut)
    assert report.truncated == 2 and not report.dropped
    assert tables["train"].lengths.tolist() == [SEQ_LENGTH] * 2
    assert tables["train"].n_supervised.tolist() == [SEQ_LENGTH - 1] * 2


def test_overlong_error_names_file_line_and_both_lengths(
    small_tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    task = write_task(tmp_path / "task", lines_of([SHORT, BLANK, LONG_LATER_ANSWER]))
    length = int(one_table(small_tokenizer, task, seq_length=10_000)[0].lengths[1])
    with pytest.raises(UserError, match=rf"part_0\.jsonl:3: has {length} tokens, more than data\.seq_length: 120"):
        one_table(small_tokenizer, task, on_overlong="error")


# --- bad records


@pytest.mark.parametrize("kind", BAD, ids=lambda kind: kind.reason)
def test_on_bad_record_error_names_file_line_and_reason(
    small_tokenizer: PreTrainedTokenizerBase, tmp_path: Path, kind: Kind
) -> None:
    task = write_task(tmp_path / "task", lines_of([SHORT]), lines_of([SHORT, BLANK, SHORT, kind, BAD[0]]))
    with pytest.raises(UserError) as caught:
        one_table(small_tokenizer, task, on_bad_record="error")
    message = str(caught.value)
    assert message.startswith(f"{task.directory / 'part_1.jsonl'}:4: ")
    assert f"[{kind.reason}]" in message and "data.on_bad_record: skip" in message


def test_on_bad_record_error_does_not_stop_at_long_conversations(
    small_tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    task = write_task(tmp_path / "task", lines_of([LONG_ANSWER, SHORT]))
    table, report = one_table(small_tokenizer, task, on_bad_record="error", max_skipped_share=0.0)
    assert len(table) == 1 and report.dropped == {"overlong": 1} and report.bad == 0


def test_bad_records_up_to_max_skipped_share_are_skipped_and_one_more_is_an_error(
    small_tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    at_most = write_task(tmp_path / "at_most", lines_of([SHORT] * 19 + [BAD[0]]))
    table, report = one_table(small_tokenizer, at_most, max_skipped_share=0.05)
    assert len(table) == 19 and report.bad == 1
    too_many = write_task(tmp_path / "too_many", lines_of([SHORT] * 18 + [BAD[0], BAD[1]]))
    with pytest.raises(UserError) as caught:
        one_table(small_tokenizer, too_many, max_skipped_share=0.05)
    message = str(caught.value)
    assert "task 'too_many': 2 of 20 records are bad" in message and "data.max_skipped_share: 0.05" in message
    assert "part_0.jsonl:19" in message and "part_0.jsonl:20" in message


def test_max_skipped_share_is_held_by_each_task_alone(small_tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    clean = write_task(tmp_path / "clean", lines_of([SHORT] * 50))
    dirty = write_task(tmp_path / "dirty", lines_of([SHORT, BAD[0]]))
    with pytest.raises(UserError, match="task 'dirty': 1 of 2"):
        judged = policy(max_skipped_share=0.05)
        loaded([clean, dirty], ALL_TRAIN, ChatFormat(small_tokenizer), judged, tmp_path / "cache")


@given(words=st.lists(st.integers(1, 40), min_size=1, max_size=30), width=st.integers(3, 50), seed=st.integers(0, 9))
@settings(deadline=None, max_examples=40)
def test_counts_of_streams_are_those_of_the_rows_they_are_cut_into(
    small_tokenizer: PreTrainedTokenizerBase,
    tmp_path_factory: pytest.TempPathFactory,
    words: list[int],
    width: int,
    seed: int,
) -> None:
    tmp_path = tmp_path_factory.mktemp("streams")
    task = write_task(tmp_path / "some", [json.dumps({"text": f"{seed} word" + " x" * count}) for count in words])
    form = ChatFormat(small_tokenizer, tokenize_mode="pretrain")
    rule = policy(seq_length=width, concat=True)
    corpus = loaded([task], parse_shares("60,30,10"), form, rule, tmp_path / "cache")
    tables = {split: corpus.table(split) for split in SPLITS}
    (report,) = corpus.reports
    assert report.conversations == {split: len(table) for split, table in tables.items()}
    assert report.tokens == sum(int(table.lengths.sum()) for table in tables.values())
    assert report.supervised_tokens == sum(int(table.n_supervised.sum()) for table in tables.values())
    assert corpus.record(0).encoded.supervised == [1] * len(corpus.record(0).input_ids)
