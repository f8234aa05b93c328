"""The same run through every backend, in one process and in two: equal losses, gradients and gradient norms.

Gradients are compared, not only losses: AdamW hides a wrong scale. The data put a text-only micro-batch on one
process beside an audio-only one on the other, which makes naive trainers hang.
"""

import numpy as np
import pytest

from tests.processes import run
from tests.tiny import tiny_model

CASES = ["fsdp", "zero0", "zero1", "zero2", "zero3"]
MORE_CASES = ["fsdp-hybrid", "zero2_offload", "zero3_offload"]
BF16_CASES = ["fsdp-bf16", "zero1-bf16", "zero2-bf16", "zero3-bf16"]
LORA_CASES = ["none-lora", "fsdp-lora", "zero2-lora", "zero3-lora"]


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """(case, world size) -> arrays of that run."""
    folder = tmp_path_factory.mktemp("parity")
    tiny_model().save_pretrained(folder / "model")
    worker = ["-m", "tests.backends.parity_worker", str(folder / "model"), str(folder)]
    run([*worker, "none", *CASES, *LORA_CASES], world_size=1)
    run([*worker, *CASES, *MORE_CASES, *BF16_CASES, *LORA_CASES[1:]], world_size=2)

    def load(case: str, world_size: int) -> dict[str, np.ndarray]:
        return dict(np.load(folder / f"{case}-world{world_size}.npz"))

    return load


@pytest.mark.parametrize(
    "case, world_size",
    [*((case, n) for case in [*CASES, *LORA_CASES[1:]] for n in (1, 2)), *((case, 2) for case in MORE_CASES)],
)
def test_backend_equals_plain_torch(case, world_size, results):
    assert_same_run(results(case, world_size), results("none-lora" if case.endswith("lora") else "none", 1))


def assert_same_run(got: dict[str, np.ndarray], wanted: dict[str, np.ndarray]) -> None:
    np.testing.assert_allclose(got["losses"], wanted["losses"], rtol=1e-5)
    np.testing.assert_allclose(got["grad_norms"], wanted["grad_norms"], rtol=1e-5)
    gradients = [name for name in wanted if name.startswith("gradient ")]
    assert sorted(gradients) == sorted(name for name in got if name.startswith("gradient "))
    # parameters drift apart by rounding, and Adam magnifies what is near zero: the last step is compared in norm
    for name in gradients:
        error = np.abs(got[name] - wanted[name]).max() if " 0 " in name else np.linalg.norm(got[name] - wanted[name])
        scale = np.abs(wanted[name]).max() if " 0 " in name else np.linalg.norm(wanted[name])
        assert error <= 1e-5 * max(scale, 1e-9), name


@pytest.mark.parametrize("case", BF16_CASES)
def test_bf16_follows_fp32(case, results):
    """Rounding to bf16 moves losses by less than two per cent over ten steps."""
    wanted, got = results("none", 1), results(case, 2)
    np.testing.assert_allclose(got["losses"], wanted["losses"], rtol=2e-2)
    np.testing.assert_allclose(got["grad_norms"], wanted["grad_norms"], rtol=5e-2)


def test_the_comparison_would_see_a_wrong_scale(results):
    wanted = results("none", 1)
    assert wanted["grad_norms"].min() > 0.5, "clipping is not exercised"
    assert len([name for name in wanted if name.startswith("gradient 0")]) == 33
