"""Whether an optimizer step may change the weights: decided on the device, from the norm of its gradients.

A norm that is not finite, or (`skip_spikes_sigma`) far above those of the last accepted steps, leaves the step out:
weights, moments and AdamW's counter stay as they are, to the last bit. The norm is that of the whole model, the same
on all processes, so all decide alike, and nobody reads a number: what was decided is a tensor that the optimizer
takes as `found_inf` (torch's fused AdamW and CompactAdamW do).
"""

import torch

WINDOW = 128
"""Accepted norms that a new one is compared with."""

ENOUGH = 32
"""Accepted norms from which on there is something to compare with."""

LEAST_SPREAD = 0.01
"""Share of the mean that a standard deviation counts at least: norms that hardly differ make no spike of the next."""


class Guard:
    """One process's; all come to the same.

    Args:
        sigma: standard deviations above the mean from which on a norm is a spike; None: only what is not finite.

    Attributes:
        memory: fp32 [WINDOW + 3]: accepted norms, the newest last, as many of them as there are; their number;
            steps skipped so far; steps skipped in a row. What a resumed run has to know: it is part of a checkpoint.
        skipped, limit: of the step judged last, fp32 scalars: 1 or 0, and above what it would have been a spike.
    """

    SIZE = WINDOW + 3

    def __init__(self, sigma: float | None, device: torch.device):
        self.sigma = sigma
        self.memory = torch.zeros(self.SIZE, device=device)
        self.skipped = torch.zeros((), device=device)
        self.limit = torch.full((), torch.inf, device=device)
        self._places = torch.arange(WINDOW, 0, -1, device=device)  # how many norms ago

    @torch.no_grad()
    def judge(self, norm: torch.Tensor) -> torch.Tensor:
        """`skipped` of a step, from the norm of its gradients (fp32 scalar). Once a step, on all processes."""
        norms, (known, skipped, row) = self.memory[:WINDOW], self.memory[WINDOW:].unbind()
        self.limit = self._limit(norms, known)
        accepted = norm.isfinite() & (norm <= self.limit)
        after_update = torch.stack([norm, (known + 1).clamp(max=WINDOW), skipped, torch.zeros_like(row)])
        after_skip = torch.stack([known, skipped + 1, row + 1])
        after_update, after_skip = torch.cat([norms[1:], after_update]), torch.cat([norms, after_skip])
        self.memory.copy_(torch.where(accepted, after_update, after_skip))
        self.skipped = (~accepted).float()
        return self.skipped

    def _limit(self, norms: torch.Tensor, known: torch.Tensor) -> torch.Tensor:
        if self.sigma is None:
            return torch.full_like(known, torch.inf)
        count, seen = known.clamp(min=1), self._places <= known
        mean = norms.sum() / count
        spread = ((norms - mean).square() * seen).sum().div(count).sqrt()
        limit = mean + self.sigma * torch.maximum(spread, LEAST_SPREAD * mean)
        return torch.where(known >= ENOUGH, limit, torch.inf)

    def counts(self) -> tuple[int, int]:
        """Steps skipped in the whole run, and in a row until now. Waits for the device."""
        total, row = self.memory[WINDOW + 1 :].tolist()
        return int(total), int(row)

    def last_good(self) -> float | None:
        """Norm of the newest accepted step. Waits for the device."""
        norm, known = self.memory[WINDOW - 1 : WINDOW + 1].tolist()
        return norm if known else None
