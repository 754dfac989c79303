"""Whether the options of an engine make sense."""

from __future__ import annotations

from llmctl.engine import EngineOptions
from llmctl.errors import UsageError


def slot_length(most: int, options: EngineOptions) -> int:
    """Tokens of one slot; UsageError for options that make no sense."""
    for ok, text in (
        (options.slots >= 1, f"slots must be at least 1, got {options.slots}"),
        (options.max_queue >= 0, f"max_queue must not be negative, got {options.max_queue}"),
        (options.prefill_tokens >= 1, f"prefill_tokens must be at least 1, got {options.prefill_tokens}"),
        (options.context >= 0, f"context must not be negative, got {options.context}"),
        (options.context <= most, f"context is {options.context}, the model's is {most}"),
        (
            options.speculation in ("none", "prompt-lookup", "draft"),
            f"speculation {options.speculation!r} is not known",
        ),
        (options.draft_tokens >= 1, f"draft_tokens must be at least 1, got {options.draft_tokens}"),
    ):
        if not ok:
            raise UsageError(text, hint="see the options of `serve`: slots, max_queue, prefill_tokens, context, draft")
    return options.context or most
