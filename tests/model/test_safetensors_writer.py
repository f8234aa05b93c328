"""One tensor at a time into a safetensors file that the library reads as it reads its own."""

import math
import stat

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from engine.errors import CheckpointError
from engine.model.safetensors_writer import DTYPE_NAMES, Spec, checksum_of, write_safetensors

SHAPES = st.lists(st.integers(0, 5), max_size=4).map(tuple)
SPECS = st.builds(Spec, SHAPES, st.sampled_from(list(DTYPE_NAMES)))
NAMES = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=12).filter(lambda n: n != "__metadata__")


def random_tensor(spec: Spec, generator: torch.Generator) -> torch.Tensor:
    """Any bits whatever, NaNs and subnormal numbers among them."""
    count = math.prod(spec.shape) * spec.dtype.itemsize
    bits = torch.randint(0, 2 if spec.dtype == torch.bool else 256, (count,), generator=generator, dtype=torch.uint8)
    return bits.view(spec.dtype).reshape(spec.shape)


@settings(max_examples=60, deadline=None)
@given(specs=st.dictionaries(NAMES, SPECS, max_size=5), seed=st.integers(0, 99))
def test_a_file_is_read_as_the_librarys_own(specs, seed, tmp_path_factory):
    folder = tmp_path_factory.mktemp("files")
    generator = torch.Generator().manual_seed(seed)
    tensors = {name: random_tensor(spec, generator) for name, spec in specs.items()}
    checksums = write_safetensors(folder / "ours", specs, tensors.__getitem__)
    save_file(tensors, folder / "theirs", metadata={"format": "pt"})
    ours, theirs = load_file(folder / "ours"), load_file(folder / "theirs")
    assert ours.keys() == theirs.keys() == checksums.keys()
    for name, tensor in ours.items():
        assert (tensor.shape, tensor.dtype) == (theirs[name].shape, theirs[name].dtype)
        assert checksum_of(tensor) == checksum_of(theirs[name]) == checksums[name]
    with safe_open(folder / "ours", "pt") as opened:
        assert opened.metadata() == {"format": "pt"}


def test_tensors_are_rounded_once_and_laid_out_in_order(tmp_path):
    wide, turned = torch.randn(6, 4), torch.randn(4, 6).T
    specs = {"wide": Spec((6, 4), torch.bfloat16), "turned": Spec((6, 4), torch.float32)}
    write_safetensors(tmp_path / "file", specs, {"wide": wide, "turned": turned}.__getitem__)
    read = load_file(tmp_path / "file")
    assert torch.equal(read["wide"], wide.bfloat16()) and torch.equal(read["turned"], turned)


def test_one_tensor_is_in_memory_at_a_time(tmp_path):
    import weakref

    alive: list[weakref.ref] = []

    def read(name: str) -> torch.Tensor:
        assert all(ref() is None for ref in alive), "an earlier tensor is still there"
        tensor = torch.zeros(4)
        alive.append(weakref.ref(tensor))
        return tensor

    write_safetensors(tmp_path / "file", dict.fromkeys("abc", Spec((4,), torch.bfloat16)), read)
    assert len(alive) == 3


def test_another_shape_than_promised_is_an_error(tmp_path):
    with pytest.raises(CheckpointError, match=r"file: w was to have shape \(2, 3\) and has \(3, 2\) → "):
        write_safetensors(tmp_path / "file", {"w": Spec((2, 3), torch.float32)}, lambda name: torch.zeros(3, 2))


def test_whoever_may_read_other_files_may_read_it(tmp_path):
    (tmp_path / "plain").write_text("")
    write_safetensors(tmp_path / "file", {}, lambda name: None)
    modes = {stat.S_IMODE((tmp_path / name).stat().st_mode) for name in ("plain", "file")}
    assert len(modes) == 1
