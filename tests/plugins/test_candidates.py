"""Several answers, their ranks and their log-probabilities from `llmctl chat` and `llmctl generate`."""

from __future__ import annotations

import json
import sys

import numpy as np
import pytest
from click.testing import CliRunner

from llmctl import InputError, UsageError
from llmctl.generator import Sampling
from llmctl.text.tokenizer import Tokenizer
from llmctl_serve.chat import chat, generate
from llmctl_serve.defaults import default_sampling

from .conftest import SURE, write_byte_tokenizer

OTHER = np.log((1 - SURE) / 261)
"""Log-probability of a token that is not the scripted one."""


@pytest.fixture
def bundle(model_dir, opens, scripted):
    (model_dir / "model.onnx").touch()
    opens({model_dir: scripted(Tokenizer.load(model_dir), {"loads": "json"}, context_length=64)})
    return model_dir


def invoke(command, *args, **options):
    result = CliRunner().invoke(command, [str(arg) for arg in args], **options)
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def test_several_beams_say_how_likely_they_are(bundle):
    # json and EOS are five tokens of probability .9; the second beam begins with another token, after which the script
    # says nothing and every token is as likely as any.
    output = invoke(chat, bundle, "--prompt", "loads?", "--beams", 3, "-n", 2).output
    first, second = 5 * np.log(SURE), OTHER - 5 * np.log(262)
    assert output == (
        f"[1] score {first / 5:.4f}, log-probability {first:.4f}, 4 tokens\njson\n\n"
        f"[2] score {second / 6:.4f}, log-probability {second:.4f}, 5 tokens\n!json\n"
    )
    longer = invoke(chat, bundle, "--prompt", "loads?", "--beams", 3, "-n", 2, "--length-penalty", 0).output
    assert f"[1] score {first:.4f}, log-probability {first:.4f}" in longer
    assert invoke(chat, bundle, "--prompt", "loads?", "--beams", 3).output == "json\n"


def test_draws_are_those_of_single_runs_with_following_seeds(bundle):
    def ask(*flags):
        flags = ("--prompt", "q", "--temperature", 1, "--max-new-tokens", 20, "--format", "json", *flags)
        return json.loads(invoke(generate, bundle, *flags).output)["candidates"]

    several = ask("--seed", 4, "-n", 4)
    assert several == [ask("--seed", seed)[0] for seed in range(4, 8)]
    assert len({one["text"] for one in several}) > 1
    assert [set(one) for one in several] == [{"text", "finish_reason", "tokens", "logprob", "score"}] * 4
    best = max(several, key=lambda one: one["score"])
    assert best != several[0]
    assert ask("--seed", 4, "--best-of", 4) == [best]
    longest = ask("--seed", 4, "--best-of", 4, "--length-penalty", 0)
    assert longest[0]["logprob"] == max(one["logprob"] for one in several)


def test_log_probabilities_of_every_token(bundle):
    output = invoke(chat, bundle, "--prompt", "loads?", "--logprobs", 2).output
    assert output.splitlines()[:4] == [
        "json",
        "",
        "log-prob  token  likeliest here",
        f' {np.log(SURE):.4f}  "j"    "j" {np.log(SURE):.4f}, "<|bos|>" {OTHER:.4f}',
    ]
    assert "likeliest" not in invoke(chat, bundle, "--prompt", "loads?", "--logprobs", 0).output
    found = json.loads(invoke(chat, bundle, "--prompt", "loads?", "--logprobs", 2, "--format", "json").output)
    (one,) = found["candidates"]
    assert (one["text"], one["finish_reason"], one["tokens"]) == ("json", "stop", 4)
    assert [token["token"] for token in one["logprobs"]] == list("json")
    assert [len(token["top_logprobs"]) for token in one["logprobs"]] == [2] * 4
    assert one["logprob"] == pytest.approx(5 * np.log(SURE))  # with EOS
    assert sum(token["logprob"] for token in one["logprobs"]) == pytest.approx(4 * np.log(SURE))


def test_a_stop_string_cuts_text_and_numbers(bundle):
    output = invoke(chat, bundle, "--prompt", "loads?", "--stop", "on", "--logprobs", 0, "--format", "json").output
    (one,) = json.loads(output)["candidates"]
    assert (one["text"], one["finish_reason"], one["tokens"]) == ("js", "stop", 4)
    assert [token["token"] for token in one["logprobs"]] == ["j", "s"]
    (short,) = json.loads(invoke(chat, bundle, "--prompt", "loads?", "--max-new-tokens", 2, "--format", "json").output)[
        "candidates"
    ]
    assert (short["text"], short["finish_reason"], short["logprob"]) == (
        "js",
        "length",
        pytest.approx(2 * np.log(SURE)),
    )


def test_each_piped_line_gets_a_line_of_json(bundle):
    output = invoke(chat, bundle, "--format", "json", input="loads?\n\nwhat?\n").output
    assert [json.loads(line)["candidates"][0]["text"] for line in output.splitlines()] == ["json", "yes"]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["-n", 2], "greedy decoding has one answer, but n is 2"),
        (["--beams", 2, "-n", 3], "2 beams cannot give 3 answers"),
        (["--beams", 2, "--temperature", 1], "temperature is 1.0"),
        (["--early-stopping", "never"], "but beams is 1"),
        (["--best-of", 3], "greedy decoding has one answer, but n is 3"),
        (["--best-of", 3, "--beams", 4], "--best-of chooses among draws"),
        (["--best-of", 3, "-n", 3], "--best-of chooses among draws"),
    ],
)
def test_options_that_contradict_each_other(bundle, flags, message):
    with pytest.raises(UsageError, match=message) as caught:
        invoke(generate, bundle, "--prompt", "q", *flags)
    assert caught.value.hint


def test_a_conversation_goes_on_from_one_answer(bundle, monkeypatch):
    class Terminal:
        isatty = staticmethod(lambda: True)

    for flags, name in ((["--beams", "2", "-n", "2"], "-n"), (["--logprobs", "1"], "--logprobs")):
        monkeypatch.setattr(sys, "stdin", Terminal())
        with pytest.raises(UsageError, match=f"{name} is not for a conversation"):
            chat.main([str(bundle), *flags], standalone_mode=False)


def test_the_models_own_beams_and_draws(tmp_path):
    config = tmp_path / "generation_config.json"
    config.write_text('{"num_beams": 4, "length_penalty": 0.6, "early_stopping": true, "num_return_sequences": 2}')
    own = Sampling(beams=4, length_penalty=0.6, early_stopping=True)
    assert default_sampling(tmp_path) == own
    assert default_sampling(tmp_path, temperature=0.0) == own
    assert default_sampling(tmp_path, temperature=0.5) == Sampling(temperature=0.5)
    assert default_sampling(tmp_path, beams=1) == Sampling()
    assert default_sampling(tmp_path, beams=2) == Sampling(beams=2, length_penalty=0.6, early_stopping=True)
    config.write_text('{"do_sample": true, "top_p": 0.9}')
    assert default_sampling(tmp_path, beams=3) == Sampling(beams=3)
    assert default_sampling(tmp_path, n=3) == Sampling(temperature=1.0, top_k=50, top_p=0.9, n=3)
    config.write_text('{"do_sample": true, "min_p": 0.1, "top_k": 0, "repetition_penalty": 1.2}')
    assert default_sampling(tmp_path) == Sampling(temperature=1.0, min_p=0.1, repetition_penalty=1.2)
    assert default_sampling(tmp_path, beams=2) == Sampling(beams=2, repetition_penalty=1.2)
    config.write_text('{"repetition_penalty": 1.2, "min_p": 0.1}')
    assert default_sampling(tmp_path) == Sampling(repetition_penalty=1.2), "min-p is of draws"
    assert default_sampling(tmp_path, repetition_penalty=1.0) == Sampling()
    config.write_text('{"num_beams": 4}')
    assert default_sampling(tmp_path, min_p=0.2) == Sampling(min_p=0.2)
    config.write_text('{"do_sample": true, "num_beams": 4}')
    with pytest.raises(InputError, match=r"generation_config.json asks for beams that are drawn"):
        default_sampling(tmp_path)
    assert default_sampling(tmp_path, beams=1) == Sampling(), "one beam is greedy"


@pytest.mark.parametrize("flags", [["--beams", 4, "-n", 3], ["--temperature", 0]])
def test_both_engines_print_the_same(real_models, flags):
    shown = []
    for model in real_models:
        options = [
            "--prompt",
            "The loom",
            "--max-new-tokens",
            12,
            "--logprobs",
            2,
            "--format",
            "json",
            "--device",
            "cpu",
        ]
        found = json.loads(invoke(generate, model.path, *options, *flags).output)["candidates"]
        shown.append([[[score["token"] for score in one["logprobs"]], one["tokens"]] for one in found])
        assert [one["score"] for one in found] == sorted((one["score"] for one in found), reverse=True)
    assert shown[0] == shown[1]


def test_an_encoder_decoder_reads_the_whole_prompt(tmp_path):
    torch = pytest.importorskip("torch")
    from llmctl.nn.config import ModelConfig
    from llmctl.nn.hf import save_model
    from llmctl.nn.transformer import Transformer
    from llmctl.train.generate import open_model

    torch.manual_seed(0)
    shape = {"vocab_size": 262, "dim": 32, "layers": 2, "heads": 4, "context": 24}
    model = Transformer(ModelConfig(arch="t5", **shape, bos_id=0, eos_id=1, pad_id=2))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += torch.randn_like(parameter) * 0.2
    save_model(model, tmp_path, write_byte_tokenizer(tmp_path / "tokenizer"))
    tokenizer = Tokenizer.load(tmp_path)
    flags = ["--max-new-tokens", 12, "--device", "cpu"]
    scored = ["--logprobs", 1, "--format", "json"]
    # A prompt as long as the context leaves room for an answer all the same.
    for text in ("loads", "x" * 22):
        source = tokenizer.encode_document(text)
        (ids,) = open_model(tmp_path, "cpu").generate([source], Sampling(max_new_tokens=12))
        assert len(ids) == 12
        assert invoke(generate, tmp_path, "--prompt", text, *flags).output == tokenizer.decode(ids) + "\n"
        (found,) = json.loads(invoke(generate, tmp_path, "--prompt", text, *flags, *scored).output)["candidates"]
        said = [tokenizer.decode([one], skip_special=False) for one in ids]
        assert [token["token"] for token in found["logprobs"]] == said
    with pytest.raises(UsageError, match="25 tokens, the model's context is 24"):
        invoke(generate, tmp_path, "--prompt", "x" * 23, *flags)


@pytest.mark.parametrize(
    ("file", "given", "wanted"),
    [
        ({"do_sample": True}, {"beams": 1}, Sampling()),
        ({"do_sample": True, "num_beams": 4}, {"temperature": 0.0}, Sampling(beams=4)),
        ({"do_sample": True}, {}, Sampling(temperature=1.0, top_k=50)),
    ],
)
def test_what_is_asked_for_settles_what_the_file_says(file, given, wanted, tmp_path):
    (tmp_path / "generation_config.json").write_text(json.dumps(file))
    assert default_sampling(tmp_path, **given) == wanted


@pytest.mark.parametrize("text", ['{"num_beams": "x"}', '{"temperature": "hot"}', "[1]", '{"top_k": true}'])
def test_a_damaged_generation_config_is_named(text, tmp_path):
    (tmp_path / "generation_config.json").write_text(text)
    with pytest.raises(InputError, match=r"generation_config\.json"):
        default_sampling(tmp_path)
