"""Every command that README.md and the pages of docs/ show is run here or by another test, but for those of NOT_RUN.

What blocks of README.md show is run by test_readme.py. Pages say CHECKPOINT, DIR and the like for what a user has; here
a small run stands for them.
"""

from __future__ import annotations

import contextlib
import gzip
import io
import json
import re
import runpy
import shlex
import shutil
from pathlib import Path

import pytest

from mft_lightning.cli import main
from tests.conftest import ROOT
from tests.examples.elsewhere import run_elsewhere
from tests.examples.shown import Unknown, commands
from tests.examples.small_benchmarks import SMALL, is_parsed, run_small
from tests.moving_over.launches import config, script

QUICK = (
    *("--trainer.max_steps", "1", "--data.num_workers", "0", "--data.total_train_batch_size", "8"),
    *("--evaluation.max_conversations_per_task", "1", "--evaluation.exact_match_per_task", "null"),
)
# What a page says for what a user has -> what it is here.
HERE = {
    "CHECKPOINT": "checkpoints/lora/step-00000001",
    "ADAPTER": "checkpoints/lora/step-00000001",
    "BASE": "checkpoints/full/step-00000001",
    "CONFIG.yaml": "checkpoints/full/config.yaml",
    "…": "checkpoints/full/config.yaml",
    "best|last|DIR": "best",
    "cuda": "cpu",
    "checkpoints/tutorial-merged": "checkpoints/full/step-00000001",
}
# What no test runs -> why. docs/code.md says the same.
NOT_RUN = {
    r"(curl|vllm|text-generation-launcher|lm_eval|python llama\.cpp/\S+) ": "a program of others",
    r"(\S+/bin/)?pip install |python -m venv ": "an installation; the extras and files that it names are there",
    r"mkdocs serve$": "an installation; .ci/run builds the site",
    r"python -m mft_lightning .*DeepSpeedStrategy": "wants CUDA GPUs; test_class_paths.py has the strategy on CPUs",
}
PAGES = {page.stem: page.read_text(encoding="utf-8") for page in sorted((ROOT / "docs").glob("*.md"))}
README = re.sub(r"(?ms)^```bash\n.*?^```$", "", (ROOT / "README.md").read_text(encoding="utf-8"))
FOUND = {page: list(commands(text)) for page, text in {**PAGES, "README": README}.items()}


@pytest.fixture(scope="module")
def project(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the pages take for granted: a run, adapters on top of it, files of other programs."""
    directory = tmp_path_factory.mktemp("project")
    for name in ("configs", "examples"):
        (directory / name).symlink_to(ROOT / name)
    shutil.copytree(tiny_model, directory / "on_the_hub")
    sizes = json.loads((tiny_model / "config.json").read_text()) | {"max_position_embeddings": 2048}
    (directory / "on_the_hub" / "config.json").write_text(json.dumps(sizes))
    with contextlib.chdir(directory):
        hub = ("--model.pretrained_model_path", "on_the_hub")
        assert main(["fit", "--config", "full.yaml", *QUICK, *hub]) == 0
        start = ("--model.pretrained_model_path", HERE["BASE"], "--model.init", "pretrained")
        assert main(["fit", "--config", "lora.yaml", *QUICK, *start, "--model.lora.r", "4"]) == 0
        (tutorial,) = re.findall(r"^```yaml\n(.*?)^```$", PAGES["tutorial"], re.MULTILINE | re.DOTALL)
        Path("tutorial.yaml").write_text(tutorial.replace("EleutherAI/pythia-70m", HERE["BASE"]))
        published(Path("downloads"))
        Path("FILE.jsonl").write_text('{"prompt": "1 + 1?"}\n')
        Path("site.yaml").write_text("model:\n  num_warmup_steps: 1\n")
        Path("experiment.yaml").write_text("data:\n  seq_length: 256\n")
        Path("run_gpt_mft_peft.sh").write_text(script())
        Path("lora_train_config.json").write_text(config("lora"))
        launch = "python mft_accelerate.py --train_config lora_train_config.json --distributed_type none\n"
        Path("ds_single_launch.sh").write_text(launch)
        Path("alpaca.json").write_text(json.dumps([{"instruction": "1 + 1?", "input": "", "output": "2"}]))
        turns = [{"from": "human", "value": "Hello"}, {"from": "gpt", "value": "Hello yourself."}]
        Path("sharegpt.json.gz").write_bytes(gzip.compress(json.dumps([{"conversations": turns}]).encode()))
    return directory


def published(downloads: Path) -> None:
    """A little in the form of each of the tutorial's data sets."""
    downloads.mkdir()
    math = [{"question": f"{n} + 1?", "answer": f"#### {n + 1}"} for n in range(40)]
    (downloads / "test.jsonl").write_text("".join(f"{json.dumps(one)}\n" for one in math))
    code = [{"text": f"Give {n}.", "code": f"def f():\r\n  return {n}", "test_list": ["assert f()"]} for n in range(40)]
    (downloads / "mbpp.jsonl").write_text("".join(f"{json.dumps(one)}\n" for one in code))
    completed = [{"prompt": f"def f{n}():\n", "canonical_solution": f"    return {n}\n"} for n in range(40)]
    with gzip.open(downloads / "HumanEval.jsonl.gz", "wt") as file:
        file.writelines(f"{json.dumps(one)}\n" for one in completed)


@pytest.mark.parametrize("page", [page for page, lines in FOUND.items() if lines])
def test_the_commands_of_a_page(
    page: str,
    project: Path,
    tiny_model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    for number, line in enumerate(FOUND[page]):
        monkeypatch.chdir(project)
        new, elsewhere = tmp_path / str(number), run_elsewhere(line)
        if benchmark := re.match(r"python (?:-m )?benchmarks[/.](\w+)(?:\.py)?(.*)", line):
            module, words = benchmark[1], [word for word in benchmark[2].split() if word != "…"]
            if elsewhere:
                is_parsed(module, words)
            else:
                monkeypatch.chdir(ROOT)  # as its page says
                run_small(module, words, tiny_model, new, capfd)
        elif any(re.match(pattern, line) for pattern in NOT_RUN):
            installs_what_there_is(line)
        elif match := re.match(r"^python (examples/\S+\.py) (.*)", line):
            runpy.run_path(str(ROOT / match[1]))["main"](*match[2].split())
        elif line.startswith("python -m pytest "):
            assert all((ROOT / file).is_file() for file in line.split()[3:])
        elif not elsewhere:
            assert line.startswith("python -m mft_lightning "), f"docs/{page}.md: no test runs {line}"
            monkeypatch.setattr("sys.stdin", io.StringIO())
            runs(shlex.split(line)[3:], new)


def test_no_benchmark_is_small_for_nothing() -> None:
    shown = " ".join(line for lines in FOUND.values() for line in lines)
    assert [name for name in SMALL if not re.search(rf"benchmarks[/.]{name}\b", shown)] == []


def test_commands_are_found_wherever_they_stand() -> None:
    text = (
        "```bash\nprintf 'a' | python -m b  # why\ncurl \\\n  -O c\n```\n\n    python d [--e]\n        [--f]\n\n"
        "Say `pip  install\ng`, or `python`.\n\n```text\nlm_eval h\nsaid\n```\n\n```bash\nmkdir i && x/bin/pip j\n```\n"
    )
    found = ["python -m b", "curl -O c", "x/bin/pip j", "lm_eval h", "python d --e --f", "pip install g"]
    assert list(commands(text)) == found
    with pytest.raises(Unknown, match="gcc k"):
        list(commands("```bash\ngcc k\n```\n"))


def installs_what_there_is(line: str) -> None:
    extras = re.search(r"^\[options\.extras_require\]\n(.*?)^\[", (ROOT / "setup.cfg").read_text(), re.M | re.S)
    assert extras is not None
    for extra in re.findall(r"\[(\w+)\]", line):
        assert f"\n{extra} =\n" in f"\n{extras[1]}"
    for file in re.findall(r"-[rc] (\S+)", line):
        assert (ROOT / file).is_file()


def runs(words: list[str], new: Path) -> None:
    """A command with what a user has in the place of what the page calls it, and little to do."""
    words = [HERE.get(word, word) for word in words]
    new.mkdir()
    for option, value in (("--output", str(new / "new")), ("--base", HERE["BASE"]), ("--limit", "2")):
        if option in words:
            words[words.index(option) + 1] = value
    output = io.StringIO()
    if ">" in words:
        words, (file,) = words[: words.index(">")], words[words.index(">") + 1 :]
        output = Path(file).open("w")  # noqa: SIM115  # closed below
    if words[0] in ("generate", "predict"):
        words += ["--max_new_tokens", "2"]
    if words[0] == "estimate":  # of a model that is on the hub
        words += ["--model.pretrained_model_path", "on_the_hub"]
    if words[0] == "fit" and not {"--print_config", "--dry_run"} & set(words):
        words += QUICK
        if "tutorial.yaml" not in words:  # whose runs go on
            words += ["--output_dir", str(new / "run")]
        words += ["--model.pretrained_model_path", HERE["BASE"], "--model.init", "pretrained"]
    with output, contextlib.redirect_stdout(output):
        try:
            code = main(words)
        except SystemExit as ended:
            code = ended.code
    assert code in (0, None)
