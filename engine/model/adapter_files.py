"""Reads adapter folders in PEFT's format, of any trainer, tensor by tensor and by rows.

Names are those of `adapter_model.safetensors` for transformers' native model. Adapters that were trained on the
original `higgs_audio` code name its layers otherwise (`layers.0` for `model.layers.0`) and are read as well.
"""

from pathlib import Path

import torch
from peft import LoraConfig

from engine.errors import ModelError
from engine.model.adapter_folder import CONFIG, WEIGHTS, adapter_folder, weights_file
from engine.model.keys import native_name
from engine.model.tensor_files import TensorFiles, read_json

PREFIX = "base_model.model."
CHANGES_THE_BASE = ("pissa", "corda", "olora", "loftq", "lora_ga")
"""Initialisations of PEFT that move a part of the base's weights into the adapter."""


STARTS_AT_ZERO = (".lora_B.", ".lora_embedding_A")
"""Parts of the names of what PEFT starts at zero: where it still is, the adapter was never trained."""


class NotUsable(ModelError):
    """An adapter that is whole, and of a kind that the engine cannot use."""


class AdapterFiles:
    """The configuration and the tensors of an adapter.

    Attributes:
        folder: where they are.
        config: PEFT's.
        shapes: name -> shape of each tensor.

    Raises:
        ModelError: not an adapter, or damaged; NotUsable: not LoRA.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        self.config = _read_config(self.folder)
        file = weights_file(self.folder)
        if file is None:
            raise ModelError(f"{self.folder}: no {' and no '.join(WEIGHTS)} there → copy the adapter again.")
        if file.name == WEIGHTS[0]:
            tensors = TensorFiles([file], _name)
            self.shapes, self._read = tensors.shapes, tensors.read
        else:
            self._pickled = _read_pickle(file)
            self.shapes = {name: tuple(tensor.shape) for name, tensor in self._pickled.items()}
            self._read = lambda name, start, stop: self._pickled[name][start:stop]

    def read(self, name: str, start: int = 0, stop: int | None = None) -> torch.Tensor:
        """Rows `start` to `stop` (dim 0) of a tensor, in the stored dtype."""
        return self._read(name, start, stop)

    def check(self, expected: dict[str, tuple[int, ...]], base: str | Path) -> None:
        """Compares names and shapes with those that `config` asks for on a base model.

        Raises:
            ModelError: anything missing, without a place, or of another shape; all of it is listed.
        """
        problems = misfits(self.shapes, expected)
        if problems:
            raise ModelError(f"{self.folder}: the adapter does not fit {base}:", problems)


def open_adapter(path: str | Path | None) -> AdapterFiles | None:
    """The adapter meant by a path (a folder of one, a run's output folder or a LoRA checkpoint); None for None.

    Raises:
        ModelError: there is none.
    """
    if path is None:
        return None
    folder = adapter_folder(path)
    if folder is None:
        raise ModelError(f"{path}: no {CONFIG} with weights there → give an adapter's folder, or a LoRA checkpoint.")
    return AdapterFiles(folder)


def misfits(found: dict[str, tuple[int, ...]], expected: dict[str, tuple[int, ...]]) -> list[str]:
    """What keeps tensors from being those that a configuration asks for, a line each."""
    problems = []
    for name, shape in expected.items():
        if name not in found:
            problems.append(f"{name} is missing, it should have shape {tuple(shape)}")
        elif tuple(found[name]) != tuple(shape):
            problems.append(f"{name} has shape {tuple(found[name])}, it should have {tuple(shape)}")
    return problems + [f"{name} has no place in the base" for name in found if name not in expected]


def _name(stored: str) -> str | None:
    """Name of a stored tensor for the native model, whichever model the adapter was trained on."""
    native = native_name(stored.removeprefix(PREFIX))
    return native and PREFIX + native


def _read_config(folder: Path) -> LoraConfig:
    kind = read_json(folder / CONFIG, "give the folder of an adapter, or a LoRA checkpoint").get("peft_type")
    if kind != "LORA":
        raise NotUsable(f"{folder}: an adapter of type {kind} → only LoRA adapters can be used.")
    try:
        config = LoraConfig.from_pretrained(str(folder))
    except Exception as error:  # PEFT raises many kinds
        raise ModelError(f"{folder / CONFIG}: PEFT cannot read it ({error}) → copy the adapter again.") from None
    start = str(config.init_lora_weights).lower()
    if start.startswith(CHANGES_THE_BASE):
        raise NotUsable(
            f"{folder}: the adapter began as {start}, which changed its base → save it with PEFT's "
            "path_initial_model_for_weight_conversion, which makes an ordinary adapter of it."
        )
    if config.megatron_config is not None:
        raise NotUsable(
            f"{folder}: an adapter of Megatron's layers, for which PEFT would import whatever module its megatron_core "
            f"names ({config.megatron_core}) → convert it to an ordinary adapter where it was trained."
        )
    config.init_lora_weights = True  # its values come from the files
    return config


def _read_pickle(file: Path) -> dict[str, torch.Tensor]:
    """The tensors of an adapter_model.bin; nothing but tensors is unpickled, so the file cannot run code."""
    try:
        stored = torch.load(file, map_location="cpu", weights_only=True)
        return {_name(name): tensor for name, tensor in stored.items() if _name(name)}
    except Exception as error:  # torch raises many kinds for damaged archives
        raise ModelError(f"{file}: not a readable file of tensors ({_first_line(error)}) → copy it again.") from None


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0]
