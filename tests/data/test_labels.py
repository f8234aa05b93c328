"""Streams and labels against a loop that follows the definition, for clips of any length and any codebooks."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.data.labels import StreamIds, codes_of_stream, delayed_labels, delayed_stream, merge
from engine.data.prompts import IGNORED, Prompt, SpecialTokens

quick = settings(max_examples=60, deadline=None, derandomize=True)


@st.composite
def clips(draw):
    """Codes [C, T] and the ids of their stream; T may be 1."""
    codebooks, frames = draw(st.integers(1, 9)), draw(st.integers(1, 30))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    return rng.integers(0, 1024, (codebooks, frames), np.int16), StreamIds(codebooks)


def naive(codes, stream):
    """Column by column, as the original pads, appends and shifts: BOS, codes, EOS; codebook k is k columns late."""
    codebooks, frames = codes.shape
    ids = np.empty((frames + codebooks + 1, codebooks), int)
    labels = np.full_like(ids, IGNORED)
    for column in range(len(ids)):
        for k in range(codebooks):
            at = column - k  # place in codebook k's own stream: BOS at 0, codes from 1, EOS at frames + 1
            if at <= 0:
                ids[column, k] = stream.bos
            elif at <= frames:
                ids[column, k] = labels[column, k] = codes[k, at - 1]
            else:
                ids[column, k] = stream.eos
                if at == frames + 1:
                    labels[column, k] = stream.eos
    return ids, labels


@quick
@given(clips())
def test_stream_and_labels_equal_the_definition(clip):
    ids, labels = naive(*clip)
    np.testing.assert_array_equal(delayed_stream(*clip), ids)
    np.testing.assert_array_equal(delayed_labels(*clip), labels)
    assert delayed_stream(*clip).dtype == delayed_labels(*clip).dtype == np.int16


@quick
@given(clips())
def test_each_codebook_learns_its_codes_and_to_stop_once(clip):
    codes, stream = clip
    labels = delayed_labels(codes, stream)
    codebooks, frames = codes.shape
    assert (labels != IGNORED).sum() == codebooks * (frames + 1)
    for k in range(codebooks):
        trained = labels[labels[:, k] != IGNORED, k]
        assert trained.tolist() == [*codes[k].tolist(), stream.eos]
    assert (labels == stream.eos).sum() == codebooks and stream.bos not in labels
    assert (labels[0] == IGNORED).all(), "the first column has nothing before it to predict it"


@quick
@given(clips())
def test_a_label_is_the_id_at_its_own_place(clip):
    ids, labels = delayed_stream(*clip), delayed_labels(*clip)
    assert (ids == labels)[labels != IGNORED].all()


@quick
@given(clips())
def test_codes_come_back_from_their_stream(clip):
    codes, stream = clip
    ids = delayed_stream(codes, stream)
    for begun in (ids, ids[1:]):  # with the leading BOS column, and as a model generates it
        np.testing.assert_array_equal(codes_of_stream(begun, stream), codes)


AUDIO_IN, AUDIO_OUT, SPECIAL = 1, 2, SpecialTokens(1, 2)
STREAM = StreamIds(codebooks=3)


def prompt(ids: list[int], trained: list[bool]) -> Prompt:
    ids = np.array(ids, np.int32)
    return Prompt(ids, ids.copy(), (None,) * len(trained), tuple(trained))


def codes(frames: int, first: int) -> np.ndarray:
    return np.arange(first, first + 3 * frames, dtype=np.int16).reshape(3, frames)


def test_merge_puts_each_clip_at_its_placeholder():
    reference, target = codes(2, 0), codes(1, 100)
    sample = merge(prompt([5, AUDIO_IN, 6, AUDIO_OUT, 7], [False, True]), [reference, target], SPECIAL, STREAM, row=4)
    # 2 + 4 and 1 + 4 frames; every audio position carries one id
    assert sample.input_ids.tolist() == [5, *[AUDIO_OUT] * 6, 6, *[AUDIO_OUT] * 5, 7]
    assert sample.labels.tolist() == [5, *[IGNORED] * 6, 6, *[IGNORED] * 5, 7]
    streams = [delayed_stream(reference, STREAM), delayed_stream(target, STREAM)]
    np.testing.assert_array_equal(sample.audio_ids, np.concatenate(streams))
    assert (sample.audio_labels[:6] == IGNORED).all(), "an untrained clip has a target"
    np.testing.assert_array_equal(sample.audio_labels[6:], delayed_labels(target, STREAM))
    assert (sample.row, len(sample), sample.text_targets, sample.audio_targets.tolist()) == (4, 14, 2, [2, 2, 2])


def test_merge_without_audio():
    sample = merge(prompt([5, 6], []), [], SPECIAL, STREAM)
    assert sample.audio_ids.shape == sample.audio_labels.shape == (0, 3) and len(sample) == 2


def test_merge_refuses_another_number_of_clips():
    with pytest.raises(ValueError, match="1 audio placeholders, but codes of 2 clips"):
        merge(prompt([AUDIO_OUT], [True]), [codes(1, 0), codes(1, 0)], SPECIAL, STREAM)


@st.composite
def heard_clips(draw):
    """A prompt of texts and clips, some heard through Whisper for so many mel rows (None: not)."""
    kinds = draw(st.lists(st.sampled_from(["text", "heard", "unheard", "spoken"]), max_size=8))
    rows = [draw(st.integers(3, 400)) if kind == "heard" else None for kind in kinds if kind != "text"]
    return kinds, rows


@quick
@given(heard_clips())
def test_whisper_positions_stand_before_the_codes_of_their_clip(given_clips):
    kinds, rows = given_clips
    special, stream = SpecialTokens(audio_in=100, audio_out=101), StreamIds()
    ids = [{"text": 7, "spoken": 101}.get(kind, 100) for kind in kinds]
    mels = [None if n is None else np.full((n, 4), i, np.float16) for i, n in enumerate(rows)]
    codes = [np.full((8, i + 1), i, np.int16) for i in range(len(rows))]
    prompt = Prompt(np.array(ids, np.int32), np.full(len(ids), IGNORED, np.int32), (None,) * len(rows),
                    tuple(kind == "spoken" for kind in kinds if kind != "text"))  # fmt: skip
    sample = merge(prompt, codes, special, stream, mels=mels)
    wanted, starts, clip = [], [], 0
    for kind in kinds:
        if kind == "text":
            wanted.append(7)
            continue
        heard = 0 if rows[clip] is None else ((rows[clip] - 2 - 1) // 2 + 1) // 2
        starts += [len(wanted)] if heard else []
        wanted += [100] * heard + [101] * (clip + 1 + 9)
        clip += 1
    assert sample.input_ids.tolist() == wanted and sample.mel_starts == tuple(starts)
    assert [m[0, 0] for m in sample.mels] == [i for i, n in enumerate(rows) if n is not None and n >= 5]
    assert (sample.labels == IGNORED).all() and len(sample.labels) == len(wanted)
    plain = merge(prompt, codes, special, stream)
    for name in ("audio_ids", "audio_labels"):
        np.testing.assert_array_equal(getattr(sample, name), getattr(plain, name))


def test_a_spoken_clip_is_never_heard():
    prompt = Prompt(np.array([101], np.int32), np.array([IGNORED], np.int32), (None,), (True,))
    with pytest.raises(ValueError, match="a spoken clip has a spectrogram"):
        merge(prompt, [np.zeros((8, 3), np.int16)], SpecialTokens(100, 101), StreamIds(), mels=[np.zeros((50, 4))])


def test_spectrograms_of_other_clips_are_refused():
    prompt = Prompt(np.array([100], np.int32), np.array([IGNORED], np.int32), (None,), (False,))
    with pytest.raises(ValueError, match="codes of 1 clips, but mels of 2"):
        merge(prompt, [np.zeros((8, 3), np.int16)], SpecialTokens(100, 101), StreamIds(), mels=[None, None])
