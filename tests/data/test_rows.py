"""Rows on their way to samples: how they are paired, dropped and laid out, and all that is wrong is told at once."""

from dataclasses import replace

import pytest

from engine.config import Settings
from engine.data.audio import Recording
from engine.data.audio_checks import AudioFacts
from engine.data.conversation import Audio, Conversation, Message, Row, Text, speech
from engine.data.layouts import Layout
from engine.data.references import References, keeps_reference
from engine.data.rows import Heard, LaidOut, RowCheck, laid_out, spoken_text

FACTS = AudioFacts(
    seconds=2.0, sampling_rate=24_000, channels=1, peak=0.5, rms=0.1, clipped=0.0, dc=0.0, leading_silence=0.1,
    trailing_silence=0.1, active=0.8, begin_level=-50.0, end_level=-50.0, pause_level=-45.0,
)  # fmt: skip
SAID = "The weather is fine today."


def recording(name: str) -> Recording:
    return Recording(f"{name}.wav")


def row(number=0, text=SAID, target="target", reference="reference", speaker="A", **misc) -> Row:
    references = [("Said before.", recording(reference))] if reference else []
    return Row(number, speech(text, recording(target), references, speaker, misc, number))


def out(*rows: Row, layout=Layout(), references=None, dropout=0.0, seed=0) -> list[LaidOut]:  # noqa: B008
    return list(laid_out(rows, layout, references, dropout, seed))


def heard(row: LaidOut, **changes) -> dict[Recording, Heard]:
    """Each recording of the row as a sound one; `changes` by name. Equal names are equal content."""
    return {
        about: changes.get(about.path.split(".")[0], sound(about.path.split(".")[0])) for about in row.recordings
    }  # fmt: skip


def sound(content: str, **facts) -> Heard:
    measured = replace(FACTS, **facts)
    return Heard(content.encode().hex().ljust(64, "0"), measured.seconds, measured)


def report(given: Row | LaidOut, check: RowCheck | None = None, **changes):
    (laid,) = [given] if isinstance(given, LaidOut) else out(given)
    return (check or RowCheck(Settings()))(laid, heard(laid, **changes))


# ---- laying out


def test_a_row_is_laid_out_and_keeps_what_it_was():
    (laid,) = out(row(3, text="你好"))
    assert laid.number == 3 and laid.written == row(3, text="你好").conversation
    assert laid.trained == Layout().apply(laid.written) and not laid.problems and not laid.warnings
    assert laid.recordings == [recording("reference"), recording("target")]


def test_a_row_that_could_not_be_read_keeps_its_problems():
    assert out(Row(2, None, ("no audio", "no text"))) == [LaidOut(2, None, None, ("no audio", "no text"))]
    assert out(Row(2, None, ("no audio",)))[0].recordings == []


def test_a_row_that_does_not_fit_its_layout_is_still_listened_to():
    (laid,) = out(row(reference=None), layout=Layout("voice_cloning"))
    assert laid.trained is None and laid.recordings == [recording("target")]
    (problem,) = laid.problems
    assert problem.startswith("voice_cloning needs one reference, the row has 0 → ")
    missing = Heard(None, problem="target.wav: no such file → correct the path")
    made = report(laid, target=missing)
    assert made.problems == (problem, missing.problem) and not made.accepted and made.speaker == "A"


@pytest.mark.parametrize("text, written", [
    ("Fine.", None), ("Fine", "Fine"), ("Fine（really）.", "Fine（really）."), (" Fine. ", " Fine. "),
])  # fmt: skip
def test_the_written_text_is_kept_only_where_normalisation_changed_it(text, written):
    assert out(row(text=text))[0].written_text == written
    assert out(row(text=text), layout=Layout(normalize_text=False))[0].written_text is None
    assert out(row(text=text), layout=Layout("as_written"))[0].written_text is None


def test_the_last_round_is_compared():
    turns = [m for t in ("One", "Two.") for m in (Message("user", (Text(t),)), Message("assistant", (audio(t),)))]
    dialogue = Row(0, Conversation(tuple(turns), misc={"task_type": "single_speaker"}))
    (laid,) = out(dialogue)
    assert laid.written_text is None and spoken_text(laid.trained) == "Two."


def audio(name: str) -> Audio:
    return Audio(recording(name))


@pytest.mark.parametrize("messages, start_index, problem", [
    ((Message("user", (Text("a"),)),), None, "no assistant message, so there is nothing to train → add the answer"),
    ((Message("user", (Text("a"),)), Message("assistant", (Text("b"),))), None,
     "no assistant message has audio → give the target recording as an audio item"),
    ((Message("user", (Text("a"),)), Message("assistant", (audio("b"),))), 2,
     "start_index 2 leaves nothing to train → the last assistant message is number 1"),
    ((Message("user", (Text("a"), audio("r"), Text("b"))), Message("assistant", (audio("t"),))), 5,
     "start_index 5 leaves nothing to train → the last assistant message is number 1"),
])  # fmt: skip
def test_a_row_with_nothing_to_train_says_so(messages, start_index, problem):
    (laid,) = out(Row(0, Conversation(messages, start_index)))
    assert laid.problems == (problem,) and laid.trained is None


def test_pairing_and_its_warnings():
    rows = [row(0, target="a", reference=None), row(1, target="b", reference=None), row(2, "Alone.", "c", None, "B")]
    references = References(rows, lambda about: about.path, 0)
    one, other, alone = out(*rows, references=references)
    assert one.recordings == [recording("b"), recording("a")] and other.recordings == [recording("a"), recording("b")]
    assert one.written.misc["reference_row"] == 1 and not one.warnings
    assert alone.warnings == ("stays without reference: there is no other clip of speaker 'B'",)
    assert alone.trained is not None and alone.recordings == [recording("c")]
    assert report(alone).warnings == alone.warnings


def test_dropout_leaves_the_references_of_some_rows_out():
    rows = [row(number) for number in range(50)]
    for number, laid in enumerate(out(*rows, dropout=0.4, seed=7)):
        kept = keeps_reference(0.4, 7, number)
        assert laid.recordings == [recording("reference")] * kept + [recording("target")]
        made = report(laid)
        assert made.accepted and made.reference_seconds == (2.0 if kept else None) and made.seconds == 2.0


# ---- judging


def test_a_sound_row():
    made = report(row(5))
    assert made.accepted and not made.warnings
    assert (made.row, made.speaker, made.text, made.written_text) == (5, "A", SAID, None)
    assert (made.seconds, made.reference_seconds) == (2.0, 2.0)


@pytest.mark.parametrize("low, high, accepted", [
    (None, None, True), (2.0, 2.0, True), (2.01, None, False), (None, 1.99, False), (1.0, 3.0, True),
])  # fmt: skip
@pytest.mark.parametrize("name", ["target", "reference"])
def test_limits_of_length(low, high, accepted, name):
    long_enough = {"reference": sound("reference"), "target": sound("target")} | {name: sound(name)}
    other = {"target": "reference", "reference": "target"}[name]
    long_enough[other] = Heard("00" * 32)  # as codes, whose length is not known
    made = report(row(), RowCheck(Settings(min_seconds=low, max_seconds=high)), **long_enough)
    assert made.accepted == accepted
    if low == 2.01:
        assert made.problems == (f"{name}.wav: 2.00 s are less than min_seconds = 2.01",)
    if high == 1.99:
        assert made.problems == (f"{name}.wav: 2.00 s are more than max_seconds = 1.99",)


@pytest.mark.parametrize("limit", ["min_seconds", "max_seconds"])
def test_a_limit_holds_for_a_length_that_equals_it_but_for_rounding(limit):
    check = RowCheck(Settings(**{limit: 0.7}))
    for seconds in (0.699999988079071, 0.7000000000001):  # the first is fp32's 0.7
        assert report(row(reference=None), check, target=sound("target", seconds=seconds)).accepted


def test_all_that_is_wrong_is_told_at_once():
    broken = Heard(None, problem="reference.wav: no such file → correct the path")
    made = report(row(), RowCheck(Settings(max_seconds=1.0)), reference=broken, target=sound("target", clipped=0.1))
    assert made.problems == (broken.problem, "target.wav: 2.00 s are more than max_seconds = 1")
    assert made.warnings == ("target.wav: clipped: 10 % of its samples stand at full scale",)
    assert made.reference_seconds is None and made.seconds == 2.0


def test_a_recording_used_twice_is_told_once():
    made = report(row(target="same", reference="same"), same=Heard(None, problem="same.wav: empty"))
    assert made.problems == ("same.wav: empty",)


COPY = "the reference is the target itself, which would teach to copy it → give another recording of the speaker"


@pytest.mark.parametrize("train_reference", [False, True])
@pytest.mark.parametrize("names", [("same", "same"), ("one", "copy")])
def test_a_reference_that_is_the_target_is_a_problem(names, train_reference):
    (laid,) = out(row(target=names[0], reference=names[1]), layout=Layout(train_reference=train_reference))
    made = report(laid, copy=sound("one"))
    (problem,) = made.problems
    assert problem.startswith(f"{names[1]}.wav: {COPY}")


def test_a_reference_without_which_the_row_is_trained_is_no_copy():
    dropped = next(n for n in range(99) if not keeps_reference(0.5, 0, n))
    (laid,) = out(row(dropped, target="same", reference="same"), dropout=0.5)
    assert report(laid).accepted


def test_an_earlier_answer_that_is_spoken_again_is_a_copy():
    # what comes before start_index is context, like a reference
    turns = tuple(m for t in "ab" for m in (Message("user", (Text(t),)), Message("assistant", (audio("same"),))))
    made = report(Row(0, Conversation(turns, 2, misc={"task_type": "single_speaker"})))
    assert COPY in made.problems[0]


def test_a_target_of_an_earlier_row_is_a_warning():
    check = RowCheck(Settings())
    made = [report(row(number, target=name), check, copy=sound("a")) for number, name in [(0, "a"), (1, "b"), (4, "a"),
                                                                                          (6, "copy")]]  # fmt: skip
    assert [m.warnings for m in made] == [
        (), (), ("a.wav: the same recording as the target of row 0",),
        ("copy.wav: the same recording as the target of row 0",),
    ]  # fmt: skip
    assert all(m.accepted for m in made)


def test_a_rejected_row_is_no_first_of_its_recording():
    check = RowCheck(Settings(max_seconds=3.0))
    assert not report(row(0, target="a", reference="long"), check, long=sound("long", seconds=9.0)).accepted
    assert not report(row(1, target="a"), check).warnings
    check = RowCheck(Settings(reject_suspicious=True))
    assert not report(row(0, target="a", reference="loud"), check, loud=sound("loud", clipped=0.1)).accepted
    assert report(row(1, target="a"), check).accepted


def test_a_reference_that_rows_share_is_no_copy_even_when_it_is_trained():
    check = RowCheck(Settings(train_reference=True, reject_suspicious=True))
    for laid in out(*[row(number, target=f"t{number}") for number in range(3)], layout=Layout(train_reference=True)):
        made = report(laid, check)
        assert made.accepted and not made.warnings
        assert (made.seconds, made.reference_seconds) == (2.0, 2.0), "a reference counts as target"


def test_the_target_of_one_row_may_be_the_reference_of_another():
    check = RowCheck(Settings())
    for number, (target, reference) in enumerate([("a", "b"), ("b", "a")]):
        assert report(row(number, target=target, reference=reference), check).warnings == ()


SUSPICIOUS = {
    "clipped": dict(clipped=0.1), "off centre": dict(dc=0.2), "cut off": dict(end_level=-5.0, trailing_silence=0.0),
    "silent": dict(active=0.1), "long pause": dict(seconds=7.0, leading_silence=5.0),
    "narrow": dict(sampling_rate=8000),
}  # fmt: skip


@pytest.mark.parametrize("facts", SUSPICIOUS.values(), ids=SUSPICIOUS)
@pytest.mark.parametrize("name", ["target", "reference"])
def test_suspicious_recordings_are_warnings_or_problems_if_asked(name, facts):
    kept, rejected = (
        report(row(), RowCheck(Settings(reject_suspicious=on)), **{name: sound(name, **facts)}) for on in (False, True)
    )
    assert kept.accepted and len(kept.warnings) == 1 and kept.warnings[0].startswith(f"{name}.wav: ")
    assert rejected.problems == (f"{kept.warnings[0]} (rejected by reject_suspicious)",)


@pytest.mark.parametrize("text, seconds, warning", [
    (SAID, 2.0, None), ("Hm.", 2.0, None),
    (SAID * 10, 2.0, "target.wav: too much text for 1.8 s: "),
    ("Hm.", 30.0, "target.wav: too little text for 29.8 s: "),
])  # fmt: skip
def test_the_text_is_compared_with_the_time_that_is_speech(text, seconds, warning):
    made = report(row(text=text), target=sound("target", seconds=seconds))
    assert made.accepted and len(made.warnings) == (warning is not None)
    assert all(line.startswith(warning) for line in made.warnings)


def test_the_text_of_a_reference_is_compared_too():
    made = report(row(), reference=sound("reference", seconds=60.0))
    assert made.warnings[0].startswith("reference.wav: too little text for 59.8 s: ")
    in_system = row(task_type="reference_in_system")
    assert not report(in_system, reference=sound("reference", seconds=60.0)).warnings, "it has no text there"


def test_codes_have_no_facts_to_warn_about():
    made = report(row(text=SAID * 50), target=Heard("11" * 32, 2.0), reference=Heard("22" * 32, 2.0))
    assert made.accepted and not made.warnings and made.seconds == 2.0
