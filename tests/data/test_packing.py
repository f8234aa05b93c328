"""Packing: indices that lead there and back, and the targets that a naive loop over each sample would give."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.data.batches import BatchPlan
from engine.data.loader import packed_batches
from engine.data.mels import CHUNK_FRAMES, pooled
from engine.data.packing import PackedBatch, empty_sample, pack
from engine.data.prompts import IGNORED
from tests.model.whisper_tiny import HEARD, heard_sample
from tests.tiny import AUDIO, CODEBOOKS, random_sample

quick = settings(max_examples=40, deadline=None, derandomize=True)


@st.composite
def rows(draw):
    """Samples of all kinds: mixed, text only, audio only, one position, untrained, empty."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    samples = []
    for _ in range(draw(st.integers(1, 6))):
        text, audio = draw(st.tuples(st.integers(0, 9), st.integers(0, 9)))
        trained = draw(st.booleans()), draw(st.booleans())
        samples.append(random_sample(rng, text, audio, *trained) if text + audio else empty_sample(CODEBOOKS))
    return samples


def naive_targets(samples) -> tuple[dict, dict]:
    """Place in the sequence -> text target, and -> audio targets, of the position that has to predict it."""
    text, audio, start = {}, {}, 0
    for sample in samples:
        frame = 0
        for place in range(len(sample)):
            is_audio = sample.input_ids[place] == AUDIO
            if place and sample.labels[place] != IGNORED:
                text[start + place - 1] = int(sample.labels[place])
            if place and is_audio and (sample.audio_labels[frame] != IGNORED).any():
                audio[start + place - 1] = sample.audio_labels[frame].tolist()
            frame += is_audio
        start += len(sample)
    return text, audio


def packed_targets(packed: PackedBatch) -> tuple[dict, dict]:
    text_places = packed.to_modality[packed.text_target_rows].tolist()
    audio_places = packed.to_modality[packed.audio_target_rows].tolist()
    return (
        dict(zip(text_places, packed.text_targets.tolist(), strict=True)),
        dict(zip(audio_places, packed.audio_targets.tolist(), strict=True)),
    )


@quick
@given(rows())
def test_the_two_orders_lead_there_and_back(samples):
    packed = pack(samples, AUDIO)
    everywhere = torch.arange(packed.tokens)
    assert torch.equal(packed.to_modality[packed.to_sequence], everywhere)
    assert torch.equal(packed.to_sequence[packed.to_modality], everywhere)


@quick
@given(rows())
def test_text_stands_before_audio_and_the_sequence_comes_back(samples):
    packed = pack(samples, AUDIO)
    assert len(packed.text_ids) + len(packed.audio_ids) == packed.tokens and AUDIO not in packed.text_ids
    ids = torch.cat([packed.text_ids, torch.full((len(packed.audio_ids),), AUDIO)])[packed.to_sequence]
    assert ids.tolist() == [i for s in samples for i in s.input_ids]
    assert packed.audio_ids.tolist() == [frame for s in samples for frame in s.audio_ids.tolist()]


@quick
@given(rows())
def test_positions_restart_at_each_sample(samples):
    packed = pack(samples, AUDIO)
    lengths = [len(s) for s in samples]
    assert packed.position_ids[packed.to_sequence].tolist() == [i for n in lengths for i in range(n)]
    assert packed.sample_lengths == tuple(lengths) and packed.longest == max(lengths)
    assert packed.sample_ends.tolist() == [sum(lengths[:n]) for n in range(len(lengths) + 1)]
    assert packed.sample_ends.dtype == torch.int32, "flash attention takes no other"


@quick
@given(rows())
def test_targets_are_those_of_each_sample_alone(samples):
    assert packed_targets(pack(samples, AUDIO)) == naive_targets(samples)


@quick
@given(rows())
def test_no_target_crosses_a_sample_and_all_are_counted(samples):
    packed = pack(samples, AUDIO)
    last = packed.to_sequence[packed.sample_ends[1:].long() - 1].tolist()
    assert not set(last) & {*packed.text_target_rows.tolist(), *packed.audio_target_rows.tolist()}
    assert len(packed.text_targets) == sum(s.text_targets for s in samples)
    counts = (packed.audio_targets != IGNORED).sum(0)
    assert counts.tolist() == sum(s.audio_targets for s in samples).tolist()


def test_an_empty_row_trains_nothing():
    packed = pack([empty_sample(CODEBOOKS)], AUDIO)
    assert (packed.tokens, len(packed.text_targets), len(packed.audio_targets)) == (1, 0, 0)
    assert packed.audio_ids.shape == (0, CODEBOOKS) and packed.audio_targets.shape == (0, CODEBOOKS)


@quick
@given(st.lists(st.tuples(st.integers(0, 5), st.integers(1, 5), st.integers(1, 6100)), min_size=1, max_size=4))
def test_each_whisper_row_takes_its_own_output_of_its_own_chunk(sizes):
    """The encoder's outputs stood in for by (clip, place in the clip): every position must get its own."""
    samples = [heard_sample(np.random.default_rng(i), *size) for i, size in enumerate(sizes)]
    for i, sample in enumerate(samples):
        for mels in sample.mels:
            mels[:] = i
    packed = pack(samples, AUDIO)
    positions = [i for i, s in enumerate(samples) for _ in range((s.input_ids == HEARD).sum())]
    assert packed.whisper_rows.tolist() == torch.nonzero(packed.text_ids == HEARD).flatten().tolist()
    assert len(packed.whisper_rows) == len(positions)
    if not positions:
        assert packed.mels.shape == (0, 0, 0)
        return
    width = pooled(packed.mels.shape[1])
    chunk, place = packed.whisper_index // width, packed.whisper_index % width
    assert packed.mels[chunk, 0, 0].tolist() == positions
    assert (place < pooled(packed.mel_frames)[chunk]).all()
    assert len(set(packed.whisper_index.tolist())) == len(positions)
    assert packed.mels.shape[1] <= CHUNK_FRAMES and packed.mel_frames.max() <= CHUNK_FRAMES
    for i in range(1, len(positions)):
        assert packed.whisper_index[i] > packed.whisper_index[i - 1]


@quick
@given(rows(), st.integers(1, 9))
def test_the_pieces_of_a_row_are_the_row(samples, of):
    """As long as each other, each with its own tokens and with the targets that its positions have in the whole row."""
    whole, pieces = pack(samples, AUDIO), [pack(samples, AUDIO, (number, of)) for number in range(of)]
    size = -(-whole.tokens // of)
    assert [piece.tokens for piece in pieces] == [size] * of
    rest = of * size - whole.tokens
    for piece in pieces:
        everywhere = torch.arange(size)
        assert torch.equal(piece.to_modality[piece.to_sequence], everywhere)
        assert torch.equal(piece.to_sequence[piece.to_modality], everywhere)
        assert piece.sample_lengths == (*whole.sample_lengths, *(1,) * rest), "attention sees the whole row"
        assert piece.sample_ends.tolist() == [0, *np.cumsum(piece.sample_lengths)]

    def of_all(take) -> list:
        return [value for piece in pieces for value in take(piece)]

    def ids(packed: PackedBatch) -> list[int]:
        everything = torch.cat([packed.text_ids, torch.full((len(packed.audio_ids),), AUDIO)])
        return everything[packed.to_sequence].tolist()

    assert of_all(ids) == [*ids(whole), *[0] * rest]
    assert of_all(lambda piece: piece.audio_ids.tolist()) == whole.audio_ids.tolist()
    positions = of_all(lambda piece: piece.position_ids[piece.to_sequence].tolist())
    assert positions == [*whole.position_ids[whole.to_sequence].tolist(), *[0] * rest]
    for kind in (0, 1):
        found = [packed_targets(piece)[kind] for piece in pieces]
        placed = {size * i + place: target for i, targets in enumerate(found) for place, target in targets.items()}
        assert placed == packed_targets(whole)[kind]


@quick
@given(st.lists(st.integers(1, 6100), min_size=1, max_size=4), st.integers(2, 5))
def test_a_piece_hears_what_its_positions_need(frames, of):
    """Each Whisper position finds in its piece the chunk that it had in the row; other chunks are not there."""
    samples = [heard_sample(np.random.default_rng(i), 3, 4, frames=n) for i, n in enumerate(frames)]
    for i, sample in enumerate(samples):
        for mels in sample.mels:
            mels[:] = 10 * i + np.arange(len(mels))[:, None] // CHUNK_FRAMES  # a number for each chunk

    def heard(packed: PackedBatch, start: int = 0) -> list[tuple]:
        """Of each Whisper position: its place in the row, the chunk, its frames, the place among its outputs."""
        if not len(packed.mels):
            assert len(packed.whisper_rows) == len(packed.whisper_index) == len(packed.mel_frames) == 0
            return []
        width = pooled(packed.mels.shape[1])
        chunk, place = packed.whisper_index // width, packed.whisper_index % width
        assert set(chunk.tolist()) == set(range(len(packed.mels))), "no chunk is run for nothing"
        places = start + packed.to_modality[packed.whisper_rows]
        found = (places, packed.mels[:, 0, 0][chunk], packed.mel_frames[chunk], place)
        return [*zip(*(values.tolist() for values in found), strict=True)]

    pieces = [pack(samples, AUDIO, (number, of)) for number in range(of)]
    of_all = [line for number, piece in enumerate(pieces) for line in heard(piece, number * piece.tokens)]
    assert of_all == heard(pack(samples, AUDIO))


def test_a_row_without_recordings_has_no_mels():
    packed = pack([random_sample(np.random.default_rng(0), 4, 5), empty_sample(CODEBOOKS)], AUDIO)
    assert len(packed.mels) == len(packed.mel_frames) == len(packed.whisper_index) == len(packed.whisper_rows) == 0


def assert_same(packed: PackedBatch, expected: PackedBatch) -> None:
    for name, value in vars(expected).items():
        found = getattr(packed, name)
        if isinstance(value, torch.Tensor):
            assert found.dtype == value.dtype and torch.equal(found, value), name
        else:
            assert found == value, name


@quick
@given(st.lists(st.tuples(st.integers(0, 5), st.integers(1, 5), st.integers(1, 400)), min_size=1, max_size=3))
def test_a_row_is_the_same_in_another_process(sizes):
    """It goes there as one tensor, with tensors of all item sizes, some of them empty, one behind the other."""
    packed = pack([heard_sample(np.random.default_rng(i), *size) for i, size in enumerate(sizes)], AUDIO)
    restored, parts = packed.__reduce__()
    assert sum(isinstance(part, torch.Tensor) for part in parts) == 1
    assert_same(restored(*parts), packed)


class Samples(list):
    codebooks = CODEBOOKS


@pytest.mark.parametrize("workers, piece", [(0, (0, 1)), (2, (0, 1)), (2, (1, 2))])
def test_the_loader_follows_the_plan_in_order(workers, piece):
    rng = np.random.default_rng(0)
    samples = Samples(random_sample(rng, int(text), int(text) % 4) for text in rng.integers(1, 9, 12))
    plan = BatchPlan([len(s) for s in samples], max_tokens=20, max_samples=3, micro_batches_per_step=3, epochs=1)
    wanted = [row for step in plan.steps() for row in step.share(1, 2, plan.rounds(2))]
    assert () in wanted, "the last step should leave this process without a micro-batch"
    batches = packed_batches(
        samples, wanted, audio_token_id=AUDIO, workers=workers, device=torch.device("cpu"), piece=piece
    )
    for row, packed in zip(wanted, batches, strict=True):
        assert_same(packed, pack([samples[i] for i in row] or [empty_sample(CODEBOOKS)], AUDIO, piece))
