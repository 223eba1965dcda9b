"""Files to lines: numbering, compression, bounded memory, and which files of a directory are data."""

import gzip
import os
import subprocess
import sys
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import pyarrow
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mft_lightning.data import lines
from mft_lightning.data.lines import MAX_LINE, Block, read_blocks, read_lines
from mft_lightning.errors import UserError

BOM = b"\xef\xbb\xbf"
CONTENT = BOM + b'{"a": 1}\r\n\n \t\r\n{"b": 2}\n{"c": 3}'


def zstd(content: bytes) -> bytes:
    sink = pyarrow.BufferOutputStream()
    with pyarrow.CompressedOutputStream(sink, "zstd") as stream:
        stream.write(content)
    return bytes(sink.getvalue())


PACK: dict[str, Callable[[bytes], bytes]] = {
    "a.jsonl": lambda content: content,
    "a.jsonl.gz": gzip.compress,
    "a.jsonl.zst": zstd,
}
packed = pytest.mark.parametrize("name", PACK)
compressed = pytest.mark.parametrize("name", ["a.jsonl.gz", "a.jsonl.zst"])


def written(tmp_path: Path, content: bytes, name: str = "a.jsonl") -> Path:
    file = tmp_path / name
    file.write_bytes(content)
    return file


def lines_of(file: Path) -> list[tuple[int, bytes]]:
    found = list(read_lines(file))
    assert all(line.file == file for line in found)
    return [(line.number, line.raw) for line in found]


# --- lines


def test_blank_lines_are_left_out_and_still_counted(tmp_path: Path) -> None:
    file = written(tmp_path, b'\n{"a": 1}\n \t \n\n{"b": 2}')
    assert lines_of(file) == [(2, b'{"a": 1}'), (5, b'{"b": 2}')]


def test_crlf_and_a_byte_order_mark_at_the_start_are_taken_off(tmp_path: Path) -> None:
    file = written(tmp_path, BOM + b'{"a": 1}\r\n\r\n{"b": 2}\r\n')
    assert lines_of(file) == [(1, b'{"a": 1}'), (3, b'{"b": 2}')]


def test_a_byte_order_mark_is_taken_off_at_the_start_only(tmp_path: Path) -> None:
    assert lines_of(written(tmp_path, b"1\n" + BOM + b"2\n")) == [(1, b"1"), (2, BOM + b"2")]


@packed
@pytest.mark.parametrize("content", [b"", BOM + b"\r\n", b"\n\n  \n\t\r\n", b" "], ids=repr)
def test_a_file_of_blanks_has_no_line(tmp_path: Path, name: str, content: bytes) -> None:
    assert lines_of(written(tmp_path, PACK[name](content), name)) == []


def test_unicode_line_separators_do_not_end_a_line(tmp_path: Path) -> None:
    raw = '{"text": "a\u2028b\u0085c\x0b\x0cd"}'.encode()
    assert lines_of(written(tmp_path, raw + b"\n")) == [(1, raw)]


def test_a_form_feed_is_no_blank_as_json_knows_none(tmp_path: Path) -> None:
    assert lines_of(written(tmp_path, b"\x0c\n\x0b1\n")) == [(1, b"\x0c"), (2, b"\x0b1")]


@packed
def test_compressed_files_are_read_like_plain_text(tmp_path: Path, name: str) -> None:
    file = written(tmp_path, PACK[name](CONTENT), name)
    assert lines_of(file) == [(1, b'{"a": 1}'), (4, b'{"b": 2}'), (5, b'{"c": 3}')]


@compressed
def test_parts_that_were_compressed_apart_are_one_file(tmp_path: Path, name: str) -> None:
    pack = PACK[name]
    file = written(tmp_path, pack(CONTENT[:9]) + pack(b"") + pack(CONTENT[9:20]) + pack(CONTENT[20:]), name)
    assert lines_of(file) == lines_of(written(tmp_path, CONTENT))


# --- blocks


@given(
    parts=st.lists(st.sampled_from([b"\n", b"\r\n", b"a", b"bc", b" ", BOM, b"0123456789"]), max_size=30),
    size=st.integers(1, 40),
    longest=st.integers(1, 12),
    name=st.sampled_from(list(PACK)),
)
@settings(deadline=None, max_examples=200)
def test_blocks_are_the_file_in_whole_lines_each_cut_to_the_limit(
    tmp_path_factory: pytest.TempPathFactory, parts: list[bytes], size: int, longest: int, name: str
) -> None:
    content = b"".join(parts)
    file = written(tmp_path_factory.mktemp("blocks"), PACK[name](content), name)
    cut = [raw[: longest + 1] for raw in content.split(b"\n")]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lines, "MAX_LINE", longest)
        blocks = list(read_blocks(file, size))
        found = [(line.number, line.raw) for block in blocks for line in block.lines()]
    assert b"".join(block.raw for block in blocks) == b"\n".join(cut)
    assert all(block.raw.endswith(b"\n") for block in blocks[:-1])
    assert all(len(block.raw) <= size + 2 * longest + 2 for block in blocks)
    assert [block.first for block in blocks] == [
        1 + sum(block.raw.count(b"\n") for block in blocks[:i]) for i in range(len(blocks))
    ]
    kept = [raw if len(raw) > longest else (raw.removeprefix(BOM) if n == 0 else raw) for n, raw in enumerate(cut)]
    kept = [raw if len(raw) > longest else raw.strip(b" \t\r") for raw in kept]
    assert found == [(number, raw) for number, raw in enumerate(kept, start=1) if raw]


@packed
def test_a_block_tells_how_much_of_the_disk_was_read(tmp_path: Path, name: str) -> None:
    content = b"".join(b"%d %s\n" % (i, os.urandom(20).hex().encode()) for i in range(20_000))
    file = written(tmp_path, PACK[name](content), name)
    places = [block.position for block in read_blocks(file, 1 << 16)]
    assert len(places) > 5 and places == sorted(places)
    assert 0 < places[0] < places[-1] / 2 and places[-1] == file.stat().st_size


def test_a_pipe_is_read_too(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.jsonl.gz")
    file = tmp_path / "pipe.jsonl.gz"
    content = written(tmp_path, gzip.compress(CONTENT), "content")
    with subprocess.Popen(["/bin/sh", "-c", 'cat "$0" > "$1"', str(content), str(file)]):
        blocks = list(read_blocks(file))
    assert {block.position for block in blocks} == {0}
    assert [line.number for block in blocks for line in block.lines()] == [1, 4, 5]


# --- the limit


def test_blanks_at_the_limit_do_not_hide_what_follows_them() -> None:
    (line,) = Block(Path("a"), 1, b" " * (MAX_LINE + 1) + b"\n", 0).lines()
    assert len(line.raw) > MAX_LINE
    assert list(Block(Path("a"), 1, b" " * MAX_LINE + b"\n", 0).lines()) == []


@packed
def test_a_line_of_200_mb_takes_little_memory(tmp_path: Path, name: str) -> None:
    file, part = tmp_path / name, PACK[name](b"x" * 10_000_000)
    with file.open("wb") as out:
        out.write(PACK[name](b"1\n"))
        for _ in range(20):
            out.write(part)
        out.write(PACK[name](b"\n\n4\n"))
    next(read_blocks(file))  # pyarrow loaded
    before = pyarrow.total_allocated_bytes()
    tracemalloc.start()
    found = [(line.number, len(line.raw), pyarrow.total_allocated_bytes() - before) for line in read_lines(file)]
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert [line[:2] for line in found] == [(1, 1), (2, MAX_LINE + 1), (4, 1)]
    assert peak < 60 << 20 and all(line[2] < 20 << 20 for line in found)


# --- files that cannot be read


def refusal(file: Path) -> str:
    with pytest.raises(UserError) as caught:
        list(read_lines(file))
    return str(caught.value)


@compressed
@pytest.mark.parametrize(
    "damage", ["no such format", "cut off", "one byte", "a header alone", "empty", "garbage after"]
)
def test_a_broken_compressed_file_is_an_error_that_names_it(tmp_path: Path, name: str, damage: str) -> None:
    whole = PACK[name](b'{"a": 1}\n' * 99)
    broken = {
        "no such format": CONTENT,
        "cut off": whole[:-3],
        "one byte": whole[:1],
        "a header alone": whole[:10],
        "empty": b"",
        "garbage after": whole + b"garbage after it",
    }[damage]
    message = refusal(written(tmp_path, broken, name))
    assert message.startswith(f"{tmp_path / name}: cannot be read (")
    assert "Copy or compress it again" in message


@pytest.mark.parametrize("at", [10, 500])  # the kind of the first deflate block, a byte that only the checksum knows
def test_a_byte_changed_on_the_way_is_found(tmp_path: Path, at: int) -> None:
    whole = bytearray(gzip.compress(os.urandom(1000)))
    whole[at] ^= 6
    assert "cannot be read" in refusal(written(tmp_path, bytes(whole), "a.jsonl.gz"))


@packed
def test_a_file_that_cannot_be_opened_is_an_error_that_says_why(tmp_path: Path, name: str) -> None:
    file = tmp_path / name
    assert refusal(file) == f"{file}: cannot be read (No such file or directory). Give a file that can."
    file.symlink_to(file.name)
    assert "(Too many levels of symbolic links)" in refusal(file)
    file.unlink()
    file.mkdir()
    assert "(Is a directory)" in refusal(file)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read every file")
def test_a_file_without_permission_is_an_error_that_says_so(tmp_path: Path) -> None:
    file = written(tmp_path, CONTENT)
    file.chmod(0)
    assert "(Permission denied)" in refusal(file)


def test_a_permission_refused_is_an_error_that_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: Path, mode: str) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "open", refuse)
    assert refusal(tmp_path / "a.jsonl").startswith(f"{tmp_path / 'a.jsonl'}: cannot be read (Permission denied)")


@packed
def test_a_file_is_closed_when_the_reader_leaves(tmp_path: Path, name: str) -> None:
    file = written(tmp_path, PACK[name](CONTENT * 1000), name)
    reader = read_lines(file)
    next(reader)
    assert file in open_files()
    reader.close()
    assert file not in open_files()


@compressed
def test_a_file_is_closed_when_it_is_broken(tmp_path: Path, name: str) -> None:
    file = written(tmp_path, PACK[name](CONTENT)[:-4], name)
    refusal(file)
    assert file not in open_files()


def open_files() -> list[Path]:
    if not Path("/proc/self/fd").is_dir():
        pytest.skip("this system does not tell which files are open")
    return [link.readlink() for link in Path("/proc/self/fd").iterdir() if link.is_symlink()]


def test_reading_needs_no_heavy_library() -> None:
    code = "import sys; import mft_lightning.data.records; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert "mft_lightning.data.lines" in loaded
    assert not {"torch", "transformers", "numpy", "pyarrow", "lightning"} & set(loaded)
