"""The plan of codec batches: which recordings are encoded together, and by which rank.

A pure function of the lengths of all recordings, never of what the cache already holds nor of the number of ranks.
So a second run after a kill encodes the batches that are left in the very composition they would have had, and the
codes are the same bit for bit: a batch of another size may round otherwise, which now and then tips a frame over to
a neighbouring code.
"""

import heapq
from collections import defaultdict
from collections.abc import Mapping


def plan_batches(frames: Mapping[str, int], batch_frames: float) -> list[list[str]]:
    """All keys in batches, each once.

    Args:
        frames: of each recording, padded to whole frames.
        batch_frames: budget of a batch; a longer recording goes alone.

    Returns:
        Batches of one number of frames each; longest first, so that memory runs out in the first batch or never.
    """
    by_frames = defaultdict(list)
    for key in sorted(frames):
        by_frames[frames[key]].append(key)
    batches = []
    for length in sorted(by_frames, reverse=True):
        size, keys = max(1, int(batch_frames // max(1, length))), by_frames[length]
        batches += [keys[start : start + size] for start in range(0, len(keys), size)]
    return batches


def share_of(batches: list[list[str]], frames: Mapping[str, int], rank: int, world_size: int) -> list[list[str]]:
    """The batches of one rank, in the order of the plan.

    Each batch, from the largest on, goes to the rank that has the least so far: no rank has more than the average
    and one batch.
    """
    sizes = [frames[batch[0]] * len(batch) for batch in batches]
    ranks = [(0, number) for number in range(world_size)]
    mine = []
    for index in sorted(range(len(batches)), key=lambda i: -sizes[i]):
        load, number = ranks[0]
        heapq.heapreplace(ranks, (load + sizes[index], number))
        if number == rank:
            mine.append(index)
    return [batches[index] for index in sorted(mine)]
