"""Weights and AdamW's moments as one flat, named set of (possibly sharded) tensors, written by torch's DCP.

`model.<name>`, `exp_avg.<name>`, `exp_avg_sq.<name>`, `step.<name>`: plain names, so that a checkpoint can be read
tensor by tensor, by any number of processes or by none. Adapters' runs hold the trained tensors only.
"""

import contextlib
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.api import CheckpointException

from engine.errors import CheckpointError

FOLDER = "tensors"
"""Name of the DCP folder within a checkpoint."""


def save_tensors(model: nn.Module, optimizer: torch.optim.Optimizer, folder: Path) -> None:
    writer = dcp.FileSystemWriter(folder / FOLDER, overwrite=False)
    with failures_in_words("writing", folder):
        dcp.save(_tensors(model, optimizer), storage_writer=writer)


def load_tensors(model: nn.Module, optimizer: torch.optim.Optimizer, folder: Path) -> None:
    _create_moments(optimizer)
    with failures_in_words("reading", folder):
        dcp.load(_tensors(model, optimizer), storage_reader=dcp.FileSystemReader(folder / FOLDER))


@contextlib.contextmanager
def failures_in_words(doing: str, folder: Path) -> Iterator[None]:
    """DCP gathers what failed on any process into an exception that is no `Exception`, and raises it on all."""
    try:
        yield
    except CheckpointException as error:
        problems = [f"process {rank}: {failure[0]}" for rank, failure in error.failures.items()]
        raise CheckpointError(f"{folder}: {doing} weights or optimizer state failed:", problems) from None


def _tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    """References to the live tensors: saving reads them, loading writes into them."""
    adapters_only = any(".lora_" in name for name, _ in model.named_parameters())
    tensors = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad or not adapters_only:
            tensors[f"model.{name}"] = parameter.detach()
        for key, value in optimizer.state.get(parameter, {}).items():
            tensors[f"{key}.{name}"] = value
    return tensors


def _create_moments(optimizer: torch.optim.Optimizer) -> None:
    """AdamW makes its state in the first step; loading needs it before."""
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            on_device = {"device": parameter.device} if group["fused"] else {}
            optimizer.state[parameter] = {
                "step": torch.zeros((), dtype=torch.float32, **on_device),
                "exp_avg": torch.zeros_like(parameter),
                "exp_avg_sq": torch.zeros_like(parameter),
            }
