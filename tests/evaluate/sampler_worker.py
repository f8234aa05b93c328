"""One rank of runs that differ in what they let be heard: sampler_worker.py JOBS; a job is the settings of a run.

Every run is a real one up to its last checkpoint; only the process group is shared by all of them.
"""

import gc
import json
import sys
from pathlib import Path

import torch

from engine.config import Settings
from engine.runtime.distributed import exit_cleanly, init_process_group, shutdown
from engine.runtime.signals import StopRequests
from engine.train import Run

torch.set_num_threads(1)
world = init_process_group()
for job in json.loads(Path(sys.argv[1]).read_text()):
    settings = Settings(**job).with_resolved(world.size, has_gpu=False)
    Run(settings, world, None).execute(StopRequests())
    gc.collect()
shutdown(world)
exit_cleanly(0)
