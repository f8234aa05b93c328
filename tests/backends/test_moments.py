"""Moments in bf16 and in 8 bits: what is kept is right on average, repeats itself, and trains as fp32 does."""

import json

import pytest
import torch
from torch import nn

from engine.backends.moments import BLOCK, Coded, CompactAdamW, decode, encode, to_bf16
from engine.backends.tensors import Reader
from engine.config import Settings
from engine.errors import ConfigError
from engine.plan.states import MOMENTS
from engine.runtime.distributed import World
from tests.backends.moments_worker import FIRST, STEPS, compact_run, straight_and_resumed
from tests.processes import run
from tests.tiny import tiny_model

ALONE = World(0, 0, 1, torch.device("cpu"))
CODES = [torch.int8, torch.uint8]


def values_of(dtype: torch.dtype, numel: int = 3 * BLOCK + 7, size: float = 1.0) -> torch.Tensor:
    """Five decades in each block, the largest negative where there are signs; some zeros."""
    torch.manual_seed(1)
    values = torch.randn(numel) * torch.logspace(-5, 0, numel)[torch.randperm(numel)] * size
    values[0], values[::50] = -9.0 * size, 0
    return values.square() if dtype == torch.uint8 else values


@pytest.mark.parametrize("size", [1.0, 1e-3, 1e-15, 1e-18])
@pytest.mark.parametrize("dtype", CODES, ids=str)
def test_what_was_read_back_is_encoded_as_it_was(dtype, size):
    """So a checkpoint, which holds what is read back, gives the same codes; from the largest values to fp32's end."""
    codes, scales = encode(values_of(dtype, size=size), dtype, torch.rand(3 * BLOCK + 7))
    again, same_scales = encode(decode(codes, scales), dtype)
    assert torch.equal(again, codes) and torch.equal(same_scales, scales)
    assert codes.any() and torch.isfinite(decode(codes, scales)).all()


@pytest.mark.parametrize("dtype", CODES, ids=str)
def test_a_code_is_near_and_right_on_average(dtype):
    values = values_of(dtype)
    near = decode(*encode(values, dtype))
    large = values.abs() > 2e-4 * values.abs().max()
    assert ((near - values).abs() <= 0.05 * values.abs())[large].all()
    draws = torch.Generator().manual_seed(0)
    mean = sum(decode(*encode(values, dtype, torch.rand(len(values), generator=draws))) for _ in range(1000)) / 1000
    torch.testing.assert_close(mean[large], values[large], rtol=1e-2, atol=0)


def test_squares_never_become_zero():
    """The update divides by them: a lost one would throw its weight away."""
    squares = torch.logspace(-30, 0, BLOCK)
    codes, scales = encode(squares, torch.uint8, torch.full((BLOCK,), 0.999))
    assert (decode(codes, scales) >= squares.clamp(max=1e-12)).all()
    assert decode(*encode(torch.zeros(BLOCK), torch.uint8)).eq(0).all()


def test_bf16_is_right_on_average():
    values = values_of(torch.int8)
    draws = torch.Generator().manual_seed(0)
    mean = sum(to_bf16(values, torch.rand(len(values), generator=draws)).float() for _ in range(2000)) / 2000
    torch.testing.assert_close(mean, values, rtol=5e-4, atol=0)
    exact = values.bfloat16()
    assert torch.equal(to_bf16(exact.float(), torch.full(values.shape, 0.999)), exact), "what is exact stays"


def trained(make, beta2: float, steps: int, gradient_of) -> tuple[torch.Tensor, object]:
    torch.manual_seed(0)
    weight = nn.Parameter(torch.randn(40, 50))
    optimizer = make([{"params": [weight], "weight_decay": 0.1}], lr=1e-3, betas=(0.9, beta2), eps=1e-8)
    for step in range(steps):
        weight.grad = gradient_of(step, weight.detach())
        optimizer.step()
    return weight.detach(), optimizer.state[weight]


def compact(dtype):
    return lambda groups, **how: CompactAdamW(groups, dtype, **how)


@pytest.mark.parametrize("dtype, tolerance", [("bf16", 0.004), ("int8", 0.05)])
def test_the_same_updates_as_adamw(dtype, tolerance):
    """The way that the weights went in fifty steps; the first step, whose moments are exact, to rounding."""

    def gradient(step, weight):
        return weight + torch.randn(40, 50, generator=torch.Generator().manual_seed(step))

    start, _ = trained(torch.optim.AdamW, 0.95, 0, gradient)
    for steps, allowed in ((1, 1e-5), (50, tolerance)):
        wanted, _ = trained(torch.optim.AdamW, 0.95, steps, gradient)
        got, _ = trained(compact(dtype), 0.95, steps, gradient)
        assert (got - wanted).norm() < allowed * (wanted - start).norm(), steps


@pytest.mark.parametrize("dtype, spread", [("bf16", 0.04), ("int8", 0.12)])
def test_slow_averages_move(dtype, spread):
    """adam_beta2 0.999: a step's change is below half a step of the format. Rounded to the nearest, they would stay."""

    def gradient(step, _):
        return torch.full((40, 50), 1.0 if step < 5 else 0.05)

    (_, exact), (_, kept) = (trained(make, 0.999, 400, gradient) for make in (torch.optim.AdamW, compact(dtype)))
    found = kept["exp_avg_sq"].shown() if dtype == "int8" else kept["exp_avg_sq"].float()
    ratio = found / exact["exp_avg_sq"].view(-1)
    assert abs(ratio.mean() - 1) < 0.02 and ratio.std() < 2 * spread


def test_bytes_of_a_parameter():
    parameter = nn.Parameter(torch.zeros(64, BLOCK))

    def size(dtype):
        moments = CompactAdamW([{"params": [parameter]}], dtype, 1e-3, (0.9, 0.95), 1e-8).moments(parameter)
        tensors = [t for m in moments.values() for t in ((m.codes, m.scales) if isinstance(m, Coded) else (m,))]
        return sum(t.nbytes for t in tensors if t.ndim) / parameter.numel()

    assert size("bf16") == 4 == MOMENTS["bf16"] and size("int8") == 2 + 8 / BLOCK == MOMENTS["int8"], "as planned"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """What two processes wrote, each run having repeated itself from its checkpoint."""
    folder = tmp_path_factory.mktemp("moments")
    tiny_model().save_pretrained(folder / "model")
    jobs = ["fsdp:int8", "zero3:bf16"]
    run(["-m", "tests.backends.moments_worker", str(folder / "model"), str(folder), *jobs], world_size=2)
    (folder / "fp32").mkdir()
    losses = straight_and_resumed("none:fp32", folder / "model", folder / "fp32", ALONE)
    (folder / "fp32" / "losses.json").write_text(json.dumps(losses))
    return folder


def losses_of(out) -> list[list[float]]:
    return json.loads((out / "losses.json").read_text())


@pytest.mark.parametrize("job", ["fsdp:int8", "zero3:bf16"])
def test_two_processes_train_as_fp32_does(job, folder):
    got, wanted = losses_of(folder / f"{job}@2"), losses_of(folder / "fp32")
    assert got[0] == pytest.approx(wanted[0], rel=1e-5)
    for mine, exact in zip(got, wanted, strict=True):
        assert mine == pytest.approx(exact, rel=5e-3)
    assert got[-1] != pytest.approx(wanted[-1], rel=1e-7), "nothing was rounded"
    stored = Reader(folder / f"{job}@2" / f"checkpoint-{FIRST}").metadata.state_dict_metadata
    dtype = stored["exp_avg_sq.audio_lm_head.weight"].properties.dtype
    assert dtype == (torch.float32 if "int8" in job else torch.bfloat16)


@pytest.mark.parametrize("dtype", ["bf16", "int8"])
def test_one_process_repeats_itself(dtype, folder, tmp_path):
    straight_and_resumed(f"none:{dtype}", folder / "model", tmp_path, ALONE)


@pytest.mark.parametrize("source", ["fp32", "fsdp:int8@2", "zero3:bf16@2"])
@pytest.mark.parametrize("dtype", ["fp32", "bf16", "int8"])
def test_a_run_goes_on_in_another_dtype(dtype, source, folder, tmp_path):
    """At another number of processes and on another backend, too: it follows the run that was all fp32."""
    again = compact_run(f"none:{dtype}", folder / "model", tmp_path, ALONE)
    again.engine.load(folder / source / f"checkpoint-{FIRST}")
    wanted = losses_of(folder / "fp32")
    for number in range(FIRST, STEPS):
        assert again.step(number) == pytest.approx(wanted[number], rel=5e-3), number


def test_deepspeed_has_no_int8():
    settings = Settings(model_path="model", optimizer_state_dtype="int8")
    with pytest.raises(ConfigError, match="optimizer_state_dtype: int8 .* → set backend to fsdp, or .* bf16"):
        settings.check(excused=("model_path", "audio_tokenizer_path", "train_data_file"))
