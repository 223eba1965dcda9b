"""Starts the other ranks of a run on this machine, and sees to it that all end together."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

import lightning as L
from lightning.fabric.plugins import ClusterEnvironment
from lightning.fabric.utilities.distributed import _set_num_threads_if_needed
from lightning.pytorch.strategies import ParallelStrategy, Strategy
from lightning.pytorch.strategies.launchers.subprocess_script import _SubprocessScriptLauncher
from torch.distributed.constants import default_pg_timeout

from mft_lightning import meeting, ranks
from mft_lightning.errors import UserError

GRACE = 20.0  # seconds that a rank has to end by itself after another one failed
GOODBYE = 60.0  # seconds that a rank has to end after the work is done
# exit codes of a rank that has done its work
ORDERLY = (0, *(128 + signum for signum in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)))


class RankLauncher(_SubprocessScriptLauncher):
    """Lightning's launcher of subprocesses, with torchrun's environment for each rank and an orderly end.

    Lightning's own starts ``sys.argv`` again, which need not be what runs here, and ends the first rank by SIGKILL
    when another one fails. With this one no rank outlives the others, and the exit code tells of the failure.

    Args:
        environment: the ranks' addresses.
        devices: ranks on this machine.
        nodes: machines.
        command: the words after ``python -m mft_lightning`` that every rank is started with.
    """

    def __init__(self, environment: ClusterEnvironment, devices: int, nodes: int, command: Sequence[str]) -> None:
        super().__init__(environment, devices, nodes)
        self.command = command

    def launch(self, function: Callable[..., Any], *args: Any, trainer: L.Trainer | None = None, **kwargs: Any) -> Any:
        """Start the other ranks, call ``function`` here, and leave none of them behind."""
        self.cluster_environment.validate_settings(num_devices=self.num_processes, num_nodes=self.num_nodes)
        _set_num_threads_if_needed(num_processes=self.num_processes)
        store = self._call_children_scripts()
        done = threading.Event()
        threading.Thread(target=self._watch, args=(done,), daemon=True, name="watch the other ranks").start()
        try:
            ranks.join(store, self._check_alive)
            result = function(*args, **kwargs)
            self._goodbye()
        except BaseException as error:
            done.set()
            killed = None
            if ranks.is_lost_peer(error):  # one of them has something to say, or never will
                self._wait(GRACE, any)
                killed = self._killed()
            elif not ranks.is_first_to_fail():
                self._wait(GRACE, any)  # it tells why
            self.kill(signal.SIGKILL)
            self._wait(GRACE, all)
            if killed is not None:
                raise UserError(killed) from error
            raise
        done.set()
        ranks.leave()
        return result

    def _check_alive(self) -> None:
        if any(process.poll() is not None for process in self.procs):
            raise UserError(self._killed() or "a rank ended before it met the others, see above.")

    def _goodbye(self) -> None:
        """Wait for the others, whose work is done too; one that fails or stays now is an error of the run."""
        if not self._wait(GOODBYE, all):
            raise UserError(f"a rank did not end within {GOODBYE:.0f} seconds after the work was done.")
        if any(process.returncode not in ORDERLY for process in self.procs):
            raise UserError(self._killed() or "a rank failed after the work was done, see above.")

    def _call_children_scripts(self) -> Any:
        """Start the other ranks of this machine; the store to meet them at, if this rank hosts it."""
        self._check_can_spawn_children()
        environment, node, store = self.cluster_environment, self.cluster_environment.node_rank(), None
        address, port = environment.main_address, environment.main_port
        if self.num_nodes == 1:  # where to meet other machines means nothing here
            store = meeting.host_store(0)
            address, port = meeting.HERE, store.port
        elif node == 0:
            store = meeting.host_store(port)
        shared = {
            "MASTER_ADDR": address,
            "MASTER_PORT": str(port),
            "NODE_RANK": str(node),
            "LOCAL_WORLD_SIZE": str(self.num_processes),
            "WORLD_SIZE": str(self.num_processes * self.num_nodes),
        }
        if (more := self.num_processes - 1) > 0:
            print(f"starting {more} more process(es)", flush=True)
        verbose = [word for word in sys.argv if word == "--verbose"]
        command = [sys.executable, "-m", "mft_lightning", *self.command, *verbose]
        for local in range(self.num_processes):
            own = {**shared, "LOCAL_RANK": str(local), "RANK": str(node * self.num_processes + local)}
            if local == 0:
                os.environ.update(own)
            else:
                started_by = {ranks.STARTED_BY: str(os.getpid())}
                # In a session of its own, so that Ctrl-C reaches this rank alone, which agrees with the others.
                environ = {**os.environ, **own, **started_by}
                self.procs.append(subprocess.Popen(command, env=environ, start_new_session=True))
        return store

    def _watch(self, done: threading.Event) -> None:
        """End this rank too where it waits for one that failed and does not notice (as in NCCL's collectives)."""
        while not done.wait(0.5):
            failed = any(process.poll() not in (None, *ORDERLY) for process in self.procs)
            if failed and not done.wait(GRACE):
                killed = self._killed()
                if killed is not None:
                    print(f"error: {killed}", file=sys.stderr)
                if sys.stdout.isatty():
                    sys.stdout.write("\x1b[?25h")  # a progress bar hides the cursor
                sys.stdout.flush()
                self.kill(signal.SIGKILL)
                os._exit(1)

    def _killed(self) -> str | None:
        """What to tell of a rank that could not tell it itself, because it was killed."""
        for local, process in enumerate(self.procs, start=1):
            if (code := process.poll()) is not None and code < 0:
                rank = self.cluster_environment.node_rank() * self.num_processes + local
                why = f"{signal.Signals(-code).name} (where memory runs out, the system does that)"
                again = ranks.AFTERWARDS.get(self.command[0], "")
                return f"rank {rank} was ended from outside by {why}.{again}"
        return None

    def _wait(self, seconds: float, enough: Callable[[list[bool]], bool]) -> bool:
        """Wait until ``enough`` (any, all) of the others have ended; whether they have in time."""
        deadline = time.monotonic() + seconds
        while not enough([process.poll() is not None for process in self.procs]):
            if time.monotonic() > deadline:
                return False
            time.sleep(0.05)
        return True


class LaunchedStrategy(ParallelStrategy):
    """What the strategies of this program have in common.

    Ranks are started by the launcher here and wait for each other before anything is written; checkpoints go through
    the run's CheckpointIO, where some of Lightning's strategies write forms of their own.

    Attributes:
        command: the words that start a further rank.
        num_nodes: machines.
        check_together: what all ranks do when they have met, before anything is written; it may raise.
    """

    command: Sequence[str]
    num_nodes: int
    check_together: Callable[[], None] | None = None

    def adopt(self, given: Any, command: Sequence[str]) -> None:
        """Take over the settings of a strategy that the configuration made, which is not used any further.

        Raises:
            UserError: settings of how ranks meet, which they have before a strategy is made.
        """
        for key, default in (("process_group_backend", None), ("timeout", default_pg_timeout)):
            if getattr(given, f"_{key}") != default:
                raise UserError(f"trainer.strategy.init_args.{key}: has no effect here. Leave it out.")
        self.__dict__.update(vars(given))
        self.command = command
        self._process_group_backend: str | None = ranks.backend()

    def _configure_launcher(self) -> None:
        environment = self.cluster_environment
        assert environment is not None and self.parallel_devices is not None
        if not environment.creates_processes_externally:
            self._launcher = RankLauncher(environment, len(self.parallel_devices), self.num_nodes, self.command)

    def setup_environment(self) -> None:
        super().setup_environment()
        self.meet()

    def meet(self) -> None:
        """Wait until all ranks have checked all there is to check, so that nothing is written before."""
        ranks.wait_for_all("checked")
        if self.check_together is not None:
            self.check_together()
        self.barrier("checked")

    @property
    def lightning_restore_optimizer(self) -> bool:
        return True

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any = None) -> None:
        Strategy.save_checkpoint(self, checkpoint, filepath, storage_options)

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        return Strategy.load_checkpoint(self, checkpoint_path, weights_only)
