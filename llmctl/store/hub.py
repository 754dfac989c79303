"""Models of the Hugging Face hub as inputs: the files that make one, in the hub's own cache, checked by their digests.

What a stage reads is a *view*: a directory of links to the cached files of one commit, under
`$XDG_CACHE_HOME/llmctl/hub`, that holds what makes the artifact and nothing else. A view appears whole or not at all.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from llmctl.errors import InputError, MachineError
from llmctl.launch.environment import stage_environment
from llmctl.spec.hub_address import HubAddress
from llmctl.store.external import DigestCache, External, read_external
from llmctl.store.hashing import hash_file
from llmctl.store.hub_client import Client, Digest, Listed
from llmctl.store.layout import Layout, own_name, remove

TYPES = ("model.hf", "tokenizer")
TOKENIZER = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "tokenizer.model",
    "spiece.model",
    "sentencepiece.bpe.model",
)
CONFIG = ("config.json", "generation_config.json")
POOLING = ("modules.json", "sentence_bert_config.json", "1_Pooling/config.json")
"""How a sentence encoder makes one vector of its states; `llmctl.text.pooling` reads them."""
SAFE = "model.safetensors"
PICKLE = "pytorch_model.bin"
FACTS = ".hub.json"
"""In a view: the digests that its files must have. Hidden, so it is no file of the artifact."""

Listing = Mapping[str, Listed]


@dataclass(frozen=True)
class HubModel:
    """What an address means now: the directory to read, and the same address with the commit."""

    path: Path
    type: str
    address: HubAddress


def fetch_model(layout: Layout, address: HubAddress, accepted: Sequence[str]) -> HubModel:
    """The files of `address` that make an artifact of one of the `accepted` types; empty means any of TYPES.

    What is in the cache is not fetched again, and a commit that was fetched before needs no network. With
    `HF_HUB_OFFLINE` only the cache counts. Raises InputError: no such model, revision or file, damaged bytes, weights
    that exist as a pickle only, no connection; MachineError without huggingface_hub.
    """
    types = [type for type in TYPES if type in accepted or not accepted]
    if not types:
        raise InputError(
            f"{address} gives a model or a tokenizer, wanted {' or '.join(accepted)}",
            hint="check which input it is for",
        )
    if address.is_commit and (ready := _ready(layout, address, types[0])):
        return ready
    client = Client(address.repo)
    commit, listing = client.list_files(address)
    named, address = address.revision, replace(address, revision=commit)
    type = _choose_type(listing, types, address)
    found = _ready(layout, address, type) or _fetch(client, listing, type, address)
    if not client.offline and named != commit:
        client.remember(named, commit)
    return found


def _fetch(client: Client, listing: Listing, type: str, address: HubAddress) -> HubModel:
    names = _choose_files(client, listing, type, address)
    files = client.fetch(address, [listing[name] for name in names])
    view = _view(address, type)
    _make_view(view, address, files, {name: listing[name].digest for name in names})
    return HubModel(view, type, address)


@dataclass(frozen=True)
class HubInput:
    """A model of the hub as an input, and the commit that its address means."""

    external: External
    commit: str


def read_hub(layout: Layout, address: HubAddress, accepted: Sequence[str], *, pinned: str = "") -> HubInput:
    """`fetch_model`, then `read_external` of what came."""
    found = fetch_model(layout, address, accepted)
    origin = str(found.address)
    types = [found.type]
    return HubInput(read_external(layout, found.path, types, pinned=pinned, origin=origin), found.address.revision)


# -- which files ------------------------------------------------------------------------------------------------------


def _choose_type(listing: Listing, types: Sequence[str], address: HubAddress) -> str:
    """A model before a tokenizer; InputError if the repository holds neither."""
    needed = {"model.hf": "config.json", "tokenizer": "tokenizer.json"}
    for type in types:
        if needed[type] in listing:
            return type
    there = ", ".join(sorted(name for name in listing if "/" not in name)[:8]) or "nothing"
    raise InputError(f"{address} holds no {' and no '.join(types)}", hint=f"at its top it has {there}")


def _choose_files(client: Client, listing: Listing, type: str, address: HubAddress) -> list[str]:
    """Configuration, tokenizer and weights: one file, or the shards that the index names."""
    names = [name for name in TOKENIZER if name in listing]
    if type == "tokenizer":
        return names
    names += [name for name in (*CONFIG, *POOLING) if name in listing]
    weights = next((name for name in (SAFE, f"{SAFE}.index.json") if name in listing), None)
    pickles = [name for name in (PICKLE, f"{PICKLE}.index.json") if name in listing]
    if weights is None and pickles and not address.allow_pickle:
        raise InputError(
            f"{address} has its weights as a pickle only ({pickles[0]}), which can run any code when it is read",
            hint=f"if you trust it, '{replace(address, allow_pickle=True)}' reads tensors from it and nothing else",
        )
    weights = weights or (pickles[0] if pickles else None)
    if weights is None:
        raise InputError(f"{address} has no weights: neither {SAFE} nor its index", hint="take another repository")
    return [*names, weights, *_shards(client, listing, weights, address)]


def _shards(client: Client, listing: Listing, index: str, address: HubAddress) -> list[str]:
    """The files that an index names; none for a file that is no index."""
    if not index.endswith(".index.json"):
        return []
    path = client.fetch(address, [listing[index]])[index]
    try:
        shards = sorted(set(json.loads(path.read_text(encoding="utf-8"))["weight_map"].values()))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{index} of {address} names no shards: {error}", hint="take another revision") from error
    missing = next((shard for shard in shards if shard not in listing), None)
    if missing is not None:
        raise InputError(f"{address} lacks {missing}, though {index} names it", hint=_incomplete(client))
    return shards


def _incomplete(client: Client) -> str:
    return "fetch it once without HF_HUB_OFFLINE" if client.offline else "take another revision"


# -- views ------------------------------------------------------------------------------------------------------------


def _view(address: HubAddress, type: str) -> Path:
    home = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    kind = f"{type}-from-pickle" if address.allow_pickle else type
    return Path(home).expanduser() / "llmctl" / "hub" / address.repo.replace("/", "--") / address.revision / kind


def _ready(layout: Layout, address: HubAddress, type: str) -> HubModel | None:
    """The view of a commit that was made before, if all its files are still there. InputError if one is damaged."""
    view = _view(address, type)
    digests = _digests(view)
    if not digests:
        return None
    _check(layout, address, {name: view / name for name in digests}, digests)
    return HubModel(view, type, address)


def _digests(view: Path) -> dict[str, str]:
    """The digests of a view's files; empty unless it is there with all of them."""
    try:
        found: dict[str, str] = json.loads((view / FACTS).read_text(encoding="utf-8"))["digests"]
    except (OSError, ValueError, KeyError):
        return {}
    return found if all((view / name).is_file() for name in found) else {}


def _check(layout: Layout, address: HubAddress, paths: Mapping[str, Path], digests: Mapping[str, str]) -> None:
    """InputError for the first file that is not what it was when it came; files at rest are hashed once."""
    large = [name for name in paths if Digest(digests[name]).is_sha256]
    now = dict(zip(large, DigestCache(layout).digests([paths[name] for name in large]), strict=True))
    for name, path in paths.items():
        wanted = Digest(digests[name])
        if not (wanted.digits == now[name] if name in now else wanted.fits(path)):
            raise InputError(
                f"{name} of {address} was changed after it came from the hub",
                hint=f"delete {path.resolve()} and run the same again",
            )


def _make_view(view: Path, address: HubAddress, files: Mapping[str, Path], digests: dict[str, Digest]) -> None:
    """Links to `files` under their names, or what their pickles hold as safetensors, and the facts."""
    staging = view.with_name(f".{own_name()}")
    try:
        staging.mkdir(parents=True)
        pickled = {name: path for name, path in files.items() if name.startswith(PICKLE.partition(".")[0])}
        for name, path in files.items():
            if name not in pickled:
                (staging / name).parent.mkdir(exist_ok=True)
                (staging / name).symlink_to(path.resolve())
        kept = {name: digest for name, digest in digests.items() if name not in pickled}
        if pickled:
            _convert(next(iter(pickled.values())).parent, staging, address)
            made = [path for path in staging.iterdir() if path.is_file() and not path.is_symlink()]
            kept |= {path.name: Digest(f"sha256:{hash_file(path)}") for path in made}
        facts = {"address": str(address), "digests": kept}
        (staging / FACTS).write_text(json.dumps(facts, sort_keys=True) + "\n", encoding="utf-8")
        if not _digests(view):  # else somebody made it meanwhile; views of one commit are all the same
            remove(view)
            staging.rename(view)
    except OSError as error:
        if not _digests(view):
            raise MachineError(
                f"cannot write {view}: {error.strerror or error}", hint="set XDG_CACHE_HOME to another place"
            ) from error
    finally:
        remove(staging)


def _convert(source: Path, target: Path, address: HubAddress) -> None:
    """Read the pickles of a snapshot in a process of its own, which sees no secrets and may hold torch."""
    command = [sys.executable, "-m", "llmctl.nn.unpickle", str(source), str(target)]
    done = subprocess.run(command, env=stage_environment({}), capture_output=True, text=True, check=False)
    if done.returncode:
        message = done.stderr.strip().splitlines()[-1:] or [f"exit {done.returncode}"]
        raise InputError(
            f"cannot read the pickle of {address}: {message[0].removeprefix('error: ')}",
            hint="take a repository of safetensors",
        )
