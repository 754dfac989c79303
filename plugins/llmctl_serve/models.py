"""The models of a server: opened side by side, swapped without losing a request, drained before they are closed."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from llmctl import Artifact, LlmctlError, UsageError
from llmctl.heap import give_back
from llmctl_serve.encoding import EncoderThread
from llmctl_serve.errors import ApiError
from llmctl_serve.metrics import ServerMetrics
from llmctl_serve.service import Service
from llmctl_serve.worker import Worker, stopping

Open = Callable[[str, Artifact], Service]
Find = Callable[[str], Artifact]


class Model:
    """One opened model, its thread, and who still uses it. Its adapters are served by the same engine."""

    def __init__(
        self,
        service: Service,
        source: str,
        warn: Callable[[str], None],
        stepped: Callable[[int], None] = lambda _: None,
    ) -> None:
        self.service, self.source = service, source
        self.worker: Worker | None = None
        if service.engine is not None:
            self.worker = Worker(service.engine, service.tokenizer, warn, service.model_id, stepped)
            self.worker.start()
        self.encoder: EncoderThread | None = None
        if service.encoder is not None:
            self.encoder = EncoderThread(service.encoder, service.params.max_queue, service.model_id)
        self.served = {
            one.model_id: Served(self, one) for one in (service, *(service.adapted(name) for name in service.adapters))
        }
        """By the ids that clients use: the model as it is, and with each of its adapters."""
        self._users = 0
        self._changed = threading.Condition()

    def use(self) -> None:
        """One more request needs it; `release` must follow."""
        with self._changed:
            self._users += 1

    def release(self) -> None:
        """That request is over."""
        with self._changed:
            self._users -= 1
            self._changed.notify_all()

    def drain(self) -> None:
        """Wait until no request uses it, then close it."""
        with self._changed:
            self._changed.wait_for(lambda: not self._users)
        self.close()

    def close(self) -> None:
        """End what runs with 503, and give the memory back."""
        if self.worker is not None:
            self.worker.stop()
        if self.encoder is not None:
            self.encoder.close()

    @property
    def depth(self) -> int:
        """Requests that wait."""
        return sum(one.depth for one in (self.worker, self.encoder) if one is not None)


@dataclass(frozen=True)
class Served:
    """A model under one of its ids, as it is or with an adapter. Whoever was given it by `Models.use` releases it."""

    model: Model
    service: Service

    @property
    def worker(self) -> Worker | None:
        """The thread of the model's engine."""
        return self.model.worker

    @property
    def encoder(self) -> EncoderThread | None:
        """The thread of an encoder."""
        return self.model.encoder

    def release(self) -> None:
        """The request is over."""
        self.model.release()

    def described(self) -> dict[str, Any]:
        """As in the list of models; `parent` is the model of an adapter, as with vLLM."""
        return {
            "id": self.service.model_id,
            "object": "model",
            "created": self.service.created,
            "owned_by": "llmctl",
            "max_model_len": self.service.context_length,
            "parent": self.service.parent,
        }


@dataclass(frozen=True)
class Change:
    """What a load or a reload did."""

    name: str
    artifact: str
    before: str | None = None
    """The artifact that it replaced; None if the name is new."""

    @property
    def changed(self) -> bool:
        """Whether another artifact is served now."""
        return self.before != self.artifact


class Models:
    """All models by the names that clients use. The first is the one for requests that name none. Thread-safe.

    `find` turns a name in the store, an id or a path that may be loaded into an artifact, `open_` opens one.
    """

    def __init__(self, open_: Open, find: Find, metrics: ServerMetrics, warn: Callable[[str], None]) -> None:
        self._open, self._find, self._metrics, self._warn = open_, find, metrics, warn
        self._models: dict[str, Model] = {}
        self._lock = threading.Lock()
        """Guards the dictionary; held for moments."""
        self._loading = threading.Lock()
        """One model is loaded at a time: each takes all the memory bandwidth there is."""
        self._retired: list[Model] = []
        self.stopping = False

    @property
    def names(self) -> list[str]:
        """The names, the default first."""
        return list(self._models)

    def all(self) -> list[Model]:
        """The models, the default first."""
        with self._lock:
            return list(self._models.values())

    @property
    def ready(self) -> bool:
        """Whether requests can be answered."""
        return bool(self._models) and not self.stopping and not self.failed

    @property
    def failed(self) -> list[str]:
        """Models whose engine has failed: they answer nothing until they are loaded again."""
        return [model.service.model_id for model in self.all() if model.worker is not None and not model.worker.alive]

    def served(self) -> list[Served]:
        """The models, the default first, each followed by itself with its adapters."""
        return [one for model in self.all() for one in model.served.values()]

    def find(self, name: str | None) -> Served:
        """The model for a request. ApiError 404 for one that this server does not have."""
        with self._lock:
            return self._get(name)

    def _get(self, name: str | None) -> Served:
        """A model by its own id, else one with an adapter, `MODEL:ADAPTER`."""
        model = next(iter(self._models.values()), None) if name is None else self._models.get(name)
        if model is None and name is not None:
            model = self._models.get(name.rpartition(":")[0])
        found = model.served.get(name or model.service.model_id) if model is not None else None
        if found is None:
            ids = [known for one in self._models.values() for known in one.served]
            message = f"the model `{name}` does not exist; this server has {', '.join(f'`{n}`' for n in ids)}"
            raise ApiError(404, message, param="model", code="model_not_found")
        return found

    def use(self, name: str | None) -> Served:
        """`find` for a request, which must `release` it at its end: a model in use is not closed."""
        with self._lock:
            if self.stopping:
                raise stopping()
            found = self._get(name)
            found.model.use()
            return found

    def put(self, model: Model) -> Model | None:
        """Serve it under its name from this moment on; the one it replaces is drained beside it and closed.

        UsageError if one of its ids, adapters included, is one of another model: it is closed then.
        """
        name = model.service.model_id
        with self._lock:
            before = self._models.get(name)
            taken = [id for other in self._models.values() if other is not before for id in other.served]
            twice = next((id for id in model.served if id in taken), None)
            refused = self.stopping or twice is not None
            if not refused:
                self._models[name] = model
        if refused:  # it was opened, perhaps while the server was told to stop; nobody else would close it
            model.close()
            if twice is None:
                raise stopping()
            raise UsageError(f"`{twice}` would be the id of two models", hint="load it under another name")
        self._watch(model)
        if before is not None:
            self._retire(before)
        return before

    def _watch(self, model: Model) -> None:
        if model.worker is not None:
            service = model.service
            capacity = model.worker.stats().cache_capacity
            held = getattr(service.engine, "cache_bytes", 0)  # the engine that answers in turn holds nothing
            self._metrics.watch(
                service.model_id,
                model.worker.stats,
                held / capacity if capacity else 0,
                artifact=service.artifact.id,
                backend=service.backend,
            )

    def load(self, name: str, source: str, artifact: Artifact | None = None) -> Change:
        """Open an artifact beside what runs, then switch the name to it. Takes as long as opening does.

        InputError, UsageError if it cannot be found or opened; what was served goes on then.
        """
        with self._loading:
            return self._load(name, source, self._find(source) if artifact is None else artifact)

    def _load(self, name: str, source: str, found: Artifact) -> Change:
        """`load`, by the one who holds the lock of loading."""
        service = self._open(name, found)
        stepped = self._metrics.batch.labels(name).observe
        before = self.put(Model(service, source, self._warn, stepped))
        return Change(name, found.id, before.service.artifact.id if before else None)

    def unload(self, name: str) -> None:
        """No longer take requests for it; running ones are finished first. ApiError 404, or 409 for the last one.

        Waits for a load that is on its way, which might be a reload of this very model.
        """
        with self._loading, self._lock:
            found = self._get(name)
            if found.service.parent is not None:
                message = f"`{name}` is an adapter of `{found.service.parent}`; load that model without it instead"
                raise ApiError(409, message, code="adapter")
            if len(self._models) == 1:
                raise ApiError(409, f"`{name}` is the last model; load another one first", code="last_model")
            del self._models[name]
        self._metrics.forget(name)
        self._retire(found.model)

    def reload(self) -> list[Change]:
        """Swap in what the names of the store point to by now. A model that cannot be opened stays as it is."""
        changes = []
        for name in self.names:
            with self._loading:  # from the look at what is served to the swap nobody else loads
                model = self._models.get(name)
                if model is None or not model.source:
                    continue
                try:
                    found = self._find(model.source)
                    if found.id != model.service.artifact.id:
                        changes.append(self._load(name, model.source, found))
                except ApiError:  # the server stops
                    break
                except LlmctlError as error:
                    self._warn(f"{name} stays as it is: {error.message}")
                except Exception as error:  # whatever a new model raises, the one that is served goes on
                    self._warn(f"{name} stays as it is: {type(error).__name__}: {error}")
        return changes

    def _retire(self, model: Model) -> None:
        """Close it as soon as its last request has ended, without waiting for that here."""
        with self._lock:
            self._retired.append(model)

        name = f"drain {model.service.model_id}"
        threading.Thread(target=self._end, args=([model],), name=name, daemon=True).start()

    def _end(self, held: list[Model]) -> None:
        """Drain and close the one model in `held`; its memory goes back to the system if nobody else holds it."""
        model = held.pop()
        model.drain()
        with self._lock:
            if model in self._retired:
                self._retired.remove(model)
        del model
        give_back()

    def close(self) -> None:
        """Take nothing more, end what runs with 503, close everything. May be called twice."""
        with self._lock:
            self.stopping = True
            models = [*self._models.values(), *self._retired]
        for model in models:
            model.close()


def memory(models: Sequence[Model]) -> Mapping[str, int]:
    """Bytes of weights of each model, by its name: the files that are read into memory."""
    patterns = ("*.onnx", "*.onnx.data", "*.onnx_data", "*.safetensors", "adapters/*.onnx_adapter")
    return {
        model.service.model_id: sum(
            file.stat().st_size for pattern in patterns for file in model.service.artifact.path.glob(pattern)
        )
        for model in models
    }
