"""The training forward of Higgs Audio v2 on packed rows.

Module tree, names and weights stay transformers' own; `install` changes the classes of existing modules to
subclasses whose forward also takes packed rows. Called in the native way (as generate() does) they do what
they always did.

Inside, hidden states are kept in modality order (engine/data/packing.py): `x[:n_text]` goes through the text
norms and FFN, `x[n_text:]` through the audio ones, each as one dense product. Both always run, with zero rows
where need be, so every process runs the same collectives whatever its data (Contract 4). The native layer does
the same with 18 boolean-mask operations, each of which stops the host to ask the GPU for a size.

A Whisper encoder (engine/model/whisper.py), if there is one, is the model's submodule `whisper`; its positions are
text positions whose embeddings come from it.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn
from transformers import HiggsAudioV2ForConditionalGeneration
from transformers.models.higgs_audio_v2.modeling_higgs_audio_v2 import (
    HiggsAudioV2Attention,
    HiggsAudioV2DecoderLayer,
    HiggsAudioV2Embeddings,
    apply_rotary_pos_emb,
)

from engine.data.packing import PackedBatch
from engine.model import compiled, recompute
from engine.model.attention import IMPLEMENTATIONS, PackedAttentionFunction, SampleBounds
from engine.model.loss import LossHead


class _Permute(torch.autograd.Function):
    """Rows in another order; the backward is a gather by the inverse, deterministic and free of atomics."""

    @staticmethod
    def forward(ctx, x, index, inverse):
        ctx.save_for_backward(inverse)
        return x.index_select(0, index)

    @staticmethod
    def backward(ctx, gradient):
        (inverse,) = ctx.saved_tensors
        return gradient.index_select(0, inverse), None, None


@dataclass(frozen=True)
class PackedRows:
    """What the layers need to know of a packed row; made once a micro-batch."""

    n_text: int
    to_sequence: torch.Tensor
    to_modality: torch.Tensor
    bounds: SampleBounds
    attend: PackedAttentionFunction

    def sequence_order(self, x: torch.Tensor) -> torch.Tensor:
        return _Permute.apply(x, self.to_sequence, self.to_modality)

    def modality_order(self, x: torch.Tensor) -> torch.Tensor:
        return _Permute.apply(x, self.to_modality, self.to_sequence)


class CodebookEmbedding(nn.Embedding):
    """Codebooks' embeddings; called with `summed`, one kernel looks them up and adds them up.

    transformers' way makes all of them first, [..., C, H], and as much again in the backward.
    """

    def forward(self, ids, summed: bool = False):
        return F.embedding_bag(ids, self.weight, mode="sum") if summed else super().forward(ids)


class PackedEmbeddings(HiggsAudioV2Embeddings):
    def forward(self, input_ids):
        if input_ids.dim() != 2:
            return super().forward(input_ids)
        return self.embed_audio_tokens(input_ids + self.audio_tokens_offsets, summed=True)


def rotate(q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Queries and keys [T, heads, d] turned by their positions' angles [T, d]."""
    return apply_rotary_pos_emb(q, k, cos, sin, unsqueeze_dim=1)


class PackedAttention(HiggsAudioV2Attention):
    rotate = staticmethod(rotate)

    def forward(self, hidden_states, position_embeddings=None, *args, rows: PackedRows | None = None, **kwargs):
        if rows is None:
            return super().forward(hidden_states, position_embeddings, *args, **kwargs)
        shape = (len(hidden_states), -1, self.head_dim)
        q, k, v = (p(hidden_states).view(shape) for p in (self.q_proj, self.k_proj, self.v_proj))
        q, k, v = (rows.sequence_order(t) for t in (q, k, v))
        q, k = self.rotate(q, k, *position_embeddings)
        out = rows.modality_order(rows.attend(q, k, v, rows.bounds, self.scaling))
        return self.o_proj(out.reshape(len(hidden_states), -1))


class PackedDecoderLayer(HiggsAudioV2DecoderLayer):
    """`checkpointing`, set by `install`: a mode of engine/model/recompute.py."""

    checkpointing: str

    def forward(self, hidden_states, position_embeddings=None, *args, rows: PackedRows | None = None, **kwargs):
        if rows is None:
            return super().forward(hidden_states, position_embeddings, *args, **kwargs)
        return self.packed(hidden_states, position_embeddings, rows)

    def packed(self, x: torch.Tensor, position_embeddings: tuple[torch.Tensor, ...], rows: PackedRows) -> torch.Tensor:
        """What engine/model/compiled.py compiles."""
        return recompute.call(self.checkpointing, self._packed, x, position_embeddings, rows)

    def _packed(self, x: torch.Tensor, position_embeddings: tuple[torch.Tensor, ...], rows: PackedRows) -> torch.Tensor:
        n = rows.n_text
        normed = torch.cat([self.input_layernorm(x[:n]), self.audio_input_layernorm(x[n:])])
        x = x + self.self_attn(normed, position_embeddings, rows=rows)
        text, audio = x[:n], x[n:]
        text = text + self.mlp(self.post_attention_layernorm(text))
        audio = audio + self.audio_mlp(self.audio_post_attention_layernorm(audio))
        return torch.cat([text, audio])


class PackedHiggsAudio(HiggsAudioV2ForConditionalGeneration):
    """transformers' model with a second way to call it: `model(batch, text_weight, codebook_weights)`.

    Attributes set by `install`:
        attend: packed attention function.
        whisper: a WhisperConditioning, None without.
    """

    attend: PackedAttentionFunction

    def forward(self, batch=None, text_weight=None, codebook_weights=None, **native):
        """Loss of one packed row.

        Args:
            batch: a PackedBatch on the model's device.
            text_weight: fp32 [1], what each text target counts (its weight / targets of the whole step).
            codebook_weights: fp32 [C], likewise for each codebook.

        Returns:
            The weighted loss (fp32 scalar), and the tallies of loss.py, fp32 [1 + C, 3]: text, codebooks.
        """
        if not isinstance(batch, PackedBatch):
            return super().forward(**({} if batch is None else {"input_ids": batch}), **native)
        hidden = self._hidden_states(batch)
        targets = torch.cat([batch.text_target_rows, batch.audio_target_rows])
        hidden = self.model.norm(hidden.index_select(0, targets))
        for_text, for_audio = hidden.split([len(batch.text_target_rows), len(batch.audio_target_rows)])
        text_loss, text_tally = self.text_lm_head(for_text, batch.text_targets[:, None], text_weight)
        audio_loss, audio_tallies = self.audio_lm_head(for_audio, batch.audio_targets, codebook_weights)
        return text_loss + audio_loss, torch.cat([text_tally, audio_tallies])

    def _hidden_states(self, batch: PackedBatch) -> torch.Tensor:
        """Hidden states of the last layer, not yet normed: [T, H] in modality order."""
        text = self._text_embeddings(batch)
        audio = self.model.embed_audio_tokens(batch.audio_ids)
        x = torch.cat([text, audio])
        rows = PackedRows(
            n_text=len(text),
            to_sequence=batch.to_sequence,
            to_modality=batch.to_modality,
            bounds=SampleBounds(batch.sample_lengths, batch.sample_ends, batch.longest),
            attend=self.attend,
        )
        positions = self.model.rotary_emb(x, batch.position_ids.index_select(0, batch.to_sequence))
        for layer in self.model.layers:
            x = layer(x, positions, rows=rows)
        return x

    def _text_embeddings(self, batch: PackedBatch) -> torch.Tensor:
        """[text, H], at Whisper positions what the encoder heard."""
        text = self.model.embed_tokens(batch.text_ids)
        if self.whisper is None:
            if len(batch.mels):
                raise ValueError("the row has Whisper positions, the model no encoder for them")
            return text
        heard = self.whisper(batch.mels, batch.mel_frames, batch.whisper_index)
        return text.index_copy(0, batch.whisper_rows, heard.to(text.dtype))


def install(
    model: HiggsAudioV2ForConditionalGeneration, attention: str, checkpointing: str = "none", compile: bool = False
) -> PackedHiggsAudio:
    """Gives a native model (with its text head, with or without LoRA) the packed training forward, in place.

    Args:
        attention: a name of engine/model/attention.py.
        checkpointing: a mode of engine/model/recompute.py. A trained Whisper encoder knows full and none.
        compile: compile the layers (engine/model/compiled.py).
    """
    if model.text_lm_head is None:
        raise ValueError("the model was built without use_text_head=True")
    model.__class__ = PackedHiggsAudio
    model.attend = IMPLEMENTATIONS[attention]
    if not hasattr(model, "whisper"):
        model.whisper = None
    if model.whisper is not None:
        model.whisper.recompute_layers = checkpointing != "none"
    for layer in model.model.layers:
        layer.__class__ = PackedDecoderLayer
        layer.checkpointing = checkpointing
        layer.self_attn.__class__ = PackedAttention
    if compile:
        model.attend = compiled.attention_of(attention, model.attend)
        compiled.compile_layers(model.model.layers)
    _set_class(model.text_lm_head, LossHead)
    _set_class(model.audio_lm_head, LossHead)
    _set_class(model.model.embed_audio_tokens, PackedEmbeddings)
    for embeddings in _copies(model.model.embed_audio_tokens):
        _set_class(embeddings.embed_audio_tokens, CodebookEmbedding)
    return model


def _set_class(module: nn.Module, kind: type[nn.Module]) -> None:
    for copy in _copies(module):
        copy.__class__ = kind


def _copies(module: nn.Module) -> list[nn.Module]:
    """The module; or, if it is trained in full beside adapters (modules_to_save), what PEFT has of it."""
    if not hasattr(module, "modules_to_save"):
        return [module]
    return [module.original_module, *module.modules_to_save.values()]
