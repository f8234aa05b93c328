"""Lets `import torchaudio` succeed beside a torch that its compiled extension was not built for.

torchaudio's wheel is linked against one CUDA build of torch. Beside any other (a CPU torch, a newer CUDA) its
import raises, and with it the import of every transformers model, for `transformers.audio_utils` imports
torchaudio whenever it is installed. We need `torchaudio.functional.resample` only, which is pure torch. So an
import hook watches for `torchaudio._extension` alone: it runs the real module, and if that fails it lets
torchaudio believe that the extension was never built, a state which torchaudio supports.

Invariant: where the real extension loads, nothing differs. Installing takes microseconds and imports neither
torch nor torchaudio; it must come before the first import of transformers' modelling code.
"""

import logging
import sys
from collections.abc import Callable, Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType

_EXTENSION = "torchaudio._extension"
_logger = logging.getLogger(__name__)


class _ForgivingLoader(Loader):
    """Loads the extension as `real` does; what `real` cannot load becomes an extension never built."""

    def __init__(self, real: Loader):
        self._real = real

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._real.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        try:
            self._real.exec_module(module)
        # OSError: a library is missing; RuntimeError: another CUDA version; ImportError: half an
        # installation.
        except (OSError, RuntimeError, ImportError) as error:
            _logger.info("torchaudio goes without its compiled extension: %s", error)
            module._IS_TORCHAUDIO_EXT_AVAILABLE = False
            module._IS_ALIGN_AVAILABLE = False
            module._check_cuda_version = lambda: None
            module.fail_if_no_align = _refuse


def _refuse(function: Callable) -> Callable:
    def refused(*args, **kwargs):
        name = function.__name__
        raise RuntimeError(f"{name} needs torchaudio's compiled extension, which this torch cannot load")

    return refused


class _ExtensionFinder(MetaPathFinder):
    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        if name != _EXTENSION:
            return None
        spec = PathFinder.find_spec(name, path, target)
        if spec is not None and spec.loader is not None:
            spec.loader = _ForgivingLoader(spec.loader)
        return spec


def install() -> None:
    """Installs the hook for this process; a second call changes nothing."""
    if not any(isinstance(finder, _ExtensionFinder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _ExtensionFinder())
