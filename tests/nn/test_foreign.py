"""Architectures that go through transformers: the same numbers, whatever is packed, padded, cached or saved."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from llmctl.errors import InputError, MachineError, UsageError
from llmctl.generator import Sampling
from llmctl.nn.foreign import ForeignModel, load_foreign
from llmctl.nn.opening import open_network, save_network, why_foreign
from llmctl.nn.transformer import Transformer
from llmctl.train.foreign_rows import ForeignGenerator, rope_switch
from llmctl.train.generate import open_model

VOCAB, CONTEXT = 97, 64
COMMON = {"vocab_size": VOCAB, "initializer_range": 0.2, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
SHAPE = {
    **COMMON,
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": CONTEXT,
}
FACTORS = {"short_factor": [1.0] * 6, "long_factor": [2.0, 2.5, 3.0, 3.5, 4.0, 5.0]}
CONFIGS: dict[str, Callable[[], object]] = {
    "gpt_neox": lambda: transformers.GPTNeoXConfig(**SHAPE),
    "opt": lambda: transformers.OPTConfig(**SHAPE, ffn_dim=64, word_embed_proj_dim=32, init_std=0.2),
    "gptj": lambda: transformers.GPTJConfig(
        **COMMON, n_embd=48, n_layer=2, n_head=4, n_positions=CONTEXT, rotary_dim=8, tie_word_embeddings=False
    ),
    "phi3-longrope": lambda: transformers.Phi3Config(
        **SHAPE,
        num_key_value_heads=2,
        original_max_position_embeddings=24,
        rope_scaling={"type": "longrope", **FACTORS},
    ),
    "falcon": lambda: transformers.FalconConfig(**SHAPE),
    "falcon-alibi": lambda: transformers.FalconConfig(**SHAPE, alibi=True),
    "cohere": lambda: transformers.CohereConfig(**SHAPE, num_key_value_heads=2, logit_scale=0.3),
    "starcoder2-window": lambda: transformers.Starcoder2Config(**SHAPE, num_key_value_heads=2, sliding_window=5),
    "mixtral": lambda: transformers.MixtralConfig(**SHAPE, num_key_value_heads=2, num_local_experts=4),
}
FAMILIES = sorted(CONFIGS)
ALONE = {"falcon-alibi", "starcoder2-window"}
"""Families that do not keep packed documents apart by themselves."""


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """`made("opt")`: a random model of transformers and its directory; biases and norms are random too."""
    found = {}

    def make(name):
        if name not in found:
            torch.manual_seed(0)
            net = transformers.AutoModelForCausalLM.from_config(CONFIGS[name]()).eval()
            with torch.no_grad():
                for parameter in net.parameters():
                    if parameter.ndim == 1:
                        parameter.add_(torch.randn_like(parameter) * 0.1)
            directory = tmp_path_factory.mktemp(name)
            net.save_pretrained(directory)
            found[name] = net, directory
        return found[name]

    return make


@pytest.fixture
def copy(made, tmp_path) -> Path:
    """A GPT-NeoX directory that a test may damage."""
    return Path(shutil.copytree(made("gpt_neox")[1], tmp_path / "model"))


def plain(net, tokens):
    return net(tokens, attention_mask=torch.ones_like(tokens)).logits


DOCUMENTS = torch.tensor([[0] * 7 + [1] * 5 + [2] * 8, [3] * 11 + [4] * 6 + [-1] * 3])
POSITIONS = torch.stack(
    [
        torch.cat([torch.arange(7), torch.arange(5), torch.arange(8)]),
        torch.cat([torch.arange(11), torch.arange(6), torch.zeros(3, dtype=torch.long)]),
    ]
)


def leak(model, net, tokens) -> float:
    """How far the logits of packed documents are from those of each alone."""
    got = model(tokens, POSITIONS, DOCUMENTS)
    worst = 0.0
    for row, documents in enumerate(DOCUMENTS):
        for document in documents[documents >= 0].unique():
            at = documents == document
            worst = max(worst, float((got[row, at] - plain(net, tokens[row, at][None])[0]).abs().max()))
    return worst


@torch.no_grad()
@pytest.mark.parametrize("name", FAMILIES)
def test_the_same_logits(name, made):
    net, directory = made(name)
    model = load_foreign(directory).eval()
    tokens = torch.randint(3, VOCAB, (2, 20))
    assert float((model(tokens) - plain(net, tokens)).abs().max()) <= 1e-6
    hidden = model.hidden(tokens).flatten(0, 1)
    picks = torch.tensor([3, 25, 39])
    assert torch.allclose(model.head(hidden[picks]), plain(net, tokens).flatten(0, 1)[picks], atol=1e-5)
    assert model.split == (name != "cohere")  # its logits are scaled behind the head
    assert model.config.parameters() == net.num_parameters() and model.config.context == CONTEXT
    assert model.config.eos_ids == {1}
    with pytest.raises(UsageError, match="65 tokens do not fit the model's context of 64"):
        model(torch.zeros(1, 65, dtype=torch.long))


@torch.no_grad()
@pytest.mark.parametrize("name", FAMILIES)
def test_packed_documents_are_computed_as_if_alone(name, made):
    net, directory = made(name)
    model = load_foreign(directory).eval()
    tokens = torch.randint(3, VOCAB, (2, 20))
    assert model.packs == (name not in ALONE)
    assert leak(model, net, tokens) <= 2e-5
    model.packs = False
    assert leak(model, net, tokens) <= 2e-5
    if name == "starcoder2-window":  # the control: what was found to be wrong is wrong
        model.packs = True
        assert leak(model, net, tokens) > 1e-2


def test_gradients_flow_through_both_ways_of_packing(made):
    model = load_foreign(made("gpt_neox")[1]).eval()
    tokens = torch.randint(3, VOCAB, (2, 20))
    found = []
    for packs in (True, False):
        model.packs = packs
        loss = model(tokens, POSITIONS, DOCUMENTS)[DOCUMENTS >= 0].logsumexp(-1).sum()
        found.append(torch.autograd.grad(loss, list(model.parameters())))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4 * float(one.abs().max() + 1))


@pytest.mark.parametrize("name", FAMILIES)
def test_the_same_tokens_as_transformers_generate(name, made):
    net, directory = made(name)
    generator = open_model(directory, "cpu")
    assert isinstance(generator, ForeignGenerator)
    assert generator.backend == f"transformers {net.config.model_type} cpu float32"
    torch.manual_seed(1)
    prompts = [torch.randint(3, VOCAB, (length,)).tolist() for length in (5, 11, 6, 11)]
    greedy = Sampling(max_new_tokens=30)
    expected = [theirs(net, prompt, max_new_tokens=30, do_sample=False) for prompt in prompts]
    assert generator.generate(prompts, greedy) == expected
    assert [list(generator.stream(prompt, greedy)) for prompt in prompts] == expected
    assert any(len(answer) > 20 for answer in expected)  # past the switch of LongRoPE
    beams = generator.candidates(prompts[0], Sampling(max_new_tokens=8, beams=3))[0]
    assert beams.ids == theirs(net, prompts[0], max_new_tokens=8, do_sample=False, num_beams=3)
    row = torch.tensor([prompts[1]])
    reference = plain(net, row)[0].detach().numpy()
    # Sums in another order: on processors without AVX-512 a few units in the last place of the largest logit.
    assert abs(generator.logits(prompts[1]) - reference).max() <= 1e-6 * max(1, abs(reference).max())


def theirs(net, prompt, **options):
    tokens = torch.tensor([prompt])
    made = net.generate(tokens, attention_mask=torch.ones_like(tokens), pad_token_id=2, **options)[0, len(prompt) :]
    ids = made.tolist()
    return ids[: ids.index(1)] if 1 in ids else ids


def test_without_the_switch_of_longrope_the_tokens_differ(made, monkeypatch):
    """The control of the test above: kept keys would have the rotation of short texts."""
    directory = made("phi3-longrope")[1]
    assert rope_switch(load_foreign(directory)) == 24
    prompt = list(range(5, 20))
    right = open_model(directory, "cpu").candidates(prompt, Sampling(max_new_tokens=40))[0]
    monkeypatch.setattr("llmctl.train.foreign_rows.rope_switch", lambda model: 0)
    wrong = open_model(directory, "cpu").candidates(prompt, Sampling(max_new_tokens=40))[0]
    assert right.logprobs[:8] == wrong.logprobs[:8] and right.logprobs != wrong.logprobs


def test_a_family_without_a_cache_answers_too(tmp_path):
    config = transformers.MambaConfig(**COMMON, hidden_size=32, num_hidden_layers=2)
    torch.manual_seed(0)
    net = transformers.MambaForCausalLM(config).eval()
    net.save_pretrained(tmp_path)
    generator = open_model(tmp_path, "cpu")
    prompts = [[5, 6, 7], [8, 9, 10, 11, 12]]
    expected = [theirs(net, prompt, max_new_tokens=6, do_sample=False) for prompt in prompts]
    assert generator.generate(prompts, Sampling(max_new_tokens=6)) == expected


@pytest.mark.parametrize("name", FAMILIES)
def test_dropout_is_that_of_the_training(name, made):
    """Files may say otherwise: OPT's own is 0.1, and 0 is the default of every stage."""
    model = load_foreign(made(name)[1]).train()
    tokens = torch.randint(3, VOCAB, (1, 20))
    model.set_dropout(0.0)
    with torch.no_grad():
        assert torch.equal(model(tokens), model(tokens))
        model.set_dropout(0.5)
        assert not torch.equal(model(tokens), model(tokens))
        assert torch.equal(model.eval()(tokens), model(tokens))


def test_another_attention_is_refused(made):
    with pytest.raises(UsageError, match="attention flex is of llmctl's own transformer; gptj is computed by"):
        load_foreign(made("gptj")[1]).backend = "flex"


# -- weights ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FAMILIES)
def test_read_and_written_the_weights_are_the_same_bits(name, made, tmp_path):
    net, directory = made(name)
    model = load_foreign(directory)
    model.save(tmp_path / "a")
    assert {p.name for p in (tmp_path / "a").iterdir()} == {p.name for p in directory.iterdir()}
    read = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "a").state_dict()
    assert read.keys() == net.state_dict().keys()
    assert all(torch.equal(tensor, read[key]) for key, tensor in net.state_dict().items())
    ours, source = (json.loads((place / "config.json").read_text()) for place in (tmp_path / "a", directory))
    assert ours == source
    load_foreign(tmp_path / "a").save(tmp_path / "b")
    for path in (tmp_path / "a").iterdir():
        assert path.read_bytes() == (tmp_path / "b" / path.name).read_bytes()


def test_a_state_holds_each_tensor_once(made):
    """Checkpoints are safetensors, which refuse shared memory; OPT's head is its embedding."""
    model = load_foreign(made("opt")[1])
    state = model.state_dict()
    places = [tensor.data_ptr() for tensor in state.values()]
    assert len(set(places)) == len(places)
    other = load_foreign(made("opt")[1])
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.zero_()
    other.load_state_dict(state)
    assert torch.equal(other.head(torch.ones(1, 32)), model.head(torch.ones(1, 32)))
    del state["net.model.decoder.embed_tokens.weight"]
    with pytest.raises((RuntimeError, KeyError)):
        other.load_state_dict(state)


def test_shards(made, tmp_path):
    net, directory = made("gptj")
    load_foreign(directory).save(tmp_path, max_shard_bytes=40_000)
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 2
    read = load_foreign(tmp_path)
    tokens = torch.arange(3, 20)[None]
    with torch.no_grad():
        assert torch.equal(read.eval()(tokens), plain(net, tokens))


def test_embeddings_and_head_are_no_hidden_matrices(made):
    names = load_foreign(made("gptj")[1]).outer_names
    assert names == {"net.transformer.wte.weight", "net.lm_head.weight"}
    assert load_foreign(made("gpt_neox")[1]).outer_names == {"net.gpt_neox.embed_in.weight", "net.embed_out.weight"}


def rewrite(directory, change):
    tensors = load_file(directory / "model.safetensors")
    change(tensors)
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})


NORM = "gpt_neox.final_layer_norm.weight"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda tensors: tensors.pop(NORM), f"missing: {NORM}"),
        (lambda tensors: tensors.update(extra=torch.ones(2)), "unexpected: extra"),
        (lambda tensors: tensors.update({NORM: torch.ones(3)}), f"misshapen: {NORM}"),
    ],
)
def test_every_tensor_is_accounted_for(copy, change, message):
    rewrite(copy, change)
    with pytest.raises(InputError, match=message):
        load_foreign(copy)


def edit(directory, **changes):
    path = directory / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_what_cannot_be_opened_is_told(copy, monkeypatch):
    edit(copy, quantization_config={"quant_method": "gptq"})
    with pytest.raises(InputError, match="GPTNeoXForCausalLM. is quantised"):
        load_foreign(copy)
    edit(copy, quantization_config=None, is_encoder_decoder=True)
    with pytest.raises(InputError, match="is an encoder-decoder that llmctl does not compute"):
        load_foreign(copy)
    edit(copy, is_encoder_decoder=False, model_type="newest", architectures=["NewestForCausalLM"])
    with pytest.raises(InputError, match="transformers cannot open .*NewestForCausalLM"):
        load_foreign(copy)
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(
        MachineError, match="NewestForCausalLM is computed by transformers, which is not installed"
    ) as e:
        load_foreign(copy)
    assert e.value.hint == "pip install 'llmctl[transformers]'"


def test_code_that_comes_with_a_model_is_not_run(copy):
    (copy / "modeling_evil.py").write_text("import pathlib\npathlib.Path('pwned').touch()\nclass Evil: pass\n")
    edit(copy, model_type="evil", architectures=["Evil"], auto_map={"AutoModelForCausalLM": "modeling_evil.Evil",
                                                                    "AutoConfig": "modeling_evil.Evil"})  # fmt: skip
    with pytest.raises(InputError, match="transformers cannot open"):
        load_foreign(copy)
    assert not Path("pwned").exists()


def test_a_pickle_is_read_on_request_only(copy):
    torch.save(load_file(copy / "model.safetensors"), copy / "pytorch_model.bin")
    (copy / "model.safetensors").unlink()
    with pytest.raises(InputError, match="transformers cannot open"):
        load_foreign(copy)
    assert isinstance(load_foreign(copy, allow_pickle=True), ForeignModel)


# -- which way --------------------------------------------------------------------------------------------------------


def test_ours_is_taken_where_it_can_be(made, hf_directory, tmp_path):
    said = []
    assert isinstance(open_network(hf_directory("llama-gqa"), log=said.append), Transformer)
    assert said == ["llama: computed by llmctl's transformer"]
    assert why_foreign(hf_directory("llama-gqa")) == ""
    said.clear()
    model = open_network(made("falcon-alibi")[1], log=said.append)
    assert isinstance(model, ForeignModel)
    assert said[0].startswith("falcon: computed by transformers, because `architectures` in config.json is ['Falcon")
    assert said[1] == "packed documents are computed in a row each: this family does not keep them apart by itself"
    size = save_network(model, tmp_path / "saved")
    assert size == (tmp_path / "saved/model.safetensors").stat().st_size
    assert "longrope" in why_foreign(made("phi3-longrope")[1])
    with pytest.raises(InputError, match="is no model: it has no config.json"):
        open_network(tmp_path)
