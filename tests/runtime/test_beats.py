"""Who holds up a run, judged from two looks at what all processes say of themselves."""

from engine.observe.stragglers import slow
from engine.runtime.beats import hanging, silent


def beat(rank: int, beats: int, step: int | None = 7, phase: str = "backward", idle: float = 31.0) -> dict:
    return {
        "rank": rank,
        "host": f"node-{rank}",
        "pid": 100 + rank,
        "step": step,
        "phase": phase,
        "beats": beats,
        "idle": idle,
    }


def test_a_process_without_a_sign_of_life_comes_first():
    first = [beat(0, 5), beat(1, 9, step=6), beat(2, 3)]
    second = [beat(0, 8), beat(1, 9, step=6), beat(2, 6)]
    assert [record["rank"] for record in silent(first, second)] == [1]
    lines = hanging(first, second)
    assert lines[0] == "no sign of life of rank 1 (node-1, pid 101): step 6, backward, for 31 s when last heard"
    assert len(lines) == 3 and not any("held up" in line for line in lines)


def test_who_is_furthest_behind_holds_up_the_others():
    def told(*records):
        first = [record | {"beats": 0} for record in records]
        return hanging(first, list(records))[0]

    assert told(beat(0, 2), beat(1, 2, step=6, phase="optimizer")).startswith("held up by rank 1 (node-1")
    assert told(beat(0, 2), beat(1, 2, phase="data")).startswith("held up by rank 1")
    assert told(beat(0, 2, phase="save"), beat(1, 2, phase="log")).startswith("rank 0")  # nobody knows
    assert told(beat(0, 2, step=None, phase="start"), beat(1, 2)).startswith("held up by rank 1")


def test_a_large_run_is_summed_up():
    second = [beat(rank, 2) for rank in range(64)]
    lines = hanging([record | {"beats": 0} for record in second], second)
    assert lines[-1] == "and 56 more" and len(lines) == 9


def test_slow_is_who_exceeds_the_others_by_a_share_of_the_step():
    assert slow([[0.1, 1.0], [0.9, 1.0], [0.1, 1.0], [0.2, 1.0]], 2.0) == [("data", 1, 0.9, 0.1)]
    assert slow([[0.1, 1.0], [0.4, 1.0]], 2.0) == []
    assert slow([[0.0, 1.0], [0.0, 1.5]], 2.0) == [("forward", 1, 1.5, 1.0)]
