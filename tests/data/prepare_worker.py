"""`python -m engine` with small chunks and a shard of codes for each batch, so that a kill finds work half done.

prepare_worker.py PAUSE ARGUMENTS...     seconds to wait after each shard, and the engine's command line
"""

import sys
import time
from functools import partial

import engine.data.encoder as encoder
import engine.data.prepare as preparing
from engine.cli import main
from engine.data.code_cache import CodeCache

CHUNK_ROWS = 16


def in_small_pieces(pause: float) -> None:
    preparing.CHUNK_ROWS = CHUNK_ROWS
    encoder.encode_missing = partial(encoder.encode_missing, flush_seconds=0)
    put = CodeCache.put

    def put_and_wait(self, items) -> None:
        put(self, items)
        time.sleep(pause)

    CodeCache.put = put_and_wait


if __name__ == "__main__":
    pause, *arguments = sys.argv[1:]
    in_small_pieces(float(pause))
    sys.exit(main(arguments))
