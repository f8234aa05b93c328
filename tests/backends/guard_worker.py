"""One rank of runs in which numbers go wrong at chosen steps, on one process only; asserts that nothing changes then.

    guard_worker.py MODEL OUT CASE...      CASE: as in parity_worker.py

Leaves OUT/CASE-worldN.json: the losses and norm of each step, which were skipped, and what a search found.
"""

import json
import sys
from pathlib import Path

import torch

from engine.data.packing import pack
from engine.higgs_engine import HiggsEngine, Targets
from engine.observe import nonfinite
from engine.runtime.distributed import World, exit_cleanly, init_process_group, shutdown
from tests.backends.parity_worker import micro_batches
from tests.checkpoint.small_run import SmallRun

STEPS = 7
FAULTS = {1: "loss", 2: "module", 4: "spike", 5: "module"}
"""Steps that go wrong: an infinite loss whose gradients are finite; NaN in a layer; a gradient far too large."""


class Faults:
    """Puts the faults into a run.

    A module's fault depends on the data alone, as a bad sample's would: the second micro-batch of the step.
    """

    def __init__(self, engine: HiggsEngine, world: World):
        self.name: str | None = None
        self.round, self.bad, self.mine = 0, 2 // world.size, world.rank == world.size - 1
        self.real = engine.backend.forward
        engine.backend.forward = self.forward
        layer = next(m for n, m in engine.backend.model.named_modules() if n.endswith("layers.1.audio_mlp"))
        layer.register_forward_hook(self.spoil)

    def spoil(self, _module, _inputs, output):
        return output * torch.nan if self.name == "module" and self.mine and self.round == self.bad else None

    def forward(self, *inputs):
        self.round += 1
        loss, sums = self.real(*inputs)
        if self.mine and self.name == "loss":
            return loss + torch.inf, sums
        return (loss * 1e4, sums) if self.mine and self.name == "spike" else (loss, sums)


def snapshot(engine: HiggsEngine) -> dict[str, torch.Tensor]:
    """All that a step may change, but for the guard's own memory."""
    state = {key: fragment.local.clone() for key, fragment in engine.state().items() if key != "guard"}
    return state | {f"held {name}": local.clone() for name, local in engine.backend.local_weights()}


def assert_unchanged(before: dict[str, torch.Tensor], engine: HiggsEngine, when: str) -> None:
    for key, value in snapshot(engine).items():
        assert torch.equal(value, before[key]), f"{when}: {key} has changed"


def searched(run: SmallRun, faults: Faults, number: int) -> dict:
    """What a search finds in a step that was skipped."""
    faults.round = 0
    samples = micro_batches(number)
    everything = [s for batch in samples for s in batch]
    audio = tuple(int(n) for n in sum(s.audio_targets for s in everything))
    mine = [pack(batch, run.files.config.audio_token_id) for batch in samples[run.reader :: run.readers]]
    return nonfinite.search(run.engine, mine, Targets(sum(s.text_targets for s in everything), audio))


def run_with_faults(case: str, model: Path, out: Path, world: World, faulty: bool = True) -> dict:
    """A run; `faulty` false: one whose plan lacks the steps that go wrong."""
    run = SmallRun(case, model, out, world)
    faults, guard, found = Faults(run.engine, world), run.engine.backend.guard, {}
    guard.sigma = 8.0
    for norm in torch.linspace(2.5, 3.5, 40):  # as if there had been steps before
        guard.judge(norm)
    rows, wanted = {}, []
    for number in range(STEPS):
        name = FAULTS.get(number)
        if name and not faulty:
            continue
        faults.name, faults.round = name, 0
        before = snapshot(run.engine)
        numbers = run.step(number)
        skipped = bool(guard.skipped)
        assert skipped == bool(name), f"{case}: step {number} ({name}), norm {numbers[-1]}, limit {guard.limit}"
        if skipped:
            assert_unchanged(before, run.engine, f"{case}, {name}")
            wanted += [number] * (name == "module")
            continue
        after = snapshot(run.engine)
        assert any(not torch.equal(value, before[key]) for key, value in after.items())
        rows[number] = numbers
        for bad in wanted:  # a good step later, as at a logged step: AdamW would not hold back by itself
            faults.name, judged, seeds = "module", guard.memory.clone(), torch.get_rng_state()
            found[bad] = searched(run, faults, bad)
            assert torch.equal(guard.memory, judged), f"{case}: a search counts as a step"
            assert torch.equal(torch.get_rng_state(), seeds), f"{case}: a search draws random numbers"
            assert_unchanged(after, run.engine, f"{case}, search")
        wanted = []
    result = {"rows": rows, "found": found, "counts": guard.counts(), "last_good": guard.last_good()}
    run.close()
    return result


def main() -> None:
    torch.set_num_threads(1)
    model, out, *cases = sys.argv[1:]
    world = init_process_group(timeout_s=60)
    for case in cases:
        result = run_with_faults(case, Path(model), Path(out), world)
        if world.is_main:
            (Path(out) / f"{case}-world{world.size}.json").write_text(json.dumps(result))
    shutdown(world)
    exit_cleanly(0)


if __name__ == "__main__":
    main()
