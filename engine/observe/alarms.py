"""What logged values say of a training that goes wrong quietly: heads that learn nothing, labels that leak.

Every alarm wants evidence first (so many targets behind a mean), is told once, and again only after it had gone.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from statistics import median

AT_CHANCE = 0.98
"""Share of the loss of a guess from which on nothing has been learnt."""

EOS_AT_CHANCE = 0.9
"""A model that knows how rare the end of a clip is, and nothing else, is at 0.8; one that avoids it, above 1."""

TOO_GOOD = 0.3
"""Nats. A codebook of real speech that was not heard before cannot be foretold so well."""

FAR_BELOW = 0.25
"""Share of the other codebooks' median: the first one, the easiest, is at about 0.7."""

LEARNING_TARGETS = 20_000
"""Audio targets of a codebook after warm-up before something is expected of it: a quarter of an hour."""

TEXT_TARGETS = 5_000
EOS_CLIPS = 500

LEAK_TARGETS = 5_000
"""Targets behind a mean before it is called too good: what is tiny may be easy."""


@dataclass(frozen=True)
class Sizes:
    """Of the heads."""

    vocabulary: int
    codebook: int
    codebooks: int


Found = Iterator[tuple[str, str]]
"""A name for each alarm, the same as long as it lasts, and what to tell."""


def not_learning(values: dict, sizes: Sizes, seen: dict[str, int]) -> Found:
    """Heads that are no better than a guess.

    Args:
        values: of a logged step.
        seen: text_targets, audio_targets (of a codebook) and eos_targets since the end of warm-up.
    """
    chance = math.log(sizes.codebook)
    if seen["audio_targets"] >= LEARNING_TARGETS:
        for book, loss in enumerate(values["codebook_losses"]):
            if loss is not None and loss >= AT_CHANCE * chance:
                yield (
                    f"chance {book}",
                    f"codebook {book} has learnt nothing: loss {loss:.2f}, a guess has {chance:.2f} → look at the "
                    "codes (higgs-engine validate) and at learning_rate",
                )
    text, guess = values["text_loss"], math.log(sizes.vocabulary)
    if seen["text_targets"] >= TEXT_TARGETS and text is not None and text >= AT_CHANCE * guess:
        yield "text", f"text has not been learnt: loss {text:.2f}, a guess has {guess:.2f} → look at the tokenizer"
    eos, clips = values["eos_loss"], seen["eos_targets"] // sizes.codebooks
    if clips >= EOS_CLIPS and eos is not None and eos >= EOS_AT_CHANCE * chance:
        yield (
            "eos",
            f"the end of a clip (EOS) is not learnt after {clips:,} clips: loss {eos:.2f}, a guess has {chance:.2f}; "
            "speech would never end → look whether clips are cut off at their end",
        )


def leaking(losses: list[float | None], targets: int, what: str) -> Found:
    """Codebooks that are foretold better than is honestly possible.

    Args:
        losses: of data that the model has not been trained on before.
        targets: of each codebook, behind the losses.
        what: these data in words.
    """
    if targets < LEAK_TARGETS:
        return
    for book, loss in enumerate(losses):
        others = [other for n, other in enumerate(losses) if n != book and other is not None]
        limit = max(TOO_GOOD, FAR_BELOW * median(others) if others else 0.0)
        if loss is not None and loss < limit:
            yield (
                f"leak {what} {book}",
                f"codebook {book} is too easy: loss {loss:.2f} in {what}, which cannot be foretold so well → look for "
                "samples that are there more than once, or labels that the input gives away",
            )


class Alarms:
    """One for a run, on the main process.

    Args:
        warmup_steps: nothing is expected before.
        repeats: an epoch has samples more than once (data_weights).
    """

    def __init__(self, sizes: Sizes, warmup_steps: int, repeats: bool):
        self.sizes, self.warmup_steps, self.repeats = sizes, warmup_steps, repeats
        self._seen = dict.fromkeys(("text_targets", "audio_targets", "eos_targets"), 0)
        self._told: dict[str, set[str]] = {}

    def of_training(self, values: dict) -> list[str]:
        """What is new in the values of a logged step."""
        if values["step"] > self.warmup_steps:
            self._seen = {name: seen + values[name] for name, seen in self._seen.items()}
        found = dict(not_learning(values, self.sizes, self._seen))
        if values["epoch"] <= 1 and not self.repeats:
            found |= dict(leaking(values["codebook_losses"], values["audio_targets"], "the first epoch"))
        return self._new("training", found)

    def of_evaluation(self, losses: list[float | None], targets: int) -> list[str]:
        """What is new in held-out losses."""
        return self._new("evaluation", dict(leaking(losses, targets, "held-out data")))

    def _new(self, source: str, found: dict[str, str]) -> list[str]:
        before = self._told.get(source, set())
        self._told[source] = set(found)
        return [text for name, text in found.items() if name not in before]
