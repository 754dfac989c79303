"""`python -m llmctl`, and the console script `llmctl`."""

from __future__ import annotations

from llmctl.cli import main

if __name__ == "__main__":
    main()
