"""Named models: exact sizes against published ones and against transformers; one trait more breaks them."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import replace

import pytest
import torch
import transformers
from transformers import AutoConfig

from llmctl.errors import UsageError
from llmctl.nn.config import TRAITS, ModelConfig
from llmctl.nn.counts import count
from llmctl.nn.families import from_hf, in_transformers, to_hf
from llmctl.nn.presets import PRESETS, preset, preset_names
from llmctl.nn.published import PUBLISHED
from llmctl.nn.transformer import Transformer

EXACT = {
    # The papers' models, and the releases of their weights.
    "bert-base": 110_106_428, "gpt1-117m": 116_534_784,
    "gpt2-small": 124_439_808, "gpt2-medium": 354_823_168, "gpt2-large": 774_030_080, "gpt2-xl": 1_557_611_200,
    "t5-small": 60_506_624, "t5-base": 222_903_552, "t5-large": 737_668_096, "t5-3b": 2_851_598_336,
    "t5-11b": 11_307_321_344, "t5-v1.1-small": 76_961_152, "t5-v1.1-base": 247_577_856, "t5-v1.1-large": 783_150_080,
    "t5-v1.1-xl": 2_849_757_184, "t5-v1.1-xxl": 11_135_332_352,
    "gpt3-175b": 174_604_259_328,
    "llama-7b": 6_738_415_616, "llama-13b": 13_015_864_320, "llama-30b": 32_528_943_616, "llama-65b": 65_285_660_672,
    "llama-2-7b": 6_738_415_616, "llama-2-13b": 13_015_864_320, "llama-2-70b": 68_976_648_192,
    "llama-3-8b": 8_030_261_248, "llama-3-70b": 70_553_706_496,
    "llama-3.1-8b": 8_030_261_248, "llama-3.1-70b": 70_553_706_496, "llama-3.1-405b": 405_853_388_800,
    "llama-3.2-1b": 1_235_814_400, "llama-3.2-3b": 3_212_749_824,
    # Counted in the files of the model cards.
    "bloom-560m": 559_214_592, "bloom-1b1": 1_065_314_304, "bloom-1b7": 1_722_408_960, "bloom-3b": 3_002_557_440,
    "bloom-7b1": 7_069_016_064, "bloom-176b": 176_247_271_424,
    "mistral-7b-v0.1": 7_241_732_096, "mistral-7b-v0.3": 7_248_023_552,
    "qwen2-0.5b": 494_032_768, "qwen2-1.5b": 1_543_714_304, "qwen2-7b": 7_615_616_512, "qwen2-72b": 72_706_203_648,
    "qwen2.5-0.5b": 494_032_768, "qwen2.5-1.5b": 1_543_714_304, "qwen2.5-3b": 3_085_938_688,
    "qwen2.5-7b": 7_615_616_512, "qwen2.5-14b": 14_770_033_664, "qwen2.5-32b": 32_763_876_352,
    "qwen2.5-72b": 72_706_203_648,
    "qwen3-0.6b": 596_049_920, "qwen3-1.7b": 1_720_574_976, "qwen3-4b": 4_022_468_096, "qwen3-8b": 8_190_735_360,
    "qwen3-14b": 14_768_307_200, "qwen3-32b": 32_762_123_264,
    "gemma-2-2b": 2_614_341_888, "gemma-2-9b": 9_241_705_984, "gemma-2-27b": 27_227_128_320,
    "gemma-3-270m": 268_098_176, "gemma-3-1b": 999_885_952,
    "phi-3-mini-4k": 3_821_079_552, "phi-4": 14_659_507_200, "phi-4-mini": 3_836_021_760,
    "smollm2-135m": 134_515_008, "smollm2-360m": 361_821_120, "smollm2-1.7b": 1_711_376_384,
    "smollm3-3b": 3_075_098_624,
}  # fmt: skip
BARE = {
    "bert-base": 109_482_240, "bert-large": 335_141_888, "roberta-base": 124_645_632, "roberta-large": 355_359_744,
    "distilbert-base": 66_362_880,
}  # fmt: skip
"""Of encoders without what reads their states."""
ROUNDED = {
    "gpt3-125m": 125e6, "gpt3-350m": 356e6, "gpt3-760m": 760e6, "gpt3-1.3b": 1.316e9, "gpt3-2.7b": 2.65e9,
    "gpt3-6.7b": 6.66e9, "gpt3-13b": 12.85e9, "gopher-44m": 44e6, "gopher-117m": 117e6, "gopher-417m": 417e6,
    "gopher-1.4b": 1.4e9, "gopher-7.1b": 7.1e9, "gopher-280b": 280e9, "chinchilla-70b": 70e9, "jurassic1-large": 7.5e9,
    "jurassic1-jumbo": 178e9,
}  # fmt: skip
"""As their papers give them, GPT-3's small ones as those of its shape."""


def on_meta(config: ModelConfig) -> int:
    """Parameters of the module itself, without memory for them."""
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in Transformer(config).parameters())


@pytest.mark.parametrize("name", EXACT)
def test_published_sizes(name):
    assert count(preset(name)).total == EXACT[name]


@pytest.mark.parametrize("name", BARE)
def test_bare_encoders(name):
    assert count(preset(name, overrides={"head": "features"})).total == BARE[name]


def test_the_masked_lm_head_of_bert():
    assert count(preset("bert-base", overrides={"head": "mlm"})).total == 109_514_298
    # SpanBERT is BERT with the cased vocabulary.
    spanbert = count(preset("spanbert-base", vocab_size=30522)).total
    assert spanbert == 109_514_298


@pytest.mark.parametrize("name", ROUNDED)
def test_rounded_figures_of_papers(name):
    assert count(preset(name)).total == pytest.approx(ROUNDED[name], rel=0.02)


CLOSED = {
    "gopher-280b": 279.7e9, "chinchilla-70b": 70.06e9, "jurassic1-large": 7.49e9, "jurassic1-jumbo": 177.8e9,
    "lamda-137b": 137.7e9,
}  # fmt: skip


def closed_form(config: ModelConfig) -> int:
    """Matrices of the blocks and the embedding, without norms and biases: L (4 d h k + ff) + V d, and W_R."""
    matrices = 4 + (config.traits.positions == "xl")
    attention = matrices * config.dim * config.heads * config.head_dim
    feed_forward = (3 if config.traits.gated else 2) * config.dim * config.ff_dim
    return config.layers * (attention + feed_forward) + config.vocab_size * config.dim


@pytest.mark.parametrize("name", [n for n in PUBLISHED if n.startswith(("gpt3", "gopher", "chin", "jur", "lamda"))])
def test_the_closed_form_where_only_rounded_figures_are_published(name):
    config = preset(name)
    wide = config.dim >= 1024  # what norms and biases add is below 0.1 % from there on
    learned = config.context * config.dim if config.traits.positions == "learned" else 0
    assert count(config).total == pytest.approx(closed_form(config) + learned, rel=1e-3 if wide else 2e-3)
    if name in CLOSED:
        assert closed_form(config) == pytest.approx(CLOSED[name], rel=1e-3)


@pytest.mark.parametrize(("name", "without"), [("gopher-280b", 258.2e9), ("chinchilla-70b", 64.7e9)])
def test_relative_attention_that_is_forgotten_shows(name, without):
    forgotten = count(preset(name, overrides={"positions": "sinusoidal"})).total
    assert forgotten == pytest.approx(without, rel=1e-3)
    assert forgotten != pytest.approx(CLOSED[name], rel=0.05)


def test_lamda_sizes_are_without_embeddings():
    sizes = [count(preset(f"lamda-{size}")).without_embedding for size in ("2b", "8b", "137b")]
    assert sizes == pytest.approx([2.1e9, 8.6e9, 137.4e9], rel=2e-3)


FIRST = {model.source: name for name, model in reversed(PUBLISHED.items())}
"""The first model of each source; of the others, which differ in size alone, the slow tests build modules."""


def sized(names: Iterable[str]) -> list[object]:
    """Names as parameters; those that `make test` leaves out are marked."""
    slow = [name for name in names if name in PUBLISHED and name not in FIRST.values()]
    return [pytest.param(name, marks=pytest.mark.slow) if name in slow else name for name in names]


@pytest.mark.parametrize("name", sized(preset_names()))
def test_the_closed_count_is_torchs_own(name):
    config = preset(name)
    assert count(config).total == on_meta(config)


@pytest.mark.parametrize(
    "changes",
    [{"bias": True}, {"gated": False}, {"order": "sandwich"}, {"final_norm": False}, {"qk_norm": True},
     {"embedding_norm": True}, {"positions": "learned"}, {"positions": "xl"}, {"positions": "t5"}, {"norm": "layer"},
     {"qkv_bias": True}],
    ids=str,
)  # fmt: skip
def test_one_trait_more_breaks_the_count(changes):
    config = preset("llama-3.2-1b", overrides={"rope_scaling": None})
    config = replace(config, rope_scaling=None, traits=replace(TRAITS["llama"], **changes))
    assert count(config).total == on_meta(config) != EXACT["llama-3.2-1b"]


@pytest.mark.parametrize("name", sized([n for n in PUBLISHED if in_transformers(preset(n))]))
def test_transformers_counts_the_same(name, tmp_path):
    config = preset(name)
    written = to_hf(config)
    assert from_hf(written) == config
    (tmp_path / "config.json").write_text(json.dumps(written))
    theirs = AutoConfig.from_pretrained(tmp_path)
    with torch.device("meta"):
        model = getattr(transformers, written["architectures"][0])(theirs)
    if config.traits.kind == "encoder-decoder" or config.tie_embeddings:
        model.tie_weights()
    assert sum(p.numel() for p in {id(p): p for p in model.parameters()}.values()) == count(config).total


def test_every_family_has_a_small_preset():
    assert {shape["arch"] for shape in PRESETS.values()} == set(TRAITS)
    for name in PRESETS:
        assert count(preset(name, vocab_size=2048)).total < 6e6


def test_overrides():
    config = preset("llama", vocab_size=100, overrides={"dim": 96, "layers": None})
    assert (config.dim, config.layers, config.vocab_size) == (96, 4, 100)
    gpt3 = preset("gpt3", overrides={"window": 0})
    assert (gpt3.pattern, gpt3.window) == ("L", 0)
    assert preset("gpt3", overrides={"pattern": "L"}).window == 0
    assert preset("llama", overrides={"window": 16}).pattern == "S"
    assert preset("gemma3", overrides={"window": 16}).pattern == "SSSL"
    alibi = preset("llama-3.2-1b", overrides={"positions": "alibi"})
    assert (alibi.traits.positions, alibi.rope_scaling) == ("alibi", None)
    assert not in_transformers(alibi)


def test_an_unknown_name_gets_near_ones():
    with pytest.raises(UsageError, match="unknown preset 'llama-3.2-1B'") as caught:
        preset("llama-3.2-1B")
    assert "`llama-3.2-1b`" in (caught.value.hint or "")
    with pytest.raises(UsageError) as caught:
        preset("zzz")
    assert "llmctl models" in (caught.value.hint or "")


def test_presets_load_no_torch():
    code = "import sys, llmctl.nn.presets, llmctl.nn.counts; print('torch' in sys.modules, 'numpy' in sys.modules)"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.split() == ["False", "False"]
