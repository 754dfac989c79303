"""Serve a model over HTTP with an OpenAI-type API, and chat with it in the terminal."""

from __future__ import annotations

from llmctl import Command, In, Out, Stage, hookimpl

SERVE = Stage(
    name="serve",
    help="Serve a model over HTTP with an OpenAI-type API.",
    inputs={
        "model": In("model.onnx", "model.hf"),
        "index": In("index.rag", optional=True, help="answer from these documents, with citations"),
        "encoder": In(
            "model.onnx", "model.hf", "embeddings", optional=True, help="of an index that finds by meaning: its encoder"
        ),
        "draft": In("model.onnx", optional=True, help="a small model that proposes tokens, for speculation"),
    },
    outputs={"receipt": Out("deployment"), "metrics": Out("metrics")},
    params="llmctl_serve.params:ServeParams",
    run="llmctl_serve.run:run",
    extra="serve",
    effect=True,
    headline=("smoke.answered",),
)


@hookimpl
def register_stages() -> list[Stage]:
    """Offer the stage `serve`."""
    return [SERVE]


@hookimpl
def register_commands() -> list[Command]:
    """Offer `chat`, `generate`, `bench` and `keys`."""
    return [
        Command(name="chat", help="Talk to a model in the terminal.", target="llmctl_serve.chat:chat"),
        Command(name="generate", help="Continue a text with a model.", target="llmctl_serve.chat:generate"),
        Command(name="bench", help="Measure a server under load.", target="llmctl_serve.bench.command:bench"),
        Command(name="keys", help="Make and revoke a server's API keys.", target="llmctl_serve.key_commands:keys"),
    ]
