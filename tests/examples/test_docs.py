"""Every command that a page of docs/ shows runs, or is of a kind that another test runs; README.md has its own test.

Pages say CHECKPOINT, DIR and the like for what a user has; here a small run stands for them.
"""

from __future__ import annotations

import argparse
import contextlib
import gzip
import importlib
import inspect
import io
import json
import re
import runpy
import shlex
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from mft_lightning.cli import main
from tests.conftest import ROOT
from tests.moving_over.launches import config, script

PAGES = sorted((ROOT / "docs").glob("*.md"))
PROGRAMS = ("python", "torchrun", "srun", "sbatch", "pip", "tensorboard", "mkdocs", "curl", "vllm", "lm_eval")
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
# What needs several devices, a cluster, or minutes -> the test that runs such, and what it has of the command.
ELSEWHERE = {
    r"^(\S+ )*torchrun .*": ("tests/integration/test_ranks.py", "torch.distributed.run"),
    r"^srun .*": ("tests/integration/test_slurm.py", "srun"),
    r".*DeepSpeedStrategy.*": ("tests/integration/test_class_paths.py", "DeepSpeedStrategy"),
    r".*-m mft_lightning consolidate .*": ("tests/integration/test_sharded_checkpoints.py", '"consolidate"'),
    r".*fit --config configs/(ddp|fsdp)\.yaml$": ("README.md", "fsdp.yaml"),
    r".*fit --config configs/quickstart\.yaml$": ("tests/examples/test_readme.py", "quickstart.yaml"),
    r".*--config own\.yaml$": ("tests/integration/test_own_classes.py", '"own.yaml"'),
    r"^tensorboard --.*": ("tests/examples/test_readme.py", "tensorboard.main"),
    r"^python tests/integration/kills\.py .*": ("tests/integration/test_kills.py", "kills"),
    r"^python -m pytest .*": ("tests/integration/test_role_tokens.py", "def test_"),
}
# Other people's programs, whose own pages say how they are called.
OTHERS = (r"^curl .*", r"^vllm .*", r"^python llama\.cpp/.*", r"^pip install (wandb|mlflow-skinny .*)$")


def commands(text: str) -> Iterator[str]:
    """Those in blocks and within sentences, continued lines joined, comments and brackets of what is optional gone."""
    blocks = re.findall(r"^```(?:bash|sh)?\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    blocks += re.findall(r"(?<=\n\n)((?: {4}[^\n]*\n)+)", text)
    within = [" ".join(found.split()) for found in re.findall(r"`([^`]+)`", re.sub(r"(?ms)^```.*?^```$", "", text))]
    lines = [line.strip() for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    for line in [*lines, *within]:
        if re.match(rf"({'|'.join(PROGRAMS)}) \S", line) and not re.fullmatch("python -m( mft_lightning)?", line):
            yield re.sub(r"\[(--[^\]]*)\]", r"\1", re.sub(r" +(# .*)?", " ", line)).strip()


FOUND = {page.stem: list(commands(page.read_text(encoding="utf-8"))) for page in PAGES}
TUTORIAL = (ROOT / "docs" / "tutorial.md").read_text(encoding="utf-8")


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
        (tutorial,) = re.findall(r"^```yaml\n(.*?)^```$", TUTORIAL, re.MULTILINE | re.DOTALL)
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
def test_the_commands_of_a_page(page: str, project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(project)
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))  # as that of a script's own directory
    for number, line in enumerate(FOUND[page]):
        if any(re.match(other, line) for other in OTHERS):
            continue
        if found := next((test for pattern, test in ELSEWHERE.items() if re.match(pattern, line)), None):
            assert found[1] in (ROOT / found[0]).read_text()
        elif match := re.match(r"^python (?:-m )?benchmarks[/.](\w+)(?:\.py)?(.*)", line):
            is_parsed(match[1], [word for word in match[2].split() if word != "…"])
        elif "pip install" in line or line.startswith("mkdocs"):
            installs_what_there_is(line)
        elif match := re.match(r"^python (examples/\S+\.py) (.*)", line):
            runpy.run_path(str(ROOT / match[1]))["main"](*match[2].split())
        else:
            assert line.startswith("python -m mft_lightning "), f"docs/{page}.md: no test runs {line}"
            monkeypatch.setattr("sys.stdin", io.StringIO())
            runs(shlex.split(line)[3:], tmp_path / str(number))


class Parsed(Exception):
    """A benchmark has read its command line."""


def is_parsed(module: str, words: list[str]) -> None:
    found = importlib.import_module(f"benchmarks.{module}")
    read = argparse.ArgumentParser.parse_known_args  # which parse_args calls too

    def end(parser: argparse.ArgumentParser, *given: Any) -> None:
        _, unknown = read(parser, words)
        assert not unknown
        raise Parsed

    if "_parser(" not in (source := inspect.getsource(found)) and "ArgumentParser(" not in source:
        assert not words
        return
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Parsed):
        patch.setattr(argparse.ArgumentParser, "parse_known_args", end)
        found.main()


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
