"""kill -9 at a chosen moment: before the n-th time that this process makes, opens, renames or removes a file.

Python tells its audit hooks of each of these, so n runs over all the moments at which a half-made state could stay.
"""

import os
import signal
import sys
from pathlib import Path

EVENTS = {"open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.link", "os.symlink", "os.truncate"}


class Trap:
    """Counts what happens below `folder` from `arm` on, and kills the process at the n-th; 0 never."""

    def __init__(self, folder: Path):
        self.folder, self.at, self.count, self.armed = str(folder), 0, 0, False
        sys.addaudithook(self._heard)

    def arm(self, at: int = 0) -> None:
        self.at, self.count, self.armed = at, 0, True

    def _heard(self, event: str, arguments: tuple) -> None:
        if not self.armed or event not in EVENTS:
            return
        paths = [os.fspath(a) for a in arguments[:2] if isinstance(a, (str, os.PathLike))]
        # rmtree removes by names relative to an open folder
        if any(path.startswith(self.folder) or not os.path.isabs(path) and event != "open" for path in paths):
            self.count += 1
            if self.count == self.at:
                os.kill(os.getpid(), signal.SIGKILL)
