"""What can be seen of a model from outside, by what it answers: exported graphs, models of transformers."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from llmctl.errors import UsageError
from llmctl.generator import Generator, Sampling
from llmctl.ort import OrtSeq2Seq, open_encoder
from llmctl.text.tokenizer import Tokenizer
from llmctl_train_pretrain.inspection import Inspection, check_text, encode, predictions_of, tokens_of


def inspect_generator(
    name: str,
    generator: Generator,
    tokenizer: Tokenizer,
    text: str,
    target: str | None,
    top: int,
    sampling: Sampling | None,
    closed: str = "",
) -> Inspection:
    """The distributions of anything that generates; `closed`: why there is no more to see."""
    kind = "encoder-decoder" if generator.encoder_decoder else "decoder"
    if target is not None and not generator.encoder_decoder:
        raise UsageError("a target has no meaning for a decoder", hint="leave --target out")
    ids = encode(tokenizer, text, kind)
    check_text(ids)
    found = Inspection(name, generator.backend, kind, "lm", tokens_of(tokenizer, ids), [], [], sampling, closed=closed)
    if not generator.encoder_decoder:
        found.predictions = predictions_of(found, generator.logits(ids), (), tokenizer, top)
        return found
    said = tokenizer.encode(target or "", special=True)
    # One more, whatever it is: what it would have been chosen from is what comes next.
    logits = generator.answer_logits(ids, [*said, 0])
    start = generator.start_id if isinstance(generator, OrtSeq2Seq) else tokenizer.pad_id or 0
    found.source, found.tokens = found.tokens, tokens_of(tokenizer, [start, *said])
    found.predictions = predictions_of(found, logits, (), tokenizer, top)
    return found


def inspect_encoder(
    name: str,
    directory: Path,
    kind: str,
    tokenizer: Tokenizer,
    text: str,
    top: int,
    sampling: Sampling | None,
    device: str,
) -> Inspection:
    """What the head of an exported encoder says, or that of a decoder that classifies."""
    encoder = open_encoder(directory, device)
    ids = encode(tokenizer, text, kind)
    check_text(ids)
    made = encoder.run([ids])
    head, outputs = "features", None
    if "start_logits" in made:
        head, outputs = "question-answering", np.stack([made["start_logits"][0], made["end_logits"][0]], axis=-1)
    elif "logits" in made:
        outputs = made["logits"][0]
        head = "mlm" if not encoder.labels else "classification" if outputs.ndim == 1 else "token-classification"
    tokens = tokens_of(tokenizer, ids)
    found = Inspection(name, encoder.backend, kind, head, tokens, [], [], sampling)
    found.predictions = predictions_of(found, outputs, encoder.labels, tokenizer, top)
    return found
