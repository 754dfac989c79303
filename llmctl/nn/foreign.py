"""Architectures that our transformer does not compute, through transformers, behind the face that training knows.

`ForeignModel` offers what the loop, the objectives and the generator use of `Transformer`: `hidden`, `head`, `forward`
and a `config`. Its weights keep the names of Hugging Face, and what it saves is again a directory that transformers
loads. No code of a model's own (`auto_map`) is ever run.

Packed documents are computed as if each were alone. Whether transformers does so in one pass, given a mask and
positions, differs from family to family and is tried out on a few tokens when a model is opened; where it does not,
every document gets a row of its own.
"""

from __future__ import annotations

import contextlib
import inspect
import json
from collections.abc import Iterator, Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from llmctl.errors import InputError, MachineError, StageError, UsageError
from llmctl.nn.foreign_config import ForeignConfig, describe, read_json
from llmctl.nn.shards import MAX_SHARD_BYTES
from llmctl.text.tokenizer import copy_tokenizer

EXTRA = "llmctl[transformers]"
SAME = 1e-5
"""Largest difference, as a share of the largest logit, of two ways to compute the same in float32."""


class ForeignModel(nn.Module):
    """A causal language model of transformers. `split` and `packs` say which ways of computing were found right."""

    def __init__(self, net: Any, config: ForeignConfig, directory: Path) -> None:
        super().__init__()
        self.net = net
        self.config = config
        self.directory = directory
        """Where it was read from: its `config.json` and `generation_config.json` are kept as they are."""
        self._tied = _tied(net)
        self._takes = frozenset(inspect.signature(net.base_model.forward).parameters)
        self.split = self.packs = False
        self.loss_chunk = 0
        """As that of `Transformer`."""
        self.loss = None
        """Likewise; a foreign model is compiled as a whole."""
        self._find_out()

    # -- computing ----------------------------------------------------------------------------------------------------

    def forward(self, tokens: Tensor, positions: Tensor | None = None, documents: Tensor | None = None) -> Tensor:
        """Logits `(B, T, V)` of the token after each of `tokens (B, T)`; the arguments are those of `hidden`."""
        return self.head(self.hidden(tokens, positions, documents))

    def hidden(self, tokens: Tensor, positions: Tensor | None = None, documents: Tensor | None = None) -> Tensor:
        """States `(B, T, D)` from which `head` makes logits; the logits themselves where the two cannot be parted.

        `documents (B, T)` int: a token sees only earlier tokens of its own document, and `positions`, if they are
        given, restart with each. Raises UsageError for more tokens than the context.
        """
        if tokens.shape[1] > self.config.context:
            raise UsageError(
                f"{tokens.shape[1]} tokens do not fit the model's context of {self.config.context}",
                hint="shorten the sequence or use a model with a longer context",
            )
        if documents is None:
            return self._states(tokens, positions)
        if self.packs:
            seen = (documents[:, :, None] == documents[:, None, :]).tril()[:, None]
            mask = torch.zeros_like(seen, dtype=self.net.dtype).masked_fill_(~seen, torch.finfo(self.net.dtype).min)
            return self._states(tokens, positions, mask)
        return self._apart(tokens, documents)

    def head(self, hidden: Tensor) -> Tensor:
        """Logits `(…, V)` of what `hidden` gave."""
        return self.net.get_output_embeddings()(hidden) if self.split else hidden

    def head_parameters(self) -> list[nn.Parameter]:
        """All that `head` reads: nothing where `hidden` gives logits."""
        return list(self.net.get_output_embeddings().parameters()) if self.split else []

    def _states(self, tokens: Tensor, positions: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        given: dict[str, Any] = {"attention_mask": torch.ones_like(tokens) if mask is None else mask}
        if "use_cache" in self._takes:
            given["use_cache"] = False
        if positions is not None and "position_ids" in self._takes:
            given["position_ids"] = positions
        if self.split:
            return self.net.base_model(tokens, **given).last_hidden_state  # type: ignore[no-any-return]
        return self.net(tokens, **given).logits  # type: ignore[no-any-return]

    def run_cached(self, tokens: Tensor, mask: Tensor, positions: Tensor, past: Any) -> Any:
        """transformers' own output with a cache, for generation: `tokens (B, T)` at `positions`, behind `past` (None:
        nothing), of rows padded on the left, `mask (B, past + T)` int. Its logits may be those of the last token only.
        """
        given: dict[str, Any] = {"attention_mask": mask}
        takes = inspect.signature(self.net.forward).parameters
        if "position_ids" in takes:
            given["position_ids"] = positions
        if "past_key_values" in takes:
            given |= {"past_key_values": past, "use_cache": True}
        if "logits_to_keep" in takes:
            given["logits_to_keep"] = 1
        return self.net(tokens, **given)

    def _apart(self, tokens: Tensor, documents: Tensor) -> Tensor:
        """Every document in a row of its own, padded on the right where nothing sees it; padding gives zeros."""
        where = documents.flatten()
        starts = torch.ones_like(where, dtype=torch.bool)
        starts[1:] = where[1:] != where[:-1]
        starts[:: documents.shape[1]] = True
        row = starts.cumsum(0) - 1
        first = torch.nonzero(starts)[:, 0]
        column = torch.arange(len(where), device=where.device) - first[row]
        real = where >= 0
        rows, row = torch.unique(row[real], return_inverse=True)
        column = column[real]
        own = tokens.new_zeros(len(rows), int(column.max()) + 1)
        own[row, column] = tokens.flatten()[real]
        states = self._states(own)[row, column]
        found = states.new_zeros(len(where), states.shape[-1])
        return found.masked_scatter(real[:, None], states).view(*documents.shape, -1)

    @torch.no_grad()
    def _find_out(self) -> None:
        """Compute a few tokens in each way, and keep what agrees with the plain one."""
        training = self.training
        self.eval()
        length = min(8, self.config.context)
        random = torch.Generator().manual_seed(0)
        tokens = torch.randint(self.config.vocab_size, (1, length), generator=random).to(self.net.device)
        expected = self.net(tokens, attention_mask=torch.ones_like(tokens)).logits
        self.split = self.net.get_output_embeddings() is not None and self.net.base_model is not self.net
        self.split = self.split and self._agrees(lambda: self(tokens), expected)
        self.packs = self._may_pack() and self._agrees(lambda: self._packed(tokens), self._unpacked(tokens))
        self.train(training)

    def _agrees(self, compute: Any, expected: Tensor) -> bool:
        try:
            found = compute()
        except (TypeError, ValueError, RuntimeError, AttributeError, IndexError, KeyError):
            return False  # whatever a family does with what it does not take
        if found.shape != expected.shape:
            return False
        # Half precision is too coarse to tell a leak from rounding; then `_may_pack` has said no already.
        bound = SAME if self.net.dtype == torch.float32 else 0.05
        return float((found - expected).abs().max()) <= bound * float(expected.abs().max())

    def _may_pack(self) -> bool:
        """A mask of ours would replace the local attention of some layers, which a few tokens cannot show."""
        windows = (value for key, value in self.net.config.to_dict().items() if "window" in key or "chunk" in key)
        local = any(isinstance(size, int) and 0 < size < self.config.context for size in windows)
        return self.net.dtype == torch.float32 and "position_ids" in self._takes and not local

    def _packed(self, tokens: Tensor) -> Tensor:
        documents, positions = _halves(tokens)
        self.packs = True
        try:
            return self.forward(tokens, positions, documents)
        finally:
            self.packs = False

    def _unpacked(self, tokens: Tensor) -> Tensor:
        return self.forward(tokens, documents=_halves(tokens)[0])

    # -- training -----------------------------------------------------------------------------------------------------

    @property
    def backend(self) -> str:
        """How attention is computed: transformers' own choice, torch's SDPA wherever a family has it."""
        return "sdpa"

    @backend.setter
    def backend(self, name: str) -> None:
        if name != "sdpa":
            raise UsageError(
                f"attention {name} is of llmctl's own transformer; {self.config.arch} is computed by transformers",
                hint="leave `attention` out",
            )

    def set_dropout(self, share: float) -> None:
        """Zero this share in training, wherever the family drops anything; whole layers are never skipped."""
        for module in self.net.modules():
            if isinstance(module, nn.Dropout):
                module.p = share
        for owner in (self.net.config, *self.net.modules()):  # some keep it as a number, some ask the configuration
            for name, value in vars(owner).items():
                if isinstance(value, int | float) and not isinstance(value, bool) and "drop" in name:
                    setattr(owner, name, 0.0 if "layerdrop" in name else share)

    def recompute(self, mode: str) -> None:
        """From now on keep what `mode` says for the gradient: all (`none`), or what enters each layer (`full`)."""
        if mode == "none":
            if self.net.supports_gradient_checkpointing:
                self.net.gradient_checkpointing_disable()
            return
        if mode != "full" or not self.net.supports_gradient_checkpointing:
            raise UsageError(
                f"recompute {mode} is not possible for {self.config.arch}, which is computed by transformers",
                hint="set recompute to none" + (" or full" if self.net.supports_gradient_checkpointing else ""),
            )
        self.net.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})

    # -- weights ------------------------------------------------------------------------------------------------------

    @property
    def outer_names(self) -> frozenset[str]:
        """Parameters that are no hidden matrices: embeddings, whose rows are looked up, and the head."""
        outer = {id(module.weight) for module in self.net.modules() if isinstance(module, nn.Embedding)}
        if (head := self.net.get_output_embeddings()) is not None:
            outer.add(id(head.weight))
        return frozenset(name for name, parameter in self.named_parameters() if id(parameter) in outer)

    def state_dict(self, *args: Any, **options: Any) -> dict[str, Any]:  # type: ignore[override]  # torch's overloads
        """Every tensor once, tied ones under their first name."""
        found: dict[str, Any] = super().state_dict(*args, **options)
        for name in self._tied:
            found.pop(f"net.{name}", None)
        return found

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """The reverse of `state_dict`."""
        tied = {f"net.{name}": state_dict[f"net.{first}"] for name, first in self._tied.items()}
        return super().load_state_dict({**state_dict, **tied}, strict, assign)

    def save(self, directory: Path, tokenizer_from: Path | None = None, max_shard_bytes: int = MAX_SHARD_BYTES) -> None:
        """Write what `save_pretrained` writes, with the `config.json` (but for the dtype) and the
        `generation_config.json` that were read, and the tokenizer of `tokenizer_from`."""
        directory.mkdir(parents=True, exist_ok=True)
        try:
            with quiet():
                _plain_generation(self.net)
                self.net.save_pretrained(directory, max_shard_size=max_shard_bytes)
        except OSError as error:
            raise StageError(f"cannot write {directory}: {error}", hint="is the disk full?") from error
        config = json.loads((self.directory / "config.json").read_text(encoding="utf-8"))
        config.pop("torch_dtype", None)
        _write_json(directory / "config.json", {**config, "dtype": str(self.net.dtype).removeprefix("torch.")})
        generation = self.directory / "generation_config.json"
        (directory / "generation_config.json").unlink(missing_ok=True)
        if generation.is_file():
            (directory / "generation_config.json").write_bytes(generation.read_bytes())
        if tokenizer_from is not None:
            copy_tokenizer(tokenizer_from, directory)


# -- opening ----------------------------------------------------------------------------------------------------------


def load_foreign(
    directory: Path,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = torch.float32,
    *,
    allow_pickle: bool = False,
) -> ForeignModel:
    """Read a causal language model of transformers, in training mode. `dtype=None` keeps the stored one.

    Raises InputError for one that is none, is quantised or needs code of its own, and for a missing, unexpected or
    misshapen tensor, which it names; MachineError without transformers.
    """
    raw = read_json(directory / "config.json")
    names = ", ".join(raw.get("architectures") or ()) or str(raw.get("model_type"))
    _refuse(raw, names, directory)
    transformers = _library(names)
    # Misshapen tensors are left out by transformers, and refused below with their names.
    options = {"local_files_only": True, "trust_remote_code": False, "ignore_mismatched_sizes": True}
    if not allow_pickle:
        options["use_safetensors"] = True
    with quiet():
        try:
            net, info = transformers.AutoModelForCausalLM.from_pretrained(
                directory, dtype=dtype or "auto", output_loading_info=True, **options
            )
        except (OSError, ValueError, KeyError, RuntimeError, ImportError, AttributeError, TypeError) as error:
            # The last two: a config.json with a field of another family, which this one computes from others.
            line = (str(error).splitlines() or [type(error).__name__])[0]
            raise InputError(
                f"transformers cannot open {directory} ({names}): {line}",
                hint="language models (…ForCausalLM) of architectures that transformers has can be trained",
            ) from error
    _refuse_tensors(info, names, directory)
    net.to(device)
    return ForeignModel(net, describe(net, directory), directory).train()


def _refuse(raw: Mapping[str, Any], names: str, directory: Path) -> None:
    if raw.get("quantization_config") is not None:
        raise InputError(
            f"{directory} ({names}) is quantised", hint="take the model with its weights in full precision"
        )
    if raw.get("is_encoder_decoder"):
        raise InputError(
            f"{directory} ({names}) is an encoder-decoder that llmctl does not compute",
            hint="T5 is computed by llmctl's own transformer; others can be exported by export-onnx",
        )


KINDS = (("missing", "missing"), ("unexpected", "unexpected"), ("misshapen", "mismatched"))
"""What may be wrong with a tensor, and transformers' word for it."""


def _refuse_tensors(info: Mapping[str, Any], names: str, directory: Path) -> None:
    found = {what: info[f"{key}_keys"] for what, key in KINDS}
    parts = [
        f"{what}: {', '.join(sorted(names)[:4])}" + (f" and {len(names) - 4} more" if len(names) > 4 else "")
        for what, names in found.items()
        if names
    ]
    if parts:
        raise InputError(f"the tensors in {directory} are not those of its config.json ({names}); {'; '.join(parts)}")


def _tied(net: nn.Module) -> dict[str, str]:
    """Names of tensors that have another name before them, with that."""
    first: dict[int, str] = {}
    found = {}
    for name, parameter in net.named_parameters(remove_duplicate=False):
        if (known := first.setdefault(id(parameter), name)) != name:
            found[name] = known
    return found


def _halves(tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Documents and positions of two documents that share the row."""
    length = tokens.shape[1]
    cut = length - length // 3
    where = torch.arange(length, device=tokens.device)
    second = where >= cut
    return second.long()[None], torch.where(second, where - cut, where)[None]


def _plain_generation(net: Any) -> None:
    """transformers refuses to save generation defaults that contradict each other; the file is copied anyhow."""
    net.generation_config = type(net.generation_config)()


def _library(names: str) -> Any:
    try:
        import transformers
    except ModuleNotFoundError as error:
        if error.name != "transformers":
            raise
        raise MachineError(
            f"{names} is computed by transformers, which is not installed", hint=f"pip install '{EXTRA}'"
        ) from error
    return transformers


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """transformers without bars and advice."""
    logging: Any = import_module("transformers.utils.logging")
    level, shown = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if shown:
            logging.enable_progress_bar()


def _write_json(path: Path, values: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(dict(sorted(values.items())), indent=2) + "\n", encoding="utf-8")
