"""The store: look up, resolve, commit, publish."""

from __future__ import annotations

from pathlib import Path

from llmctl.stage import Artifact


class Store:
    """A directory laid out as `pipeline.md` 2.3 says; `root` may not exist yet."""

    def __init__(self, root: Path) -> None:
        self.root = root

    @classmethod
    def open(cls, path: Path | None = None) -> Store:
        """The store at `path`, else `$LLMCTL_STORE`, else `.llmctl/store` of the nearest parent that has `.llmctl/`."""
        raise NotImplementedError

    def get(self, id: str) -> Artifact:
        """The artifact with this content id or unique prefix; InputError if it is not there or damaged."""
        raise NotImplementedError

    def resolve(self, text: str, types: tuple[str, ...] = ()) -> Artifact:
        """What a person means: an existing path, an id, or a name such as `quickstart/sft` or `quickstart/sft.model`.

        `types` narrows the guess of a directory's type. Raises InputError.
        """
        raise NotImplementedError
