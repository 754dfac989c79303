"""`llmctl bench`: load on a server of OpenAI's API, and what its users would have felt."""
