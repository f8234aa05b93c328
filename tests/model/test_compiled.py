"""Compiled layers: plain numbers, no graph break, and no more graphs than there are kinds of rows."""

import copy
import shutil

import numpy as np
import pytest
import torch
from torch._dynamo.utils import counters

from engine.config import Settings
from engine.data.packing import pack
from engine.model import compiled
from engine.model.packed import install
from tests.tiny import AUDIO, CODEBOOKS, random_sample, tiny_model

ROWS = {
    "ragged": [(20, 30), (7, 12)], "shorter": [(5, 9)], "many": [(3, 5), (2, 2), (6, 11)], "text": [(9, 0), (14, 0)],
    "audio": [(0, 21)], "one text": [(1, 5)], "one audio": [(7, 1)],
}  # fmt: skip


def rows(*names: str):
    rng = np.random.default_rng(0)
    return [pack([random_sample(rng, *sizes) for sizes in ROWS[name]], AUDIO) for name in names]


def both(checkpointing: str, backend: str):
    """The model as it is, and compiled."""
    torch._dynamo.reset()
    counters.clear()
    native = tiny_model()
    plain = install(copy.deepcopy(native), "sdpa", checkpointing)
    fused = install(native, "sdpa", checkpointing)
    fused.attend = compiled.attention_of("sdpa", fused.attend)
    compiled.compile_layers(fused.model.layers, backend)
    return plain, fused


def run(model, batch) -> tuple[float, list[torch.Tensor]]:
    model.zero_grad()
    loss, _ = model(batch, torch.ones(1), torch.ones(CODEBOOKS))
    loss.backward()
    return loss.item(), [p.grad.clone() for p in model.parameters()]


@pytest.mark.parametrize("checkpointing", ["none", "selective", "full"])
def test_traced_layers_are_the_layers(checkpointing):
    """Bit for bit, with the compiler's front only: what is fused later rounds differently."""
    plain, traced = both(checkpointing, "aot_eager")
    names = ["ragged", "shorter", "many", "text"] if checkpointing != "none" else ROWS
    for batch in rows(*names):
        wanted, got = run(plain, batch), run(traced, batch)
        assert got[0] == wanted[0]
        for a, b in zip(wanted[1], got[1], strict=True):
            torch.testing.assert_close(b, a, rtol=1e-6, atol=1e-9)
    # one graph for two layers and all rows with several tokens of each kind; one for each special kind
    assert counters["stats"]["unique_graphs"] == (2 if checkpointing != "none" else 5)
    assert not counters["graph_break"]


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler on a CPU")
def test_fused_layers_compute_the_same():
    plain, fused = both("full", "inductor")
    for batch in rows("ragged", "shorter"):
        wanted, got = run(plain, batch), run(fused, batch)
        assert got[0] == pytest.approx(wanted[0], rel=1e-6)
        for a, b in zip(wanted[1], got[1], strict=True):
            assert (a - b).abs().max() <= 1e-5 * a.abs().max()


def test_what_cannot_be_compiled_is_refused():
    (problem,) = compiled.problems(Settings(torch_compile=True), "flex", torch.device("cuda"))
    assert problem.startswith("torch_compile: attention flex is compiled anew for each batch → flash or varlen")
    assert not list(compiled.problems(Settings(torch_compile=True), "sdpa", torch.device("cpu")))
