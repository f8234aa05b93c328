"""What leaves a checkpoint passes through memory a tensor at a time, while it is written and while it is verified."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import HiggsAudioV2Config

from engine.checkpoint.lifecycle import MODEL_FILES
from engine.checkpoint.manifest import MANIFEST, Manifest
from engine.config import Settings
from engine.model.initial import build_on_meta
from tests.processes import ROOT

CLEAR_REFS = Path("/proc/self/clear_refs")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    """Complete but for its tensors: 545 MiB in fp32, the largest 64, a decoder layer less than that."""
    folder = tmp_path_factory.mktemp("run") / "checkpoint-1"
    (folder / MODEL_FILES).mkdir(parents=True)
    config = HiggsAudioV2Config(
        vocab_size=32_768, hidden_size=512, intermediate_size=3072, num_hidden_layers=10, num_attention_heads=8,
        num_key_value_heads=2, head_dim=64, codebook_size=1026, audio_token_id=30_000, audio_delay_token_id=30_001,
        audio_bos_token_id=30_002, eos_token_id=2, pad_token_id=1,
    )  # fmt: skip
    config.save_pretrained(folder / MODEL_FILES)
    settings = Settings(model_path="base")
    settings.to_yaml(folder / "config.yaml")
    shapes = {name: list(p.shape) for name, p in build_on_meta(config).named_parameters()}
    manifest = Manifest(
        step=1, epoch=0, tokens_seen=0, backend="none", world_size=1, use_lora=False, base="", plan={},
        settings=dataclasses.asdict(settings), versions={}, shapes=shapes,
    )  # fmt: skip
    (folder / MANIFEST).write_text(manifest.to_json())
    return folder


@pytest.mark.skipif(not CLEAR_REFS.exists(), reason="only Linux tells a process its peak memory")
def test_consolidation_takes_the_memory_of_a_few_tensors(checkpoint, tmp_path):
    """Of 545 MiB in fp32, and 272 rounded, it takes 195: the largest is 64, rounded 32, and as much again computes."""
    words = ["-m", "tests.export.memory_worker", str(checkpoint), str(tmp_path / "out")]
    done = subprocess.run([sys.executable, *words], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    *said, numbers = done.stdout.splitlines()
    assert "verified: " in said[-1] and "logits of 25 text and 21 audio positions equal" in said[-1]
    total, largest, peak = map(int, numbers.split())
    assert total > 5 * largest
    assert peak < 2.5 * largest + 64, f"{peak} MiB for tensors of at most {largest} MiB"
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) > 1
