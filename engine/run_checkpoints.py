"""The checkpoints of a run: what is in them beside the state, going on from one, and the weights handed over.

How one is written, and which of them stay, is engine/checkpoint's part.
"""

import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

from peft import PeftModel

from engine.checkpoint import lifecycle
from engine.checkpoint.lifecycle import MODEL_FILES
from engine.checkpoint.manifest import Manifest, load_manifest, versions, write_atomically
from engine.checkpoint.saver import Saved, Saver
from engine.checkpoint.stored import StoredWeights
from engine.config import Settings
from engine.errors import CheckpointError
from engine.export.adapters import write_adapter
from engine.export.consolidate import consolidate
from engine.export.model_folder import copy_side_files
from engine.higgs_engine import HiggsEngine
from engine.model import whisper_source
from engine.model.adapter_folder import SUBFOLDER as ADAPTERS
from engine.run_data import RunData
from engine.runtime import activity
from engine.runtime.distributed import World, on_main


class RunCheckpoints:
    """
    Args:
        say: prints a line, on the main process.
        published: told of the step and the folder of each checkpoint that is complete, on every process.

    Attributes:
        saver: which writes them.
        last_step: of the newest one.
    """

    def __init__(
        self, settings: Settings, world: World, data: RunData, engine: HiggsEngine, say: Callable[[str], None],
        published: Callable[[int, Path], None],
    ):  # fmt: skip
        self._published = published
        self.settings, self.world, self.data, self.engine, self._say = settings, world, data, engine, say
        self.output_dir, self.total = Path(settings.output_dir), data.plan.total_steps
        self.last_step = 0
        self._base = data.files.fingerprint()
        self.saver = Saver(
            self.output_dir, world, limit=settings.save_total_limit, keep_every=settings.keep_every,
            background=settings.async_save, say=say, done=self._saved,
        )  # fmt: skip

    def _manifest(self, step: int, epoch: int = 0, tokens_seen: int = 0, eval_loss: float | None = None) -> Manifest:
        s = self.settings
        plan = {
            "data": self.data.train.fingerprint,
            "data_weights": s.data_weights,
            "seed": s.seed,
            "max_tokens_per_micro_batch": s.max_tokens_per_micro_batch,
            "per_device_train_batch_size": s.per_device_train_batch_size,
            "micro_batches_per_step": s.micro_batches_per_step,
        }
        return Manifest(
            step=step, epoch=epoch, tokens_seen=tokens_seen, backend=s.backend,
            world_size=self.world.size, use_lora=s.use_lora, base=self._base, plan=plan,
            settings=asdict(s), versions=versions(), eval_loss=eval_loss, shapes=self.engine.stored_shapes(),
        )  # fmt: skip

    def resume(self, folder: Path) -> Manifest:
        """Loads a checkpoint, and says what will be different; its manifest.

        Raises:
            CheckpointError: it is not of this run.
        """
        found, present = load_manifest(folder), self._manifest(0)
        lifecycle.require_same_run(found, present, folder)
        if found.step > self.total:
            raise CheckpointError(
                f"{folder}: step {found.step} is beyond the {self.total} steps of this run → raise max_steps or "
                "num_train_epochs."
            )
        self.engine.load(folder)
        same_draws = lifecycle.restore_random_state(folder, found, self.world)
        self._say(
            f"resumed {folder.name}: step {found.step} of {self.total}, written by {found.world_size} process(es) of "
            f"{found.backend}"
        )
        for name, (was, now) in lifecycle.changes(found, present, "Optimisation"):
            self._say(f"note: {name} was {was}, is {now} from here on")
        if not same_draws and self.settings.use_lora and self.settings.lora_dropout:
            self._say("note: another number of processes draws other dropout; the data are the same")
        self.last_step = found.step
        return found

    def save(self, step: int, epoch: int, tokens_seen: int, eval_loss: float | None) -> None:
        """Every process calls it; see Saver.save."""
        activity.current.enter("save")
        manifest = self._manifest(step, epoch, tokens_seen, eval_loss)
        self.saver.save(manifest, self.engine.state(), self._write_once)
        self.last_step = step
        if self.settings.async_save:
            self._say(f"saving step {step} behind the training, which waited {self.saver.waited:.2f} s")

    def _write_once(self, folder: Path, manifest: Manifest) -> None:
        """What a checkpoint holds beside the state; perhaps in a thread, so nothing here may look at the model."""
        self.settings.to_yaml(folder / "config.yaml")
        (folder / MODEL_FILES).mkdir()
        copy_side_files(self.data.files, folder / MODEL_FILES)
        if self.engine.whisper:
            self.engine.whisper.describe(folder / whisper_source.FOLDER)
        if isinstance(self.engine.backend.model, PeftModel):
            self.engine.backend.model.peft_config["default"].save_pretrained(folder)
            stored = StoredWeights(folder, manifest)  # what has just been written, so it is known to be readable
            self.adapter = write_adapter(stored, folder / ADAPTERS, folder / "adapter_config.json", self.settings)

    def leave(self) -> None:
        """On the way out after an error: nobody else is told any more."""
        self._published = lambda step, folder: None
        self.saver.leave()

    def _saved(self, saved: Saved) -> None:
        step = lifecycle.step_of(saved.folder)
        if self.world.is_main:
            self._write_state(saved, step)
        self._published(step, saved.folder)

    def _write_state(self, saved: Saved, step: int) -> None:
        state = {
            "step": step,
            "total_steps": self.total,
            "latest": saved.folder.name,
            "best": lifecycle.pointer(self.output_dir, "best"),
            "tokens_seen": load_manifest(saved.folder).tokens_seen,
        }
        try:
            write_atomically(self.output_dir / "trainer_state.json", json.dumps(state, indent=1))
        except OSError as error:
            self._say(f"note: trainer_state.json could not be written: {error}")
        adapter = f"; {ADAPTERS}: {self.adapter}" if self.settings.use_lora else ""
        gone = f"; removed {', '.join(folder.name for folder in saved.pruned)}" if saved.pruned else ""
        size = f"{saved.bytes / 2**20:,.1f} MiB in {saved.seconds:.1f} s"
        self._say(f"saved {saved.folder} ({size}){adapter}{gone}")
        for warning in saved.warnings:
            self._say(f"note: {warning}")

    def hand_over(self) -> None:
        """Final weights from a checkpoint, so that what is handed over is what can be read back.

        It is the last one; the best one where the run was to watch for that (`early_stopping_patience`).
        """
        best = lifecycle.pointer(self.output_dir, "best") if self.settings.early_stopping_patience else None
        chosen = best or f"checkpoint-{self.last_step}"
        out = self.output_dir / (ADAPTERS if self.settings.use_lora else "model")
        on_main(self.world, lambda: consolidate(self.output_dir / chosen, out))
        self._say(f"done: {out}" + (f" (of {chosen}, the best)" if best else ""))
        self._say(_next_command(self.settings, out))


def _next_command(settings: Settings, out: Path) -> str:
    if settings.use_lora:
        return (
            f"next: higgs-engine merge --base_model_path {settings.model_path} --lora_adapter_path {out} "
            f"--output_path {out.parent / 'merged'}"
        )
    return f"next: HiggsAudioV2ForConditionalGeneration.from_pretrained({str(out)!r}, use_text_head=True)"
