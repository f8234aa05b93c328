"""Every data format that people have, read into conversations through one interface.

A format is a file of this folder with a FORMAT; its README shows each by an example. Light to import: pyarrow is loaded
when a Parquet file is read or written.
"""

from engine.data.formats.convert import convert
from engine.data.formats.format import Format
from engine.data.formats.registry import FORMAT_NAMES, FORMATS, detect, read_conversations, read_rows

__all__ = ["FORMATS", "FORMAT_NAMES", "Format", "convert", "detect", "read_conversations", "read_rows"]
