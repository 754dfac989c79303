"""The stage `tokenize`: merges as a naive trainer's, files that transformers loads, shards that give text back."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest
import regex
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from transformers import AutoTokenizer

from llmctl import Artifact, InputError, StageError, UsageError
from llmctl.testing import run_stage
from llmctl.text.datasets import DatasetWriter
from llmctl.text.shards import TokenShards
from llmctl.text.tokenizer import Tokenizer
from llmctl_tokenize import TOKENIZE, encoding, kinds
from llmctl_tokenize.params import TokenizeParams

LIBRARY = Path(json.__file__).parent.parent
SPECIAL = ["<|bos|>", "<|end|>", "<|pad|>", "<|system|>", "<|user|>", "<|assistant|>"]


def sources(*names: str) -> list[str]:
    return [(LIBRARY / name).read_text(encoding="utf-8") for name in names]


def dataset(directory: Path, train: list[str], validation: list[str] = ()) -> Artifact:
    with DatasetWriter(directory, "dataset.text", ("train", "validation")) as writer:
        for split, texts in (("train", train), ("validation", validation)):
            for number, text in enumerate(texts):
                writer.add(split, {"id": f"{split}{number}", "source": "s", "text": text})
    return Artifact(directory, "dataset.text")


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    return dataset(tmp_path_factory.mktemp("text"), sources("textwrap.py", "heapq.py"), sources("bisect.py"))


@pytest.fixture(scope="module")
def made(tmp_path_factory, text):
    return run_stage(TOKENIZE, tmp_path_factory.mktemp("made"), {"vocab_size": 600}, text=text)


# GPT-2's pattern and byte alphabet, as in openai/gpt-2 `src/encoder.py`.
GPT2 = regex.compile(r"""'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+""")


def byte_alphabet() -> dict[int, str]:
    kept = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    table = {byte: chr(byte) for byte in kept}
    for byte in range(256):
        if byte not in table:
            table[byte] = chr(256 + len(table) - len(kept))
    return table


def naive_merges(texts: list[str], merges: int, min_frequency: int = 2) -> list[tuple[str, str]]:
    """BPE as in Sennrich et al. 2016, algorithm 1, recounting everything for each merge.

    Tie rule: count descending, then (id of left, id of right) ascending; ids: special tokens, then the alphabet by code
    point, then order of creation.
    """
    table = byte_alphabet()
    words = Counter("".join(table[b] for b in word.encode()) for text in texts for word in GPT2.findall(text))
    ids = {char: number for number, char in enumerate(sorted(table.values()), start=len(SPECIAL))}
    split = {word: list(word) for word in words}
    found = []
    for _ in range(merges):
        pairs: Counter[tuple[str, str]] = Counter()
        for word, count in words.items():
            for pair in zip(split[word], split[word][1:], strict=False):
                pairs[pair] += count
        left, right = min(pairs, key=lambda pair: (-pairs[pair], ids[pair[0]], ids[pair[1]]))
        if pairs[left, right] < min_frequency:
            break
        found.append((left, right))
        ids.setdefault(left + right, len(ids) + len(SPECIAL))
        for word, parts in split.items():
            joined, i = [], 0
            while i < len(parts):
                if parts[i : i + 2] == [left, right]:
                    joined.append(left + right)
                    i += 2
                else:
                    joined.append(parts[i])
                    i += 1
            split[word] = joined
    return found


def merges_of(directory: Path) -> list[tuple[str, str]]:
    return [tuple(pair) for pair in json.loads((directory / "tokenizer.json").read_text())["model"]["merges"]]


def test_merges_equal_a_naive_trainer(made):
    expected = naive_merges(sources("textwrap.py", "heapq.py"), 600 - 262)
    assert len(expected) == 338
    assert merges_of(made.outputs["tokenizer"].path) == expected


@pytest.mark.slow
def test_merges_equal_a_naive_trainer_on_a_megabyte(tmp_path):
    files, size = [], 0
    for path in sorted(LIBRARY.glob("*.py")):
        files.append(path.name)
        size += path.stat().st_size
        if size > 1 << 20:
            break
    made = run_stage(TOKENIZE, tmp_path / "made", {"vocab_size": 600}, text=dataset(tmp_path / "text", sources(*files)))
    assert merges_of(made.outputs["tokenizer"].path) == naive_merges(sources(*files), 600 - 262)


def test_overlapping_pairs_are_counted_as_they_merge(tmp_path):
    words = " aaaa aaa aaaaa bb bb bb"
    made = run_stage(
        TOKENIZE, tmp_path / "made", {"vocab_size": 268}, text=dataset(tmp_path / "text", [words * 3], ["aaaaaaa"])
    )
    assert merges_of(made.outputs["tokenizer"].path) == naive_merges([words * 3], 6)


def merged(word: list[str], left: str, right: str) -> list[str]:
    joined, i = [], 0
    while i < len(word):
        pair = word[i : i + 2] == [left, right]
        joined.append(left + right if pair else word[i])
        i += 2 if pair else 1
    return joined


def pairs_of(word: list[str], overlapping: bool) -> list[tuple[str, str]]:
    """Neighbours; `aaa` has the pair `aa` twice, or once if pairs may not overlap."""
    found, i = [], 0
    while i < len(word) - 1:
        pair = (word[i], word[i + 1])
        found.append(pair)
        i += 2 if not overlapping and pair[0] == pair[1] == "".join(word[i + 2 : i + 3]) else 1
    return found


@pytest.mark.parametrize(
    ("fault", "text"), [("without overlaps", "aaa aaa bc bc bc"), ("across words", "x y x y x y zz zz")]
)
def test_other_ways_to_count_or_merge_give_another_list(tmp_path, fault, text):
    """The controls: `aaa` counted as one pair, though both of its places can merge; and pairs across the cuts."""
    table = byte_alphabet()
    words = [text] if fault == "across words" else GPT2.findall(text)
    split, found = [[table[b] for b in word.encode()] for word in words], []
    for _ in range(2):
        pairs = Counter(pair for word in split for pair in pairs_of(word, fault == "across words"))
        left, right = min(pairs, key=lambda pair: (-pairs[pair], pair))
        found.append((left, right))
        split = [merged(word, left, right) for word in split]
    made = run_stage(TOKENIZE, tmp_path / "made", {"vocab_size": 264}, text=dataset(tmp_path / "text", [text]))
    ours = merges_of(made.outputs["tokenizer"].path)
    assert ours == naive_merges([text], 2)
    assert ours != found


def test_size_special_tokens_and_alphabet(made):
    tokenizer = Tokenizer.load(made.outputs["tokenizer"].path)
    assert tokenizer.vocab_size == made.metrics["vocab_size"] == 600
    assert tokenizer.special_tokens() == {token: number for number, token in enumerate(SPECIAL)}
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id) == (0, 1, 2)
    vocabulary = json.loads((tokenizer.directory / "tokenizer.json").read_text())["model"]["vocab"]
    assert set(byte_alphabet().values()) <= set(vocabulary)
    assert sum(tokenizer.token_bytes()) > 0


@settings(max_examples=150)
@given(some=st.text(st.characters(codec="utf-8"), max_size=60))
def test_any_text_comes_back(made, some):
    tokenizer = Tokenizer.load(made.outputs["tokenizer"].path)
    assert tokenizer.decode(tokenizer.encode(some), skip_special=False) == some
    sizes = tokenizer.token_bytes()
    assert sum(sizes[i] for i in tokenizer.encode(some)) == len(some.encode())


def test_every_byte_has_a_token(made):
    peer = AutoTokenizer.from_pretrained(made.outputs["tokenizer"].path)
    table = byte_alphabet()
    ids = [peer.convert_tokens_to_ids(table[byte]) for byte in range(256)]
    assert len(set(ids)) == 256 and None not in ids
    assert Tokenizer.load(made.outputs["tokenizer"].path).decode(ids) == bytes(range(256)).decode("utf-8", "replace")


def test_a_common_word_is_one_token_and_a_rare_one_several(tmp_path):
    texts = ["the module zymurgical provides it"] + ["a frobnicate function"] * 200
    made = run_stage(TOKENIZE, tmp_path / "made", {"vocab_size": 279}, text=dataset(tmp_path / "text", texts))
    tokenizer = Tokenizer.load(made.outputs["tokenizer"].path)
    assert len(tokenizer.encode(" frobnicate")) == 1
    assert len(tokenizer.encode(" zymurgical")) > 1


def test_transformers_loads_it_and_agrees(made):
    directory = made.outputs["tokenizer"].path
    ours, peer = Tokenizer.load(directory), AutoTokenizer.from_pretrained(directory)
    assert type(peer).__name__ == "PreTrainedTokenizerFast" and len(peer) == 600
    assert (peer.bos_token_id, peer.eos_token_id, peer.pad_token_id) == (0, 1, 2)
    assert set(peer.all_special_tokens) == set(SPECIAL)
    assert peer.model_max_length > 10**9
    for some in [*sources("bisect.py"), "héllo 你好 🙂 \x00", " 12345 don't"]:
        assert ours.encode(some) == peer(some, split_special_tokens=True)["input_ids"]
        assert peer.decode(ours.encode(some)) == some
    talk = [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}, {"role": "assistant", "content": "a"}]
    expected = f"<|bos|><|system|>s<|end|><|user|>u<|end|><|assistant|>a<|end|>"  # noqa: F541  # reads as the template
    assert peer.apply_chat_template(talk, tokenize=False) == expected
    assert peer.apply_chat_template(talk[:2], tokenize=False, add_generation_prompt=True).endswith("<|assistant|>")
    assert ours.encode_chat(talk).ids == peer.apply_chat_template(talk)
    with pytest.raises(InputError, match="unknown role critic"):
        ours.encode_chat([{"role": "critic", "content": "x"}])


@pytest.mark.parametrize(
    ("special", "first", "roles", "frame"),
    [
        ("bert", ["[PAD]", "[CLS]", "[SEP]", "[MASK]"], {"pad": 0, "cls": 1, "sep": 2, "mask": 3}, (1, 2)),
        ("roberta", ["<s>", "<pad>", "</s>", "<mask>"], {"bos": 0, "pad": 1, "eos": 2, "mask": 3}, (0, 2)),
        ("t5", ["<pad>", "</s>"], {"pad": 0, "eos": 1}, (None, 1)),
    ],
)
def test_special_tokens_of_other_kinds_of_models(text, tmp_path, special, first, roles, frame):
    params = {"vocab_size": 420, "special": special}
    made = run_stage(TOKENIZE, tmp_path / "made", params, text=text)
    ours = Tokenizer.load(made.outputs["tokenizer"].path)
    peer = AutoTokenizer.from_pretrained(ours.directory)
    assert peer.convert_ids_to_tokens(list(range(len(first)))) == first
    for role, number in roles.items():
        assert getattr(ours, f"{role}_id") == getattr(peer, f"{role}_token_id") == number
    assert len(peer) == ours.vocab_size == 420
    # A document is framed as transformers frames a text.
    start = [] if frame[0] is None else [frame[0]]
    assert ours.encode_document("a b") == [*start, *ours.encode("a b"), frame[1]] == peer("a b")["input_ids"]
    sentinels = 100 if special == "t5" else 0
    assert ours.sentinel_ids == list(range(419, 419 - sentinels, -1))
    if sentinels:
        assert peer.convert_ids_to_tokens(419) == "<extra_id_0>" and 419 in ours.special_ids
        assert ours.encode("<extra_id_0>") != [419] == ours.encode("<extra_id_0>", special=True)
    pair = peer("a", "b")
    if special == "bert":
        assert pair["token_type_ids"] == [0] * 3 + [1] * 2
    assert peer.decode(pair["input_ids"], skip_special_tokens=True) == "ab"
    with pytest.raises(InputError, match="no chat template"):
        ours.encode_chat([{"role": "user", "content": "u"}])
    for path in ours.directory.iterdir():  # equal text, equal bytes
        again = run_stage(TOKENIZE, tmp_path / "again", params, text=text).outputs["tokenizer"].path
        assert path.read_bytes() == (again / path.name).read_bytes()


def test_words_are_where_letters_meet(made):
    tokenizer = Tokenizer.load(made.outputs["tokenizer"].path)
    continues, leaves_open = tokenizer.word_joins()
    text = "wonderful héllo, foo1bar (x)"
    ids = tokenizer.encode(text)
    words, current = [], [ids[0]]
    for before, after in zip(ids, ids[1:], strict=False):
        if continues[after] and leaves_open[before]:
            current.append(after)
        else:
            words, current = [*words, current], [after]
    assert [tokenizer.decode(word) for word in [*words, current]] == [
        "wonderful", " héllo", ",", " foo1bar", " (", "x", ")"
    ]  # fmt: skip
    assert not any(continues[i] or leaves_open[i] for i in tokenizer.special_ids)


def test_shards_hold_every_document(made, text):
    tokenizer = Tokenizer.load(made.outputs["tokenizer"].path)
    shards = TokenShards.open(made.outputs["tokens"])
    assert shards.tokenizer == tokenizer.digest and shards.vocab_size == 600
    for split, texts in (("train", sources("textwrap.py", "heapq.py")), ("validation", sources("bisect.py"))):
        found = shards.split(split)
        assert [found.document(i).tolist() for i in range(len(found))] == [tokenizer.encode_document(t) for t in texts]
        assert [tokenizer.decode(found.document(i)) for i in range(len(found))] == texts
        assert found.bytes == sum(len(t.encode()) for t in texts)
        assert made.metrics[f"tokens.{split}"] == len(found.tokens)
        content = len(found.tokens) - 2 * len(texts)
        assert made.metrics[f"bytes_per_token.{split}"] == pytest.approx(found.bytes / content)
    assert made.outputs["tokens"].metadata == {
        "tokenizer": tokenizer.digest,
        "vocab_size": 600,
        "tokens": sum(made.metrics[f"tokens.{split}"] for split in ("train", "validation")),
    }


def test_special_tokens_in_documents_stay_text(tmp_path):
    texts = ["a<|end|>b <|bos|>" * 20]
    made = run_stage(TOKENIZE, tmp_path / "made", {"vocab_size": 264}, text=dataset(tmp_path / "text", texts))
    tokens = TokenShards.open(made.outputs["tokens"]).split("train").tokens.tolist()
    assert [i for i in tokens if i < 6] == [0, 1]


def test_equal_text_gives_equal_bytes(made, text, tmp_path):
    again = run_stage(TOKENIZE, tmp_path, {"vocab_size": 600}, text=text)
    for port in ("tokenizer", "tokens"):
        for path in made.outputs[port].path.iterdir():
            assert path.read_bytes() == (again.outputs[port].path / path.name).read_bytes(), path.name


def test_a_vocabulary_larger_than_the_text_allows(tmp_path):
    text = dataset(tmp_path / "text", ["to be or not to be"])
    with pytest.raises(StageError, match=r"allows a vocabulary of (\d+) tokens, 5000 were asked for") as caught:
        run_stage(TOKENIZE, tmp_path / "a", {"vocab_size": 5000}, text=text)
    assert caught.value.exit_code == 3
    reachable = int(caught.value.message.split("vocabulary of ")[1].split()[0])
    assert str(reachable) in caught.value.hint
    made = run_stage(TOKENIZE, tmp_path / "b", {"vocab_size": reachable}, text=text)
    assert made.metrics["vocab_size"] == reachable
    with pytest.raises(StageError, match=rf"allows a vocabulary of {reachable} tokens"):
        run_stage(TOKENIZE, tmp_path / "c", {"vocab_size": reachable + 1}, text=text)
    more = run_stage(TOKENIZE, tmp_path / "d", {"vocab_size": reachable + 1, "min_frequency": 1}, text=text)
    assert more.metrics["vocab_size"] == reachable + 1


@pytest.mark.parametrize(("pattern", "digits", "merges"), [("gpt2", 7, 9), ("llama3", 3, 8), ("qwen2", 1, 4)])
def test_patterns_cut_numbers(tmp_path, pattern, digits, merges):
    texts = ["x 1234567 y\n\n  z" * 40]
    params = {"vocab_size": 262 + merges, "pattern": pattern}
    made = run_stage(TOKENIZE, tmp_path / "made", params, text=dataset(tmp_path / "text", texts))
    tokenizer = Tokenizer.load(made.outputs["tokenizer"].path)
    ids = tokenizer.encode("1234567")
    assert tokenizer.decode(ids) == "1234567"
    assert max(tokenizer.token_bytes()[i] for i in ids) <= digits
    assert len(
        kinds.untrained(TokenizeParams(pattern=pattern), [], None).pre_tokenizer.pre_tokenize_str("1234567")
    ) == -(-7 // digits)
    assert AutoTokenizer.from_pretrained(tokenizer.directory).encode("x 1234567") == tokenizer.encode("x 1234567")


def test_emit_chooses_the_outputs(text, tmp_path):
    made = run_stage(TOKENIZE, tmp_path / "a", {"vocab_size": 300, "emit": "tokens"}, text=text)
    assert set(made.outputs) == {"tokens", "metrics"}
    assert TokenShards.open(made.outputs["tokens"]).vocab_size == 300
    made = run_stage(TOKENIZE, tmp_path / "b", {"vocab_size": 300, "emit": "tokenizer"}, text=text)
    assert set(made.outputs) == {"tokenizer", "metrics"} and "tokens.train" not in made.metrics


def test_a_bound_tokenizer_is_passed_through(made, text, tmp_path):
    again = run_stage(TOKENIZE, tmp_path / "a", {}, text=text, tokenizer=made.outputs["tokenizer"])
    for port in ("tokenizer", "tokens"):
        for path in made.outputs[port].path.iterdir():
            assert path.read_bytes() == (again.outputs[port].path / path.name).read_bytes(), path.name
    run_stage(TOKENIZE, tmp_path / "b", {"vocab_size": 600}, text=text, tokenizer=made.outputs["tokenizer"])
    for wrong in ({"vocab_size": 700}, {"min_frequency": 3}, {"pattern": "llama3"}, {"special": "bert"}):
        with pytest.raises(UsageError, match=f"{next(iter(wrong))} cannot be set"):
            run_stage(TOKENIZE, tmp_path / "c", wrong, text=text, tokenizer=made.outputs["tokenizer"])


def test_a_tokenizer_that_changes_text_is_a_warning(made, text, tmp_path):
    from tokenizers import Tokenizer as Peer
    from tokenizers import normalizers

    peer = Peer.from_file(str(made.outputs["tokenizer"].path / "tokenizer.json"))
    peer.normalizer = normalizers.Lowercase()
    (tmp_path / "lower").mkdir()
    peer.save(str(tmp_path / "lower" / "tokenizer.json"))
    again = run_stage(TOKENIZE, tmp_path / "made", {}, text=text, tokenizer=Artifact(tmp_path / "lower", "tokenizer"))
    warnings = [fields["text"] for kind, fields in again.events if kind == "warning"]
    assert len(warnings) == 1 and "does not give back document 1 of `train`" in warnings[0]


def test_rows_without_text_and_empty_splits(tmp_path):
    with DatasetWriter(tmp_path / "chat", "dataset.chat") as writer:
        writer.add("train", {"id": "1", "messages": []})
    with pytest.raises(InputError, match="row 1 of `train` has no column `text`") as caught:
        run_stage(TOKENIZE, tmp_path / "a", {}, text=Artifact(tmp_path / "chat", "dataset.chat"))
    assert "id, messages" in caught.value.hint
    with pytest.raises(InputError, match="training split is empty"):
        run_stage(TOKENIZE, tmp_path / "b", {}, text=dataset(tmp_path / "text", [], ["x"]))


def test_batches_are_bounded(monkeypatch):
    monkeypatch.setattr(encoding, "BATCH_BYTES", 10)
    documents = [("s", "a" * 10), ("s", "b"), ("t", "c")]
    assert list(encoding.batches(iter(documents))) == [documents[:1], documents[1:]]


def test_progress_is_shown(tmp_path):
    texts = [f"text number {i}" for i in range(250)]
    made = run_stage(TOKENIZE, tmp_path / "made", {"vocab_size": 266}, text=dataset(tmp_path / "text", texts))
    steps = [(fields["phase"], fields["step"], fields["total"]) for kind, fields in made.events if kind == "progress"]
    assert steps == [("train", 100, 250), ("train", 200, 250), ("encode", 250, 250)]


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"vocab_size": 261}, "greater than or equal to 262"),
        ({"vocab_size": 0}, "greater than or equal to 1"),
        ({"vocab_size": 357, "special": "t5"}, "greater than or equal to 358"),
        ({"vocab_size": 300, "sentinels": 39}, "greater than or equal to 301"),
        ({"special": "elmo"}, "'gpt', 'bert', 'roberta' or 't5'"),
        ({"vocab_size": "8192"}, "valid integer"),
        ({"min_frequency": 0}, "greater than or equal to 1"),
        ({"emit": "all"}, "'both', 'tokenizer' or 'tokens'"),
        ({"pattern": "gpt5"}, "'gpt2', 'llama3', 'qwen2', 'words', 'spaces', 'lines' or 'whole'"),
        ({"vocabsize": 300}, "Extra inputs are not permitted"),
    ],
)
def test_nonsense_is_refused(wrong, message):
    with pytest.raises(ValidationError, match=message):
        TokenizeParams.model_validate(wrong)
