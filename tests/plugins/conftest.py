"""A tokenizer of bytes and a model whose answers are written down, for every stage that only generates."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path

import numpy as np
import pytest

from llmctl import Artifact
from llmctl.generator import GREEDY, Candidate, Sampling, check_prompt
from llmctl.registry import Registry
from llmctl.text.tokenizer import Tokenizer

from .terminal import Typist, open_chat

SPECIAL = ("<|bos|>", "<|end|>", "<|pad|>", "<|system|>", "<|user|>", "<|assistant|>")
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{{ '<|' + m['role'] + '|>' + m['content'] + '<|end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
END, ASSISTANT = 1, 5
SURE = 0.9
"""Probability that the scripted model gives to its next token; the others share the rest."""


def write_byte_tokenizer(directory: Path) -> Path:
    """One token per byte after the six special ones, and the chat template of our own tokenizers."""
    from tokenizers import AddedToken, decoders, models, pre_tokenizers
    from tokenizers import Tokenizer as Raw

    directory.mkdir(parents=True, exist_ok=True)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: number for number, token in enumerate([*SPECIAL, *alphabet])}
    raw = Raw(models.BPE(vocabulary, []))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    raw.decoder = decoders.ByteLevel()
    raw.add_special_tokens([AddedToken(token, special=True) for token in SPECIAL])
    raw.save(str(directory / "tokenizer.json"))
    names = {"bos_token": SPECIAL[0], "eos_token": SPECIAL[1], "pad_token": SPECIAL[2]}
    (directory / "tokenizer_config.json").write_text(json.dumps(names))
    (directory / "chat_template.jinja").write_text(TEMPLATE)
    return directory


class Scripted:
    """Answers each question with what `answers` says (by a part of the question), else with `default`.

    Its distribution is closed: `SURE` on the next token of the script, the rest spread evenly.
    """

    backend = "scripted"
    eos_ids = frozenset({END})
    encoder_decoder = False

    def __init__(
        self,
        tokenizer: Tokenizer,
        answers: Mapping[str, str] | None = None,
        default: str = "yes",
        context_length: int = 512,
        delay: float = 0.0,
    ) -> None:
        self.tokenizer, self.answers, self.default = tokenizer, dict(answers or {}), default
        self.context_length, self.delay = context_length, delay
        self.vocab_size = tokenizer.vocab_size
        self.generated = 0
        self.batches: list[int] = []

    def script(self, question: str) -> list[int]:
        found = [answer for part, answer in self.answers.items() if part in question]
        return [*self.tokenizer.encode(found[0] if found else self.default), END]

    def _next(self, tokens: Sequence[int]) -> int | None:
        """The scripted token after `tokens`, None where the script says nothing."""
        at = max((i for i, token in enumerate(tokens) if token == ASSISTANT), default=-1)
        script = self.script(self.tokenizer.decode(tokens[: at + 1] if at >= 0 else tokens[:]))
        if at < 0:  # a plain completion repeats its script for ever
            return script[(len(tokens) - 1) % (len(script) - 1)]
        said = list(tokens[at + 1 :])
        return script[len(said)] if len(said) < len(script) and script[: len(said)] == said else None

    def room(self, prompt: Sequence[int]) -> int:
        check_prompt(prompt, self.context_length)
        return self.context_length - len(prompt)

    def stream(self, prompt: Sequence[int], sampling: Sampling = GREEDY) -> Iterator[int]:
        check_prompt(prompt, self.context_length)
        random = np.random.default_rng(sampling.seed)
        tokens = list(prompt)
        for _ in range(min(sampling.max_new_tokens, self.context_length - len(prompt))):
            time.sleep(self.delay)
            self.generated += 1
            token = self._next(tokens)
            if sampling.temperature > 0 and random.random() > SURE:
                token = int(random.integers(len(SPECIAL), self.vocab_size))
            if token is None:
                token = len(SPECIAL)
            if token in self.eos_ids:
                return
            yield token
            tokens.append(token)

    def generate(self, prompts: Sequence[Sequence[int]], sampling: Sampling = GREEDY) -> list[list[int]]:
        self.batches.append(len(prompts))
        return [list(self.stream(prompt, sampling)) for prompt in prompts]

    def candidates(self, prompt: Sequence[int], sampling: Sampling = GREEDY) -> list[Candidate]:
        """Beams are the script, and the script after one, two, … other tokens."""
        found = [list(self.stream(prompt, single)) for single in sampling.draws()]
        if sampling.beams > 1:
            found = [[*[len(SPECIAL)] * i, *ids][: sampling.max_new_tokens] for i, ids in enumerate(found)]
        answers = []
        for ids in found:
            ended = len(ids) < sampling.max_new_tokens
            said = [*ids, END] if ended else ids
            logprobs = self.logprobs([*prompt, *said])[len(prompt) - 1 :].tolist()
            answers.append(Candidate(ids, logprobs, ended, sampling.length_penalty))
        return answers

    def answer_logits(self, prompt: Sequence[int], answer: Sequence[int]) -> np.ndarray:
        return self.logits([*prompt, *answer])[len(prompt) - 1 : -1]

    def logits(self, tokens: Sequence[int]) -> np.ndarray:
        rows = np.full((len(tokens), self.vocab_size), np.log((1 - SURE) / (self.vocab_size - 1)), np.float32)
        for i in range(len(tokens)):
            token = self._next(tokens[: i + 1])
            if token is None:
                rows[i] = -np.log(self.vocab_size)
            else:
                rows[i, token] = np.log(SURE)
        return rows

    def logprobs(self, tokens: Sequence[int]) -> np.ndarray:
        return np.take_along_axis(self.logits(tokens)[:-1], np.array(tokens[1:])[:, None], axis=1)[:, 0]


@pytest.fixture(scope="session")
def write_tokenizer() -> Callable[[Path], Path]:
    """Puts a tokenizer of bytes into a directory."""
    return write_byte_tokenizer


@pytest.fixture
def model_dir(tmp_path: Path) -> Path:
    """A directory with a byte tokenizer; the model in it is whatever `opens` gives."""
    return write_byte_tokenizer(tmp_path / "byte-model")


@pytest.fixture
def byte_tokenizer(model_dir: Path) -> Tokenizer:
    """The tokenizer in `model_dir`."""
    return Tokenizer.load(model_dir)


@pytest.fixture(scope="session")
def scripted() -> type[Scripted]:
    """The class of the scripted model."""
    return Scripted


@pytest.fixture
def opens(monkeypatch: pytest.MonkeyPatch):
    """Make `open_generator` give the model that belongs to a directory: `opens({model_dir: generator})`."""

    def put(models: Mapping[Path, Scripted]) -> None:
        def open_generator(self: Registry, artifact: Artifact, **options: object) -> Scripted:
            return models[artifact.path]

        monkeypatch.setattr(Registry, "open_generator", open_generator)

    return put


@pytest.fixture(scope="session")
def real_models(tmp_path_factory: pytest.TempPathFactory) -> tuple[Artifact, Artifact]:
    """One small random model with the byte tokenizer: as `model.hf`, and exported as `model.onnx`."""
    torch = pytest.importorskip("torch")
    pytest.importorskip("onnx")
    from llmctl.nn.config import ModelConfig
    from llmctl.nn.hf import save_model
    from llmctl.nn.transformer import Transformer
    from llmctl.testing import run_stage
    from llmctl_export_onnx import EXPORT_ONNX

    tokenizer = write_byte_tokenizer(tmp_path_factory.mktemp("tokenizer"))
    shape = {"arch": "llama", "vocab_size": 262, "dim": 64, "layers": 2, "heads": 4, "kv_heads": 2, "context": 128}
    torch.manual_seed(0)
    model = Transformer(ModelConfig(**shape, bos_id=0, eos_id=1, pad_id=2))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += torch.randn_like(parameter) * 0.05  # no two tokens alike
    hf = Artifact(tmp_path_factory.mktemp("hf"), "model.hf")
    save_model(model, hf.path, tokenizer)
    exported = run_stage(EXPORT_ONNX, tmp_path_factory.mktemp("onnx"), {"parity_prompts": 2, "threads": 1}, model=hf)
    return hf, exported.outputs["model"]


@pytest.fixture(scope="session")
def adapted_models(
    real_models: tuple[Artifact, Artifact], tmp_path_factory: pytest.TempPathFactory
) -> tuple[dict[str, Path], Artifact]:
    """Two adapters of `real_models` in peft's files, and the bundle of the model with both."""
    from llmctl.testing import run_stage
    from llmctl_export_onnx import EXPORT_ONNX

    sys.path.insert(0, str(Path(__file__).parents[1] / "ort" / "models"))
    import lora

    hf, root = real_models[0], tmp_path_factory.mktemp("adapters")
    directories = {
        "polite": lora.write_adapter(root / "polite", hf.path, rank=4, seed=1, size=0.3),
        "terse": lora.write_adapter(root / "terse", hf.path, ("q_proj", "v_proj", "down_proj"), 3, 2, 0.5),
    }
    ids = (f"sha256:{digit * 64}" for digit in "ab")
    adapters = [Artifact(path, "model.adapter", id) for path, id in zip(directories.values(), ids, strict=True)]
    params = {"parity_prompts": 2, "threads": 1}
    done = run_stage(EXPORT_ONNX, tmp_path_factory.mktemp("adapted"), params, model=hf, adapters=adapters)
    return directories, done.outputs["model"]


@pytest.fixture
def terminal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., AbstractContextManager[Typist]]:
    """`with terminal(arguments) as typed`: `llmctl chat` in a pty; its history is in the test's directory."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    return open_chat
