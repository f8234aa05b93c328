"""One rank of short conditioned runs: two steps, a checkpoint, two steps on, and these again from the checkpoint.

whisper_worker.py MODEL OUT CASE...     cases as in tests/backends/parity_worker.py
"""

import gc
import sys
from pathlib import Path

import torch

from engine.checkpoint import lifecycle
from engine.checkpoint.consolidate import MODEL_FILES
from engine.checkpoint.lifecycle import Manifest
from engine.checkpoint.model_folder import copy_side_files
from engine.data.packing import pack
from engine.higgs_engine import HiggsEngine, Targets
from engine.model.weights import WeightFiles
from engine.runtime.distributed import exit_cleanly, init_process_group, shutdown
from tests.backends.parity_worker import MICRO_BATCHES, micro_batches, settings_for


class Run:
    def __init__(self, case: str, model: str, out: Path, world):
        self.files, self.world, self.out = WeightFiles(model), world, out
        self.settings = settings_for(case, model, world.size)
        self.engine = HiggsEngine(self.settings, world, self.files, rounds=MICRO_BATCHES // world.size)

    def step(self, number: int) -> list[float]:
        """One step; its sums on this process and its gradient norm."""
        samples = micro_batches(number, whisper=True)
        everything = [s for batch in samples for s in batch]
        audio = tuple(int(n) for n in sum(s.audio_targets for s in everything))
        mine = [pack(batch, self.files.config.audio_token_id) for batch in samples[self.world.rank :: self.world.size]]
        result = self.engine.train_step(mine, Targets(sum(s.text_targets for s in everything), audio), 3e-3)
        return [*result.sums.tolist(), float(result.grad_norm)]

    def save(self) -> Path:
        def write_once(folder: Path) -> None:
            self.settings.to_yaml(folder / "config.yaml")
            (folder / MODEL_FILES).mkdir()
            copy_side_files(self.files, folder / MODEL_FILES)
            if self.settings.use_lora:
                self.engine.backend.model.peft_config["default"].save_pretrained(folder)

        manifest = Manifest(2, self.settings.backend, self.world.size, self.settings.use_lora, {})
        return lifecycle.save(
            self.out, manifest, self.world, write_shards=self.engine.save, write_once=write_once, keep=None
        )

    def close(self) -> None:
        if hasattr(self.engine.backend, "engine"):
            self.engine.backend.engine.destroy()
        del self.engine
        gc.collect()


def main() -> None:
    torch.set_num_threads(1)
    model, out, *cases = sys.argv[1:]
    world = init_process_group(timeout_minutes=1)
    for case in cases:
        folder = Path(out) / case
        folder.mkdir(exist_ok=True)
        run = Run(case, model, folder, world)
        first = run.step(0), run.step(1)
        assert first[0] != first[1]
        checkpoint = run.save()
        straight = [run.step(2), run.step(3)]
        run.close()
        run = Run(case, model, folder, world)
        run.engine.load(checkpoint)
        resumed = [run.step(2), run.step(3)]
        assert resumed == straight, f"{case}: {resumed} after the resume, {straight} without"
        run.close()
    shutdown(world)
    exit_cleanly(0)


if __name__ == "__main__":
    main()
