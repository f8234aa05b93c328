"""From a checkpoint to DeepSpeed's universal one, so that a program without this engine goes on with it.

    OUT/latest_universal                      global_step100, the tag that load_checkpoint(OUT) looks for
    OUT/global_step100/
      mp_rank_00_model_states.pt              counters; for ZeRO 3 under zero_pp_rank_0_mp_rank_00_model_states.pt too
      zero/optimizer_state.pt                 what DeepSpeed wants to know of the optimizer as a whole
      zero/<parameter>/fp32.pt                the weight, fp32; of what is not trained this alone
                       exp_avg.pt, exp_avg_sq.pt, step.pt

DeepSpeed (0.19) loads it with `{"checkpoint": {"load_universal": true}}` at ZeRO 1, 2 and 3 and any number of
processes, if the program's parameters have the same names. Weights that the program freezes it does not load, as of
any universal checkpoint. Every file holds tensors and plain values only, one tensor at a time is in memory.

At ZeRO 3 DeepSpeed sets one and the same tensor as the step of all its groups, and an optimizer that counts in place
(torch's AdamW) counts it up once a group: a program with several had better give each its own after loading,
`for state in optimizer.state.values(): state["step"] = state["step"].clone()`.

The learning rate, weight decay and so on stay those of the program: a universal checkpoint keeps them by optimizer
group, ZeRO 3 would set those of the first group for all, and ZeRO 1 and 2 leave groups beyond those in the file
unloaded without a word. So there are many groups here, and all are empty.
"""

import shutil
from pathlib import Path

import torch

from engine.backends.tensors import Reader
from engine.backends.torch_optimizer import MOMENTS
from engine.checkpoint.manifest import Manifest, read_manifest, write_atomically
from engine.errors import CheckpointError
from engine.export.model_folder import drafted, require_free
from engine.untrusted import name_within

LAYOUT_OF = "0.19.8"
"""DeepSpeed release after which this is written; it asks for the version that wrote a checkpoint."""
MOST_GROUPS = 256
MODEL_STATES = ("mp_rank_00_model_states.pt", "zero_pp_rank_0_mp_rank_00_model_states.pt")


def to_universal(checkpoint: Path, out: Path) -> str:
    """Writes a universal checkpoint into the new folder `out`.

    Returns:
        The tag of the checkpoint within it.

    Raises:
        CheckpointError: the checkpoint is not complete, or there is no room for the new one.
        ConfigError: `out` holds something already.
    """
    require_free(out)
    manifest = read_manifest(checkpoint)
    if strange := [name for name in manifest.shapes if not _names_folder(name)]:
        raise CheckpointError(f"{checkpoint}: parameters whose names are no names of folders:", strange)
    reader = Reader(checkpoint)
    tag = f"global_step{manifest.step}"
    out.parent.mkdir(parents=True, exist_ok=True)
    _require_room(out, reader)
    with drafted(out) as draft:
        step = reader.tensor("step").reshape(())
        (draft / tag / "zero").mkdir(parents=True)
        for name, shape in manifest.shapes.items():
            _write_parameter(draft / tag / "zero" / name, reader, name, shape, step)
        torch.save(_optimizer_state(step), draft / tag / "zero" / "optimizer_state.pt")
        for file in MODEL_STATES:
            torch.save(_model_states(manifest), draft / tag / file)
        write_atomically(draft / "latest_universal", tag)
    return tag


def _names_folder(name: str) -> bool:
    try:
        return bool(name_within(name))
    except ValueError:
        return False


def _require_room(out: Path, reader: Reader) -> None:
    entries = reader.metadata.state_dict_metadata.values()
    needed, free = sum(4 * entry.size.numel() for entry in entries), shutil.disk_usage(out.parent).free
    if free < needed:
        raise CheckpointError(
            f"{out}: {needed / 1e9:,.1f} GB are needed, {free / 1e9:,.1f} GB are free → make room there."
        )


def _write_parameter(folder: Path, reader: Reader, name: str, shape: list[int], step: torch.Tensor) -> None:
    folder.mkdir()
    stored = reader.metadata.state_dict_metadata
    for key, file in (("model", "fp32"), *((moment, moment) for moment in MOMENTS)):
        if f"{key}.{name}" in stored:
            value = reader.tensor(f"{key}.{name}").view(shape).float()
            torch.save({"param": value, "cat_dim": 0}, folder / f"{file}.pt")
    if f"{MOMENTS[0]}.{name}" in stored:
        torch.save(step, folder / "step.pt")  # a tensor, as torch's AdamW needs it; DeepSpeed's own take it too


def _optimizer_state(step: torch.Tensor) -> dict:
    groups = [{} for _ in range(MOST_GROUPS)]
    return {
        "ds_version": LAYOUT_OF,
        "param_groups": groups,  # where ZeRO 1 and 2 look
        "optimizer_state_dict": {"state": {0: {"step": step}}, "param_groups": groups},  # where ZeRO 3 does
    }


def _model_states(manifest: Manifest) -> dict:
    """What DeepSpeed's engine takes for itself, and `higgs_engine`, which load_checkpoint hands back."""
    return {
        "module": {},
        "lr_scheduler": {"last_batch_iteration": manifest.step - 1},  # as DeepSpeed's own schedulers count
        "global_steps": manifest.step,
        "global_samples": manifest.step * manifest.plan.get("micro_batches_per_step", 1),
        "skipped_steps": 0,
        "dp_world_size": manifest.world_size,
        "mp_world_size": 1,
        "ds_version": LAYOUT_OF,
        "universal_checkpoint_info": {"universal_checkpoint_version": 0.4},
        "higgs_engine": {
            "step": manifest.step, "epoch": manifest.epoch, "tokens_seen": manifest.tokens_seen,
            "settings": manifest.settings, "plan": manifest.plan, "versions": manifest.versions,
        },
    }  # fmt: skip
