"""`starts.jsonl`: what each start of a run was: when, where, with what versions, from which step, on which data.

What is measured means little without it; the report and whoever repeats the run read it.
"""

import platform
import shlex
import socket
import subprocess
import sys
from datetime import datetime, timezone

import torch
import torch.distributed as dist

from engine.callbacks import Callback
from engine.checkpoint.manifest import versions
from engine.config_checks import REPOSITORY
from engine.data.dataset import Dataset
from engine.data.distribution import describe
from engine.data.encoder import FRAMES_PER_SECOND
from engine.observe import journal

FILE = "starts.jsonl"


class Provenance(Callback):
    """Every process has one; the main one writes."""

    def on_start(self, run, step):
        hosts = [socket.gethostname()]
        if run.world.size > 1:
            hosts = [""] * run.world.size
            dist.all_gather_object(hosts, socket.gethostname())
        if not run.world.is_main:
            return
        held_out = run.data.held_out
        line = {
            "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "step": step,
            "total_steps": run.total,
            "resumed_from": run.checkpoint and run.checkpoint.name,
            "world_size": run.world.size,
            "hosts": sorted(set(hosts)),
            "device": _device(run.world.device),
            "versions": {"python": platform.python_version(), **versions()},
            "engine_commit": _commit(),
            "command": shlex.join(sys.argv),
            "model": {"path": run.settings.model_path, **_parameters(run.engine)},
            "summary": list(run.summary),
            "data": {"train": described(run.data.train), "eval": held_out and described(held_out.data)},
        }
        journal.add(run.output_dir / FILE, [line])


def _device(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def _commit() -> str | None:
    """Of the engine's own repository, with a + where files differ from it; None for an installed package."""
    if not (REPOSITORY / ".git").exists():
        return None
    try:
        run = ["git", "-C", str(REPOSITORY), "describe", "--always", "--dirty=+", "--exclude=*"]
        return subprocess.run(run, capture_output=True, text=True, timeout=5, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


def _parameters(engine) -> dict[str, int]:
    shapes = engine.parameter_shapes()
    return {
        "parameters": sum(shape.numel() for shape, _ in shapes.values()),
        "trained": sum(shape.numel() for shape, trained in shapes.values() if trained),
    }


def described(data: Dataset) -> dict:
    """Size of a set, and the distribution of its samples' seconds of speech, references included, and of tokens."""
    seconds = data.audio_frames / FRAMES_PER_SECOND
    return {
        "samples": len(data),
        "tokens": int(data.lengths.sum()),
        "audio_hours": float(seconds.sum()) / 3600,
        "lengths": {"seconds": describe(seconds), "tokens": describe(data.lengths)},
    }
