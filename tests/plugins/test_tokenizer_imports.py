"""Imported tokenizers give the ids of the libraries that they come from."""

from __future__ import annotations

import base64
import io
import json
import random
from pathlib import Path

import pytest
import sentencepiece
import tiktoken
from tiktoken_ext import openai_public
from transformers import BertTokenizer, GPT2Tokenizer

from llmctl import InputError, UsageError
from llmctl.text.tokenizer import Tokenizer
from llmctl_tokenize import tiktoken_ranks
from llmctl_tokenize.importing import import_tokenizer

LIBRARY = Path(json.__file__).parent.parent
ODD = [
    "", " ", "  a  b ", "héllo 你好 🙂", "x\ty\r\n\n z", "123456 7", "don't WE'LL", "ａｂｃ ﬁ",
    "<|endoftext|>", "\u2028 \xa0 \x1c",
    "1234567\n", "end  \n", "   ",
]  # fmt: skip


@pytest.fixture(scope="module")
def lines() -> list[str]:
    """10,000 lines: real ones, odd ones, and random Unicode."""
    found = [
        line for path in sorted(LIBRARY.glob("*.py"))[:60] for line in path.read_text(encoding="utf-8").splitlines()
    ]
    generator = random.Random(0)
    # No combining marks: after a character that NFKC takes apart (`¼`), `tokenizers` normalises them in another way.
    pool = [*range(32, 127), *range(0xA1, 0x180), *range(0x4E00, 0x4E40), *range(0x1F600, 0x1F640), 0x20]
    noise = ["".join(map(chr, generator.choices(pool, k=generator.randrange(1, 30)))) for _ in range(500)]
    return [*ODD, *noise, *found][:10_000]


@pytest.fixture(scope="module")
def ranks(lines) -> dict[bytes, int]:
    """Ranks of 600 tokens, trained by tiktoken's own teaching trainer's rule: merge the most frequent pair."""
    words = [list(bytes([b]) for b in word.encode()) for line in lines[513:1500] for word in line.split(" ")]
    found = {bytes([byte]): byte for byte in range(256)}
    while len(found) < 600:
        counts: dict[tuple[bytes, bytes], int] = {}
        for word in words:
            for pair in zip(word, word[1:], strict=False):
                counts[pair] = counts.get(pair, 0) + 1
        left, right = max(counts, key=lambda pair: (counts[pair], pair))
        found.setdefault(left + right, len(found))
        for word in words:
            at = 0
            while at < len(word) - 1:
                if word[at] == left and word[at + 1] == right:
                    word[at : at + 2] = [left + right]
                at += 1
    return found


def write_ranks(path: Path, ranks: dict[bytes, int]) -> Path:
    path.write_text("".join(f"{base64.b64encode(token).decode()} {rank}\n" for token, rank in ranks.items()))
    return path


@pytest.mark.parametrize("name", [pytest.param("r50k_base", marks=pytest.mark.slow), "cl100k_base", "o200k_base"])
def test_tiktoken_gives_the_same_ids(tmp_path, ranks, lines, name):
    special = {"<|endoftext|>": 600, "<|later|>": 605}
    path = write_ranks(tmp_path / "own.tiktoken", ranks)
    pattern = tiktoken_ranks.ENCODINGS[name].pattern
    assert import_tokenizer(path, tmp_path / "made", pattern=pattern, special=special) == "tiktoken"
    ours = Tokenizer.load(tmp_path / "made")
    peer = tiktoken.Encoding("own", pat_str=pattern, mergeable_ranks=ranks, special_tokens=special)
    assert ours.encode_batch(lines) == peer.encode_ordinary_batch(lines)
    joined = "\n".join(lines[:2000])
    assert ours.encode(joined) == peer.encode_ordinary(joined)
    assert ours.decode(ours.encode(joined)) == joined
    assert ours.encode("a<|later|>b", special=True) == peer.encode("a<|later|>b", allowed_special="all")
    assert ours.vocab_size == 606 and ours.eos_id == 600
    assert ours.encode("<|endoftext|>") == peer.encode_ordinary("<|endoftext|>")


@pytest.mark.parametrize("name", tiktoken_ranks.ENCODINGS)
def test_the_known_encodings_are_tiktoken_s(monkeypatch, name):
    for reader in ("load_tiktoken_bpe", "data_gym_to_mergeable_bpe_ranks"):
        monkeypatch.setattr(openai_public, reader, lambda *_, **__: {})
    theirs = getattr(openai_public, name)()
    assert tiktoken_ranks.ENCODINGS[name].pattern == theirs["pat_str"]
    assert dict(tiktoken_ranks.ENCODINGS[name].special) == theirs["special_tokens"]


def test_special_tokens_between_the_ranks_keep_their_ids(tmp_path, ranks):
    moved = {token: rank if rank < 590 else rank + 1 for token, rank in ranks.items()}
    path = write_ranks(tmp_path / "own.tiktoken", moved)
    import_tokenizer(path, tmp_path / "made", pattern=tiktoken_ranks.R50K, special={"<|endoftext|>": 590})
    ours = Tokenizer.load(tmp_path / "made")
    assert ours.eos_id == 590 and ours.vocab_size == 601
    assert 590 not in ours.encode("<|endoftext|>")


@pytest.mark.parametrize(
    ("text", "message"),
    [("IQ== 0\n", "no token for the byte 0x00"), ("IQ==\n", ":1: no rank"), ("!! 1\n", ":1: no rank")],
)
def test_damaged_rank_files(tmp_path, text, message):
    (tmp_path / "a.tiktoken").write_text(text)
    with pytest.raises(InputError, match=message):
        import_tokenizer(tmp_path / "a.tiktoken", tmp_path / "made", encoding="r50k_base")
    with pytest.raises(UsageError, match="does not say how text is cut"):
        import_tokenizer(tmp_path / "a.tiktoken", tmp_path / "made")


def spm(path: Path, lines: list[str], **options) -> sentencepiece.SentencePieceProcessor:
    written = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines), model_writer=written, minloglevel=2, num_threads=1, **options
    )
    path.write_bytes(written.getvalue())
    return sentencepiece.SentencePieceProcessor(model_proto=written.getvalue())


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("llama", {"model_type": "bpe", "byte_fallback": True, "normalization_rule_name": "identity",
                   "remove_extra_whitespaces": False, "vocab_size": 900, "character_coverage": 0.999}),
        ("t5", {"model_type": "unigram", "vocab_size": 700, "pad_id": 3, "character_coverage": 0.999}),
        ("gemma", {"model_type": "unigram", "byte_fallback": True, "vocab_size": 900, "add_dummy_prefix": False,
                   "normalization_rule_name": "identity", "remove_extra_whitespaces": False}),
        ("own", {"model_type": "bpe", "vocab_size": 700, "user_defined_symbols": ["<sep>", "<cls>"]}),
    ],
)  # fmt: skip
def test_sentencepiece_gives_the_same_ids(tmp_path, lines, name, options):
    # sentencepiece cuts at NUL and line ends; its lines have none.
    given = [line.replace("\n", " ").replace("\r", " ") for line in lines]
    peer = spm(tmp_path / "spiece.model", given[513:3000], **options)
    assert import_tokenizer(tmp_path, tmp_path / "made") == "sentencepiece"
    ours = Tokenizer.load(tmp_path / "made")
    assert ours.vocab_size == peer.vocab_size()
    found, expected = ours.encode_batch(given), peer.encode(given)
    other = [(line, a, b) for line, a, b in zip(given, found, expected, strict=True) if a != b]
    if options["model_type"] == "bpe":
        assert other == []
    # Unigram: sentencepiece adds in 32 bits, which decides between cuts that are equally likely.
    assert len(other) <= 3
    for line, a, b in other:
        assert sum(map(peer.get_score, a)) == pytest.approx(sum(map(peer.get_score, b)), rel=1e-5), line
    assert (ours.bos_id, ours.eos_id, ours.unk_id) == (peer.bos_id(), peer.eos_id(), peer.unk_id())
    for line, ids in zip(given[513:700], expected[513:700], strict=True):
        assert ours.decode(ids, skip_special=False).replace("<unk>", " ⁇ ") == peer.decode(ids), line
    assert not {*ours.encode("<s> </s> <0x41>")} & {ours.bos_id, ours.eos_id}


def test_sentencepiece_models_that_cannot_be_expressed(tmp_path, lines):
    spm(tmp_path / "a.model", lines[513:1500], model_type="word", vocab_size=100)
    with pytest.raises(InputError, match="of type word are not supported"):
        import_tokenizer(tmp_path / "a.model", tmp_path / "made")
    (tmp_path / "b.model").write_bytes(b"\n\x99")
    with pytest.raises(InputError, match="no SentencePiece model"):
        import_tokenizer(tmp_path / "b.model", tmp_path / "made")


def test_vocabulary_files_of_gpt2_and_bert(tmp_path, ranks):
    source = tmp_path / "gpt2"
    source.mkdir()
    alphabet = tiktoken_ranks.byte_alphabet()
    vocabulary = {"".join(alphabet[b] for b in token): rank for token, rank in ranks.items()} | {"<|endoftext|>": 600}
    (source / "vocab.json").write_text(json.dumps(vocabulary))
    merges = tiktoken_ranks.merges(ranks, alphabet)
    (source / "merges.txt").write_text("#version: 0.2\n" + "".join(f"{a} {b}\n" for a, b in merges))
    assert import_tokenizer(source, tmp_path / "a") == "gpt2"
    ours, peer = Tokenizer.load(tmp_path / "a"), GPT2Tokenizer.from_pretrained(source)
    for text in ODD[1:8]:
        assert ours.encode(text) == peer.encode(text)
    assert ours.eos_id == 600
    source = tmp_path / "bert"
    source.mkdir()
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "hello", "##s", "a", "b", "don", "'", "t"]
    (source / "vocab.txt").write_text("\n".join(words) + "\n")
    assert import_tokenizer(source, tmp_path / "b") == "bert"
    ours, peer = Tokenizer.load(tmp_path / "b"), BertTokenizer(source / "vocab.txt")
    for text in ["Hellos a  b", "don't", "Ä x", "hello[MASK]"]:
        assert ours.encode(text) == peer.encode(text, add_special_tokens=False, split_special_tokens=True)
    assert (ours.cls_id, ours.pad_id, ours.unk_id) == (2, 0, 1)


def test_directories_are_copied_and_nonsense_is_refused(tmp_path):
    with pytest.raises(InputError, match="does not exist"):
        import_tokenizer(tmp_path / "nothing", tmp_path / "made")
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="holds no tokenizer"):
        import_tokenizer(tmp_path / "empty", tmp_path / "made")
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf" / "tokenizer.json").write_text("{")
    with pytest.raises(UsageError, match="no tiktoken rank file"):
        import_tokenizer(tmp_path / "hf", tmp_path / "made", encoding="r50k_base")
    with pytest.raises(InputError, match="damaged"):
        import_tokenizer(tmp_path / "hf", tmp_path / "made")
    with pytest.raises(InputError, match="is not empty"):
        import_tokenizer(tmp_path / "hf", tmp_path / "made")
