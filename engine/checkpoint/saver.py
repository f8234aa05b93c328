"""Saves the checkpoints of a run, while training waits or behind its back.

With `async_save` training stops only while this process's part of the state is copied to host memory (pinned on GPU
machines, kept for the next time); a thread writes the copy. One save is under way at a time. Either way the same
steps are taken: reserve, write, hash, publish, prune; a failure on any process fails the save on all, and training
goes on. The second failure in a row ends the run, for what is computed then could be lost.
"""

import concurrent.futures
import dataclasses
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from engine.backends.tensors import FOLDER as TENSORS
from engine.backends.tensors import Fragment, State, total_bytes, write_tensors
from engine.checkpoint import lifecycle
from engine.checkpoint.manifest import File, Manifest, describe_files
from engine.errors import CheckpointError, EngineError
from engine.runtime import activity
from engine.runtime.agreement import Ballot
from engine.runtime.distributed import World

SLOWEST_WRITE = timedelta(hours=6)
"""After this time processes that have written give up waiting for one that has not."""
SLOWEST_SIGHT_S = 60.0
"""Network file systems show one machine's new folders to the others after a while."""


@dataclasses.dataclass(frozen=True)
class Saved:
    """A checkpoint that was published.

    Attributes:
        bytes: of all its files.
        seconds: from the call to its name.
        pruned: older ones that went for it.
        warnings: what could not be tidied up.
    """

    folder: Path
    bytes: int
    seconds: float
    pruned: list[Path]
    warnings: list[str]


class Saver:
    """Every process of a run has one and makes the same calls.

    Args:
        limit, keep_every: which checkpoints stay (lifecycle.prune).
        background: write while training goes on.
        say: prints a line, on the main process.
        done: told of each checkpoint published, on every process, between two steps.

    Attributes:
        waited: seconds for which the last save kept training waiting.
    """

    def __init__(
        self,
        output_dir: Path,
        world: World,
        *,
        limit: int | None,
        keep_every: int | None,
        background: bool,
        say: Callable[[str], None],
        done: Callable[[Saved], None] = lambda saved: None,
    ):
        self.output_dir, self.world, self._limit, self._keep_every = output_dir, world, limit, keep_every
        self._say, self._done = say, done
        self._group = dist.new_group(backend="gloo", timeout=SLOWEST_WRITE) if world.size > 1 else None
        self._thread = concurrent.futures.ThreadPoolExecutor(1, "checkpoint", self._on_device) if background else None
        self._ballot = Ballot(world, dist.ReduceOp.MIN, SLOWEST_WRITE) if background else None
        self._under_way: concurrent.futures.Future | None = None
        self._copies: dict[str, torch.Tensor] = {}
        self._failures = 0
        self.waited = 0.0

    def save(self, manifest: Manifest, state: State, write_once: Callable[[Path, Manifest], None]) -> None:
        """Saves, or begins to. The memory of `state` may change as soon as this returns.

        Args:
            write_once: writes what belongs to the run as a whole into the folder (main process; perhaps in a thread).

        Raises:
            CheckpointError: this is the second failure in a row.
        """
        began = time.monotonic()
        self.wait()
        random_state = lifecycle.random_state(self.world)
        if self._thread is None:
            self._settle(self._attempt(manifest, state, random_state, write_once, began))
        else:
            copy = self._copied(state)
            self._under_way = self._thread.submit(self._attempt, manifest, copy, random_state, write_once, began)
        self.waited = time.monotonic() - began

    def poll(self) -> None:
        """Between two steps: hears of a save that has ended, on all processes at the same step.

        Raises:
            CheckpointError: its was the second failure in a row.
        """
        if self._under_way is not None and self._ballot.vote(self._under_way.done()):
            self.wait()

    def wait(self) -> None:
        """Returns when nothing is being written.

        Raises:
            CheckpointError: as `poll`.
        """
        if self._under_way is not None:
            self._ballot.close()
            outcome, self._under_way = self._under_way.result(), None
            self._settle(outcome)

    def finish(self) -> None:
        """At the end of the run.

        Raises:
            CheckpointError: the last save failed.
        """
        self.wait()
        if self._thread is not None:
            self._thread.shutdown()
        if self._failures:
            raise CheckpointError(f"{self.output_dir}: the last checkpoint could not be written (see above).")

    def leave(self) -> None:
        """On the way out after an error: lets a save that has begun come to its end, whatever the others do."""
        if self._under_way is None:
            return
        outcome, self._under_way = self._under_way.result(), None
        if isinstance(outcome, Exception):
            self._say(f"NOT SAVED: {outcome}")
        else:
            self._done(outcome)

    def _settle(self, outcome: "Saved | EngineError") -> None:
        """What a finished save means for the run; all processes have the same outcome."""
        if not isinstance(outcome, Exception):
            self._failures = 0
            self._done(outcome)
            return
        self._failures += 1
        if self._failures > 1:
            raise CheckpointError(
                f"two checkpoints in a row could not be written, so the run stops: {outcome.heading}", outcome.problems
            )
        self._say(f"NOT SAVED, training goes on: {outcome}")

    def _copied(self, state: State) -> State:
        """The state in host memory of our own; each buffer serves every save of the run."""
        copies = {}
        for key, fragment in state.items():
            if key not in self._copies:
                pin = fragment.local.is_cuda
                self._copies[key] = torch.empty(
                    fragment.local.shape, dtype=fragment.local.dtype, device="cpu", pin_memory=pin
                )
            self._copies[key].copy_(fragment.local, non_blocking=True)
            copies[key] = Fragment(self._copies[key], fragment.start, fragment.numel)
        if self.world.device.type == "cuda":
            torch.cuda.current_stream().synchronize()
        return copies

    # ---------------------------------------------------------------- one save, perhaps in the thread

    def _on_device(self) -> None:
        """A thread begins on GPU 0. DCP waits for the GPU it is on, and would make a context there in each process."""
        if self.world.device.type == "cuda":
            torch.cuda.set_device(self.world.device)

    def _attempt(self, manifest, state, random_state, write_once, began: float) -> "Saved | EngineError":
        try:
            return self._write(manifest, state, random_state, write_once, began)
        except EngineError as error:
            return error
        except Exception as error:  # a lost connection, a defect: training is not worth less for it
            return EngineError(f"{type(error).__name__}: {error}")

    def _write(self, manifest, state, random_state, write_once, began: float) -> Saved:
        folder = self._agreed(lambda: self._reserve(manifest.step, total_bytes(state)))[self.world.rank]
        self._agreed(lambda: self._require_seen(folder))
        write_tensors(state, folder, self._group)
        described = self._agreed(lambda: self._rest_of_mine(folder, random_state))
        files = {name: entry for part in described for name, entry in part.items()}
        return self._agreed(lambda: self._publish(folder, manifest, files, write_once, began))[0]

    def _reserve(self, step: int, needed: int) -> Path:
        draft = self.output_dir / f".checkpoint-{step}.incomplete"
        if self.world.is_main:
            lifecycle.reserve(self.output_dir, step, needed)
            (draft / "rng").mkdir()
        return draft

    def _require_seen(self, folder: Path) -> None:
        """A process that does not see what the first one made would write where nobody looks."""
        give_up = time.monotonic() + SLOWEST_SIGHT_S
        while not (folder / "rng").is_dir():
            if time.monotonic() > give_up:
                raise CheckpointError(
                    f"{folder} was made by process 0 and is not seen here → put output_dir where all machines see it."
                )
            time.sleep(0.1)

    def _rest_of_mine(self, folder: Path, random_state: dict) -> dict[str, File]:
        """Writes this process's random state; describes all files that are its own."""
        torch.save(random_state, folder / lifecycle.random_state_file(self.world))
        shards = (folder / TENSORS).glob(f"__{self.world.rank}_*.distcp")
        mine = [str(file.relative_to(folder)) for file in shards] + [lifecycle.random_state_file(self.world)]
        return describe_files(folder, mine)

    def _publish(
        self, folder: Path, manifest: Manifest, files: dict[str, File], write_once: Callable, began: float
    ) -> Saved | None:
        if not self.world.is_main:
            return None
        write_once(folder, manifest)
        others = {str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()} - files.keys()
        files = files | describe_files(folder, others)
        complete = dataclasses.replace(manifest, files=dict(sorted(files.items())))
        final = lifecycle.publish(folder, complete, self.output_dir)
        pruned, warnings = [], []
        try:
            pruned = lifecycle.prune(self.output_dir, self._limit, self._keep_every)
        except OSError as error:
            warnings.append(f"an old checkpoint could not be removed: {error}")
        size = sum(entry.bytes for entry in files.values())
        return Saved(final, size, time.monotonic() - began, pruned, warnings)

    def _agreed(self, action: Callable[[], object]) -> list:
        """Does something on each process; returns the results of all, or raises the failures of all on all."""
        if self._thread is None:
            activity.current.tick()
        try:
            mine = (action(), None)
        except OSError as disk:
            mine = (None, CheckpointError(f"{disk.strerror}: {disk.filename}" if disk.strerror else str(disk)))
        except EngineError as error:
            mine = (None, error)
        except Exception as error:
            mine = (None, CheckpointError(f"{type(error).__name__}: {error}"))
        if self._group is None:
            everyone = [mine]
        else:
            everyone = [None] * self.world.size
            dist.all_gather_object(everyone, mine, group=self._group)
        failed = [(rank, error) for rank, (_, error) in enumerate(everyone) if error is not None]
        if failed:
            problems = [f"process {rank}: {error}" for rank, error in failed]
            raise CheckpointError("saving failed, the last checkpoint is untouched:", problems)
        return [result for result, _ in everyone]
