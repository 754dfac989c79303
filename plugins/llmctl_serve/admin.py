"""Routes that change what is served: load, swap, remove, reload. Never for everybody."""

from __future__ import annotations

import asyncio
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Request
from pydantic import Field

from llmctl import LlmctlError
from llmctl_serve.bodies import Strict, Text
from llmctl_serve.errors import ApiError
from llmctl_serve.exchange import exchange_of
from llmctl_serve.models import Change, Models
from llmctl_serve.schemas import Changed, ChangeList, Removed, errors

NAME = r"^[A-Za-z0-9][A-Za-z0-9._:/-]{0,127}$"


class LoadRequest(Strict):
    """Body of `POST /admin/models`."""

    name: Annotated[Text, Field(pattern=NAME, description="What clients will call it.")]
    ref: Annotated[
        Text,
        Field(min_length=1, max_length=500, description="PIPELINE/STAGE, sha256:<id>, or a directory in `model_root`."),
    ]


def require_admin(request: Request) -> None:
    """ApiError 403 unless a key of scope admin was shown, which the guard has checked."""
    if not exchange_of(request).key_id:
        raise ApiError(403, "without an admin key nobody may change what is served", code="missing_scope")


def admin_routes(models: Models) -> APIRouter:
    """The routes under `/admin`."""
    router = APIRouter(prefix="/admin", dependencies=[Depends(require_admin)])

    @router.post("/models", response_model=Changed, responses=errors(400, 413, 415))
    async def load(body: LoadRequest) -> dict[str, Any]:
        """Load a model beside the others; one of that name is replaced, its running requests are finished first."""
        try:
            return _changed(await asyncio.to_thread(models.load, body.name, body.ref))
        except ApiError:
            raise
        except LlmctlError as error:
            hint = f" ({error.hint})" if error.hint else ""
            raise ApiError(400, error.message + hint, param="ref", code="cannot_load") from error

    @router.delete("/models/{name:path}", response_model=Removed, responses=errors(404, 409))
    async def remove(name: str) -> dict[str, Any]:
        """Take no more requests for a model, and close it after its last one."""
        await asyncio.to_thread(models.unload, name)
        return {"name": name, "removed": True}

    @router.post("/reload", response_model=ChangeList, responses=errors())
    async def reload() -> dict[str, Any]:
        """Swap in what the names of the store point to by now."""
        return {"changes": [_changed(change) for change in await asyncio.to_thread(models.reload)]}

    return router


def _changed(change: Change) -> dict[str, Any]:
    return {"name": change.name, "artifact": change.artifact, "replaced": change.before}
