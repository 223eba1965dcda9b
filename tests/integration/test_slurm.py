"""Under a real SLURM: srun's tasks are the ranks of one run, which SLURM's signals end in order, and which goes on."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.integration.conftest import ROOT, checkpoints, user_environment
from tests.integration.slurm import slurm  # noqa: F401  # a fixture

SOON = 120.0  # seconds that a job may take on a machine that does other things too
SCRIPT = "#SBATCH --open-mode truncate\nsrun {command}\nexit $?\n"
Submit = Callable[..., "Job"]


class Job:
    """A job of SLURM's.

    Args:
        environment: of SLURM's commands.
        directory: for its script and what it prints.
        nodes: how many.
        tasks: on each.
        words: of the program's command line.
        script: what it runs, with ``{command}`` for the program.
    """

    def __init__(
        self, environment: dict[str, str], directory: Path, nodes: int, tasks: int, words: list[str], script: str
    ) -> None:
        self.environment, self.output = {**user_environment(), **environment}, directory / "printed"
        command = shlex.join([sys.executable, "-m", "mft_lightning", *words])
        (directory / "job.sh").write_text("#!/bin/bash\n" + script.replace("{command}", command))
        own = ("--parsable", "--chdir", str(ROOT), "--output", str(self.output))
        own += ("--nodes", str(nodes), "--ntasks-per-node", str(tasks))
        self.id = self.say("sbatch", *own, str(directory / "job.sh")).strip()

    def say(self, *command: str) -> str:
        """A command to SLURM, and its answer."""
        done = subprocess.run(command, env=self.environment, capture_output=True, text=True, check=True, timeout=SOON)
        return done.stdout

    def printed(self) -> str:
        return self.output.read_text() if self.output.exists() else ""

    def wait_for(self, text: str) -> None:
        self._until(lambda: text in self.printed())

    def ended(self) -> tuple[str, str]:
        """How: its state and ``exit code:signal``."""
        self._until(lambda: not self.say("squeue", "-h", "-t", "PD,R,CG", "-j", self.id).strip())
        words = self.say("scontrol", "-o", "show", "job", self.id).split()
        said = dict(word.split("=", 1) for word in words if "=" in word)
        return said["JobState"], said["ExitCode"]

    def _until(self, there: Callable[[], bool]) -> None:
        deadline = time.monotonic() + SOON
        while not there():
            assert time.monotonic() < deadline, self.printed()
            time.sleep(0.2)


def documented(page: str, program: str) -> str:
    """The script of a page that runs a program, as :class:`Job` takes it."""
    blocks = re.findall(r"^```bash\n(#SBATCH .*?)^```$", (ROOT / "docs" / page).read_text(), re.MULTILINE | re.DOTALL)
    (script,) = [block for block in blocks if program in block]
    return script.replace(program, "{command}")


@pytest.fixture
def submit(slurm: dict[str, str], fit_arguments: Callable[..., list[str]], tmp_path: Path) -> Submit:  # noqa: F811
    """``fit`` on so many nodes, with so many tasks on each."""

    def start(nodes: int, tasks: int, *words: str, config: str = "ddp.yaml", script: str = SCRIPT) -> Job:
        few = ("--evaluation.at_start", "false", "--evaluation.steps", "1000", "--trainer.devices", "auto")
        arguments = fit_arguments(tmp_path / "run", *few, *words, config=config)
        return Job(slurm, tmp_path, nodes, tasks, ["fit", *arguments], script)

    return start


def test_a_signal_ends_the_tasks_of_two_nodes_in_order_and_the_run_goes_on(submit: Submit, tmp_path: Path) -> None:
    """As two tasks of one node. The first starts anew, as ``--ckpt_path last`` finds nothing yet."""
    forever = ("--trainer.max_steps", "100000", "--checkpoint.checkpointing_steps", "100000")
    job = submit(2, 1, *forever, "--ckpt_path", "last", config="lora.yaml")
    job.wait_for("step 4/")
    job.say("scancel", "--signal=USR1", job.id)
    assert job.ended() == ("FAILED", "138:0"), job.printed()
    assert "1 x cpu on each of 2 nodes, ddp" in job.printed() and "stopped by SIGUSR1" in job.printed()
    (last,) = checkpoints(tmp_path / "run")
    step = int(last.removeprefix("step-"))
    again = submit(1, 2, "--trainer.max_steps", str(step + 2), "--ckpt_path", "last", config="lora.yaml")
    assert again.ended() == ("COMPLETED", "0:0"), again.printed()
    assert "2 x cpu, ddp" in again.printed() and f"going on from {last}" in again.printed()
    assert again.printed().count(f"trained to step {step + 2}") == 1


def test_bad_input_is_told_once_and_ends_the_tasks_of_both_nodes(submit: Submit, tmp_path: Path) -> None:
    script = documented("parallel.md", "python -m mft_lightning fit --config configs/multi-node.yaml")
    job = submit(2, 1, "--data.seq_length", "7", config="multi-node.yaml", script=script)
    state, code = job.ended()
    assert state == "FAILED" and code in ("1:0", "143:0")  # of the task that failed, or of one that srun ended for it
    (message,) = [line for line in job.printed().splitlines() if line.startswith("error: ") and "srun" not in line]
    assert message.startswith("error: data.") and not (tmp_path / "run").exists()


@pytest.mark.parametrize(("code", "requeued"), [(0, False), (1, False), (138, True), (143, True), (137, False)])
def test_a_documented_script_requeues_what_a_signal_ended(tmp_path: Path, code: int, requeued: bool) -> None:
    """What SLURM's own programs are asked: a queue that tries such a job again takes minutes for it."""
    program = "python -m mft_lightning fit --config configs/lora.yaml --ckpt_path last"
    script = documented("checkpoints.md", program).replace("{command}", program)
    for name, status in (("srun", code), ("scontrol", 0)):
        (tmp_path / name).write_text(f'#!/bin/sh\necho "{name} $*"\nexit {status}\n')
        (tmp_path / name).chmod(0o755)
    environment = {"PATH": f"{tmp_path}:/usr/bin:/bin", "SLURM_JOB_ID": "17"}
    done = subprocess.run(["bash", "-c", script], env=environment, capture_output=True, text=True, check=False)
    asked = [f"srun {program}", *(["scontrol requeue 17"] if requeued else [])]
    assert (done.stdout.splitlines(), done.stderr, done.returncode) == (asked, "", code)
