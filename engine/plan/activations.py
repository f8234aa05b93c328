"""Bytes that forward and backward of one packed row hold at their peak: counted, not derived.

The training forward itself runs on fake tensors, which have shapes but no memory, and every storage is counted from
its first operation to its end. So the count knows whatever the model does, adapters, dropout, frozen parts and each
checkpointing mode, and no formula has to follow it. Two and three layers are run; the others are like the third.

Attention is SDPA here: it saves what flash and varlen save. Fused kernels and torch.compile save less than this.
Activations of a trained Whisper encoder are not in it: what it hears is not known before the data.
"""

import math
import weakref
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import HiggsAudioV2Config

from engine.config import Settings
from engine.data.dataset import Dataset
from engine.data.packing import PackedBatch
from engine.model import ulysses
from engine.model.cut import cut_on_meta
from engine.model.initial import build_on_meta, fill, rebuild_buffers
from engine.model.packed import PackedHiggsAudio, install
from engine.model.trainable import choose_trainable
from engine.model.whisper import WhisperConditioning

CPU = torch.device("cpu")
AUDIO_SHARE = 0.9
"""Of the positions of speech data (25 audio frames and some 3 text tokens a second), where the data are not known."""


@dataclass(frozen=True)
class Row:
    """Sizes of a packed row: positions, audio positions among them, and positions with a label of each kind.

    `sample`: positions of the longest sample, below which rows cannot be shortened; 0 where it is not known.
    """

    tokens: int
    audio: int
    text_targets: int
    audio_targets: int
    sample: int = 0

    @classmethod
    def typical(cls, tokens: int) -> "Row":
        """Speech of which every position has a label: the most that the heads can take."""
        audio = int(AUDIO_SHARE * tokens)
        return cls(tokens, audio, tokens - audio, audio)

    @classmethod
    def of(cls, data: Dataset, tokens: int) -> "Row":
        """A row as the data are on average."""
        columns = (data.audio_frames, data.text_targets, data.audio_targets)
        shares = (column.sum() / data.lengths.sum() for column in columns)
        return cls(tokens, *(math.ceil(tokens * share) for share in shares), sample=int(data.lengths.max()))

    def piece(self, of: int) -> "Row":
        """What one of so many processes has that share the row."""
        return self.shortened(-(-self.tokens // of))

    def shortened(self, tokens: int) -> "Row":
        counts = (self.audio, self.text_targets, self.audio_targets)
        return Row(tokens, *(math.ceil(count * tokens / self.tokens) for count in counts), sample=self.sample)


def longest_row(lengths: np.ndarray, settings: Settings) -> int:
    """The most tokens that a row of samples of these lengths can have."""
    limit, samples = settings.max_tokens_per_micro_batch, settings.per_device_train_batch_size
    longest = int(np.sort(lengths)[-samples:].sum()) if samples else int(lengths.sum())
    return min(longest, limit or longest)


@dataclass(frozen=True)
class Activations:
    """Bytes of one row.

    Attributes:
        kept: held when the layers are done and the heads begin.
        heads: more than that at the peak: logits of a chunk, gradients of heads, a layer's second computation.
    """

    kept: int
    heads: int

    @property
    def peak(self) -> int:
        return self.kept + self.heads


def trainable_on_meta(
    config: HiggsAudioV2Config, settings: Settings, whisper: WhisperConditioning | None = None
) -> tuple[nn.Module, PackedHiggsAudio]:
    """The model that a run trains, and the Higgs model in it, without memory; one process's part of what is cut."""
    core = build_on_meta(config)
    model = choose_trainable(core, settings, whisper)
    cut_on_meta(core, settings.tensor_parallel_size)
    return model, install(core, "sdpa")


def count(config: HiggsAudioV2Config, settings: Settings, mode: str, row: Row) -> Activations:
    """What one row takes under a checkpointing mode (engine/model/recompute.py), in the dtype of the settings.

    Of a row that processes share it is what one of them holds.
    """
    model, core = trainable_on_meta(config, settings)
    pieces = settings.sequence_parallel_size
    if pieces > 1:
        core.attend = ulysses.over_pieces(core.attend, pieces, group=None)
    batch = partial(fake_row, row.piece(pieces), config.num_codebooks, pieces)
    depth = len(core.model.layers)
    for layer in core.model.layers:
        layer.checkpointing = mode
    with FakeTensorMode():
        fill(model, _Shapes(), CPU, torch.bfloat16 if settings.bf16 else torch.float32)
        rebuild_buffers(core, CPU)
        if depth <= 3 or not _all_alike(core):
            return _run(model, core, batch())
        core.model.layers = core.model.layers[:3]
        three = _run(model, core, batch())
        core.model.layers = core.model.layers[:2]
        two = _run(model, core, batch())
    more = depth - 3
    peak = three.peak + more * (three.peak - two.peak)
    kept = three.kept + more * (three.kept - two.kept)
    return replace(three, kept=kept, heads=peak - kept)


class _Shapes:
    """Stands for InitialWeights: parameters of the right shape."""

    def read(self, name: str, shape: torch.Size) -> torch.Tensor:
        return torch.empty(shape)


def _all_alike(core: PackedHiggsAudio) -> bool:
    """Whether every layer has the same trained parameters."""
    return len({tuple(p.requires_grad for p in layer.parameters()) for layer in core.model.layers}) == 1


def _run(model: nn.Module, core: PackedHiggsAudio, batch: PackedBatch) -> Activations:
    """Gradients are dropped as they come, for where they are kept is the backend's affair."""
    drops = [
        p.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", None))
        for p in model.parameters()
        if p.requires_grad
    ]
    held = []
    with LiveBytes(model) as live:
        note = core.text_lm_head.register_forward_pre_hook(lambda *_: held.append(live.now))
        loss, _ = model(batch, torch.ones(1), torch.ones(core.config.num_codebooks))
        loss.backward()
    for hook in (*drops, note):
        hook.remove()
    return Activations(held[0], live.peak - held[0])


def fake_row(row: Row, codebooks: int, pieces: int = 1) -> PackedBatch:
    """One of the pieces, of these sizes, of a row that is one sample; under FakeTensorMode it takes no memory."""

    def index(*shape: int) -> torch.Tensor:
        return torch.zeros(shape, dtype=torch.int64)

    order = torch.arange(row.tokens)
    return PackedBatch(
        text_ids=index(row.tokens - row.audio), audio_ids=index(row.audio, codebooks), position_ids=order,
        to_sequence=order, to_modality=order, sample_lengths=(pieces * row.tokens,),
        sample_ends=torch.tensor([0, pieces * row.tokens], dtype=torch.int32),
        text_target_rows=index(row.text_targets), text_targets=index(row.text_targets),
        audio_target_rows=index(row.audio_targets), audio_targets=index(row.audio_targets, codebooks),
        mels=torch.zeros(0, 0, 0), mel_frames=index(0), whisper_index=index(0), whisper_rows=index(0),
    )  # fmt: skip


class LiveBytes(TorchDispatchMode):
    """Bytes of the storages that operations make: `now`, and at their `peak`. Those of `model` are not counted."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.now = self.peak = 0
        self._known = {t.untyped_storage()._cdata for t in (*model.parameters(), *model.buffers())}

    def __torch_dispatch__(self, operation, types, arguments=(), named=None):
        result = operation(*arguments, **(named or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                self._see(tensor.untyped_storage())
        return result

    def _see(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._known:
            return
        self._known.add(key)
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._gone, key, size)

    def _gone(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.now -= size
