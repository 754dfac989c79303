"""Serve a model until stopped, or start, ask smoke questions over HTTP and stop."""

from __future__ import annotations

import json
import os
import platform
import re
import shlex
import socket
import time
from collections.abc import Sequence
from contextlib import closing
from importlib.metadata import version
from pathlib import Path
from typing import Any

from llmctl import Artifact, Context, InputError, StageError, UsageError, __version__
from llmctl.registry import get_registry
from llmctl.store import Store
from llmctl.store.signing import require_signed
from llmctl.text.retrieval import Index
from llmctl.text.tokenizer import Tokenizer
from llmctl_serve.app import create_app
from llmctl_serve.defaults import default_sampling
from llmctl_serve.guard import Guard
from llmctl_serve.metrics import ServerMetrics
from llmctl_serve.params import ServeParams
from llmctl_serve.server import HttpServer, endpoint, listen, url
from llmctl_serve.service import Service
from llmctl_serve.smoke import Asked, Client
from llmctl_serve.worker import Worker

DIGEST = re.compile(r"[0-9a-f]{64}\Z")
POLL = 0.1
"""Seconds between two looks at `should_stop`."""


def run(ctx: Context, params: ServeParams, model: Artifact, index: Artifact | None = None) -> None:
    """Open the port, then the model; serve; leave a receipt."""
    api_key = read_key(params)
    check_signature(params, model)
    metrics = ServerMetrics(params.metrics_per_key)
    with closing(Guard(params, metrics, api_key, ctx.warn)) as guard, listen(params.host, params.port) as listener:
        base = url(listener)
        service = open_service(params, model, index)
        worker = Worker(service.generator, service.tokenizer, params.max_queue, ctx.warn)
        metrics.watch(service.model_id, worker.stats, artifact=model.id, backend=service.generator.backend)
        worker.start()
        app = create_app(service, worker, guard, ctx.warn)
        try:
            with HttpServer(app, listener, params.drain_seconds, worker.stop, **guard.uvicorn()) as server:
                asked = smoke(ctx, service, listener, api_key) if params.mode == "smoke" else []
                if params.mode == "foreground":
                    announce(ctx, service, listener)
                    wait(ctx, server)
        finally:
            worker.stop()
        write_receipt(ctx, service, model, base, asked)
    ctx.report({"tokens.prompt": _total(metrics.prompt_tokens), "tokens.generated": _total(metrics.new_tokens)})
    if params.mode == "smoke":
        report_smoke(ctx, asked)


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


def check_signature(params: ServeParams, model: Artifact) -> None:
    """InputError unless the model is what `require_signed_by` has signed, where that is asked for."""
    if params.require_signed_by is None:
        return
    allowed = Path(params.allowed_signers).expanduser() if params.allowed_signers else None
    require_signed(model.path, params.require_signed_by, allowed, Store.open())


def open_service(params: ServeParams, model: Artifact, index: Artifact | None) -> Service:
    """Load the model, its tokenizer and the index."""
    tokenizer = Tokenizer.load(model.path)
    documents = Index.load(index) if index else None
    generator = get_registry().open_generator(model, device=params.device, threads=params.threads)
    if generator.vocab_size < tokenizer.vocab_size:
        raise InputError(
            f"the tokenizer has {tokenizer.vocab_size} ids, the model {generator.vocab_size}",
            hint="use the tokenizer that the model was trained with",
        )
    return Service(
        generator, tokenizer, params.model_name or model_id(model), params, default_sampling(model.path), documents
    )


def model_id(model: Artifact) -> str:
    """The name of the model's directory; in the store that is a digest, of which the beginning is enough."""
    name = model.path.resolve().name
    return f"model-{name[:12]}" if DIGEST.match(name) else name


def has_chat(tokenizer: Tokenizer) -> bool:
    """Whether the model has a chat template."""
    try:
        return bool(tokenizer.chat_template)
    except InputError:
        return False


def announce(ctx: Context, service: Service, listener: socket.socket) -> None:
    """Say where the server is and how to ask it."""
    base = url(listener)
    ctx.log(f"serving {service.model_id} at {base}/v1 ({service.generator.backend}); Ctrl-C stops")
    question: dict[str, Any] = {"model": service.model_id}
    if has_chat(service.tokenizer):
        path, question["messages"] = "/v1/chat/completions", [{"role": "user", "content": "Hello"}]
    else:
        path, question["prompt"] = "/v1/completions", "Hello"
    ctx.log(f"curl {base}{path} -H 'Content-Type: application/json' -d {shlex.quote(json.dumps(question))}")


def wait(ctx: Context, server: HttpServer) -> None:
    """Until a signal, or the server's own end."""
    while not ctx.should_stop():
        if not server.alive:
            raise StageError("the HTTP server ended by itself", hint="see the log of this stage")
        time.sleep(POLL)
    ctx.log("stopping: running requests are finished first")


def smoke(ctx: Context, service: Service, listener: socket.socket, api_key: str) -> list[Asked]:
    """Ask every question, the first one streamed too. StageError if the server's own pages fail."""
    client = Client(*endpoint(listener), service.model_id, api_key, has_chat(service.tokenizer))
    if json.loads(client.get("/healthz"))["status"] != "ok":
        raise StageError("/healthz does not say ok")
    questions = service.params.smoke_questions
    asked = [client.ask(questions[0], stream=True)]
    for number, question in enumerate(questions, start=1):
        asked.append(client.ask(question))
        ctx.progress(number, len(questions))
    if b"llmctl_completion_tokens_total" not in client.get("/metrics"):
        raise StageError("/metrics does not count tokens")
    return asked


def write_receipt(ctx: Context, service: Service, model: Artifact, base: str, asked: Sequence[Asked]) -> None:
    """`receipt.json`: where, what, with which versions, and what was answered."""
    receipt = {
        "endpoint": f"{base}/v1",
        "model": {"id": service.model_id, "artifact": model.id, "type": model.type},
        "tokenizer": service.tokenizer.digest,
        "backend": service.generator.backend,
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
