"""References drawn for rows that have none, and rows that go without: another clip, the same voice."""

import math
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.data.audio import AudioError, Recording
from engine.data.conversation import Audio, Conversation, Message, Row, Text, speech
from engine.data.layouts import Layout
from engine.data.references import References, keeps_reference

quick = settings(max_examples=80, deadline=None, derandomize=True)


def content(recording: Recording) -> str:
    """Of the file `content/name`: recordings of one folder are equal."""
    folder, _ = recording.path.split("/")
    if folder == "missing":
        raise AudioError(f"{recording.path}: no such file")
    return folder


def row(number: int, path: str, speaker: str | None = "A", **more) -> Row:
    return Row(number, speech(f"Text {number}.", Recording(path), speaker=speaker, row=number, **more))


@st.composite
def data_sets(draw):
    """Rows of a few speakers; some recordings of equal content under other names, some that cannot be read."""
    kinds = st.tuples(st.sampled_from("ABC") | st.none(), st.sampled_from(["1", "2", "3", "4", "missing"]))
    drawn = draw(st.lists(kinds, min_size=1, max_size=12))
    return [row(i, f"{name}/{i}.wav", speaker) for i, (speaker, name) in enumerate(drawn)]


def paths(sample: Conversation) -> list[str]:
    return [audio.recording.path for audio in sample.audios]


@quick
@given(data_sets(), st.integers(0, 2**32 - 1))
def test_a_reference_is_another_clip_of_the_same_speaker(rows, seed):
    references = References(rows, content, seed)
    for given_row in rows:
        sample = given_row.conversation
        paired, warning = references.pair(sample)
        mine = paths(sample)[0].split("/")[0]
        others = [other for other in rows if other.conversation.speaker == sample.speaker is not None
                  and other.number != sample.row and content_or_none(other) not in (None, mine)]  # fmt: skip
        if not others:
            assert paired is sample and warning
            continue
        assert warning is None
        (chosen,) = [other for other in others if paths(other.conversation) == paths(paired)[:1]]
        asked = Text(f"Text {chosen.number}."), chosen.conversation.audios[0], Text(f"Text {sample.row}.")
        assert paired.messages == (Message("user", asked), sample.messages[-1])
        assert paired.misc["reference_row"] == chosen.number and paired.speaker == sample.speaker


def content_or_none(given_row: Row) -> str | None:
    folder = paths(given_row.conversation)[0].split("/")[0]
    return None if folder == "missing" else folder


@quick
@given(data_sets(), st.integers(0, 2**32 - 1), st.randoms())
def test_a_reference_depends_on_data_seed_and_row_only(rows, seed, shuffle: random.Random):
    references = References(rows, content, seed)
    pairs = {r.number: references.pair(r.conversation) for r in rows}
    again, order = References(iter(rows), content, seed), list(rows)
    shuffle.shuffle(order)
    assert {r.number: again.pair(r.conversation) for r in order} == pairs


def test_all_clips_serve_as_references_and_another_seed_draws_others():
    rows = [row(i, f"{i}/a.wav") for i in range(40)]
    drawn = [[References(rows, content, seed).pair(r.conversation)[0].misc["reference_row"] for r in rows]
             for seed in (1, 2)]  # fmt: skip
    assert drawn[0] != drawn[1]
    assert len(set(drawn[0])) > 15, "few clips are the reference of all"


@pytest.mark.parametrize("rows, warning", [
    ([row(0, "1/a.wav", None), row(1, "2/b.wav", None)], "stays without reference: the row names no speaker"),
    ([row(0, "1/a.wav"), row(1, "2/b.wav", "B")], "stays without reference: there is no other clip of speaker 'A'"),
    ([row(0, "1/a.wav"), row(1, "1/copy.wav")], "stays without reference: there is no other clip of speaker 'A'"),
    ([row(0, "1/a.wav"), row(1, "missing/b.wav")], "stays without reference: there is no other clip of speaker 'A'"),
])  # fmt: skip
def test_what_has_no_partner_stays_and_says_so(rows, warning):
    sample = rows[0].conversation
    assert References(rows, content, 0).pair(sample) == (sample, warning)


def test_a_recording_that_cannot_be_read_is_paired_and_spoils_no_other_row():
    # its own problem is told when it is read; one more for want of a reference would hide it
    rows = [row(0, "missing/a.wav"), row(1, "2/b.wav"), row(2, "3/c.wav")]
    references = References(rows, content, 0)
    assert references.pair(rows[0].conversation)[1] is None
    assert all("missing/a.wav" not in paths(references.pair(r.conversation)[0])[:1] for r in rows[1:])


def test_rows_that_have_a_reference_or_several_rounds_are_kept():
    given_one = row(0, "1/a.wav", references=[(None, Recording("2/own.wav"))])
    dialogue = Conversation(rows_of_two_rounds(), speaker="A", row=1)
    broken = Row(2, None, ("no such column",))
    answer_only = Conversation((Message("assistant", (Audio(Recording("4/d.wav")),)),), speaker="A", row=3)
    rows = [given_one, Row(1, dialogue), broken, Row(3, answer_only), row(4, "5/e.wav"), row(5, "6/f.wav")]
    references = References(rows, content, 0)
    for sample in (given_one.conversation, dialogue, answer_only):
        assert references.pair(sample) == (sample, None)
    chosen = {references.pair(row(n, f"new/{n}.wav").conversation)[0].misc["reference_row"] for n in range(10, 60)}
    assert chosen == {0, 4, 5}, "clips of single rounds serve, also of rows with a reference of their own"


def rows_of_two_rounds() -> tuple[Message, ...]:
    return tuple(
        message
        for name in "ab"
        for message in (Message("user", (Text(name),)), Message("assistant", (Audio(Recording(f"9/{name}.wav")),)))
    )


def test_a_paired_row_is_laid_out_with_the_words_of_its_reference():
    misc = {"ref_transcript": "of something else", "target_transcript": "Really said.", "task_type": "single_speaker"}
    rows = [row(0, "1/a.wav", misc=misc), row(1, "2/b.wav")]
    paired, _ = References(rows, content, 0).pair(rows[0].conversation)
    turns = Layout().apply(paired).messages
    assert [text for message in turns[1:] for text in message.texts] == ["Text 1.", "Really said."]
    assert [message.audios[0].recording.path for message in turns if message.audios] == ["2/b.wav", "1/a.wav"]


# ---- reference_dropout


@quick
@given(st.floats(0, 0.99), st.integers(0, 2**32 - 1))
def test_the_share_of_rows_goes_without(share, seed):
    rows = 1000
    dropped = sum(not keeps_reference(share, seed, number) for number in range(rows))
    assert abs(dropped - share * rows) <= 5 * math.sqrt(rows * share * (1 - share)) + 1


@quick
@given(st.floats(0, 1), st.floats(0, 1), st.integers(0, 2**32 - 1))
def test_a_smaller_share_drops_some_of_the_same_rows(one, other, seed):
    low, high = sorted((one, other))
    assert all(keeps_reference(low, seed, n) for n in range(100) if keeps_reference(high, seed, n))
    assert all(keeps_reference(0.0, seed, n) and not keeps_reference(1.0, seed, n) for n in range(100))


def test_another_seed_drops_other_rows():
    kept = [[keeps_reference(0.5, seed, n) for n in range(100)] for seed in (1, 1, 2)]
    assert kept[0] == kept[1] != kept[2]
