"""Base + adapter, one weight in memory at a time, in fp32. PEFT itself merges each layer; the rest stays on disk.

The model is on the meta device. A layer gets its base weight and its adapter when its merged weight is asked for,
PEFT's own `merge()` makes the weight, whatever the variant, and the layer is empty again.
"""

import torch
from peft import LoraConfig
from peft.tuners.lora import LoraLayer
from torch import nn

from engine.errors import ModelError
from engine.model.adapter_files import STARTS_AT_ZERO, AdapterFiles
from engine.model.initial import adapter_shapes, build_on_meta, is_of_adapter
from engine.model.keys import adapter_name, base_name
from engine.model.lora import add_adapters
from engine.model.weights import WeightFiles


class MergedWeights:
    """The weights of base + adapter.

    Attributes:
        files, adapter: the two.
        shapes: name -> shape of every weight of the model.
        touched: names of those that the adapter is for.
        model: transformers' model in PEFT's wrapper, on the meta device.

    Raises:
        ModelError: the adapter does not fit the base, cannot be merged, or is all zero.
    """

    def __init__(self, files: WeightFiles, adapter: AdapterFiles):
        self.files, self.adapter = files, adapter
        base = build_on_meta(files.config)
        self.shapes = {name: tuple(parameter.shape) for name, parameter in base.named_parameters()}
        files.check(self.shapes)
        self.model = self._wrap(base, adapter.config)
        self._carried = {base_name(name): name for name in adapter.shapes if name.endswith(".base_layer.weight")}
        carried = {stored: self.shapes.get(name, ()) for name, stored in self._carried.items()}
        adapter.check(adapter_shapes(self.model) | carried, files.folder)
        self._layers = {
            f"{base_name(name)}.weight": (name, module)
            for name, module in self.model.named_modules()
            if isinstance(module, LoraLayer)
        }
        names = [name for name, _ in self.model.named_parameters() if ".modules_to_save." in name]
        self._whole = {base_name(name): adapter_name(name) for name in names}
        self.touched = [name for name in self.shapes if name in self._layers or name in self._whole]
        if not any(self.is_trained(name) for name in self.touched):
            raise ModelError(
                f"{adapter.folder}: the adapter changes nothing (all its B matrices are zero) → it was never trained."
            )

    def _wrap(self, base: nn.Module, config: LoraConfig) -> nn.Module:
        """The meta model with empty adapters."""
        if config.layer_replication or config.lora_bias:
            raise ModelError(
                f"{self.adapter.folder}: {'layer_replication' if config.layer_replication else 'lora_bias'} makes "
                "another architecture of the model → such an adapter cannot be merged."
            )
        base.name_or_path = config.base_model_name_or_path or ""  # or PEFT warns that it was another
        try:
            return add_adapters(base, config)
        except ValueError as error:  # nothing that it could be for
            raise ModelError(f"{self.adapter.folder}: the adapter does not fit {self.files.folder}: {error}") from None

    def is_trained(self, name: str) -> bool:
        """Whether the adapter of a weight has left its start, or the weight was trained whole."""
        if name in self._whole:
            return True
        prefix = adapter_name(self._layers[name][0])
        started = [f"{prefix}{part}" for part in STARTS_AT_ZERO]
        names = [stored for stored in self.adapter.shapes if stored.startswith(tuple(started))]
        return any(bool(self.adapter.read(stored).any()) for stored in names)

    def base(self, name: str) -> torch.Tensor:
        """A weight of the base, fp32."""
        return self.files.read(name).float()

    def unmerged(self, parameter: str) -> torch.Tensor:
        """A parameter of `model`, fp32: the base's, or the adapter's."""
        if is_of_adapter(parameter):
            return self.adapter.read(adapter_name(parameter)).float()
        name = base_name(parameter)
        # with adapters of an embedding PEFT stores the embedding too, and loads it again
        return self.adapter.read(self._carried[name]).float() if name in self._carried else self.base(name)

    @torch.no_grad()
    def read(self, name: str) -> torch.Tensor:
        """A merged weight, fp32."""
        if name in self._whole:
            return self.adapter.read(self._whole[name]).float()
        return self._merged_layer(name) if name in self._layers else self.base(name)

    def _merged_layer(self, name: str) -> torch.Tensor:
        prefix, layer = self._layers[name]
        on_meta = [
            (module, last, parameter, f"{prefix}.{inner}.{last}")
            for inner, module in layer.named_modules()
            for last, parameter in module.named_parameters(recurse=False)
        ]
        try:
            for module, last, _, full_name in on_meta:
                setattr(module, last, nn.Parameter(self.unmerged(full_name), requires_grad=False))
            layer.merge(safe_merge=True)
            return layer.get_base_layer().weight.data
        except (ValueError, RuntimeError, NotImplementedError) as error:  # of PEFT: not finite, or not mergeable
            raise ModelError(f"{self.adapter.folder}: {name} cannot be merged: {error}") from None
        finally:
            layer.merged_adapters.clear()
            layer._caches.clear()
            for module, last, parameter, _ in on_meta:
                setattr(module, last, parameter)
