"""Token files as litdata writes them, and ours as it reads them: the fixture of tests/plugins/test_litdata_chunks.py.

    python -m venv peers && peers/bin/pip install litdata==0.2.44
    peers/bin/python benchmarks/peers/litdata_chunks.py write tests/plugins/litdata
    peers/bin/python benchmarks/peers/litdata_chunks.py read DIRECTORY [BLOCK]

`write` makes, from documents that depend on nothing, what `litdata.optimize(..., item_loader=TokensLoader())` leaves:
int32 tensors as litgpt has them, and NumPy's uint16, in chunks of at most 600 bytes. `read` prints the tokens of all
blocks that litdata's own StreamingDataset gives of a directory.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

CHUNK_BYTES = 600


def documents() -> list[list[int]]:
    """Forty documents of 1 to 60 ids below 300; one is larger than a chunk."""
    lengths = [400 if number == 17 else 1 + number * 7 % 60 for number in range(40)]
    return [[(number * 31 + place * 17) % 300 for place in range(length)] for number, length in enumerate(lengths)]


def write(directory: Path) -> None:
    """The two data sets, and their documents."""
    import numpy
    import torch
    from litdata.streaming.item_loader import TokensLoader
    from litdata.streaming.writer import BinaryWriter

    for name, made in (
        ("int32", lambda ids: torch.tensor(ids, dtype=torch.int)),
        ("uint16", lambda ids: numpy.array(ids, dtype=numpy.uint16)),
    ):
        writer = BinaryWriter(str(directory / name), chunk_bytes=CHUNK_BYTES, item_loader=TokensLoader())
        for number, ids in enumerate(documents()):
            writer.add_item(number, made(ids))
        writer.done()
        writer.merge()
    (directory / "documents.json").write_text(json.dumps(documents()) + "\n")


def read(directory: Path, block: int) -> None:
    """Blocks of tokens in order, as JSON."""
    from litdata import StreamingDataset, TokensLoader

    dataset = StreamingDataset(str(directory), item_loader=TokensLoader(block_size=block), shuffle=False)
    print(json.dumps([dataset[number].tolist() for number in range(len(dataset))]))


if __name__ == "__main__":
    if sys.argv[1] == "write":
        write(Path(sys.argv[2]))
    else:
        read(Path(sys.argv[2]), int(sys.argv[3]) if len(sys.argv) > 3 else 1)
