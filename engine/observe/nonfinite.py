"""Where a step's numbers first went wrong: its micro-batches are run once more, and every module's output looked at.

For the report of a skipped step. Weights, moments, counters and random state are afterwards as they were before.
"""

from collections.abc import Iterable, Iterator
from contextlib import nullcontext

import torch
import torch.distributed as dist
from torch import nn

from engine.data.batches import Step
from engine.data.packing import PackedBatch
from engine.higgs_engine import HiggsEngine, Targets

PEFT_PREFIX = "base_model.model."


def search(engine: HiggsEngine, batches: Iterable[PackedBatch], targets: Targets) -> dict:
    """Runs this process's micro-batches of a step forward and backward; a collective.

    Returns:
        On all processes the same: `rank`, `round` (which of its micro-batches, from 0) and `module`, the first in
        order of execution whose output is not finite; or `gradient_of`, the parameter that the backward reached first
        whose gradient is not finite; or `note`, if everything is finite now.
    """
    device, settings = engine.world.device, engine.settings
    eager = torch.compiler.set_stance("force_eager") if settings.torch_compile else nullcontext()
    with torch.random.fork_rng([device] if device.type == "cuda" else []), eager:
        watch = _Watch(engine.backend.model)
        try:
            engine.accumulate(batches, targets)
        finally:
            watch.remove()
        found = _agreed(watch.first(), engine.world.rank, engine.world.size)
        if found is None:
            found = _first_gradient(engine)
        engine.backend.discard()
    return found


def named(found: dict, step: Step, readers: int, processes_per_row: int, names) -> dict:
    """What was found, with the micro-batch's number within the step (from 1) and the names of its samples."""
    if "round" not in found:
        return found
    number = found["round"] * readers + found["rank"] // processes_per_row
    rest = {key: value for key, value in found.items() if key != "round"}
    samples = step.micro_batches[number] if number < len(step.micro_batches) else ()
    return rest | {"micro_batch": number + 1, "samples": names(samples)}


class _Watch:
    """Hooks on all modules; their answers stay on the device until `first`.

    Modules also run in the backward, where activations are recomputed: only what runs within the model's own forward
    counts.
    """

    def __init__(self, model: nn.Module):
        self.round, self.running = -1, False
        self.answers: list[tuple[int, str, torch.Tensor]] = []
        self.hooks = [model.register_forward_pre_hook(self._begin)]
        for name, module in model.named_modules():
            self.hooks.append(module.register_forward_hook(self._looking_at(name.removeprefix(PEFT_PREFIX))))
        self.hooks.append(model.register_forward_hook(self._end))

    def _begin(self, *_) -> None:
        self.round += 1
        self.running = True

    def _end(self, *_) -> None:
        self.running = False

    def _looking_at(self, name: str):
        def look(_module, _inputs, output) -> None:
            if self.running:
                finite = [finite_everywhere(tensor) for tensor in _tensors(output)]
                if finite:
                    self.answers.append((self.round, name or "the whole model", torch.stack(finite).all()))

        return look

    def remove(self) -> None:
        for hook in self.hooks:
            hook.remove()

    def first(self) -> tuple[int, str] | None:
        """Round and name of the first whose output was not finite."""
        finite = torch.stack([answer for _, _, answer in self.answers]).tolist() if self.answers else []
        places = (place[:2] for place, good in zip(self.answers, finite, strict=True) if not good)
        return next(places, None)


def _tensors(output) -> Iterator[torch.Tensor]:
    """Those of floating point, not empty, in what a module gave."""
    if isinstance(output, torch.Tensor):
        if output.is_floating_point() and output.numel():
            yield output.detach()
    elif isinstance(output, (tuple, list)):
        for part in output:
            yield from _tensors(part)
    elif isinstance(output, dict):
        yield from _tensors(list(output.values()))


def finite_everywhere(values: torch.Tensor) -> torch.Tensor:
    """Bool scalar, on the device; without temporaries as large as the values, of which there must be some."""
    return torch.stack(values.aminmax()).isfinite().all()


def _agreed(mine: tuple[int, str] | None, rank: int, size: int) -> dict | None:
    """The first over all processes."""
    everyone = [mine]
    if size > 1:
        everyone = [None] * size
        dist.all_gather_object(everyone, mine)
    found = [(place[0], who, place[1]) for who, place in enumerate(everyone) if place is not None]
    if not found:
        return None
    number, who, module = min(found)
    return {"rank": who, "round": number, "module": module}


def _first_gradient(engine: HiggsEngine) -> dict:
    """The backward goes from the end of the model to its beginning: what it spoils first is the last in order."""
    spoilt = [name for name, gradient in engine.gradients() if not finite_everywhere(gradient)]
    if spoilt:
        return {"gradient_of": spoilt[-1].removeprefix(PEFT_PREFIX)}
    return {"note": "everything is finite when the step is run once more: the weights have changed since"}
