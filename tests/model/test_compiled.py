"""Compiled layers: plain numbers, no graph break, and no more graphs than there are kinds of rows."""

import copy
import shutil
import warnings

import numpy as np
import pytest
import torch
from torch._dynamo.utils import counters
from torch._subclasses.fake_tensor import FakeTensorMode

from engine.config import Settings
from engine.data.packing import pack
from engine.model import compiled
from engine.model.attention import SampleBounds, varlen
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


@pytest.mark.parametrize("checkpointing, attentions", [("none", 4), ("selective", 4), ("full", 6)])
def test_traced_layers_are_the_layers(checkpointing, attentions, monkeypatch):
    """Bit for bit, with the compiler's front only: what is fused later rounds differently.

    Two layers attend twice, forward and backward; only `full` has to do it once more.
    """
    plain, traced = both(checkpointing, "aot_eager")
    real, calls = compiled._samples, []
    monkeypatch.setattr(compiled, "_samples", lambda *tensors: calls.append(None) or real(*tensors))
    names = ["ragged", "shorter", "many", "text"] if checkpointing != "none" else ROWS
    for batch in rows(*names):
        calls.clear()
        wanted, got = run(plain, batch), run(traced, batch)
        assert got[0] == wanted[0] and len(calls) == attentions
        for a, b in zip(wanted[1], got[1], strict=True):
            torch.testing.assert_close(b, a, rtol=1e-6, atol=1e-9)
    # one graph for two layers and all rows with several tokens of each kind; one for each special kind
    assert counters["stats"]["unique_graphs"] == (2 if checkpointing != "none" else 5)
    assert not counters["graph_break"]


def test_the_compiler_takes_the_gpus_attention_without_a_word():
    """Traced on tensors that claim to be on a GPU; no graph break, and none of the compiler's warnings."""
    torch._dynamo.reset()
    with FakeTensorMode(), warnings.catch_warnings():
        warnings.simplefilter("error")
        q, k, v = (torch.empty(50, heads, 128, device="cuda:0", dtype=torch.bfloat16) for heads in (6, 2, 2))
        bounds = SampleBounds((20, 30), torch.empty(3, device="cuda:0", dtype=torch.int32), 30)
        out = torch.compile(varlen, backend="eager", fullgraph=True, dynamic=True)(q, k, v, bounds, 0.1)
    assert out.shape == q.shape and out.device == q.device


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
