"""Ulysses: neighbouring processes share each packed row, a piece of it each (`sequence_parallel_size`).

All but attention looks at one position at a time, and runs on the process's own L of the row's T = N L positions.
Attention has to see the whole row, but does so head by head: the processes exchange positions for heads before it, and
heads for positions after it.

    q, k, v [L, heads, d]  →  [T, heads / N, d]  →  attention  →  [T, heads / N, d]  →  [L, heads, d]

That is two exchanges a layer and direction (queries, keys and values travel together), 2 (query + key-value heads) d
values of each position, of which the share (N - 1) / N leaves the process: links within a machine are made for it.

A process's loss is that of its own targets. What other pieces owe to its keys and values comes back through the
exchanges, and the backends sum gradients over all processes, as they do without pieces. Processes that share a row
make the same exchanges in the same order, whatever lies in their pieces (Contract 4). What activation checkpointing
computes again it also exchanges again, in the mode `selective` too: keeping the result would take a quarter more of
what a layer keeps there, and the exchange takes far less time than the matrix products that are kept.
"""

from collections.abc import Iterator

import torch
import torch.distributed as dist
from transformers import HiggsAudioV2Config

from engine.config import Settings
from engine.model.attention import PackedAttentionFunction, SampleBounds


class _Exchange(torch.autograd.Function):
    """[N, ...]: part i goes to process i of the group, part i of the result comes from there. Its own adjoint."""

    @staticmethod
    def forward(ctx, parts, group):
        ctx.group = group
        parts = parts.contiguous()
        received = torch.empty_like(parts)
        if group is not None:
            dist.all_to_all_single(received, parts, group=group)
        return received

    @staticmethod
    def backward(ctx, gradient):
        return _Exchange.apply(gradient, ctx.group), None


def over_pieces(attend: PackedAttentionFunction, size: int, group: dist.ProcessGroup | None) -> PackedAttentionFunction:
    """`attend` for rows whose `size` pieces lie in the processes of `group`, in its order.

    It takes and gives the positions of its own piece; `bounds` are those of the whole row. Without a group nothing is
    sent: shapes and memory are the same, which is all that the memory plan asks for.
    """

    def attend_together(
        q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, bounds: SampleBounds, scale: float
    ) -> torch.Tensor:
        by_heads = [t.reshape(len(t), size, -1).transpose(0, 1) for t in (q, k, v)]
        row = _Exchange.apply(torch.cat(by_heads, 2), group).flatten(0, 1)
        parts = row.split([part.shape[2] for part in by_heads], 1)
        out = attend(*(part.unflatten(1, (-1, q.shape[2])) for part in parts), bounds, scale)
        by_places = _Exchange.apply(out.reshape(size, len(q), -1), group)
        return by_places.transpose(0, 1).reshape(q.shape)

    return attend_together


def neighbours(size: int) -> dist.ProcessGroup:
    """The group of this process: `size` processes of neighbouring ranks. All processes have to ask."""
    return dist.new_subgroups(size)[0]


def problems(config: HiggsAudioV2Config, settings: Settings) -> Iterator[str]:
    """Why heads cannot be divided among the processes that share a row."""
    size, heads = settings.sequence_parallel_size, config.num_key_value_heads
    if heads % size:
        able = ", ".join(str(n) for n in range(1, heads + 1) if heads % n == 0)
        yield f"sequence_parallel_size: {size} does not divide the model's {heads} key-value heads → one of {able}"
