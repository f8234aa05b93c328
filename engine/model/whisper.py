"""Whisper conditioning: what a Whisper encoder hears in reference audio, as positions before the clip's codes.

The tower of the original higgs_audio: Whisper's encoder, but with its outputs pooled in pairs *before* the last layer
norm (a plain WhisperEncoder has no pooling), then a linear projection to the language model's width. Modules and
names are transformers' own. Attention sees the valid positions of a chunk only, so that a chunk may be cropped to the
longest of its batch, and nothing of the padding reaches a valid position.

A clip of more than 30 s is several chunks, each heard on its own; their positions follow each other and then come
the clip's codes, once. The original repeats the whole placeholder for each chunk, and its codes then belong to the
wrong placeholders.

Every process runs the module in every micro-batch, on a chunk of silence if it has no recording (Contract 4).
"""

import copy

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import WhisperConfig
from transformers.models.whisper.modeling_whisper import WhisperEncoder

from engine.data.mels import convolved

SILENT_FRAMES = 4
"""The shortest chunk that has a position after pooling; of a micro-batch without recordings none is used."""

FIXED = "encoder.embed_positions.weight"
"""Whisper's sinusoids, a parameter by its class only: never trained."""


class WhisperConditioning(nn.Module):
    """Encoder and projection.

    Args:
        config: of the encoder.
        hidden_size: width of the language model.

    Attributes:
        recompute_layers: recompute the layers of a trained encoder in the backward.
    """

    recompute_layers = False

    def __init__(self, config: WhisperConfig, hidden_size: int):
        super().__init__()
        config = copy.deepcopy(config)
        # dropping layers by chance would also leave processes waiting for each other's
        config.dropout = config.attention_dropout = config.activation_dropout = config.encoder_layerdrop = 0.0
        self.encoder = WhisperEncoder(config)
        self.projection = nn.Linear(config.d_model, hidden_size)

    def choose_trainable(self, encoder: bool, projection: bool) -> None:
        """Which of the two is trained; never the encoder's table of positions."""
        for name, parameter in self.named_parameters():
            parameter.requires_grad = (projection if name.startswith("projection.") else encoder) and name != FIXED

    def forward(self, mels: torch.Tensor, frames: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
        """Embeddings of the chunks' valid positions.

        Args:
            mels: [chunks, frames, n_mels]; no chunk, if the micro-batch has no recording.
            frames: int64 [chunks]; valid frames of each chunk.
            index: int64 [positions]; which of the pooled positions, [chunks x pooled] as one, to give.

        Returns:
            [positions, hidden_size].
        """
        if not len(mels):
            mels = mels.new_zeros(1, SILENT_FRAMES, self.encoder.num_mel_bins)
            frames = frames.new_full((1,), SILENT_FRAMES)
        trained = torch.is_grad_enabled() and self.encoder.conv1.weight.requires_grad
        with torch.set_grad_enabled(trained):
            x = self.encode(mels, frames)
            x = F.avg_pool1d(x.transpose(1, 2), kernel_size=2, stride=2).transpose(1, 2)
            x = self.encoder.layer_norm(x)
        return self.projection(x.flatten(0, 1).index_select(0, index))

    def encode(self, mels: torch.Tensor, frames: torch.Tensor) -> torch.Tensor:
        """Output of the encoder's last layer, neither pooled nor normed: [chunks, convolved(frames), d_model]."""
        encoder = self.encoder
        x = mels.to(encoder.conv1.weight.dtype).transpose(1, 2)
        x = F.gelu(encoder.conv2(F.gelu(encoder.conv1(x)))).transpose(1, 2)
        positions = torch.arange(x.shape[1], device=x.device)
        x = x + encoder.embed_positions(positions)
        valid = (positions < convolved(frames)[:, None])[:, None, None]
        for layer in encoder.layers:
            if self.recompute_layers and torch.is_grad_enabled():
                x = checkpoint(layer, x, valid, use_reentrant=False)
            else:
                x = layer(x, valid)
        return x
