"""A conditioned model through every backend, in two processes of which one never hears anything: as in plain torch."""

import numpy as np
import pytest

from tests.backends.test_parity import assert_same_run
from tests.model.whisper_tiny import save_whisper
from tests.processes import run
from tests.tiny import tiny_model

pytestmark = pytest.mark.slow

CASES = ["fsdp-whisper", "zero2-whisper", "zero3-whisper"]
TOWER_CASES = ["fsdp-whisper-tower", "zero2-whisper-tower", "zero3-whisper-tower"]
LORA_CASES = ["fsdp-whisper-lora", "zero2-whisper-lora", "zero3-whisper-lora"]
BF16_CASES = ["fsdp-whisper-bf16", "zero3-whisper-bf16"]


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """case -> arrays of that run; the yardsticks ran in one process, the others in two."""
    folder = tmp_path_factory.mktemp("parity")
    tiny_model().save_pretrained(folder / "model")
    save_whisper(folder / "whisper")
    worker = ["-m", "tests.backends.parity_worker", str(folder / "model"), str(folder)]
    run([*worker, "none", "none-whisper", "none-whisper-tower", "none-whisper-lora"], world_size=1)
    run([*worker, *CASES, *TOWER_CASES, *LORA_CASES, *BF16_CASES], world_size=2)
    return lambda case: dict(np.load(folder / f"{case}-world{1 if case.startswith('none') else 2}.npz"))


@pytest.mark.parametrize("case", [*CASES, *TOWER_CASES, *LORA_CASES])
def test_backend_equals_plain_torch(case, results):
    assert_same_run(results(case), results(case.replace(case.split("-")[0], "none", 1)))


@pytest.mark.parametrize("case", BF16_CASES)
def test_bf16_follows_fp32(case, results):
    np.testing.assert_allclose(results(case)["losses"], results("none-whisper")["losses"], rtol=2e-2)


def test_the_comparison_sees_the_encoder(results):
    plain, frozen, tower = (results(case) for case in ("none", "none-whisper", "none-whisper-tower"))
    assert (frozen["losses"] != tower["losses"]).any() and (frozen["losses"] != plain["losses"]).any()
    of = {case: {n.removeprefix("gradient 0 ") for n in results(case) if n.startswith("gradient 0")}
          for case in ("none", "none-whisper", "none-whisper-tower", "none-whisper-lora")}  # fmt: skip
    assert of["none-whisper"] - of["none"] == {"whisper.projection.weight", "whisper.projection.bias"}
    assert len(of["none-whisper-tower"] - of["none-whisper"]) == 2 * 15 + 6
    assert sum("whisper" in name for name in of["none-whisper-lora"]) == 2
    assert all(np.abs(tower[f"gradient 0 {name}"]).max() > 0 for name in of["none-whisper-tower"] if "k_proj" in name)
