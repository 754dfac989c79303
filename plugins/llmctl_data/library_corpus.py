"""The reader `python-stdlib`: pages and source of the library as text, and its facts."""

from __future__ import annotations

from typing import TYPE_CHECKING

from llmctl import Context
from llmctl_data import pages
from llmctl_data.facts import FactBook
from llmctl_data.library_facts import fact_book
from llmctl_data.params import DataParams
from llmctl_data.stdlib import module_files, read_module

if TYPE_CHECKING:
    from llmctl_data.run import Spool


def read_library(ctx: Context, params: DataParams, out: Spool) -> FactBook:
    """Write every module's documents to the split of the module and return what can be asked about them."""
    chosen = module_files(params.modules)
    every = module_files()
    modules = {}
    for number, (name, path) in enumerate(every.items(), start=1):
        modules[name] = read_module(name, path)
        ctx.progress(number, len(every), module=name)
    introduced: list[tuple[pages.Page, bool]] = []
    for name in chosen:
        module = modules[name]
        for page in pages.docs(module):
            split = out.split_of(page.document)
            introduced.append((page, split == "train"))
            if "docs" in params.include:
                out.add(page.document, split)
        if "source" in params.include:
            for document in pages.source(module):
                out.add(document, out.split_of(document))
    return fact_book([modules[name] for name in chosen], introduced, list(modules.values()))
