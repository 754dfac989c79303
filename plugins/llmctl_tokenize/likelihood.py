"""A Unigram vocabulary by sentencepiece (Kudo 2018, 1804.10959): pieces that make the words most likely."""

from __future__ import annotations

import io
import tempfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from llmctl import MachineError, StageError
from llmctl_tokenize.sentencepiece_model import read_model

ESCAPED = {
    char: chr(0xF0000 + number)
    for number, char in enumerate("\n\t\r\0 ▁\u2028\u2029\u0085\v\f\x1c\x1d\x1e\u00a0\u3000\ufeff")
}
"""Characters that its files and its idea of white space have other uses for, as ones of private use."""
LONGEST = 4000
"""Bytes of a word that is looked at; longer ones are cut."""


def train(words: Counter[str], size: int, longest: int, required: Sequence[str]) -> list[tuple[str, float]]:
    """At most `size` pieces with their log-probabilities, best first; every character of `required` is one.

    StageError if `size` does not hold them.
    """
    try:
        import sentencepiece
    except ModuleNotFoundError as error:
        raise MachineError(
            "kind: unigram needs the module `sentencepiece`", hint="pip install 'llmctl[sentencepiece]'"
        ) from error
    if len(required) > size:
        raise StageError(
            f"the text has {len(required)} characters, vocab_size leaves room for {size} pieces",
            hint="raise vocab_size, or set limit_alphabet",
        )
    table = str.maketrans(ESCAPED)
    back = str.maketrans({code: char for char, code in ESCAPED.items()})
    written = io.BytesIO()
    with tempfile.TemporaryDirectory(prefix="llmctl-unigram-") as directory:
        path = Path(directory) / "words.tsv"
        with path.open("w", encoding="utf-8", newline="\n") as file:
            for word, count in sorted(words.items()):
                for part in _parts(word.translate(table)):
                    file.write(f"{part}\t{count}\n")
        try:
            sentencepiece.SentencePieceTrainer.train(
                input=str(path),
                input_format="tsv",
                model_writer=written,
                model_type="unigram",
                vocab_size=size + 1,
                hard_vocab_limit=False,
                character_coverage=1.0,
                required_chars="".join(required).translate(table),
                max_sentencepiece_length=longest,
                split_by_whitespace=False,
                split_by_unicode_script=False,
                split_by_number=False,
                normalization_rule_name="identity",
                add_dummy_prefix=False,
                remove_extra_whitespaces=False,
                bos_id=-1,
                eos_id=-1,
                num_threads=1,  # sums of floats depend on how the work is shared out
                minloglevel=2,
            )
        except (RuntimeError, OSError) as error:
            raise StageError(
                f"sentencepiece could not train: {str(error).strip().splitlines()[-1]}",
                hint="give more text, or another vocab_size",
            ) from error
    found = [(piece.text.translate(back), piece.score) for piece in read_model(written.getvalue()).pieces[1:]]
    return _complete(found, size, required)


def _complete(found: list[tuple[str, float]], size: int, required: Sequence[str]) -> list[tuple[str, float]]:
    """The best pieces, and every required character: one that no word holds is less likely than all others."""
    known, needed = {text for text, _ in found}, set(required)
    least = min((score for _, score in found), default=0.0) - 1
    missing = [(char, least) for char in required if char not in known]
    surplus = len(found) + len(missing) - size
    droppable = [text for text, _ in reversed(found) if text not in needed][: max(0, surplus)]
    return [piece for piece in found if piece[0] not in {*droppable}] + missing


def _parts(word: str) -> list[str]:
    """`word`, in parts that sentencepiece does not leave out for their length."""
    step = LONGEST // 4
    return [word[start : start + step] for start in range(0, len(word), step)]
