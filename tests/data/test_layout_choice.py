"""Layouts: which one a row gets, what of it is trained, and what does not fit is told with its remedy."""

from dataclasses import replace

import pytest

from engine.config import Settings
from engine.data.conversation import Audio, Conversation, Message, Text, speech
from engine.data.layouts import LAYOUTS, TASK_TYPES, Layout, LayoutError, has_seed_shape, read_speech
from tests.data.layout_rows import (
    ANSWER,
    PLAIN,
    REFERENCE,
    ROW,
    SECOND,
    TAGGED,
    TARGET,
    TWO_VOICES,
    answer,
    dialogue,
    seed_row,
    turns,
    user,
)

CLONING = Layout("voice_cloning")


# ---- rounds and what of them is trained


ROUNDS = (("One.", TARGET), ("Two.", SECOND), ("Three.", ANSWER))


def trained_clips(layout: Layout, sample: Conversation) -> list[Audio]:
    made = layout.apply(sample)
    return [clip for turn, m in enumerate(made.messages) if m.role == "assistant" and turn >= made.start_index
            for clip in m.audios]  # fmt: skip


@pytest.mark.parametrize("name, before", [
    ("voice_cloning", 3), ("reference_in_system", 1), ("single_speaker", 1), ("multi_speaker", 3),
])  # fmt: skip
def test_all_rounds_follow_and_start_index_counts_messages_as_written(name, before):
    row = dialogue(*ROUNDS, references=(("said", REFERENCE),))
    rounds = [message for text, clip in ROUNDS for message in (user(text), answer(clip))]
    assert turns(row, name)[before:] == rounds
    clips = [clip for _, clip in ROUNDS]
    # messages as written: user 0, assistant 1, user 2, assistant 3, user 4, assistant 5
    for start, context in {None: 0, 0: 0, 1: 0, 2: 1, 3: 1, 4: 2, 5: 2, 6: 3, 99: 3}.items():
        assert trained_clips(Layout(name), replace(row, start_index=start)) == clips[context:], start
    with_system = replace(row, messages=(Message("system", (Text("Speak."),)), *row.messages), start_index=3)
    assert trained_clips(Layout(name), with_system) == clips[1:], "the system message counts too"


@pytest.mark.parametrize("start_index, train_reference, expected", [
    (None, False, [TARGET]), (0, False, [TARGET]), (2, False, [TARGET]), (3, False, []),
    (None, True, [REFERENCE, TARGET]), (2, True, [REFERENCE, TARGET]), (3, True, []),
])  # fmt: skip
def test_the_reference_is_trained_on_request_only(start_index, train_reference, expected):
    layout = replace(CLONING, train_reference=train_reference)
    assert trained_clips(layout, seed_row("ref", "target", start_index=start_index)) == expected


def test_train_reference_trains_all_references_and_nothing_else_where_there_is_none():
    everything = Layout("auto", train_reference=True)
    voices = replace(TWO_VOICES, misc={"task_type": "multi_speaker"})
    assert trained_clips(everything, voices) == [REFERENCE, SECOND, TARGET]
    for task, references in (("single_speaker", ()), ("reference_in_system", (("r", REFERENCE),))):
        row = dialogue(*ROUNDS, references=references, start_index=2, misc={"task_type": task})
        assert trained_clips(everything, row) == [SECOND, ANSWER], "context is trained"


def test_a_dialogue_whose_target_text_is_in_misc_takes_it_for_a_single_round_only():
    misc = {"target_transcript": "Only."}
    for rounds, said in ((ROUNDS[:1], ["Only."]), (ROUNDS, ["One.", "Two.", "Three."])):
        made = turns(dialogue(*rounds, references=(("r", REFERENCE),), misc=misc), "single_speaker")
        assert [m.texts[0] for m in made if m.role == "user"] == said


# ---- which layout


OTHER_SHAPES = {
    "no reference": (user("a"), answer(TARGET)),
    "two references": (user("a", REFERENCE, REFERENCE), answer(TARGET)),
    "no text": (user(REFERENCE), answer(TARGET)),
    "no target": (user("a", REFERENCE), Message("assistant", (Text("b"),))),
    "two targets": (user("a", REFERENCE), Message("assistant", (TARGET, TARGET))),
    "two rounds": (user("a", REFERENCE), answer(TARGET)) * 2,
    "no answer": (user("a", REFERENCE),),
}


def test_auto_rebuilds_the_seeds_shape():
    assert has_seed_shape(ROW) and turns(ROW) == turns(ROW, "voice_cloning")
    bare = seed_row("a", "b", system="")
    assert len(bare.messages) == 2 and turns(bare) == turns(bare, "voice_cloning")
    assert Layout("as_written").apply(ROW) is ROW


@pytest.mark.parametrize("shape", OTHER_SHAPES)
def test_auto_keeps_any_other_shape_as_written(shape):
    sample = Conversation(OTHER_SHAPES[shape])
    assert Layout().apply(sample) is sample
    with pytest.raises(LayoutError, match="set prompt_layout: as_written"):
        CLONING.apply(sample)


@pytest.mark.parametrize("task", [*TASK_TYPES, *LAYOUTS])
def test_task_types_are_layouts_as_setting_and_of_a_row(task):
    voices = {"multi_speaker_smart_voice": TAGGED, "single_speaker_smart_voice": PLAIN}.get(task, ROW)
    said = replace(voices, misc={"task_type": task})
    wanted = Layout(TASK_TYPES.get(task, task)).apply(voices).messages
    assert Layout(task).apply(voices).messages == wanted == Layout().apply(said).messages
    other = Layout("single_speaker").apply(said).messages
    assert other == Layout("single_speaker").apply(voices).messages, "a row beats the setting that asks for one layout"


def test_the_task_types_of_other_trainers():
    assert TASK_TYPES == {
        "zero_shot_voice_cloning": "voice_cloning",
        "single_speaker_smart_voice": "single_speaker",
        "multi_speaker_smart_voice": "multi_speaker",
        "multi_speaker_voice_cloning": "multi_speaker",
    }


@pytest.mark.parametrize("task", ["karaoke", "auto", "", None, 3, ["voice_cloning"], {"a": 1}])
def test_an_unknown_task_type_is_ignored(task):
    assert turns(replace(ROW, misc={"task_type": task})) == turns(ROW)
    plain = replace(PLAIN, misc={"task_type": task})
    assert Layout().apply(plain) is plain


def test_rows_that_are_no_conversations_bring_their_task_type():
    recording, reference = TARGET.recording, REFERENCE.recording
    references = [[], [("one", reference)], [("one", reference), ("two", SECOND.recording)]]
    rows = [speech("[SPEAKER0] Hi.", recording, given) for given in references]
    assert [Layout().name_for(row) for row in rows] == ["single_speaker", "voice_cloning", "multi_speaker"]
    assert [len(turns(row)) for row in rows] == [3, 5, 7]


# ---- what does not fit


@pytest.mark.parametrize("name, row, message", [
    ("voice_cloning", PLAIN, "needs one reference, the row has 0 → .*single_speaker none, pair_references finds one"),
    ("voice_cloning", TWO_VOICES, "needs one reference, the row has 2 → multi_speaker takes several"),
    ("reference_in_system", PLAIN, "needs a reference, the row has none → single_speaker goes without; pair_ref"),
    ("multi_speaker", PLAIN, r"needs references, or texts with tags such as \[SPEAKER0\] → tag the texts, or set "),
    ("multi_speaker", dialogue(("a", TARGET), references=((None, REFERENCE), ("b", SECOND))),
     "no text of the reference → give it as misc.ref_transcript or as a text before the clip, or set prompt_layout"),
    ("voice_cloning", dialogue((" ", TARGET), references=(("b", REFERENCE),)), "no text of the target → give it as"),
    ("single_speaker", dialogue(("", TARGET)), "no text of the target → give it as misc.target_transcript"),
    ("single_speaker", dialogue(("a", TARGET), (" ", ANSWER)), "no text of the target → give it as"),
    ("multi_speaker", Conversation((user("a", REFERENCE, "b", SECOND), answer(TARGET))), "no text of the target"),
    ("single_speaker", replace(PLAIN, misc={"target_transcript": 7}), "no text of the target"),
])  # fmt: skip
def test_what_a_layout_lacks_is_told_with_a_remedy(name, row, message):
    with pytest.raises(LayoutError, match=message):
        Layout(name).apply(row)


@pytest.mark.parametrize("messages", [
    (), (user("a"),), (answer(TARGET),), (answer(TARGET), user("a")), (user("a"), user("b"), answer(TARGET)),
    (user("a"), answer(TARGET), answer(ANSWER)), (user("a"), answer(TARGET), user("b")),
    (user("a"), answer(TARGET), user("b", REFERENCE), answer(ANSWER)),
    (user("a"), Message("assistant", (Text("b"),))),
])  # fmt: skip
@pytest.mark.parametrize("name", ["voice_cloning", "single_speaker"])
def test_only_user_and_assistant_in_turn_can_be_laid_out(messages, name):
    with pytest.raises(LayoutError, match=f"prompt_layout {name} needs user messages .* in turn → bring the row into"):
        Layout(name).apply(Conversation(messages))


# ---- reading, and what a layout is


def test_texts_before_clips_are_their_transcripts():
    content = ("about", "one", REFERENCE, SECOND, "the text")
    found = read_speech(Conversation((user(*content), answer(TARGET))), "multi_speaker")
    assert found.references == (("one", REFERENCE), (None, SECOND)) and found.rounds == (("the text", TARGET),)


def test_misc_is_kept():
    made = Layout().apply(seed_row("a", "b", misc={"id": 5, "task_type": "voice_cloning"}))
    assert made.misc == {"id": 5, "task_type": "voice_cloning"}


def test_a_layout_is_that_of_the_settings_and_every_one_of_them_is_its_identity():
    others = dict(name="multi_speaker", system_prompt="S", scene="R", train_reference=True, normalize_text=False)
    given = {"prompt_layout" if name == "name" else name: value for name, value in others.items()}
    assert Layout.of(Settings(**given)) == Layout(**others)
    assert Layout.of(Settings()) == Layout()
    changed = [Layout(**{name: value}) for name, value in others.items()]
    assert all(layout.identity != Layout().identity for layout in changed)
