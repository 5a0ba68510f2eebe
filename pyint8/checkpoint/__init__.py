"""Where every tensor's bytes lie: the headers of safetensors files, the pickles of PyTorch's, and indexes of shards.

Nothing here reads a byte of a tensor (except in formats that cannot be read by offset). Importing it imports no torch.

    checkpoint = open_checkpoint("path/to/model")
    entry = checkpoint["model.embed_tokens.weight"]
    entry.dtype, entry.shape, entry.path, entry.offset, entry.nbytes
"""

from .agreement import Disagreement
from .entry import DTYPES, FLOATS, Entry, EntryInMemory
from .index import Checkpoint, checkpoint_of_files, open_checkpoint
from .pickled import PickledFile, read_pickled
from .safetensors import SafetensorsFile, read_header
from .stamp import FileStamp

__all__ = [
    "DTYPES",
    "FLOATS",
    "Checkpoint",
    "Disagreement",
    "Entry",
    "EntryInMemory",
    "FileStamp",
    "PickledFile",
    "SafetensorsFile",
    "checkpoint_of_files",
    "open_checkpoint",
    "read_header",
    "read_pickled",
]
