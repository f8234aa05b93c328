"""A run of a few steps on awkward random samples, for tests of checkpoints: real engine, real saver, no data files."""

import gc
from dataclasses import asdict
from pathlib import Path

import torch

from engine.backends.tensors import Reader
from engine.checkpoint.lifecycle import MODEL_FILES
from engine.checkpoint.manifest import Manifest, load_manifest
from engine.checkpoint.saver import Saved, Saver
from engine.data.packing import empty_sample, pack
from engine.export.model_folder import copy_side_files
from engine.higgs_engine import HiggsEngine, Targets
from engine.model.weights import WeightFiles
from engine.runtime.distributed import World
from tests.backends.parity_worker import MICRO_BATCHES, micro_batches, piece_of, settings_for
from tests.tiny import CODEBOOKS


class SmallRun:
    """Every process has one.

    Args:
        case: backend and variants, as in tests/backends/parity_worker.py.
        out: where checkpoints go.
    """

    def __init__(self, case: str, model: Path, out: Path, world: World, background: bool = False, **saver):
        self.world, self.out, self.whisper = world, out, "-whisper" in case
        self.files = WeightFiles(model)
        self.settings = settings_for(case, str(model), world.size)
        self.reader, self.readers = world.in_groups(of=self.settings.processes_per_row)
        self.rounds = -(-MICRO_BATCHES // self.readers)
        self.engine = HiggsEngine(self.settings, world, self.files, self.rounds)
        self.said: list[str] = []
        self.saved: list[Saved] = []
        options = {"limit": None, "keep_every": None} | saver
        self.saver = Saver(out, world, background=background, say=self.said.append, done=self.saved.append, **options)

    def step(self, number: int) -> list[float]:
        """One step; losses of the whole step by head, and its gradient norm."""
        samples = micro_batches(number, self.whisper)
        everything = [s for batch in samples for s in batch]
        targets = Targets(
            sum(s.text_targets for s in everything), tuple(int(n) for n in sum(s.audio_targets for s in everything))
        )
        mine = samples[self.reader :: self.readers]
        mine += [[empty_sample(CODEBOOKS)]] * (self.rounds - len(mine))
        piece = piece_of(self.settings, self.world)
        packed = [pack(batch, self.files.config.audio_token_id, piece) for batch in mine]
        result = self.engine.train_step(packed, targets, 1e-3 * (number + 1))
        sums = result.sums.clone()
        if self.world.size > 1:
            torch.distributed.all_reduce(sums)
        return [*(sums / torch.tensor([targets.text, *targets.codebooks])).tolist(), float(result.grad_norm)]

    def manifest(self, step: int, eval_loss: float | None = None) -> Manifest:
        s = self.settings
        return Manifest(
            step=step, epoch=0, tokens_seen=0, backend=s.backend, world_size=self.world.size, use_lora=s.use_lora,
            base=self.files.fingerprint(), plan={}, settings=asdict(s), versions={}, eval_loss=eval_loss,
            shapes=self.engine.stored_shapes(),
        )  # fmt: skip

    def save(self, step: int) -> Path:
        self.saver.save(self.manifest(step), self.engine.state(), self._write_once)
        return self.out / f"checkpoint-{step}"

    def _write_once(self, folder: Path, manifest: Manifest) -> None:
        self.settings.to_yaml(folder / "config.yaml")
        (folder / MODEL_FILES).mkdir()
        copy_side_files(self.files, folder / MODEL_FILES)
        if self.engine.whisper:
            self.engine.whisper.describe(folder / "whisper_conditioning")
        if self.settings.use_lora:
            self.engine.backend.model.peft_config["default"].save_pretrained(folder)

    def load(self, folder: Path) -> int:
        """Takes a checkpoint's state and makes sure that every element of it arrived; returns its step."""
        self.engine.load(folder)
        reader = Reader(folder)
        for key, fragment in self.engine.state().items():
            stored = reader.tensor(key)[fragment.start : fragment.start + len(fragment.local)]
            assert torch.equal(fragment.local.float().cpu(), stored.float()), f"{key} is not what {folder.name} holds"
        return load_manifest(folder).step

    def close(self) -> None:
        self.saver.wait()
        if hasattr(self.engine.backend, "engine"):
            self.engine.backend.engine.destroy()
        del self.engine
        gc.collect()
