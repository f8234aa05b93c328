"""Alarms: told for what they name, with enough evidence, once, and never for an honest run."""

import math

import pytest

from engine.observe.alarms import EOS_CLIPS, LEAK_TARGETS, LEARNING_TARGETS, Alarms, Sizes

SIZES = Sizes(vocabulary=128256, codebook=1026, codebooks=8)
CHANCE = math.log(1026)
HONEST = [3.9, 4.4, 4.6, 4.7, 4.8, 4.9, 5.0, 5.0]


def alarms(warmup: int = 100, repeats: bool = False) -> Alarms:
    return Alarms(SIZES, warmup, repeats)


def values(step: int = 200, epoch: int = 2, **other) -> dict:
    """Of a logged step of a healthy run, with much data behind it."""
    healthy = {
        "codebook_losses": HONEST, "text_loss": 2.0, "eos_loss": 0.8, "text_targets": 10**5,
        "audio_targets": 10**5, "eos_targets": 8 * 10**4,
    }  # fmt: skip
    return {"step": step, "epoch": epoch} | healthy | other


def with_book(book: int, loss: float | None) -> list[float | None]:
    return [loss if n == book else other for n, other in enumerate(HONEST)]


def test_an_honest_run_is_not_disturbed():
    watch = alarms()
    for step in range(1, 500, 10):
        assert watch.of_training(values(step, epoch=1 + step // 200)) == []
    assert watch.of_evaluation(HONEST, 10**5) == []
    nothing = dict.fromkeys(("text_loss", "eos_loss")) | {"codebook_losses": [None] * 8}
    assert watch.of_training(values(600, **nothing)) == [], "all steps since the last line were skipped"


def test_the_first_steps_may_be_as_good_as_a_guess():
    watch, guess = alarms(), {"codebook_losses": [CHANCE] * 8, "eos_loss": CHANCE, "text_loss": math.log(128256)}
    assert all(watch.of_training(values(step, epoch=0, **guess)) == [] for step in range(1, 101))
    assert len(watch.of_training(values(101, epoch=0, **guess))) == 8 + 1 + 1


def test_a_codebook_at_chance_is_told_once_and_again_after_it_had_gone():
    watch, bad = alarms(), values(codebook_losses=with_book(3, CHANCE * 0.99))
    (told,) = watch.of_training(bad)
    assert "codebook 3 has learnt nothing: loss 6.86, a guess has 6.93" in told and "→" in told
    assert watch.of_training(bad) == []
    assert watch.of_training(values(codebook_losses=with_book(3, CHANCE * 0.95))) == []
    assert watch.of_training(bad) == [told]


def test_little_data_prove_nothing():
    bad = {"codebook_losses": [CHANCE] * 8, "eos_loss": CHANCE}
    few = {"text_targets": 0, "audio_targets": LEARNING_TARGETS // 2, "eos_targets": 8 * EOS_CLIPS // 2}
    watch = alarms()
    assert watch.of_training(values(**bad, **few)) == []
    assert len(watch.of_training(values(**bad, **few))) == 8 + 1, "but they add up"
    assert alarms().of_evaluation(with_book(0, 0.1), LEAK_TARGETS - 1) == []


@pytest.mark.parametrize("eos, told", [(6.0, 0), (6.5, 1), (11.0, 1)])
def test_an_eos_that_is_not_learnt(eos, told):
    """One in two hundred frames is an end: who knows only that has a loss of 5.3."""
    found = alarms().of_training(values(eos_loss=eos))
    assert len(found) == told and all("the end of a clip (EOS) is not learnt" in text for text in found)


@pytest.mark.parametrize("loss, told", [(0.2, 1), (1.0, 1), (1.3, 0)])
def test_a_codebook_that_is_too_easy(loss, told):
    """In held-out data, and in the first epoch, in which no sample is there twice; later it may be memory."""
    easy = with_book(2, loss)
    assert len(alarms().of_evaluation(easy, 10**5)) == told
    assert len(alarms().of_training(values(epoch=0, codebook_losses=easy))) == told
    assert alarms().of_training(values(epoch=1.1, codebook_losses=easy)) == []
    assert alarms(repeats=True).of_training(values(epoch=0, codebook_losses=easy)) == []
    assert len(alarms().of_evaluation([0.2] * 8, 10**5)) == 8, "also where all of them are"
