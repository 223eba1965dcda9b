"""Encoded files as one sequence of records: what the encoder gave, read through a map that holds no memory."""

import hashlib
import json
import mmap
import os
import pickle
import subprocess
import sys
from array import array
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader, Dataset
from transformers import PreTrainedTokenizerBase

from mft_lightning.data import token_store
from mft_lightning.data.chat_format import ChatFormat
from mft_lightning.data.encoding import digest_of, encode_block
from mft_lightning.data.lines import read_blocks
from mft_lightning.data.records import parse_record
from mft_lightning.data.token_store import DamagedFile, EncodedFile, TokenStore, schema, write_batches
from mft_lightning.errors import UserError
from tests.data.caches import ROOT, cache, lines, opened, rows, write
from tests.data.tables import masked, store_of

SOURCE = Path("made.jsonl")
CONVERSATIONS = [masked([1, 2, 3], [0, 1, 1]), masked([4], [0]), masked([], []), masked([5, 6, 7, 8], [0, 1, 0, 1])]


def saved(path: Path, id_type: str = "uint16", batch: int = 3) -> EncodedFile:
    """A cache file of ``CONVERSATIONS``, in batches of so many."""
    form = schema(id_type)
    batches = (record.cast(form) for record in store_of(CONVERSATIONS, batch).files[0].batches)
    write_batches(path, form, iter(batches))
    return EncodedFile.open(path, SOURCE)


def test_rows_are_what_the_encoder_gives_and_places_are_those_of_the_lines(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    bad = b'\n{"prompt": 1}\n'
    task = write(tmp_path / "task", a=lines(30), b=bad + lines(40, 30))
    store = opened(cache(tmp_path / "cache", tokenizer), task)
    raws = lines(40).splitlines()
    encoded = ChatFormat(tokenizer).encode([parse_record(raw) for raw in raws])
    found = rows(store)
    assert found[30] == ([], []) and store.unusable.tolist() == [30]
    assert store.refusal(30) == ("missing-content", "prompt: is int, not a string")
    assert [*found[:30], *found[31:]] == [(one.input_ids, one.spans) for one in encoded]
    places = [("a.jsonl", n) for n in range(1, 31)] + [("b.jsonl", n) for n in range(2, 13)]
    assert [(store.where(n)[0].name, store.where(n)[1]) for n in range(len(store))] == places
    assert store.first.tolist() == [0, 30, 41] and [store.file_of(n) for n in (0, 29, 30, 40)] == [0, 0, 1, 1]
    supervised = [sum(one.supervised) for one in encoded]
    assert store.n_supervised.tolist() == [*supervised[:30], 0, *supervised[30:]]
    ends = [one.spans[1] for one in encoded]
    assert store.first_ends().tolist() == [*ends[:30], 0, *ends[30:]]


@given(
    st.lists(st.lists(st.booleans(), max_size=6), max_size=12), st.integers(1, 5), st.sampled_from(["uint16", "uint32"])
)
@settings(deadline=None, max_examples=60)
def test_the_numbers_of_a_store_are_those_of_its_rows(masks: list[list[bool]], batch: int, id_type: str) -> None:
    made = [masked(list(range(len(mask))), mask) for mask in masks]
    (file,) = store_of(made, batch).files
    store = TokenStore([EncodedFile(SOURCE, [part.cast(schema(id_type)) for part in file.batches])])
    assert rows(store) == [(one.input_ids, one.spans) for one in made]
    assert store.lengths.tolist() == [len(mask) for mask in masks]
    assert store.n_supervised.tolist() == [sum(mask) for mask in masks]
    assert store.first_ends().tolist() == [one.spans[1] if one.spans else 0 for one in made]


def test_a_file_has_few_batches_whatever_it_is_written_from(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = [masked([number, number], [0, 1]) for number in range(200)]
    parts = store_of(made, batch=2).files[0].batches
    monkeypatch.setattr(token_store, "BATCH", 20 * parts[0].nbytes)
    write_batches(tmp_path / "cached", schema("uint16"), iter(parts))
    file = EncodedFile.open(tmp_path / "cached", SOURCE)
    assert [len(batch) for batch in file.batches] == [40] * 5
    assert rows(TokenStore([file])) == [(one.input_ids, one.spans) for one in made]


def test_opening_leaves_pandas_alone_where_there_is_one(tmp_path: Path) -> None:
    (tmp_path / "pandas.py").write_text("print('imported')")
    bad = {"line": 2, "input_ids": [], "spans": [], "digest": 0, "reason": "bad", "detail": "is bad"}
    parts = [*store_of(CONVERSATIONS).files[0].batches, pa.RecordBatch.from_pylist([bad], schema("uint16"))]
    write_batches(tmp_path / "cached", schema("uint16"), iter(parts))
    code = (
        "import sys; from pathlib import Path; from mft_lightning.data.token_store import EncodedFile, TokenStore;"
        "store = TokenStore([EncodedFile.open(Path(sys.argv[1]), Path('made.jsonl'))]);"
        "print(store.lengths.tolist(), store.unusable.tolist(), store.row(0)[0].tolist())"
    )
    words = [sys.executable, "-c", code, str(tmp_path / "cached")]
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"}
    found = subprocess.run(words, env=environment, cwd=ROOT, check=True, capture_output=True, text=True).stdout
    assert found == "[3, 1, 0, 4, 0] [4] [1, 2, 3]\n"


def test_records_of_a_part_of_a_batch_are_read_from_where_they_lie() -> None:
    (whole,) = store_of(CONVERSATIONS, batch=4).files[0].batches
    bad = pa.array([None, None, "bad", None], pa.string())
    told = pa.RecordBatch.from_arrays([*whole.columns[:4], bad, bad], schema=whole.schema)
    part = TokenStore([EncodedFile(SOURCE, [told.slice(1, 3)])])
    assert rows(part) == [(one.input_ids, one.spans) for one in CONVERSATIONS[1:]]
    assert part.unusable.tolist() == [1] and digests(part) == digests(TokenStore([EncodedFile(SOURCE, [whole])]))[1:]


# --- digests


@pytest.mark.parametrize(("id_type", "batch"), [("uint32", 3), ("uint16", 1), ("uint32", 100)])
def test_digests_do_not_depend_on_batches_or_on_the_width_of_ids(tmp_path: Path, id_type: str, batch: int) -> None:
    one, other = TokenStore([saved(tmp_path / "one")]), TokenStore([saved(tmp_path / "other", id_type, batch)])
    assert digests(one) == digests(other) == [digest_of(e.input_ids, e.spans) for e in CONVERSATIONS]
    assert one.digests(np.array([3, 0])).tolist() == [digests(one)[3], digests(one)[0]]


def test_digests_do_not_depend_on_the_size_of_blocks(small_tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    file = write(tmp_path / "task", a=lines(50)).directory / "a.jsonl"
    encoder, found = ChatFormat(small_tokenizer).encoder, []
    for size in (1, 700, 1 << 20):
        batches = [encode_block(block, encoder, "uint16") for block in read_blocks(file, size)]
        write_batches(tmp_path / "cached", schema("uint16"), iter(batches))
        found.append(digests(TokenStore([EncodedFile.open(tmp_path / "cached", file)])))
    assert len(set(found[0])) == 50 and found[0] == found[1] == found[2]


TOKENS = st.lists(st.integers(0, 5), max_size=4)


@given(TOKENS, TOKENS, TOKENS, TOKENS)
@settings(deadline=None)
def test_digests_are_one_where_tokens_and_supervision_are(
    ids: list[int], spans: list[int], other_ids: list[int], other_spans: list[int]
) -> None:
    same = (ids, spans) == (other_ids, other_spans)
    assert (digest_of(ids, spans) == digest_of(other_ids, other_spans)) is same


def test_a_digest_is_the_same_everywhere() -> None:
    told = b"".join(number.to_bytes(4, "little") for number in (3, 70_000, 2, 3, 1, 3))  # a length, ids, spans
    expected = int.from_bytes(hashlib.blake2b(told, digest_size=8).digest(), "little")
    assert digest_of([70_000, 2, 3], [1, 3]) == expected == digest_of(array("I", [70_000, 2, 3]), array("i", [1, 3]))


def digests(store: TokenStore) -> list[int]:
    return store.digests(np.arange(len(store))).tolist()


# --- files


def test_a_file_in_the_cache_is_pickled_as_its_path_and_one_in_memory_as_its_records(tmp_path: Path) -> None:
    store = TokenStore([saved(tmp_path / "cached")])
    assert len(pickle.dumps(store)) < 500
    assert rows(pickle.loads(pickle.dumps(store))) == rows(store)
    in_memory = store_of(CONVERSATIONS)
    assert rows(pickle.loads(pickle.dumps(in_memory))) == rows(in_memory) == rows(store)


class Lengths(Dataset[torch.Tensor]):
    """The ids of a store, each row as a tensor."""

    def __init__(self, store: TokenStore) -> None:
        self.store = store

    def __len__(self) -> int:
        return len(self.store)

    def __getitem__(self, index: int) -> torch.Tensor:
        return torch.tensor(self.store.row(index)[0].astype(np.int64))


def test_loader_workers_that_are_spawned_read_the_same_rows(tmp_path: Path) -> None:
    store = TokenStore([saved(tmp_path / "cached")])
    loader = DataLoader(Lengths(store), batch_size=None, num_workers=1, multiprocessing_context="spawn")
    assert [ids.tolist() for ids in loader] == [ids for ids, _ in rows(store)]


def test_giving_pages_back_changes_nothing_that_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = TokenStore([saved(tmp_path / "cached")])
    ids, spans = store.row(0)
    before = rows(store)
    store.release()
    assert (ids.tolist(), spans.tolist()) == before[0] and rows(store) == before
    monkeypatch.setattr(token_store, "RELEASE_AFTER", -1)
    assert rows(store) == before


def test_rows_cannot_be_written_to(tmp_path: Path) -> None:
    ids, _ = TokenStore([saved(tmp_path / "cached")]).row(0)
    with pytest.raises(ValueError, match="read-only"):
        ids[0] = 7


def test_a_file_without_its_end_or_with_nothing_or_something_else_in_it_is_damaged(tmp_path: Path) -> None:
    path = tmp_path / "cached"
    saved(path)
    whole = path.read_bytes()
    for part in [b"", b"\0", b"ARROW1\0\0", b"text " * 100, whole[:-1], whole[: len(whole) // 2], bytes(len(whole))]:
        path.write_bytes(part)
        with pytest.raises(DamagedFile, match="cached: "):
            EncodedFile.open(path, SOURCE)
    for start, end in pairwise(range(0, len(whole), 16)):  # never anything but this error, and never a crash
        path.write_bytes(whole[:start] + b"\xff" * (end - start) + whole[end:])
        try:
            EncodedFile.open(path, SOURCE)
        except DamagedFile:
            continue


def test_an_arrow_file_with_other_columns_is_damaged(tmp_path: Path) -> None:
    form = pa.schema([field for field in schema("uint16") if field.name != "digest"])
    with pa.ipc.new_file(str(tmp_path / "cached"), form) as writer:
        writer.write_batch(pa.RecordBatch.from_pylist([], form))
    with pytest.raises(DamagedFile, match="cached"):
        EncodedFile.open(tmp_path / "cached", SOURCE)


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt(), UserError("bad line")])
def test_nothing_is_left_of_a_file_that_cannot_be_written_to_its_end(tmp_path: Path, error: BaseException) -> None:
    def batches() -> Iterator[pa.RecordBatch]:
        yield from store_of(CONVERSATIONS).files[0].batches
        raise error

    expected = UserError if isinstance(error, OSError) else type(error)
    with pytest.raises(expected, match=str(getattr(error, "strerror", error)) or None):
        write_batches(tmp_path / "cached", schema("uint16"), batches())
    assert not (tmp_path / "cached").exists()


MEASURE = """
import json, sys
from pathlib import Path
from mft_lightning.data.token_store import EncodedFile, TokenStore

def memory():
    lines = Path("/proc/self/status").read_text().splitlines()
    return {name: int(rest.split()[0]) for name, _, rest in (line.partition(":") for line in lines) if "Rss" in name}

store = TokenStore([EncodedFile.open(Path(sys.argv[1]), Path("made.jsonl"))])
start, highest, checked = memory(), 0, 0
steps = range(0, len(store) * 7919, 7919)  # every row, in an order that jumps
for number, step in enumerate(steps):
    ids, spans = store.row(step % len(store))
    checked += int(ids[-1])
    if number % 200 == 0:
        highest = max(highest, memory()["RssFile"])
end = memory()
found = {"anonymous": end["RssAnon"] - start["RssAnon"], "mapped": highest - start["RssFile"], "sum": checked}
print(json.dumps(found))
"""


@pytest.mark.skipif(not hasattr(mmap, "MADV_DONTNEED") or not Path("/proc/self/status").exists(), reason="Linux only")
def test_reading_every_row_of_a_large_file_holds_little_memory(tmp_path: Path) -> None:
    form, each, records = schema("uint16"), 3000, 500
    ids = np.arange(each * records, dtype=np.uint16)
    ends = np.arange(0, each * records + 1, each, dtype=np.int32)
    spans = np.tile(np.array([1, each], dtype=np.int32), records)
    columns = [
        pa.array(np.arange(records)),
        pa.ListArray.from_arrays(ends, pa.array(ids), type=form.field("input_ids").type),
        pa.ListArray.from_arrays(np.arange(0, 2 * records + 1, 2, dtype=np.int32), pa.array(spans), type=form[2].type),
        pa.array(np.zeros(records, dtype=np.uint64)),
        pa.nulls(records, pa.string()),
        pa.nulls(records, pa.string()),
    ]
    batch = pa.RecordBatch.from_arrays(columns, schema=form)
    write_batches(tmp_path / "large", form, iter([batch] * 70))
    size = (tmp_path / "large").stat().st_size >> 10  # all in KiB
    assert size > 200_000
    words = [sys.executable, "-c", MEASURE, str(tmp_path / "large")]
    found = json.loads(subprocess.run(words, cwd=ROOT, check=True, capture_output=True, text=True).stdout)
    assert found["sum"] == 70 * int(ids[each - 1 :: each].sum(dtype=np.int64))
    assert found["anonymous"] < 8_000
    assert found["mapped"] < (token_store.RELEASE_AFTER >> 10) * 1.25 < size
