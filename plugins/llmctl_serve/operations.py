"""Routes for those who run the server: whether it lives, whether it is ready, what it serves and where that is from."""

from __future__ import annotations

import asyncio
from typing import Any

from fastapi import APIRouter
from fastapi.responses import JSONResponse, Response

from llmctl import InputError, __version__
from llmctl.ort.adapters import adapter_sources
from llmctl.store import Store
from llmctl.store.lineage import lineage
from llmctl_serve.metrics import ServerMetrics
from llmctl_serve.models import Models
from llmctl_serve.schemas import Health, ModelEntry, ModelList, Ready, Version, errors
from llmctl_serve.service import Service


def model_routes(models: Models) -> APIRouter:
    """`/v1/models`."""
    router = APIRouter()

    @router.get("/v1/models", response_model=ModelList, responses=errors())
    async def list_models() -> dict[str, Any]:
        """The models of this server, each followed by its adapters; the first answers requests that name none."""
        return {"object": "list", "data": [one.described() for one in models.served()]}

    @router.get("/v1/models/{model:path}", response_model=ModelEntry, responses=errors(404))
    async def one_model(model: str) -> dict[str, Any]:
        """One model."""
        return models.find(model).described()

    return router


def operation_routes(models: Models, metrics: ServerMetrics) -> APIRouter:
    """`/healthz`, `/readyz`, `/version`, `/metrics`."""
    router = APIRouter()

    @router.get("/healthz", response_model=Health, responses={**errors(), 503: {"model": Health}})
    async def healthz() -> Response:
        """Whether the process lives, and the thread of every model: 503 means that only a restart helps."""
        depth = sum(model.depth for model in models.all())
        dead = bool(models.failed) and not models.stopping
        body = {"status": "failed" if dead else "ok", "models": models.names, "queue_depth": depth}
        return JSONResponse(body, 503 if dead else 200)

    @router.get("/readyz", response_model=Ready, responses={**errors(), 503: {"model": Ready}})
    async def readyz() -> Response:
        """Whether models are loaded, all their engines work, and the server is not stopping."""
        status = "ready" if models.ready else "failed" if models.failed and not models.stopping else "stopping"
        return JSONResponse({"status": status, "models": models.names}, 200 if models.ready else 503)

    @router.get("/version", response_model=Version, responses=errors())
    async def version() -> dict[str, Any]:
        """The software, and for each model the artifacts that it was made from, back to what came from outside."""
        services = [one.service for one in models.served()]
        found = await asyncio.to_thread(lambda: [provenance(service) for service in services])
        return {"llmctl": __version__, "models": found}

    text = {"text/plain": {"schema": {"type": "string"}}}

    @router.get("/metrics", response_class=Response, responses={**errors(), 200: {"content": text}})
    async def exposition() -> Response:
        """Prometheus' text format."""
        return Response(metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    return router


def provenance(service: Service) -> dict[str, Any]:
    """What is served, and from what it was made; without the paths of this machine.

    An adapter's `artifact` is the adapter that the bundle was exported with, as far as the bundle says so.
    """
    artifact, kind = service.artifact.id, service.artifact.type
    if service.adapter is not None:
        said = adapter_sources(service.artifact.path).get(service.adapter, {})
        artifact, kind = str(said.get("artifact") or ""), "model.adapter"
    return {
        "id": service.model_id,
        "parent": service.parent,
        "artifact": artifact,
        "type": kind,
        "backend": service.backend,
        "tokenizer": service.tokenizer.digest,
        "system_fingerprint": service.fingerprint,
        "lineage": ancestors(artifact),
    }


def ancestors(artifact: str) -> list[dict[str, Any]]:
    """The artifact and all that it was made from, nearest first; empty if the store does not know it."""
    if not artifact:
        return []
    try:
        store = Store.open()
        nodes = lineage(store, store.manifest(artifact))
    except InputError:
        return []
    names = ("id", "type", "stage", "instance", "run", "inputs")
    return [{name: getattr(node, name) for name in names} for node in nodes.values()]
