"""The scaling model meets what others published, keeps its bounds, and its page says what it prints."""

from dataclasses import replace
from xml.etree import ElementTree

import pytest

from benchmarks import scaling
from benchmarks.scaling_hardware import GPUS_PER_NODE, H100, H200, Constants, collective
from benchmarks.scaling_model import Layout, step
from benchmarks.scaling_published import LLAMA_8B, MPT_3B, POINTS, SMALL
from engine.model.flops import active_adapters, step_flops
from tests.processes import ROOT

DEFAULTS = scaling.parse_arguments([])


@pytest.mark.parametrize("point", POINTS, ids=lambda point: f"{point.source} {point.model.name} {point.setting}")
def test_published_points_are_met(point):
    assert point.modelled(Constants()) == pytest.approx(point.published, rel=0.15)


def test_fitted_on_one_node_it_predicts_several():
    errors = [
        point.modelled(Constants()) / point.published - 1 for point in POINTS if point.layout.gpus > GPUS_PER_NODE
    ]
    assert len(errors) >= 15 and sum(map(abs, errors)) / len(errors) < 0.05


def test_geometries_have_the_sizes_that_are_published():
    assert LLAMA_8B.total == pytest.approx(8.03e9, rel=0.01)
    assert MPT_3B.total == pytest.approx(2651837440, rel=0.01)
    assert SMALL.total == pytest.approx(3.57e9, rel=0.01)


@pytest.mark.parametrize("rank", [None, 16])
def test_higgs_flops_are_those_of_the_engine(rank):
    model, samples = scaling.higgs(rank), 32
    adapters = None if rank is None else active_adapters(scaling.CONFIG, rank)
    labels = samples * scaling.TEXT_LABELS, samples * scaling.AUDIO_LABELS
    wanted = step_flops(scaling.CONFIG, [scaling.LENGTH] * samples, *labels, adapters)
    layout = Layout("fsdp", 8, samples * scaling.LENGTH, scaling.LENGTH)
    assert step(model, layout, H200, Constants()).flops == pytest.approx(wanted, rel=1e-9)
    assert model.total == 5_771_283_456 and (rank is None or model.trained == 39_452_672)


@pytest.mark.parametrize("lora", [False, True])
def test_predictions_are_monotone_and_bounded(lora):
    constants = Constants()
    slow = replace(constants, network=constants.network / 4)
    for name, steps in scaling.predictions(DEFAULTS, constants, lora).items():
        speeds = [s.tokens_per_second for s in steps.values()]
        assert speeds == sorted(speeds, reverse=True), f"{name}: a larger cluster is no faster per GPU"
        assert all(0.2 < s.mfu(H200) < constants.gemm for s in steps.values()), name
        slower = scaling.predictions(DEFAULTS, slow, lora)[name]
        assert all(slower[n].tokens_per_second <= s.tokens_per_second for n, s in steps.items()), name
        assert slower[8].seconds == steps[8].seconds, f"{name}: one node has no network"


def test_more_traffic_or_recomputation_costs_and_larger_steps_pay():
    def seconds(**changes):
        return step(scaling.higgs(), replace(Layout("fsdp", 64, 16384, 1024), **changes), H200, Constants()).seconds

    plain = seconds()
    assert seconds(reduce_bytes=2) < plain < seconds(recompute=0.5) < seconds(recompute=1)
    assert seconds(reshard=False) < plain < seconds(compiled=False)
    assert seconds(method="zero3", node_gathers=True) < plain
    assert seconds(method="zero1", rounds=4) < seconds(method="zero2", rounds=4), "reduces once, not four times"
    assert seconds(tokens=32768) < 2 * plain, "the same communication for twice the tokens"


def test_bytes_on_the_wire_are_those_of_a_ring():
    flat = replace(Constants(), nvlink_hop=0, network_hop=0)
    assert collective(8e9, 1, 1, flat) == 0
    assert collective(8e9, 8, 1, flat) == pytest.approx(7e9 / flat.nvlink)
    # two nodes: half of it comes from the other one, through eight cards
    assert collective(8e9, 16, 1, replace(flat, nvlink=1e15)) == pytest.approx(4e9 / (8 * flat.network))
    # what every GPU of a node reduces with its peers goes through a card each
    assert collective(8e9, 2, 1, flat, per_node=1, shared=8) == pytest.approx(4e9 / flat.network)
    assert collective(8e9, 16, 3, Constants()) > collective(8e9, 16, 1, Constants()), "hops count for each piece"


def test_without_communication_or_eager_operations_only_computation_is_left():
    layout = Layout("zero0", 1, 16384, 1024)
    alone = step(MPT_3B, layout, H100, Constants())
    assert alone.communication == alone.bubble == 0
    assert alone.matmuls == pytest.approx(6 * MPT_3B.active * 16384 / (989e12 * Constants.gemm))


def test_the_page_shows_what_is_printed(tmp_path):
    page = (ROOT / "benchmarks" / "README.md").read_text()
    args = scaling.parse_arguments(["--plot", str(tmp_path / "plot.svg")])
    for table in scaling.report(args).split("\n\n"):
        assert table in page, "benchmarks/README.md is out of date → python -m benchmarks.scaling"
    drawn = (tmp_path / "plot.svg").read_text()
    assert drawn == (ROOT / "benchmarks" / "results" / "scaling.svg").read_text()
    lines = [e for e in ElementTree.fromstring(drawn) if e.tag.endswith("polyline") and e.get("stroke-width") == "2"]
    assert len(lines) == len(scaling.FULL) + len(scaling.LORA)
