"""The store: look up by key, by id, by name or by path; publish results under their keys."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from llmctl.errors import InputError
from llmctl.spec.files import home_path, is_there
from llmctl.spec.hub_address import FORM, BadAddress, is_hub, parse_hub
from llmctl.stage import Artifact
from llmctl.store import commit as protocol
from llmctl.store import external, names
from llmctl.store.guard import finding, mark_used
from llmctl.store.layout import Layout, check_free, locate, relist
from llmctl.store.manifest import BadManifest, Manifest
from llmctl.store.verification import inspect

ID = re.compile(r"(sha256:)?(?P<digits>[0-9a-f]{4,64})\Z")
WHOLE = re.compile(r"sha256:[0-9a-f]{64}\Z")


def is_id(value: Any) -> bool:
    """Whether this is a whole content id or key: `sha256:` and 64 hexadecimal digits."""
    return isinstance(value, str) and WHOLE.match(value) is not None


@dataclass(frozen=True, kw_only=True)
class Pointer:
    """The published result of an action key: content ids by output port, and the pre-image for `why`."""

    key: str
    preimage: Mapping[str, Any]
    outputs: Mapping[str, str]
    metrics: Mapping[str, Any] = field(default_factory=dict)
    """Final numbers that the stage reported."""
    run: str = ""
    ended: str = ""
    seconds: float = 0.0

    def to_json(self) -> dict[str, Any]:
        """The JSON object of the pointer's file."""
        return {name: getattr(self, name) for name in self.__dataclass_fields__}

    @classmethod
    def read(cls, path: Path) -> Pointer | None:
        """The pointer in a file; None if there is none or it is damaged: both are a miss."""
        return cls.parse(names.read_json(path))

    @classmethod
    def parse(cls, raw: Mapping[str, Any]) -> Pointer | None:
        """The pointer in a JSON object; None if it is none."""
        if not all(name in raw for name in cls.__dataclass_fields__) or not isinstance(raw["outputs"], dict):
            return None
        if not all(isinstance(id, str) for id in raw["outputs"].values()):
            return None
        return cls(**{name: raw[name] for name in cls.__dataclass_fields__})


class Store(Layout):
    """A directory laid out as `pipeline.md` 2.3 says, absent before `create`. Every method is safe to race."""

    @classmethod
    def open(cls, path: Path | None = None) -> Store:
        """The store at `path`, else `$LLMCTL_STORE`, else `.llmctl/store` of the nearest parent that has `.llmctl/`.

        Raises InputError if something else is there.
        """
        root = locate(path)
        check_free(root)
        return cls(root)

    # -- by id --------------------------------------------------------------------------------------------------------

    def directories(self) -> list[Path]:
        """Every directory where an artifact is or should be, in order of their ids."""
        return sorted((self.root / "artifacts" / "sha256").glob("??/*"))

    def ids(self) -> Iterator[str]:
        """All committed artifacts, in order of their ids."""
        for path in self.directories():
            if (path / "llmctl.json").is_file():
                yield f"sha256:{path.name}"

    def find(self, prefix: str) -> str:
        """The full id that begins with `prefix` (`sha256:` may be left out); InputError if none or several do."""
        match = ID.match(prefix)
        if not match:
            raise InputError(f"`{prefix}` is no content id", hint="sha256: and at least 4 hexadecimal digits")
        digits = match["digits"]
        if len(digits) == 64:
            return f"sha256:{digits}"
        found = [path.name for path in (self.root / "artifacts" / "sha256" / digits[:2]).glob(f"{digits}*")]
        if len(found) != 1:
            what = f"{len(found)} artifacts begin with" if found else "there is no artifact"
            raise InputError(f"{what} `{prefix}` in {self.root}", hint="`llmctl ls` lists the artifacts")
        return f"sha256:{found[0]}"

    def manifest(self, id: str) -> Manifest:
        """The manifest of an artifact whose files are all there; InputError names what is missing or damaged."""
        full = self.find(id)
        directory = self.artifact(full)
        try:
            manifest = Manifest.read(directory)
        except FileNotFoundError:
            raise InputError(f"there is no artifact {id} in {self.root}", hint="`llmctl ls` lists them") from None
        except BadManifest as error:
            raise InputError(f"{directory / 'llmctl.json'} is damaged: {error}", hint="run its stage again") from None
        if manifest.id != full:
            raise InputError(
                f"artifact {full[:19]} is damaged: {directory} holds {manifest.id[:19]}",
                hint="run its stage again, it is made anew",
            )
        if damage := manifest.damage(directory):
            raise InputError(f"artifact {full[:19]} is damaged: {damage}", hint="run its stage again, it is made anew")
        return manifest

    def get(self, id: str) -> Artifact:
        """The artifact with this content id or unique prefix; sizes are checked, contents by `verify`."""
        manifest = self.manifest(id)
        return Artifact(self.artifact(manifest.id), manifest.type, manifest.id, manifest.metadata)

    def use(self, id: str) -> Artifact:
        """`get` for somebody who is going to read it: for a day at least it is not thrown away."""
        with finding(self):
            artifact = self.get(id)
            mark_used(artifact.path)
        return artifact

    def last_use(self, id: str) -> int:
        """When the artifact was last found by anybody, in nanoseconds; 0 if it is not there."""
        try:
            return self.artifact(id).stat().st_mtime_ns
        except FileNotFoundError:
            return 0

    def verify(self, id: str) -> None:
        """Hash every file again; InputError names the first that differs from the manifest, or what else is wrong."""
        full = self.find(id)
        self.manifest(full)
        if problems := inspect(self.artifact(full), full, deep=True):
            raise InputError(problems[0], hint="`llmctl verify --deep` lists all; run its stage again")

    # -- by key -------------------------------------------------------------------------------------------------------

    def pointer(self, key: str) -> Pointer | None:
        """What was published under an action key, whether or not its artifacts are still there."""
        return Pointer.read(self.key(key))

    def lookup(self, key: str) -> Pointer | None:
        """The result of an action key; None unless every artifact is there with the right sizes."""
        found = self.pointer(key)
        if found is None:
            relist(self.key(key).parent)
            found = self.pointer(key)
        if found is None:
            return None
        with finding(self):
            directories = [self.artifact(id) for id in found.outputs.values()]
            if any(not self._is_whole(directory) for directory in directories):
                return None
            for directory in directories:
                mark_used(directory)
        return found

    def _is_whole(self, directory: Path) -> bool:
        if protocol.intact(directory) is not None:
            return True
        relist(directory.parent)
        relist(directory)
        return protocol.intact(directory) is not None

    def publish(self, pointer: Pointer, *, replace: bool = False) -> Pointer:
        """Publish a result; returns the one that counts: the first valid one, or ours with `replace`."""
        path = self.key(pointer.key)
        if replace or not protocol.create_json(self, path, pointer.to_json()):
            winner = None if replace else self.lookup(pointer.key)
            if winner is not None:
                return winner
            with finding(self):
                protocol.replace_json(self, path, pointer.to_json())
        return pointer

    def commit(
        self,
        directory: Path,
        type: str,
        files: Sequence[str],
        *,
        metadata: Mapping[str, Any],
        provenance: Mapping[str, Any],
    ) -> Artifact:
        """Take a staged directory in (see `llmctl.store.commit`); the artifact with its id, also if it was known."""
        manifest = protocol.commit(self, directory, type, files, metadata=metadata, provenance=provenance)
        return Artifact(self.artifact(manifest.id), manifest.type, manifest.id, manifest.metadata)

    # -- by what a person types ---------------------------------------------------------------------------------------

    def resolve(self, text: str, types: Sequence[str] = ()) -> Artifact:
        """What a person means: an existing path, an id, a name such as `quickstart/sft` or `quickstart/sft.model`, or
        the address of a model on the hub.

        `types` are those that are welcome; they decide what a directory without a manifest is. Raises InputError.
        """
        path = home_path(text)
        if is_there(path):
            artifact = self.at(path.absolute(), types)
        elif text.startswith("sha256:") or (ID.match(text) and len(text) >= 8):
            artifact = self.use(text)
        elif names.NAME.match(text):
            artifact = self.use(names.read(self, text, types))
        elif is_hub(text):
            artifact = self._fetched(text, types)
        else:
            raise InputError(
                f"no such file, directory or artifact: {text}", hint="give a path, sha256:<id> or PIPELINE/STAGE"
            )
        if types and artifact.type not in types:
            raise InputError(
                f"{text} is a {artifact.type}, wanted {' or '.join(types)}", hint="`llmctl ls` lists types"
            )
        return artifact

    def _fetched(self, text: str, types: Sequence[str]) -> Artifact:
        from llmctl.store.hub import read_hub

        try:
            address = parse_hub(text)
        except BadAddress as bad:
            raise InputError(str(bad), hint=FORM) from None
        return read_hub(self, address, types).external.artifact

    def at(self, path: Path, types: Sequence[str] = ()) -> Artifact:
        """The artifact at a path, which may lie in the store; elsewhere its bytes are compared with its manifest."""
        if path.is_relative_to(self.root / "artifacts") and (path / "llmctl.json").exists():
            return self.use(path.name)
        return external.read_external(self, path, types).artifact
