"""Real checkpoints of the smallest model in a tenth of a second: written by the Saver, without a run."""

import dataclasses
from pathlib import Path

import torch

from engine.backends.tensors import Fragment, State
from engine.checkpoint.manifest import Manifest, versions
from engine.checkpoint.saver import Saver
from engine.config import Settings
from engine.model.weights import WeightFiles
from engine.runtime.distributed import World
from tests.tiny import tiny_model

WORLD = World(0, 0, 1, torch.device("cpu"))


def small_model(folder: Path, seed: int = 0) -> Path:
    """A model folder in transformers' format."""
    tiny_model(seed).save_pretrained(folder)
    return folder


def state_of(weights: dict[str, torch.Tensor], step: int) -> State:
    """Weights as they are, with moments that differ from tensor to tensor."""
    generator = torch.Generator().manual_seed(step)
    state = {"step": Fragment.whole(torch.tensor(float(step)))}
    for name, value in weights.items():
        state[f"model.{name}"] = Fragment.whole(value)
        state[f"exp_avg.{name}"] = Fragment.whole(torch.randn(value.shape, generator=generator))
        state[f"exp_avg_sq.{name}"] = Fragment.whole(torch.rand(value.shape, generator=generator))
    return state


def manifest_of(model: Path, weights: dict[str, torch.Tensor], step: int, **changes) -> Manifest:
    settings = Settings(model_path=str(model), learning_rate=3e-4, save_steps=7)
    values = {
        "step": step, "epoch": 1, "tokens_seen": 1234, "backend": "none", "world_size": 1, "use_lora": False,
        "base": WeightFiles(model).fingerprint(), "plan": {"seed": 1}, "settings": dataclasses.asdict(settings),
        "versions": versions(), "shapes": {name: list(value.shape) for name, value in weights.items()},
    }  # fmt: skip
    return Manifest(**values | changes)


def small_checkpoint(
    output_dir: Path, model: Path, step: int = 5, weights: dict[str, torch.Tensor] | None = None, **changes
) -> Path:
    """`checkpoint-STEP` of a run from `model` in a folder that may hold others.

    Args:
        weights: what is stored; none given: those of the model.
        changes: of the manifest.
    """
    output_dir.mkdir(parents=True, exist_ok=True)
    weights = weights or {name: p.detach().clone() for name, p in tiny_model().named_parameters()}
    manifest = manifest_of(model, weights, step, **changes)

    def write_once(folder: Path, manifest: Manifest) -> None:
        Settings(**manifest.settings).to_yaml(folder / "config.yaml")
        (folder / "model_files").mkdir()
        WeightFiles(model).config.save_pretrained(folder / "model_files")

    saver = Saver(output_dir, WORLD, limit=None, keep_every=None, background=False, say=print)
    saver.save(manifest, state_of(weights, step), write_once)
    saver.finish()
    return output_dir / f"checkpoint-{step}"
