"""``chat``: turn after turn in a terminal that types, reads and presses Ctrl-C, and from a pipe."""

from __future__ import annotations

import codecs
import io
import json
import os
import pty
import re
import select
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType, SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from mft_lightning.cli import main
from mft_lightning.commands import chat, conversation
from mft_lightning.data.records import Turn, parse_record
from mft_lightning.model.generation import Answer, GenerationSettings
from tests.integration import preloaded
from tests.integration.conftest import user_environment

FIRST = "Write a test for this function:\n\ndef check_size(size):\n    return size != 7"
SECOND = "Explain `price`."
PROMPT = "\n> "  # an answer may hold the sign too, but not at the start of a line


class Terminal:
    """``chat`` in a terminal of its own."""

    def __init__(self, checkpoint: Path, *words: str) -> None:
        self.unread = ""
        self.decode = codecs.getincrementaldecoder("utf-8")("replace").decode  # a letter may come in two parts
        self.mine, theirs = pty.openpty()
        environment = {**user_environment(), "TERM": "xterm"}
        script = ["tests/integration/in_terminal.py", "chat", "--model", str(checkpoint), "--device", "cpu", *words]
        self.process = preloaded.start(script, environment, theirs, theirs, theirs)
        os.close(theirs)

    def wait(self, text: str) -> str:
        """What is written until ``text`` is, with it and without escape sequences."""
        deadline = time.monotonic() + 30
        while text not in self.unread:
            assert select.select([self.mine], [], [], max(0, deadline - time.monotonic()))[0], self.unread
            self.unread += self.decode(os.read(self.mine, 65536)).replace("\r", "")
            self.unread = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", self.unread)
        read, _, self.unread = self.unread.partition(text)
        return read + text

    def type(self, keys: str, until: str = PROMPT) -> str:
        os.write(self.mine, keys.encode())
        return self.wait(until)

    def press_ctrl_c(self, until: str = PROMPT) -> str:
        """Ctrl-C at a prompt, when its line is waited for; Python keeps one that comes a moment before to itself."""
        asleep, file = 0, Path(f"/proc/{self.process.pid}/stat")
        while asleep < 10:
            asleep = asleep + 1 if file.read_text().rpartition(")")[2].split()[0] == "S" else 0
            time.sleep(0.02)
        return self.type("\x03", until)

    def ended(self, keys: str) -> int | None:
        os.write(self.mine, keys.encode())
        code = preloaded.exit_code(self.process)
        os.close(self.mine)
        return code


@pytest.fixture
def terminal(checkpoint: Path) -> Iterator[Callable[..., Terminal]]:
    """``terminal("--option")`` starts one, which ends with the test."""
    made = []

    def start(*words: str) -> Terminal:
        made.append(Terminal(checkpoint, *words))
        made[-1].wait(PROMPT)
        return made[-1]

    yield start
    for one in made:
        one.process.kill()


def fenced(text: str) -> str:
    return f'"""{text}"""'


def by_transformers(checkpoint: Path, messages: list[dict[str, str]], limit: int, **settings: Any) -> str:
    """The answer as transformers gives it through the checkpoint's chat template."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(checkpoint), AutoTokenizer.from_pretrained(checkpoint)
    ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    output = model.generate(**ids, max_new_tokens=limit, **{"do_sample": False, **settings})
    return tokenizer.decode(output[0, ids["input_ids"].shape[1] :], skip_special_tokens=True)


@pytest.fixture
def piped(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., tuple[int, str, str]]:
    """``piped("a line\\n…", "--option")``: the exit code, what the answers are, and what is said besides."""

    def run(text: str | bytes, *words: str) -> tuple[int, str, str]:
        raw = text.encode() if isinstance(text, str) else text
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(raw), encoding="utf-8"))
        capsys.readouterr()
        code = main(["chat", "--model", str(checkpoint), "--device", "cpu", "--max_new_tokens", "30", *words])
        printed = capsys.readouterr()
        return code, printed.out, printed.err

    return run


def test_a_pipe_gets_the_answers_alone_each_after_all_before(
    piped: Callable[..., tuple[int, str, str]], checkpoint: Path, tmp_path: Path
) -> None:
    saved = tmp_path / "talk.jsonl"
    code, answers, _ = piped(f"{fenced(FIRST)}\n\n{SECOND}\n/save {saved}\n", "--system", "Be brief.")
    assert code == 0
    messages = [{"role": "system", "content": "Be brief."}]
    expected = ""
    for text in (FIRST, SECOND):
        messages.append({"role": "user", "content": text})
        messages.append({"role": "assistant", "content": by_transformers(checkpoint, messages, 30)})
        expected += messages[-1]["content"] + "\n"
    assert answers == expected
    turns = parse_record(saved.read_bytes().strip()).turns
    roles = {"user": "human", "assistant": "bot"}
    assert [(turn.role, turn.content) for turn in turns] == [
        (roles.get(message["role"], message["role"]), message["content"]) for message in messages
    ]


def test_reset_and_system_start_anew(piped: Callable[..., tuple[int, str, str]], checkpoint: Path) -> None:
    text = fenced(FIRST)
    lines = [
        text,
        SECOND,
        "/reset",
        text,
        "/system Reply with Python code only.",
        text,
        "/system",
        text,
        "/quit",
        SECOND,
    ]
    code, answers, said = piped("\n".join(lines))
    one = by_transformers(checkpoint, [{"role": "user", "content": FIRST}], 30)
    system = [{"role": "system", "content": "Reply with Python code only."}, {"role": "user", "content": FIRST}]
    other = by_transformers(checkpoint, system, 30)
    assert code == 0 and one != other
    assert answers.startswith(one + "\n") and answers.endswith(f"{one}\n{other}\n{one}\n")
    assert said.count("starting anew") == 3


@pytest.mark.parametrize("words", [("--preset", "beam"), ("--preset", "code", "--temperature", "1.5")], ids=str)
def test_the_options_are_those_of_generate(
    piped: Callable[..., tuple[int, str, str]],
    checkpoint: Path,
    capsys: pytest.CaptureFixture[str],
    words: tuple[str, ...],
) -> None:
    code, answers, _ = piped(SECOND + "\n", *words)
    assert code == 0 and answers != piped(SECOND + "\n")[1]
    asked = ("--model", str(checkpoint), "--device", "cpu", "--max_new_tokens", "30", "--prompt", SECOND)
    assert main(["generate", *asked, *words]) == 0
    assert capsys.readouterr().out == answers


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ("/nope\n", "standard input, line 1: /nope: there is no such command; /help lists them"),
        ("\n/save x.jsonl\n", "line 2: /save: nothing has been said yet"),
        ("/save\n", "/save: give a file"),
        ("/save ~nosuchuser/x.jsonl\n", "/save ~nosuchuser/x.jsonl: nobody has that home directory"),
        (f"/save {'x' * 300}\n", "cannot be used (File name too long)"),
        ('\n"""a\nb\n', 'standard input, line 2: """ opens a message there that no """ ends'),
        ('"""a\n/b \udcff"""\n'.encode(errors="surrogateescape"), "line 1: it is not UTF-8"),
        (b"a\xff\n", "line 1: it is not UTF-8 (character 2)"),
        (fenced("a b " * 300) + "\n", "positions. Your words are taken back. /reset starts anew."),
    ],
    ids=lambda value: str(value)[:20],
)
def test_what_is_wrong_in_a_pipe_ends_the_command(
    piped: Callable[..., tuple[int, str, str]], lines: str | bytes, message: str
) -> None:
    code, answers, said = piped(lines)
    assert code == 1 and not answers
    assert said.startswith("error: standard input") and message in said and said.count("\n") == 1


def test_only_a_regular_file_is_replaced(piped: Callable[..., tuple[int, str, str]], tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    code, _, said = piped(f"/save! {pipe}\n")
    assert code == 1 and f"/save! {pipe}: is no regular file" in said and pipe.is_fifo()


def test_a_slash_can_be_said(piped: Callable[..., tuple[int, str, str]], checkpoint: Path) -> None:
    expected = by_transformers(checkpoint, [{"role": "user", "content": "/price"}], 30)
    assert piped("//price\n")[1] == expected + "\n"
    assert piped(fenced("/price") + "\n")[1] == expected + "\n"


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (["/reset"], ("/reset", True)),
        (['"""/a', "", 'b"""'], ("/a\n\nb", False)),
        (["/* a\n */\n\n"], ("/* a\n */", False)),
        (['"""Doc."""\nx = 1'], ('"""Doc."""\nx = 1', False)),
        (["//a\n"], ("//a", False)),
    ],
)
def test_a_message_is_a_line_or_fenced_or_pasted(keys: list[str], message: tuple[str, bool]) -> None:
    line, *more = keys
    assert chat._message(line, lambda _: more.pop(0)) == message and not more


def test_memory_that_runs_out_is_one_message(
    piped: Callable[..., tuple[int, str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: Any, **__: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.")

    monkeypatch.setattr(conversation, "reply", fails)
    code, _, said = piped("a\n")
    assert code == 1 and said.startswith("error: out of memory: CUDA out of memory") and "--dtype bfloat16" in said


def test_an_empty_answer_is_told_and_leaves_no_turn(
    piped: Callable[..., tuple[int, str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(conversation, "reply", lambda *_, **__: Answer([], True))
    code, answers, said = piped("a\n")
    assert code == 1 and not answers and "the answer is empty. Your words are taken back." in said


# --- in a terminal


def pasted(text: str) -> str:
    """As a terminal sends what was pasted into it."""
    return f"\x1b[200~{text}\x1b[201~\r"


def test_a_terminal_talks_saves_and_refuses(
    terminal: Callable[..., Terminal], checkpoint: Path, tmp_path: Path
) -> None:
    saved = tmp_path / "talk.jsonl"
    it = terminal("--max_new_tokens", "30")
    assert "/save! FILE" in it.type("/help\r")
    assert "no such command" in it.type("/nope\r")
    assert "nothing has been said yet" in it.type(f"/save {saved}\r")
    assert "positions. Your words are taken back" in it.type(pasted("a b " * 300), "/reset starts anew.)")
    it.wait(PROMPT)
    first = by_transformers(checkpoint, [{"role": "user", "content": FIRST}], 30)
    assert f"\n{first}\n(cut at --max_new_tokens 30)" in it.type(pasted(FIRST), "30)")
    it.wait(PROMPT)
    it.type('"""two\r', "… ")
    it.type('lines"""\r')
    assert "saved to" in it.type(f"/save {saved}\r")
    before = saved.read_bytes()
    it.type(f"{SECOND}\r")
    it.type(pasted('"""Doc."""\n/reset\n\n'))
    assert "is there already" in it.type(f"/save {saved}\r") and saved.read_bytes() == before
    assert "saved to" in it.type(f"/save! {saved}\r") and saved.read_bytes() != before
    assert "cannot be written" in it.type(f"/save {saved}/x\r")
    assert it.ended("\x04") == 0
    turns = [turn.content for turn in parse_record(saved.read_bytes().strip()).turns]
    assert turns[::2] == [FIRST, "two\nlines", SECOND, '"""Doc."""\n/reset']
    assert turns[1] == first


def test_ctrl_c_stops_an_answer_and_not_the_program(
    terminal: Callable[..., Terminal], piped: Callable[..., tuple[int, str, str]], tmp_path: Path
) -> None:
    saved = tmp_path / "talk.jsonl"
    how, seed, whole = ("--max_new_tokens", "400", "--temperature", "3", "--seed"), 0, ""
    while len(whole) < 600:  # ten seconds, as slow as it is there
        seed += 1
        whole = piped("a\n", *how, str(seed))[1]
    it = terminal(*how, str(seed))
    begun = it.type("a\r", "a\n")
    while len(begun) < 40:  # the first words of the answer
        begun += it.wait(" ")
    shown = begun + it.type("\x03", "(stopped; what stands there counts as the answer)")
    it.wait(PROMPT)
    assert "answer 1 is not whole" in it.type(f"/save {saved}\r")
    (question, answer) = json.loads(saved.read_text())["chat_rounds"]
    assert question == {"role": "human", "content": "a"} and len(answer["content"]) > 20
    assert len(answer["content"]) < len(whole) // 2
    words = re.findall(r"[a-z]{3,}", answer["content"])
    assert len(words) > 3 and all(word in shown for word in words[:-1])
    beginning = answer["content"].rstrip("\ufffd")  # of a character of which more tokens were to come
    assert whole.startswith(beginning)
    assert "answer" not in it.type("/reset\r")
    assert "Ctrl-C again, or Ctrl-D, ends" in it.press_ctrl_c()
    os.write(it.mine, b"abc")
    it.wait("abc")
    it.press_ctrl_c()  # that line alone
    assert "Ctrl-C again" not in it.type("/help\r")
    assert "Ctrl-C again" in it.press_ctrl_c()
    it.press_ctrl_c("\n")
    assert it.ended("") == 0


def test_a_second_ctrl_c_breaks_an_answer_off_and_takes_the_question_back() -> None:
    interrupts = chat._Interrupts()
    with interrupts.kept() as stopped:
        assert not stopped()
        interrupts._receive(2, None)
        assert stopped()
        with pytest.raises(KeyboardInterrupt):
            interrupts._receive(2, None)
    interrupts._receive(2, None)  # between an answer and the prompt
    with pytest.raises(KeyboardInterrupt), interrupts.raised():
        interrupts._receive(2, None)
    interrupts._receive(2, None)


def test_ctrl_c_while_a_note_is_written_takes_nothing_back(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Answers:
        rounds: tuple[str, ...] = ()

        def say(self, text: str, **_: Any) -> str:
            self.rounds += (text,)
            return "cut"

    def pressed(text: str | None, note: Callable[[str | None], None] = chat._note) -> None:
        signal.raise_signal(signal.SIGINT)
        note(text)

    keys = iter(["a", "b"])
    talk: Any = Answers()
    monkeypatch.setattr("builtins.input", lambda _: next(keys, None) or (_ for _ in ()).throw(EOFError))
    monkeypatch.setattr(chat, "_note", pressed)
    chat._in_terminal(talk)
    assert talk.rounds == ("a", "b") and capsys.readouterr().err == "(cut)\n(cut)\n"


def test_an_answer_is_kept_whole_or_not_at_all_wherever_it_is_broken_off(monkeypatch: pytest.MonkeyPatch) -> None:
    """Broken off before every line of ``say``; the next turn has as many answers as it has ids of answers."""

    class Format:
        def encode_prompt(self, turns: list[Turn], answers: list[list[int]]) -> list[int]:
            assert sum(turn.role == "bot" for turn in turns) == len(answers)
            assert [turn.role for turn in turns[::2]] == ["human"] * (len(answers) + 1)
            return [1]

        def decode(self, ids: list[int]) -> str:
            return "b"

    monkeypatch.setattr(conversation, "reply", lambda *_, **__: Answer([2], False))
    monkeypatch.setattr(conversation, "room", lambda *_: None)
    loaded: Any = SimpleNamespace(model=None, tokenizer=None, chat_format=Format())
    talk = conversation.Talk(loaded, GenerationSettings(), None)
    code, before = conversation.Talk.say.__code__, sys.gettrace()
    for broken in range(40):
        left = broken

        def tracing(frame: FrameType, event: str, _: Any) -> Any:
            nonlocal left
            if frame.f_code is not code:
                return None
            if event == "line":
                left -= 1
                if left < 0:
                    raise KeyboardInterrupt
            return tracing

        sys.settrace(tracing)
        try:
            talk.say("a", tell=print, stopped=lambda: False)
            break
        except KeyboardInterrupt:
            pass
        finally:
            sys.settrace(before)
        talk.say("a", tell=print, stopped=lambda: False)
    assert 10 < broken < 40


def test_an_answer_that_fills_the_positions_says_so(
    piped: Callable[..., tuple[int, str, str]], checkpoint: Path
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    text = "a b " * 200
    while len(tokenizer(text)["input_ids"]) > 470:
        text = text[4:]
    code, answers, said = piped(text + "\n", "--max_new_tokens", "400", "--temperature", "3")
    assert code == 0 and answers and "the model's 512 positions are full. /reset starts anew" in said
