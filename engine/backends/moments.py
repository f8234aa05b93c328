"""AdamW with moments in 16 or 8 bits: 4 or 2.03 bytes a parameter instead of 8. Weights and arithmetic stay fp32.

| optimizer_state_dtype | a moment is kept as                                                    | bytes of both |
|-----------------------|------------------------------------------------------------------------|--------------:|
| bf16                  | bf16                                                                   | 4             |
| int8                  | the largest of 256 neighbours in fp32, of each the logarithm of its share | 2.03       |

An average that moves by less than half a step of its format would never move if it were rounded to the nearest: with
adam_beta2 0.999 the square falls by 0.1 % a step, bf16 knows steps of 0.4 to 0.8 %. So each store rounds up or down at
random, such that it is right on average. The draws depend on the step alone: a resumed run repeats them, and processes
that hold the same shard stay equal.

torchao has such optimizers (its steps need a compiler on a CPU). They round to the nearest, and their 8-bit code has
no -1: a block whose largest value is negative changes each time a checkpoint is written and read. Here what is read
back is what was kept, to the last bit.
"""

from functools import cache

import torch
from torch import nn
from torch.distributed.tensor import DTensor

BLOCK = 256
"""Neighbours that share the scale of an 8-bit moment."""

MEAN_OCTAVES, SQUARE_OCTAVES = 16, 32
"""What 8 bits span: down to 1/65536 of a block's largest gradient, in steps of 9 %."""

LEAST_SCALE = 2.0**-90
"""Scales end here, so that no share of one falls among fp32's inexact smallest numbers."""

CHUNK = 2**24
"""Elements updated at a time: bounds the temporaries to a few hundred MB, however large a shard is."""


# ---------------------------------------------------------------- the two formats


def to_bf16(values: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
    """fp32 rounded to a neighbour in bf16, to each as often as it is near. `noise`: uniform in [0, 1)."""
    bits = values.view(torch.int32) + (noise * 2**16).to(torch.int32)
    return (bits & -(2**16)).view(torch.float32).bfloat16()


def encode(
    values: torch.Tensor, dtype: torch.dtype, noise: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """fp32 [n] as codes [n] and scales [n / BLOCK, rounded up].

    Code 0 is zero, the highest is a block's largest value, each one between a constant factor above the one before.
    What `decode` gives is encoded as it was if it is rounded to the nearest.

    Args:
        dtype: int8 for values of either sign, uint8 for squares. Of these none but zero becomes zero: the update
            divides by them.
        noise: uniform in [0, 1), [n]; None: rounds to the nearest.
    """
    top, steps = _code(dtype)
    blocks = _blocks(values)
    scales = blocks.abs().amax(1).clamp(min=LEAST_SCALE)
    share = blocks.abs() / scales[:, None]
    below = (top + steps * share.log2()).floor().clamp(0 if dtype == torch.int8 else 1, top)
    low, high = _share(below, dtype), _share(below + 1, dtype)
    threshold = 0.5 if noise is None else _blocks(noise)
    level = torch.where(share > 0, below + ((share - low) / (high - low) > threshold), 0)
    codes = (level * blocks.sign() if dtype == torch.int8 else level).to(dtype)
    return codes.view(-1)[: len(values)], scales


def decode(codes: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """fp32 [n] of what `encode` gave."""
    blocks = _blocks(codes)
    level = blocks.float()
    return (level.sign() * _share(level.abs(), codes.dtype) * scales[:, None]).view(-1)[: len(codes)]


def _code(dtype: torch.dtype) -> tuple[int, float]:
    """Highest level, and levels an octave."""
    top, octaves = (127, MEAN_OCTAVES) if dtype == torch.int8 else (255, SQUARE_OCTAVES)
    return top, (top - 1) / octaves


def _share(level: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    top, steps = _code(dtype)
    return torch.where(level > 0, ((level - top) / steps).exp2(), 0.0)


def _blocks(flat: torch.Tensor) -> torch.Tensor:
    return nn.functional.pad(flat, (0, -len(flat) % BLOCK)).view(-1, BLOCK)


class Coded:
    """A moment in 8 bits, [n] as the flat shard of its parameter.

    Attributes:
        codes: int8 or uint8 [n].
        scales: fp32 [n / BLOCK, rounded up].
    """

    def __init__(self, numel: int, dtype: torch.dtype, device: torch.device):
        self.codes = torch.zeros(numel, dtype=dtype, device=device)
        self.scales = torch.full((-(-numel // BLOCK),), LEAST_SCALE, device=device)

    def part(self, start: int, stop: int) -> tuple[torch.Tensor, torch.Tensor]:
        return self.codes[start:stop], self.scales[start // BLOCK : -(-stop // BLOCK)]

    def shown(self) -> torch.Tensor:
        """fp32 copy in host memory: a checkpoint takes no memory of the device, which four times as much might not be.

        A scale belongs to 256 neighbours of one process's shard, so codes could not be cut for other shards.
        """
        return decode(self.codes.cpu(), self.scales.cpu())

    def take(self, values: torch.Tensor) -> None:
        """Values from a checkpoint, rounded to the nearest code."""
        codes, scales = encode(values, self.codes.dtype)
        self.codes.copy_(codes)
        self.scales.copy_(scales)


# ---------------------------------------------------------------- the step


class CompactAdamW(torch.optim.Optimizer):
    """torch.optim.AdamW in all but how its moments are kept. Parameters are fp32, perhaps DTensors.

    Args:
        dtype: `bf16` or `int8`.
    """

    def __init__(self, groups: list[dict], dtype: str, lr: float, betas: tuple[float, float], eps: float):
        super().__init__(groups, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": 0.0})
        self.dtype = dtype

    def moments(self, parameter: torch.Tensor) -> dict[str, torch.Tensor | Coded]:
        """A parameter's state, made when first asked for.

        `step` counts updates, on the device, where a skipped step is known of; `draws` counts steps, skipped or not,
        on the host, where the generator of the rounding is seeded.
        """
        state = self.state[parameter]
        if not state:
            flat = flat_shard(parameter)
            state["step"] = torch.zeros((), dtype=torch.float32, device=flat.device)
            state["draws"] = torch.zeros((), dtype=torch.int64)
            if self.dtype == "bf16":
                state |= {k: torch.zeros_like(flat, dtype=torch.bfloat16) for k in ("exp_avg", "exp_avg_sq")}
            else:
                state["exp_avg"] = Coded(len(flat), torch.int8, flat.device)
                state["exp_avg_sq"] = Coded(len(flat), torch.uint8, flat.device)
        return state

    @torch.no_grad()
    def step(self, closure=None) -> None:
        """Updates, unless `found_inf` (an fp32 scalar that is set as for torch's fused AdamW) is 1."""
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, self.moments(parameter), group)

    def skip(self) -> None:
        """A step was left out by someone who did not even call `step`."""
        for state in self.state.values():
            state["draws"] += 1

    def _update(self, parameter: torch.Tensor, state: dict, group: dict) -> None:
        weight, gradient = flat_shard(parameter), _local(parameter.grad).reshape(-1)
        found_inf = getattr(self, "found_inf", None)
        skipped = torch.zeros_like(state["step"]) if found_inf is None else found_inf.to(weight.device)
        state["step"] += 1 - skipped
        state["draws"] += 1
        step, lr, (beta1, beta2) = state["step"].double(), group["lr"], group["betas"]
        # tensors: compiled code would be made anew for each other number
        keep = torch.tensor(1 - lr * group["weight_decay"])
        rates = keep, (lr / (1 - beta1**step)).float(), (1 - beta2**step).sqrt().float()
        update = _updates(self.dtype, weight.device.type)
        draw = torch.Generator(weight.device).manual_seed(int(state["draws"]))
        for start in range(0, len(weight), CHUNK):
            stop = min(start + CHUNK, len(weight))
            noise = torch.rand(2, stop - start, device=weight.device, generator=draw)
            kept = (part for key in ("exp_avg", "exp_avg_sq") for part in _parts(state[key], start, stop))
            part = slice(start, stop)
            update(skipped > 0, weight[part], gradient[part], *kept, *noise, *rates, beta1, beta2, group["eps"])


def flat_shard(tensor: torch.Tensor) -> torch.Tensor:
    """This process's part of a tensor, one-dimensional, as a view."""
    return _local(tensor).detach().view(-1)


def _local(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _parts(moment: "torch.Tensor | Coded", start: int, stop: int) -> tuple[torch.Tensor, ...]:
    return moment.part(start, stop) if isinstance(moment, Coded) else (moment[start:stop],)


@cache
def _updates(dtype: str, device: str):
    """On a GPU compiled into a pass over the memory; elsewhere a compiler may be missing."""
    update = _update_bf16 if dtype == "bf16" else _update_int8
    return update if device == "cpu" else torch.compile(update, dynamic=True)


def _update_bf16(skipped, weight, gradient, mean, square, noise_m, noise_s, *how) -> None:
    new_mean, new_square = _adamw(skipped, weight, gradient, mean.float(), square.float(), *how)
    mean.copy_(torch.where(skipped, mean, to_bf16(new_mean, noise_m)))
    square.copy_(torch.where(skipped, square, to_bf16(new_square, noise_s)))


def _update_int8(skipped, weight, gradient, mean, mean_scales, square, square_scales, noise_m, noise_s, *how) -> None:
    old = decode(mean, mean_scales), decode(square, square_scales)
    news = _adamw(skipped, weight, gradient, *old, *how)
    for codes, scales, new, noise in zip(
        (mean, square), (mean_scales, square_scales), news, (noise_m, noise_s), strict=True
    ):
        new_codes, new_scales = encode(new, codes.dtype, noise)
        codes.copy_(torch.where(skipped, codes, new_codes))
        scales.copy_(torch.where(skipped, scales, new_scales))


def _adamw(skipped, weight, gradient, mean, square, keep, rate, correction, beta1, beta2, epsilon):
    """Updates the weight by the exact new moments, unless the step is skipped; returns these, fp32."""
    mean = mean.lerp(gradient, 1 - beta1)
    square = square * beta2 + gradient * gradient * (1 - beta2)
    updated = weight * keep - rate * mean / (square.sqrt() / correction + epsilon)
    weight.copy_(torch.where(skipped, weight, updated))
    return mean, square
