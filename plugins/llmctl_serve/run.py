"""Serve a model until stopped, or start, ask smoke questions over HTTP and stop."""

from __future__ import annotations

import json
import os
import platform
import shlex
import socket
import time
from collections.abc import Sequence
from contextlib import closing
from importlib.metadata import version
from pathlib import Path
from typing import Any

from llmctl import Artifact, Context, InputError, StageError, UsageError, __version__
from llmctl.encoders import open_text_encoder
from llmctl.heap import settled
from llmctl.registry import get_registry
from llmctl.spec.files import home_path, is_there
from llmctl.text.retrieval import Index
from llmctl.text.tokenizer import Tokenizer
from llmctl_serve.app import create_app
from llmctl_serve.guard import Guard
from llmctl_serve.metrics import ServerMetrics
from llmctl_serve.models import Model, Models, memory
from llmctl_serve.opening import Finder, Opener, model_id
from llmctl_serve.params import ServeParams
from llmctl_serve.server import HttpServer, endpoint, listen, url
from llmctl_serve.service import Service
from llmctl_serve.smoke import Asked, Client

POLL = 0.1
"""Seconds between two looks at `should_stop`."""


def run(
    ctx: Context,
    params: ServeParams,
    model: Artifact,
    index: Artifact | None = None,
    encoder: Artifact | None = None,
    draft: Artifact | None = None,
) -> None:
    """Open the port, then the models; serve; leave a receipt."""
    api_key = read_key(params)
    metrics = ServerMetrics(params.metrics_per_key)
    opener = Opener(params)
    opener.check_signature(model)
    with (
        closing(Guard(params, metrics, api_key, ctx.warn)) as guard,
        listen(params.host, params.port) as listener,
        settled(),  # before the models, which come and go
    ):
        base = url(listener)
        models = open_models(ctx, params, metrics, model, open_index(params, index, encoder), draft)
        app = create_app(models, guard, ctx.warn, params.page)
        try:
            with HttpServer(app, listener, params.drain_seconds, models.close, **guard.uvicorn()) as server:
                asked = smoke(ctx, params, models, listener, api_key) if params.mode == "smoke" else []
                if params.mode == "foreground":
                    announce(ctx, models, listener)
                    wait(ctx, server, models)
        finally:
            models.close()
        write_receipt(ctx, models, base, asked)
    ctx.report({"tokens.prompt": _total(metrics.prompt_tokens), "tokens.generated": _total(metrics.new_tokens)})
    if params.mode == "smoke":
        report_smoke(ctx, asked)


def open_index(params: ServeParams, index: Artifact | None, encoder: Artifact | None) -> Index | None:
    """The documents, with what finds them by meaning. UsageError for an encoder without an index."""
    if index is None:
        if encoder is not None:
            raise UsageError(
                "the input `encoder` has no effect without an `index`", hint="give the index it belongs to"
            )
        return None
    return Index.load(index, open_text_encoder(encoder, params.device, params.threads) if encoder else None)


def open_models(
    ctx: Context,
    params: ServeParams,
    metrics: ServerMetrics,
    model: Artifact,
    documents: Index | None,
    draft: Artifact | None,
) -> Models:
    """The stage's model, which is the default, and the others; each with its own engine and thread."""
    opened = get_registry().open_generator(draft, device=params.device, threads=params.threads) if draft else None
    first = Opener(params, documents, opened, Tokenizer.load(draft.path).digest if draft else "")
    # A draft model proposes for the model it was given with.
    plain = params if draft is None else params.model_copy(update={"speculation": "none"})
    further = Opener(plain, documents)
    name = params.model_name or model_id(model)
    if name in params.models:
        raise UsageError(f"two models are called `{name}`", hint="set model_name, or another name in models")

    def open_(called: str, artifact: Artifact) -> Service:
        return (first if called == name else further).open(called, artifact)

    root = home_path(params.model_root) if params.model_root else None
    if root is not None and not is_there(root, Path.is_dir):
        raise InputError(f"model_root: {root} is no directory")
    models = Models(open_, Finder(root, frozenset(params.models.values())).find, metrics, ctx.warn)
    try:
        models.load(name, "", model)
        for other, source in params.models.items():
            models.load(other, source)
    except BaseException:
        models.close()
        raise
    return models


def read_key(params: ServeParams) -> str:
    """The key that clients must send, empty for none."""
    if params.api_key_env is None:
        return ""
    key = os.environ.get(params.api_key_env, "")
    if not key:
        raise UsageError(
            f"the environment variable {params.api_key_env} is not set", hint=f"export {params.api_key_env}=… first"
        )
    return key


def has_chat(tokenizer: Tokenizer) -> bool:
    """Whether the model has a chat template."""
    try:
        return bool(tokenizer.chat_template)
    except InputError:
        return False


def announce(ctx: Context, models: Models, listener: socket.socket) -> None:
    """Say where the server is, how to ask it, and what its models take."""
    base = url(listener)
    service = models.all()[0].service
    ctx.log(f"serving {', '.join(models.names)} at {base}/v1 ({service.backend}); Ctrl-C stops")
    question: dict[str, Any] = {"model": service.model_id}
    if service.encoder is not None:
        path, question["input"] = "/v1/embeddings", "Hello"
    elif has_chat(service.tokenizer):
        path, question["messages"] = "/v1/chat/completions", [{"role": "user", "content": "Hello"}]
    else:
        path, question["prompt"] = "/v1/completions", "Hello"
    ctx.log(f"curl {base}{path} -H 'Content-Type: application/json' -d {shlex.quote(json.dumps(question))}")
    for name, size in memory(models.all()).items():
        adapters = models.find(name).service.adapters
        beside = f", adapters {', '.join(adapters)}" if adapters else ""
        ctx.log(f"{name}: {size / 1e6:.1f} MB of weights{beside}{_cache(models.find(name).model)}")
    if (resident := resident_bytes()) is not None:
        ctx.log(f"the process takes {resident / 1e6:.0f} MB now")


def _cache(model: Model) -> str:
    stats = model.worker.stats() if model.worker is not None else None
    if stats is None:
        return ""
    held = f", room for {stats.cache_capacity} tokens" if stats.cache_capacity else ""
    return f", {stats.slots} answer{'s' if stats.slots > 1 else ''} at a time{held}"


def resident_bytes() -> int | None:
    """Memory of this process, where the system says it."""
    try:
        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    except (OSError, ValueError, IndexError):  # no Linux
        return None
    return pages * os.sysconf("SC_PAGE_SIZE")


def wait(ctx: Context, server: HttpServer, models: Models) -> None:
    """Until a signal, or the server's own end. A request to save (SIGUSR2) reloads the models."""
    while not ctx.should_stop():
        if not server.alive:
            raise StageError("the HTTP server ended by itself", hint="see the log of this stage")
        if ctx.should_save():
            changes = models.reload()
            for change in changes:
                ctx.log(f"{change.name}: {change.artifact[:19]} in place of {(change.before or 'nothing')[:19]}")
            if not changes:
                ctx.log("nothing to reload: every name points to what is served")
        time.sleep(POLL)
    models.stopping = True
    ctx.log("stopping: running requests are finished first")


def smoke(ctx: Context, params: ServeParams, models: Models, listener: socket.socket, api_key: str) -> list[Asked]:
    """Ask every question, the first one streamed too. StageError if the server's own pages fail."""
    service = models.all()[0].service
    client = Client(*endpoint(listener), service.model_id, api_key, has_chat(service.tokenizer))
    if json.loads(client.get("/healthz"))["status"] != "ok":
        raise StageError("/healthz does not say ok")
    questions = params.smoke_questions
    asked = [client.ask(questions[0], stream=True)]
    for number, question in enumerate(questions, start=1):
        asked.append(client.ask(question))
        ctx.progress(number, len(questions))
    if b"llmctl_completion_tokens_total" not in client.get("/metrics"):
        raise StageError("/metrics does not count tokens")
    return asked


def write_receipt(ctx: Context, models: Models, base: str, asked: Sequence[Asked]) -> None:
    """`receipt.json`: where, what, with which versions, and what was answered."""
    services = [model.service for model in models.all()]
    service, model = services[0], services[0].artifact
    receipt = {
        "endpoint": f"{base}/v1",
        "model": {"id": service.model_id, "artifact": model.id, "type": model.type},
        "models": [{"id": one.model_id, "artifact": one.artifact.id, "type": one.artifact.type} for one in services],
        "tokenizer": service.tokenizer.digest,
        "backend": service.backend,
        "documents": len(service.index.chunks) if service.index else 0,
        "versions": {
            "llmctl": __version__,
            "python": platform.python_version(),
            **{name: version(name) for name in ("fastapi", "uvicorn")},
        },
        "questions": [_record(one) for one in asked],
    }
    text = json.dumps(receipt, indent=2, ensure_ascii=False)
    (ctx.output("receipt") / "receipt.json").write_text(text + "\n", encoding="utf-8")


def _record(one: Asked) -> dict[str, Any]:
    return {
        "question": one.question,
        "answer": one.answer,
        "ok": one.ok,
        "finish_reason": one.finish_reason,
        "tokens": one.tokens,
        "seconds": round(one.seconds, 4),
        "streamed": one.streamed,
        "citations": [{key: cited[key] for key in ("number", "id", "document")} for cited in one.citations],
        **({"problem": one.problem} if one.problem else {}),
    }


def report_smoke(ctx: Context, asked: Sequence[Asked]) -> None:
    """Metrics and samples; StageError if a question got no answer."""
    streamed, plain = asked[0], asked[1:]
    with (ctx.output("metrics") / "samples.jsonl").open("w", encoding="utf-8") as file:
        for one in plain:
            file.write(json.dumps(_record(one), ensure_ascii=False) + "\n")
    seconds = sum(one.seconds for one in plain)
    ctx.report(
        {
            "smoke.questions": len(plain),
            "smoke.answered": sum(one.ok for one in plain),
            "smoke.streamed": streamed.ok and streamed.answer == plain[0].answer,
            "smoke.seconds": seconds,
            "smoke.tokens_per_s": sum(one.tokens for one in plain) / seconds,
        }
    )
    failed = [one for one in asked if not one.ok]
    if failed:
        why = failed[0].problem or f"the answer is empty (finish_reason {failed[0].finish_reason})"
        raise StageError(f"{len(failed)} smoke questions got no answer; {failed[0].question!r}: {why}")
    if streamed.answer != plain[0].answer:
        raise StageError("the streamed answer differs from the whole one", hint="this is a defect of the server")


def _total(counter: Any) -> float:
    return float(sum(sample.value for sample in counter.collect()[0].samples if sample.name.endswith("_total")))
