"""Cross-entropy straight from hidden states: the logits of a chunk at a time, never all of them.

The text head alone is 128,256 wide: the fp32 logits of 16k tokens would take 8 GB. Here each chunk of rows makes
its logits, its loss and its gradients at once in the forward, and only the gradients (the size of the inputs and
of the weight) are kept for the backward. Rows that fit one chunk and are fewer than the weight has columns keep the
gradient of their logits instead, which is smaller than the weight's: the usual case of text, whose targets are few.
The eight codebooks run as one matrix product of 8 x 1026 columns.

Besides, each target is a question answered rightly or not: the most likely token is at hand while the logits are.

Sums, not means: the caller divides by the targets of the whole optimizer step (Contract 5), so that splitting a
step over ranks or micro-batches changes nothing. Zero rows are fine and give zero gradients, never None or NaN.
"""

import torch
from torch import nn

CHUNK_ROWS = 1024
"""Rows whose logits exist at once: 1024 x 128256 fp32 is 0.5 GB."""


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, targets, group_weights, train, marked):
        rows, groups = targets.shape
        width = weight.shape[0] // groups
        need_hidden, need_weight = (train and needed for needed in ctx.needs_input_grad[:2])
        grad_hidden = torch.empty_like(hidden) if need_hidden else None
        wait = need_weight and rows <= min(CHUNK_ROWS, weight.shape[1])
        grad_weight = None
        tallies = torch.zeros(groups + (marked is not None), 3, dtype=torch.float32, device=hidden.device)
        gradient = tallies.new_empty(0, groups * width)
        for start in range(0, rows, CHUNK_ROWS):
            part, target = hidden[start : start + CHUNK_ROWS], targets[start : start + CHUNK_ROWS]
            logits = (part @ weight.t()).float().view(-1, groups, width)
            labelled = target >= 0
            index = target.clamp(min=0).unsqueeze(-1)
            normaliser = logits.logsumexp(-1)
            losses = normaliser - logits.gather(-1, index).squeeze(-1)
            counts = torch.stack([losses, logits.argmax(-1) == target, labelled.float()], -1)  # [rows, groups, 3]
            tallies[:groups] += (counts * labelled.unsqueeze(-1)).sum(0)
            if marked is not None:
                tallies[groups] += (counts * (target == marked).unsqueeze(-1)).sum((0, 1))
            if not (need_hidden or need_weight):
                continue
            # gradient of the weighted sum: (softmax - one_hot) * weight of the group, written over the logits
            gradient = logits.sub_(normaliser.unsqueeze(-1)).exp_()
            gradient.scatter_add_(-1, index, gradient.new_full(index.shape, -1.0))
            gradient.mul_((labelled * group_weights).unsqueeze(-1))
            gradient = gradient.view(-1, groups * width)
            rounded = gradient.to(hidden.dtype)
            if need_hidden:
                torch.mm(rounded, weight, out=grad_hidden[start : start + CHUNK_ROWS])
            if need_weight and not wait:
                grad_weight = _add_product(grad_weight, rounded.t(), part)
        ctx.gradients = grad_hidden, grad_weight
        ctx.waiting = (gradient, hidden) if wait else None
        ctx.weight_dtype = weight.dtype
        ctx.mark_non_differentiable(tallies)
        return (tallies[:groups, 0] * group_weights).sum(), tallies

    @staticmethod
    def backward(ctx, grad_loss, _):
        (grad_hidden, grad_weight), waiting = ctx.gradients, ctx.waiting
        ctx.gradients = ctx.waiting = None
        if grad_hidden is not None:
            grad_hidden = grad_hidden.mul_(grad_loss.to(grad_hidden.dtype))
        if grad_weight is not None:
            grad_weight = grad_weight.mul_(grad_loss).to(ctx.weight_dtype)
        elif waiting is not None:
            gradient, hidden = waiting
            grad_weight = gradient.mul_(grad_loss).to(hidden.dtype).t() @ hidden
        return grad_hidden, grad_weight, None, None, None, None


def _add_product(total: torch.Tensor | None, left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """`total + left @ right` in fp32; the first product makes the total, which need not be filled with zeros then."""
    if total is None:
        return (left @ right).float()
    return total.addmm_(left, right) if left.dtype == torch.float32 else total.add_(left @ right)


def linear_cross_entropy(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    group_weights: torch.Tensor,
    marked: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Weighted sum of cross-entropies over groups of a linear head's outputs.

    Args:
        hidden: [rows, H].
        weight: [groups * width, H].
        targets: int64 [rows, groups], negative where there is none.
        group_weights: fp32 [groups]; what each target of a group counts.
        marked: a target that is looked at on its own, in all groups.

    Returns:
        The weighted sum (differentiable, fp32 scalar), and a tally of each group (fp32 [groups, 3]): the plain sum of
        cross-entropies, how many targets the logits say themselves (their largest, the first of equals), and how many
        there are. If a target is marked, another row tallies those.
    """
    # a Function is told which inputs require gradients, also where nobody will ask for any
    return _LinearCrossEntropy.apply(hidden, weight, targets, group_weights, torch.is_grad_enabled(), marked)


class LossHead(nn.Linear):
    """A head whose call gives the loss, so that FSDP's and ZeRO's hooks see a use of its weight like any other.

    An existing `nn.Linear` becomes one by `head.__class__ = LossHead`; called without targets it stays linear.

    Attributes:
        marked: as in `linear_cross_entropy`; set it on a head whose tallies should have that row.
    """

    marked: int | None = None

    def forward(self, hidden, targets=None, group_weights=None):
        if targets is None:
            return super().forward(hidden)
        return linear_cross_entropy(hidden, self.weight, targets, group_weights, self.marked)
