"""The sum over marked targets beside the sums of the groups: what it counts, and that nothing else changes by it."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from engine.data.packing import pack
from engine.higgs_engine import HiggsEngine, Targets
from engine.model.loss import CHUNK_ROWS, linear_cross_entropy
from engine.model.weights import WeightFiles
from engine.runtime.distributed import World
from tests.backends.parity_worker import settings_for
from tests.tiny import AUDIO, CODEBOOKS, random_sample, tiny_model

EOS, WIDTH = 33, 34


def inputs(rows: int):
    torch.manual_seed(rows)
    hidden, weight = torch.randn(rows, 16, requires_grad=True), torch.randn(CODEBOOKS * WIDTH, 16, requires_grad=True)
    targets = torch.randint(-1, WIDTH, (rows, CODEBOOKS))
    targets[::7, 3] = EOS
    return hidden, weight, targets


@pytest.mark.parametrize("rows", [0, 60, CHUNK_ROWS + 50])
def test_marked_targets_are_summed_on_their_own(rows):
    hidden, weight, targets = inputs(rows)
    shares = torch.rand(CODEBOOKS)
    loss, tallies = linear_cross_entropy(hidden, weight, targets, shares, EOS)
    plain, groups = linear_cross_entropy(hidden, weight, targets, shares)
    assert torch.equal(tallies[:CODEBOOKS], groups) and torch.equal(loss, plain) and groups.shape == (CODEBOOKS, 3)
    logits = (hidden @ weight.t()).view(rows, CODEBOOKS, WIDTH).transpose(1, 2)
    each = F.cross_entropy(logits, targets, ignore_index=-1, reduction="none")
    right = logits.argmax(1) == targets
    of_all = torch.stack([each.sum(0), right.sum(0), (targets >= 0).sum(0)], 1)
    torch.testing.assert_close(groups, of_all)
    there = targets == EOS
    torch.testing.assert_close(tallies[CODEBOOKS], torch.stack([each[there].sum(), right[there].sum(), there.sum()]))
    gradients = [torch.autograd.grad(value, (hidden, weight)) for value in (loss, plain)]
    assert all(torch.equal(*pair) for pair in zip(*gradients, strict=True))


def test_the_engine_marks_the_end_of_a_clip(tmp_path):
    tiny_model().save_pretrained(tmp_path)
    sample = random_sample(np.random.default_rng(0), 5, 40)
    sample.audio_labels[7:11, 2:4] = EOS
    ends = int((sample.audio_labels[1:] == EOS).sum())
    files, alone = WeightFiles(tmp_path), World(0, 0, 1, torch.device("cpu"))
    engine = HiggsEngine(settings_for("none-lora", str(tmp_path), 1), alone, files, 1)
    batch, targets = pack([sample], AUDIO), Targets(5, (40,) * CODEBOOKS)
    evaluated = engine.evaluate([batch])
    result = engine.train_step([batch], targets, 1e-3)
    assert int(result.tallies[-1, 2]) == ends > 0 and result.sums.shape == (1 + CODEBOOKS,)
    counts = [len(batch.text_targets), *(batch.audio_targets >= 0).sum(0).tolist()]
    assert result.positions == batch.tokens == 45 and result.tallies[:-1, 2].tolist() == counts
    torch.testing.assert_close(result.tallies, evaluated)
