"""Memory of a process, now and at its highest since the last look: of its GPU, or where there is none its own."""

from pathlib import Path

import psutil
import torch

GIB = 2**30
PROC = Path("/proc/self")
RESET_PEAK = "5"
"""Written to clear_refs, it sets the kernel's VmHWM back to what is used now (man proc_pid_clear_refs)."""


class Memory:
    """What torch has given to tensors on a GPU (its reserve left out); on a CPU, what the process has in RAM."""

    def __init__(self, device: torch.device):
        self._device, self._last = device, 0.0

    def read(self) -> tuple[float, float]:
        """(now, peak since the last call) in GiB; the next peak starts from here.

        Where the kernel's peak cannot be set back, the peak is the higher one of this reading and the last.
        """
        if self._device.type == "cuda":
            now = torch.cuda.memory_allocated(self._device) / GIB
            peak = torch.cuda.max_memory_allocated(self._device) / GIB
            torch.cuda.reset_peak_memory_stats(self._device)
            return now, peak
        now = psutil.Process().memory_info().rss / GIB
        peak = max(now, self._last if (known := _kernel_peak()) is None else known)
        self._last = now
        return now, peak


def _kernel_peak() -> float | None:
    """GiB since the last call; None where the system does not tell, or not since then."""
    try:
        lines = (PROC / "status").read_text().splitlines()
        kib = next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:"))
        (PROC / "clear_refs").write_text(RESET_PEAK)
    except (OSError, StopIteration):
        return None
    return kib / 2**20
