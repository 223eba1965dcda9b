"""What a script's words come to: compared with what bash itself says of the same lines, where it can be asked."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Sequence

import pytest

from mft_lightning.errors import UserError
from mft_lightning.moving_over.shell_expansion import as_written
from mft_lightning.moving_over.shell_script import read_script

VALUES = ("10", "1", "8", "5")
# each ends with a command of the name `told`
SCRIPTS = [
    "told a 'b c' \"d e\" f\\ g \"\" ''",
    'A="x y"; told $A "$A" pre$A"post" ${A}z',
    'A=; told a $A b ${A} "$A" c',
    'told $1 ${4} $# "$@" "$*" ${5:-none} ${5-none} ${6:+some}',
    'told "${@:2}"',
    "A=1; B=${A:-2}; C=${D:-$A}; D=${E:=7}; told $B $C $D $E ${A:+yes}",
    "P=/a/b.c/d.tar.gz; told ${P##*/} ${P%.*} ${P%%.*} ${P#*/} ${#P} ${P/d/x} ${P//a/_}",
    "told $((2 + 3 * 4)) $(($1 * $2 * $3)) $(( ($1 - 3) / 2 )) $((-7 % 3)) $(( -7 / 2 ))",
    "N=4; told $((N * 2)) $(($N*N))",
    "A=(--x 1 'two words'); A+=(--y); told \"${A[@]}\" ${A[1]} end",
    "told a \\\n  b \\\n  c # d\ntold2",
    "told 'it''s' \"a\"'b'c",
    'told "a\\$b" "c\\"d" a#b \'#\' \\$x',
    "# nothing\n\n  told after comments",
    "A=1\nif [ $A = 1 ]; then B=yes; else B=no; fi\ntold $B",
    'if [ $1 -gt 20 ]; then B=big; elif [ "$2" == "1" ]; then B=one; else B=no; fi; told $B',
    'if [[ $1 -eq 10 && "$4" != 6 ]]; then B=both; fi; told $B',
    '[ -z "$7" ] && B=missing; [ -n "$7" ] || C=too; told $B $C',
    "if [ a = b ]; then\n if true; then X=1; fi\n X=2\nelse X=3; fi; told $X",
    "if ! [ a = b ]; then X=1; fi; told $X",
    "cat > /dev/null <<EOF\ntold not 'this\nEOF\ntold this",
    "cat > /dev/null <<-'X'\n\tit's\n\tX\ntold this",
    'export A=1 B="two words"; told $A "$B"',
    'CMD="told a b"; $CMD c; ',
    "CMD=\"told 'a b'\"; eval $CMD c",
    "X=1 told a > /dev/null 2>&1; told b >> /dev/null",
    "shift; told $1 $#",
    'A=1; unset A; told "[$A]"',
    "{ A=1; }; told $A",
    "A=--flag; told ${A} $NOTHING end",
    "S=${SIZE:-'a b'}; told \"$S\" ${SIZE:-x}",
    "told `true` end",
    'A=(); B=(x "y z"); told "$@" "${@:5}" "${A[@]}" "${A[*]}" "${B[*]}" a"${A[@]}" "${A[@]}b" "${A[@]}${A[@]}" ""',
    'A=(); told ${A[@]} ${@:9} "" "${@:5}"',
]


def told(text: str) -> list[list[str]]:
    """The words of all commands ``told``, with what is open as nothing, as bash without the variable has it."""
    commands = read_script(text, "run.sh", VALUES, {"NOTHING": "", "SIZE": ""}).commands
    return [[word for word, _ in command.words[1:]] for command in commands if command.words[0][0] == "told"]


def of_bash(text: str) -> list[list[str]]:
    said = subprocess.run(
        ["bash", "-c", 'told() { printf "%s\\0" told "$@" "" ; }; told2() { :; }\n' + text, "run.sh", *VALUES],
        capture_output=True,
        text=True,
        check=False,
        env={"PATH": "/usr/bin:/bin", "NOTHING": "", "SIZE": ""},
    )
    assert not said.stderr, said.stderr
    found: list[list[str]] = []
    for call in said.stdout.split("told\0")[1:]:
        found.append(call.split("\0")[:-2])
    return found


@pytest.mark.skipif(shutil.which("bash") is None, reason="bash is not there to be asked")
@pytest.mark.parametrize("text", [text for text in SCRIPTS if "`" not in text and "> /dev/null 2" not in text])
def test_words_are_what_bash_makes_of_them(text: str) -> None:
    assert told(text) == of_bash(text)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('A="$A"; told $A', ["$A"]),
        ("DAY=$(date +%Y); told out/$DAY", ["out/$DAY"]),
        ("told $(nvidia-smi -L | wc -l)", ["$(nvidia-smi -L | wc -l)"]),
        ("told --n=`nproc`x", ["--n=$(nproc)x"]),
        ("T=$((N * 2)); told $T", ["$T"]),
        ("told ${HOME_OF_DATA}/a ${X:?must be set}", ["$HOME_OF_DATA/a", "$X"]),
        ('told "${ARRAY[@]}"', ["$ARRAY"]),
        ("X=${ARRAY[0]}; told $X", ["$ARRAY"]),
    ],
)
def test_what_only_running_it_tells_is_open_by_its_variable(text: str, words: Sequence[str]) -> None:
    (command,) = read_script(text, "run.sh", (), {}).commands
    assert [as_written(word) for word, _ in command.words[1:]] == list(words)


def test_given_variables_are_known() -> None:
    (command,) = read_script("told $A ${B:-2}", "run.sh", (), {"A": "1", "B": "3"}).commands
    assert [word for word, _ in command.words] == ["told", "1", "3"]


@pytest.mark.parametrize(
    "assigned",
    ["A=$(nproc)", "A=`nproc`", "A=4", "A=(4 5)", "A=4; A+=5", "export A=4", "[ -d x ] && A=4", "A=4; unset A", ""],
)
def test_what_is_given_stands_for_what_the_script_would_set(assigned: str) -> None:
    commands = read_script(f'{assigned}; told $A "${{A[@]}}" ${{A[1]}}', "run.sh", (), {"A": "x 'y z'"}).commands
    told = [[word for word, _ in command.words[1:]] for command in commands if command.words[0][0] == "told"]
    assert told == [["x", "'y", "z'", "x", "y z", "y", "z"]]


def test_a_condition_that_is_not_known_may_decide_nothing_that_matters() -> None:
    text = 'if [ ! -d $OUT ]; then mkdir $OUT; fi\n[ -z "$DATA" ] && exit 1\ntold a'
    assert [command.words[0][0] for command in read_script(text, "run.sh", (), {}).commands] == ["told"]


def test_commands_know_their_line_and_what_follows_an_exit_is_not_read() -> None:
    script = read_script("\ntold \\\n a\nexit 0\ntold b\n", "run.sh", (), {})
    assert script.ended == 4 and [command.line for command in script.commands] == [2]
    assert [line for _, line in script.commands[0].words] == [2, 3]


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ('a\nX="b', "run.sh:2: a double quote is opened here and not closed."),
        ("X='b", "run.sh:1: a single quote is opened here"),
        ("a $(b", "run.sh:1: ( is opened here"),
        ("told ${x y}", "run.sh:1: ${x y} is no variable."),
        ("cat <<E\na\n", "run.sh:2: the here-document that begins here is not closed by E."),
        ("for i in 1 2; do echo $i; done", "run.sh:1: a `for` cannot be followed"),
        ("while true; do a; done", "a `while` cannot be followed"),
        ("case $1 in a) b;; esac", "a `case` cannot be followed"),
        ("go() { a; }", "run.sh:1: a function cannot be followed"),
        ("function go { a; }", "a `function` cannot be followed"),
        ("if [ -d x ]; then A=1; fi", "run.sh:1: whether A is set so depends on what only running the script can tell"),
        ("[ -f x ] && python r.py", "whether `python r.py` is started depends"),
        ("if [ $A = 1 ]; then B=1; else B=2; fi", "whether B is set so depends"),
        ("if true; then a", "run.sh:1: the script ends without 'fi'."),
        ("if true; a", "the script ends without 'then'."),
        ("a ${B^}", ""),
        ("A=abc; a ${A/b*/c}", "${A/b*/c} is more of the shell than convert-config reads"),
        ("a $((1 // 0))", "cannot be worked out"),
        ("a $((1 / 0))", "run.sh:1: $((1 / 0)) cannot be worked out"),
        ("a \\\n --b 1 \\\n # --c 2 \\\n --d 3", "run.sh:4: a command begins with --d."),
        ("a $1", "run.sh:1: $1 is not given. Give the script's values after it"),
        ("[ a = b", "run.sh:1: [ is opened here"),
        ("[[ a = b", "run.sh:1: [[ is opened here"),
        (") a", "cannot stand here"),
        ("a &&\n", "run.sh:1: the script ends where a command must stand."),
        ("a\n((A = A * 2))", "run.sh:2: ((A = A * 2)) sets variables in a way that is not followed."),
        ("((A++))", "run.sh:1: ((A++)) sets variables"),
        ("if (( $# < 4 )); then A=1; fi", "whether A is set so depends"),
        ("if (( $# <= 4 )); then exit 1; fi; ((a); (b)); a > >(tee b)", ""),
        ("let A=3", "run.sh:1: let sets variables in a way that is not followed."),
        ("A[1]=3", "run.sh:1: A[1]=3 sets variables in a way"),
        ("a\nset -- 1 2", "run.sh:2: set sets variables in a way"),
        ("( " * 10_000 + "a" + ")" * 10_000, "run.sh: is nested too deeply, or evaluates itself."),
        ("""A='eval "$A"'; eval "$A\"""", "run.sh: is nested too deeply, or evaluates itself."),
        ('told "${QUOTE[@]}"', "--set QUOTE: is read as words, and has a quote that is not closed."),
        ("A=abc\n" + "A=$A$A\n" * 40, "run.sh: A becomes longer than 1,048,576 characters."),
    ],
)
def test_what_cannot_be_read_is_told_with_its_line(text: str, why: str) -> None:
    if not why:
        read_script(text, "run.sh", (), {})
        return
    with pytest.raises(UserError) as caught:
        read_script(text, "run.sh", (), {"QUOTE": "'"})
    assert why in str(caught.value)


def test_nothing_is_run(tmp_path: pytest.TempPathFactory) -> None:
    mark = f"{tmp_path}/mark"
    text = f'touch {mark}; A=$(touch {mark}); B=`touch {mark}`; [ -n "$(touch {mark})" ] || true; eval touch {mark}'
    read_script(text, "run.sh", (), {})
    with pytest.raises(FileNotFoundError):
        open(mark)  # noqa: SIM115, PTH123
