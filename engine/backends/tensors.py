"""One way to store what is trained, whatever shards it: named tensors, flattened, each process writing its part.

    model.<name>      weights: fp32 masters of what is trained, the rest as it is (runs of adapters: the trained only)
    exp_avg.<name>    AdamW's moments, fp32 or bf16
    exp_avg_sq.<name>
    step              AdamW's counter, one element
    guard             what the next step's gradients are compared with (guard.py); checkpoints of before have none

FSDP cuts a tensor by rows, ZeRO 1 and 2 cut the concatenation of all, ZeRO 3 cuts each one evenly: seen flat, all are
ranges of elements. So torch's distributed checkpoint (DCP) stores ranges of one-dimensional tensors, and its
resharding lets any number of processes of any backend, or a single one without any, read them back.
"""

import contextlib
import pickle
import warnings
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import default_planner, filesystem, metadata
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadPlan, SavePlan, TensorWriteData, WriteItem, WriteItemType
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from engine.errors import CheckpointError
from engine.untrusted import path_within

FOLDER = "tensors"
"""Name of the DCP folder within a checkpoint."""


GUARD = "guard"
"""The one key that a checkpoint may lack."""


@dataclass(frozen=True)
class Fragment:
    """This process's part of a tensor: elements `start` to `start + len(local)` of its `numel`, in row-major order.

    Attributes:
        local: one-dimensional; where it is a view of the training's own memory, loading writes there.
    """

    local: torch.Tensor
    start: int
    numel: int

    @classmethod
    def whole(cls, tensor: torch.Tensor) -> "Fragment":
        return cls(tensor.detach().view(-1), 0, tensor.numel())


State = dict[str, Fragment]


def total_bytes(state: State) -> int:
    """Bytes of the whole state, the parts of the other processes included."""
    return sum(fragment.numel * fragment.local.element_size() for fragment in state.values())


def write_tensors(state: State, folder: Path, group=None) -> None:
    """Every process writes its fragments; of copies one is written. A failure on any process is raised on all.

    Args:
        group: processes that write together; None: this one alone.

    Raises:
        CheckpointError: naming each process that failed, and why.
    """
    with failures_in_words("writing", folder):
        dcp.save(
            {key: fragment.local for key, fragment in state.items()},
            storage_writer=_Writer(folder / FOLDER, overwrite=False),
            planner=_SaveFragments(state),
            process_group=group,
            no_dist=group is None,
        )


def weights_of(keys: Iterable[str]) -> list[str]:
    """Those of `keys` that are weights, and nothing of the optimizer's."""
    return [key for key in keys if key.startswith("model.")]


def read_tensors(state: State, folder: Path, weights_only: bool = False) -> None:
    """Fills the fragments from a checkpoint that any number of processes wrote; each process reads for itself.

    Args:
        weights_only: leave the optimizer's fragments as they are, whatever the checkpoint has of them.

    Raises:
        CheckpointError: files that cannot be read, tensors that are missing or have another size; all are named.
    """
    reader = Reader(folder)
    stored = reader.metadata.state_dict_metadata
    if weights_only:
        state, stored = ({key: part[key] for key in weights_of(part)} for part in (state, stored))
    state = {key: fragment for key, fragment in state.items() if key in stored or key != GUARD}
    _require_fit(state, stored, folder)
    reader.fill(state)


def _require_fit(state: State, stored: Mapping[str, TensorStorageMetadata], folder: Path) -> None:
    sizes = {key: entry.size.numel() for key, entry in stored.items()}
    problems = [f"{key} is not in it" for key in state if key not in sizes]
    problems += [f"{key} has no place in this run's model" for key in sizes if key not in state]
    problems += [
        f"{key} has {sizes[key]:,} elements, this run's has {fragment.numel:,}"
        for key, fragment in state.items()
        if key in sizes and sizes[key] != fragment.numel
    ]
    if problems:
        raise CheckpointError(
            f"{folder}: the checkpoint is of another model, or trained something else → resume with the settings of "
            "its config.yaml:",
            problems,
        )


class _Writer(dcp.FileSystemWriter):
    """DCP's writer, whose failures name what the disk said instead of where in torch it was noticed."""

    def write_data(self, plan, planner):
        try:
            return super().write_data(plan, planner)
        except RuntimeError as error:
            cause: BaseException | None = error
            while cause is not None and not isinstance(cause, OSError):
                cause = cause.__cause__ or cause.__context__
            if cause is None:
                raise
            raise OSError(cause.errno, f"{cause.strerror} in the middle of a file") from error


class _SaveFragments(default_planner.DefaultSavePlanner):
    """Tells DCP that each tensor it is given is a range of a larger one."""

    def __init__(self, state: State):
        # DCP drops copies, and spreads the writing of what all processes hold
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)
        self._placed = state

    def create_local_plan(self) -> SavePlan:
        items = [_write_item(key, fragment) for key, fragment in self._placed.items() if len(fragment.local)]
        self.plan = SavePlan(items)
        return self.plan

    def lookup_object(self, index: MetadataIndex) -> torch.Tensor:
        return self.state_dict[index.fqn]


def _write_item(key: str, fragment: Fragment) -> WriteItem:
    chunk = ChunkStorageMetadata(torch.Size([fragment.start]), torch.Size([len(fragment.local)]))
    data = TensorWriteData(
        chunk, TensorProperties.create_from_tensor(fragment.local), size=torch.Size([fragment.numel])
    )
    return WriteItem(MetadataIndex(key, chunk.offsets), WriteItemType.SHARD, tensor_data=data)


class _LoadFragments(default_planner.DefaultLoadPlanner):
    def __init__(self, state: State):
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)
        self._placed = state

    def create_local_plan(self) -> LoadPlan:
        items = []
        for key, fragment in self._placed.items():
            wanted = ChunkStorageMetadata(torch.Size([fragment.start]), torch.Size([len(fragment.local)]))
            if len(fragment.local):
                stored = self.metadata.state_dict_metadata[key]
                items += create_read_items_for_chunk_list(key, stored, [wanted])
        return LoadPlan(items)

    def lookup_tensor(self, index: MetadataIndex) -> torch.Tensor:
        return self.state_dict[index.fqn]


class Reader(dcp.FileSystemReader):
    """DCP's reader with its table of contents read once, and as data: it is a pickle, which could run any code.

    Attributes:
        metadata: what is stored, and where.
    """

    def __init__(self, folder: Path):
        super().__init__(folder / FOLDER)
        file = folder / FOLDER / ".metadata"
        try:
            with open(file, "rb") as opened:
                self.metadata: Metadata = _TableOfContents(opened).load()
            _require_sound(self.metadata)
        except OSError as error:
            raise CheckpointError(f"{file}: cannot be read ({error.strerror}).") from None
        except Exception as error:  # pickle raises whatever it stumbles over
            raise CheckpointError(f"{file}: damaged ({error}) → take another checkpoint.") from None

    def fill(self, state: State) -> None:
        """Reads the fragments, this process's alone."""
        with failures_in_words("reading", self.path.parent):
            dcp.load(
                {key: fragment.local for key, fragment in state.items()},
                storage_reader=self,
                planner=_LoadFragments(state),
                no_dist=True,
            )

    def tensor(self, key: str) -> torch.Tensor:
        """One whole tensor, one-dimensional, in the stored dtype."""
        stored = self.metadata.state_dict_metadata[key]
        try:
            flat = torch.empty(stored.size, dtype=stored.properties.dtype)
        except RuntimeError as error:
            raise CheckpointError(f"{self.path}: no memory for {key} as it is said to be ({error}).") from None
        self.fill({key: Fragment.whole(flat)})
        return flat

    def read_metadata(self, *args, **kwargs) -> Metadata:
        return self.metadata


class _TableOfContents(pickle.Unpickler):
    """Takes DCP's own records, sizes and dtypes, and nothing else."""

    RECORDS = {
        record.__name__: record
        for record in (
            Metadata, metadata.TensorStorageMetadata, TensorProperties, ChunkStorageMetadata, MetadataIndex,
            metadata.StorageMeta, metadata._MEM_FORMAT_ENCODING, filesystem._StorageInfo, torch.Size,
            torch.serialization._get_layout, PurePosixPath,
        )
    }  # fmt: skip

    def find_class(self, module: str, name: str):
        if (module, name) == ("builtins", "getattr"):  # how Python 3.11.0 to 3.11.3 pickles a member of an enumeration
            return _member
        if name == "PosixPath":  # its module has another name from Python 3.13 on
            return PurePosixPath
        found = self.RECORDS.get(name) or getattr(torch, name, None)
        if name in self.RECORDS and found.__module__ == module or module == "torch" and isinstance(found, torch.dtype):
            return found
        raise pickle.UnpicklingError(f"{module}.{name} has no place in a checkpoint")


def _require_sound(contents: Metadata) -> None:
    """
    Raises:
        ValueError, or whatever records without their fields lead to: not the table of a checkpoint of this engine.
    """
    for key, entry in contents.state_dict_metadata.items():
        numel = _one(entry.size)
        if not isinstance(key, str) or not isinstance(entry.properties.dtype, torch.dtype):
            raise ValueError(f"{key!r} is no tensor")
        for chunk in entry.chunks:
            if not 0 <= _one(chunk.offsets) <= _one(chunk.offsets) + _one(chunk.sizes) <= numel:
                raise ValueError(f"{key} has parts beyond its end")
    for index, place in contents.storage_data.items():
        path_within(str(place.relative_path))
        if (
            not isinstance(index.fqn, str)
            or _one(index.offset) < 0
            or not 0 <= place.offset <= place.offset + place.length
        ):
            raise ValueError(f"{index.fqn!r} has no place")


def _one(sizes: torch.Size) -> int:
    """The only one of them, for all is stored flat."""
    (size,) = sizes
    if not isinstance(sizes, torch.Size) or size < 0:
        raise ValueError(f"{sizes} is the size of nothing")
    return size


def _member(enumeration: type, name: str):
    if enumeration is metadata._MEM_FORMAT_ENCODING:
        return enumeration[name]
    raise pickle.UnpicklingError(f"{enumeration}.{name} has no place in a checkpoint")


@contextlib.contextmanager
def failures_in_words(doing: str, folder: Path) -> Iterator[None]:
    """DCP gathers what failed on any process into an exception that is no `Exception`, and raises it on all."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # DCP warns of working alone
            yield
    except CheckpointException as error:
        problems = [f"process {rank}: {failure[0]}" for rank, failure in error.failures.items()]
        raise CheckpointError(f"{folder}: {doing} weights or optimizer state failed:", problems) from None
