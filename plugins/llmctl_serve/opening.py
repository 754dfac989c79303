"""Finding and opening what is to be served."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from llmctl import Artifact, InputError, UsageError
from llmctl.engine import Engine, EngineOptions
from llmctl.generation_config import warn_of_unhonoured
from llmctl.generator import Generator
from llmctl.one_by_one import OneByOne
from llmctl.ort.encoder import OrtEncoder, open_encoder
from llmctl.registry import get_registry
from llmctl.spec.files import home_path, is_there
from llmctl.store import Store
from llmctl.store.models import model_type
from llmctl.store.signing import require_signed
from llmctl.text.pooling import says_pooling
from llmctl.text.retrieval import Index
from llmctl.text.tokenizer import Tokenizer
from llmctl_serve.constraining import Forms
from llmctl_serve.defaults import default_sampling
from llmctl_serve.params import ServeParams
from llmctl_serve.service import Service

TYPES = ("model.onnx", "model.hf")
DIGEST = re.compile(r"[0-9a-f]{64}\Z")


@dataclass(frozen=True)
class Opener:
    """Opens models as the server's parameters say."""

    params: ServeParams
    index: Index | None = None
    draft: Generator | None = None
    draft_tokenizer: str = ""
    """Digest of the tokenizer that the draft was trained with."""

    def open(self, name: str, artifact: Artifact) -> Service:
        """The service of a model. InputError, UsageError, MachineError if it cannot be opened or served so."""
        self.check_signature(artifact)
        tokenizer = Tokenizer.load(artifact.path)
        common = {"model_id": name, "artifact": artifact, "tokenizer": tokenizer, "params": self.params}
        opened = self._open(artifact)
        if isinstance(opened, OrtEncoder):
            return Service(**common, encoder=opened)  # type: ignore[arg-type]
        if opened.vocab_size < tokenizer.vocab_size:
            raise InputError(
                f"the tokenizer has {tokenizer.vocab_size} ids, the model {opened.vocab_size}",
                hint="use the tokenizer that the model was trained with",
            )
        if self.draft is not None and self.draft_tokenizer != tokenizer.digest:
            raise UsageError(
                f"the draft's tokenizer is {self.draft_tokenizer[:19]}…, the model's {tokenizer.digest[:19]}…",
                hint="use a draft that was trained with the model's own tokenizer",
            )
        engine = self.engine(opened)
        warn_of_unhonoured(artifact.path)
        return Service(
            **common,  # type: ignore[arg-type]
            generator=opened,
            engine=engine,
            default=default_sampling(artifact.path),
            index=self.index,
            forms=Forms(tokenizer, engine.vocab_size, engine.eos_ids),
        )

    def _open(self, artifact: Artifact) -> Generator | OrtEncoder:
        bundle = artifact.type == "model.onnx"
        if bundle and says_pooling(artifact.path):
            return open_encoder(artifact.path, self.params.device, self.params.threads)
        try:
            return get_registry().open_generator(artifact, device=self.params.device, threads=self.params.threads)
        except InputError as no_generator:
            if not bundle:
                raise
            try:
                return open_encoder(artifact.path, self.params.device, self.params.threads)
            except InputError:
                raise no_generator from None

    def engine(self, generator: Generator) -> Engine:
        """The generator's own engine, which answers side by side, else one that answers in turn."""
        own = getattr(generator, "engine", None)
        batched = own is not None and getattr(generator, "in_place", True)
        return own(self.options()) if batched else OneByOne(generator, self.options())  # type: ignore[misc]

    def options(self) -> EngineOptions:
        """How much the engine does at once."""
        params = self.params
        if (params.speculation == "draft") != (self.draft is not None):
            raise UsageError(
                "speculation by a draft model needs the input `draft`, and the input needs `speculation: draft`",
                hint="give both or neither",
            )
        return EngineOptions(
            slots=params.slots,
            max_queue=params.max_queue,
            context=params.context,
            prefill_tokens=params.prefill_tokens,
            prefix_cache=params.prefix_cache,
            speculation=params.speculation,
            draft=self.draft,
            draft_tokens=params.draft_tokens,
        )

    def check_signature(self, artifact: Artifact) -> None:
        """InputError unless the model is what `require_signed_by` has signed, where that is asked for."""
        if self.params.require_signed_by is None:
            return
        given = self.params.allowed_signers
        allowed = home_path(given) if given else None
        require_signed(artifact.path, self.params.require_signed_by, allowed, Store.open())


def find_given(text: str) -> Artifact:
    """What the one who starts the server names: a path, an id, or a name in the store."""
    return Store.open().resolve(text, TYPES)


@dataclass(frozen=True)
class Finder:
    """What may be loaded while the server runs: artifacts of the store, and directories below `root`.

    `given` are the texts that whoever started the server wrote down; these may be any path.
    """

    root: Path | None = None
    given: frozenset[str] = frozenset()

    def find(self, text: str) -> Artifact:
        """The artifact. InputError if there is none, or none that a request may name."""
        if text in self.given:
            return find_given(text)
        if self.root is not None and (inside := self._below_root(text)) is not None:
            return Store.open().at(inside, (model_type(inside),))
        if any(mark in text for mark in ("\\", "://", "..", "~", "\0")) or text.startswith(("/", ".", "hf:")):
            raise InputError(f"`{text}` is no artifact of the store", hint="give sha256:<id> or PIPELINE/STAGE")
        store = Store.open()
        if is_there(Path(text)):  # `resolve` would take a path of this machine
            raise InputError(f"`{text}` is no artifact of the store", hint="give sha256:<id> or PIPELINE/STAGE")
        return store.resolve(text, TYPES)

    def _below_root(self, text: str) -> Path | None:
        """The directory below the root that `text` names, links followed; None if there is none."""
        assert self.root is not None
        if "\0" in text:
            return None
        root = self.root.expanduser().resolve()
        found = (root / text).resolve()
        return found if found != root and found.is_relative_to(root) and is_there(found) and found.is_dir() else None


def model_id(model: Artifact) -> str:
    """The name of the model's directory; in the store that is a digest, of which the beginning is enough."""
    name = model.path.resolve().name
    return f"model-{name[:12]}" if DIGEST.match(name) else name
