"""`llmctl models`: every named model, any directory, in text and JSON, quickly and without torch."""

from __future__ import annotations

import json
import resource
import subprocess
import sys

import pytest
from click.testing import CliRunner

from llmctl import InputError
from llmctl.errors import UsageError
from llmctl.nn import counts
from llmctl.nn.config import ModelConfig
from llmctl.nn.presets import preset, preset_names
from llmctl_train_pretrain.models import models, short


def invoke(*args):
    result = CliRunner().invoke(models, [str(arg) for arg in args])
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.output


def one(name, *args):
    (found,) = json.loads(invoke(name, *args, "--format", "json"))
    return found


def test_the_list_has_every_model():
    rows = json.loads(invoke("--format", "json"))
    assert [row["name"] for row in rows] == preset_names()
    assert all(row["parameters"] > 1e6 and row["source"] for row in rows)
    text = invoke().splitlines()
    assert len(text) == 1 + len(rows)
    for line, row in zip(text[1:], rows, strict=True):
        assert line.split()[0] == row["name"]
        assert short(row["parameters"]) in line.split()


def test_one_model_in_numbers():
    found, config = one("llama-3.2-1b"), preset("llama-3.2-1b")
    assert found["parameters"] == 1_235_814_400 == sum(found["parameters_by_part"].values())
    assert found["parameters_without_embeddings"] == 973_146_112
    assert found["flops_per_token"] == counts.forward_flops(config, 131072)
    assert found["training_flops_per_token"] == 3 * found["flops_per_token"]
    assert found["serving_bytes"]["bf16"] == 2 * found["parameters"]
    assert found["training_bytes"]["float32"] == 16 * found["parameters"]
    assert found["cache_bytes_per_token"]["bf16"] == 2 * 16 * 8 * 64 * 2  # keys and values, layers, heads, width, bytes
    assert found["cache_bytes_full_context"]["bf16"] == 131072 * found["cache_bytes_per_token"]["bf16"]
    assert (found["transformers"], found["through_transformers"]) == ("LlamaForCausalLM", False)
    text = invoke("llama-3.2-1b")
    for part in ("1 235 814 400", "973 146 112", "scaled 32 times by llama3", "32 KiB", "meta-llama/Llama-3.2-1B"):
        assert part in text


def test_a_window_bounds_the_cache_of_a_full_context():
    windowed, full = one("mistral-7b-v0.1"), one("mistral-7b-v0.3")
    assert windowed["cache_bytes_per_token"] == full["cache_bytes_per_token"]
    assert windowed["cache_bytes_full_context"]["bf16"] * 8 == full["cache_bytes_full_context"]["bf16"]


def test_what_transformers_has():
    assert one("gpt3-175b")["transformers"] is None
    assert "a model type of llmctl's own" in invoke("gpt3-175b")
    mini = one("phi-4-mini")
    assert (mini["transformers"], mini["through_transformers"]) == ("Phi3ForCausalLM", True)
    assert "longrope" in mini["reason"]
    assert "goes through transformers" in invoke("phi-4-mini")


def test_another_vocabulary():
    assert one("llama")["parameters"] - one("llama", "--vocab-size", 4096)["parameters"] == 4096 * 192


def test_what_each_of_many_processes_would_hold():
    spread = one("llama-3.2-1b", "--parallel", "dp_shard=16,tp=4")["spread"]
    matrices, norms = 1_235_814_400 - 33 * 2048, 33 * 2048  # norms are whole for tensor parallelism
    assert spread["processes"] == 64
    assert spread["parameters_per_process"] == matrices // 64 + norms // 16
    assert spread["training_bytes_per_process"] == 16 * spread["parameters_per_process"]
    assert "spread" not in one("llama-3.2-1b")
    assert "each holds          19.3M weights" in invoke("llama-3.2-1b", "--parallel", "dp_shard=16,tp=4")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("llama-3.2-1b", "--parallel", "tp=16"), "kv_heads 8 cannot be cut into 16 parts"),
        (("llama-3.2-1b", "--parallel", "dp=2"), "'dp=2' is no NAME=SIZE"),
        (("llama-3.2-1b", "--parallel", "tp"), "'tp' is no NAME=SIZE"),
        (("--parallel", "tp=2"), "--parallel needs the name of a model"),
    ],
)
def test_what_cannot_be_spread(arguments, message):
    with pytest.raises(UsageError, match=message):
        invoke(*arguments)


def test_a_directory(tmp_path):
    from llmctl.nn.hf import save_model
    from llmctl.nn.transformer import Transformer

    config = ModelConfig(arch="qwen2", vocab_size=97, dim=32, layers=2, heads=4, kv_heads=2, context=64)
    save_model(Transformer(config), tmp_path / "mine")
    found = one(tmp_path / "mine")
    assert (found["name"], found["arch"]) == ("mine", "qwen2")
    assert found["parameters"] == found["stored_parameters"] == config.parameters()
    # Another architecture: what its files hold.
    values = json.loads((tmp_path / "mine" / "config.json").read_text())
    (tmp_path / "mine" / "config.json").write_text(json.dumps({**values, "architectures": ["FalconForCausalLM"]}))
    other = one(tmp_path / "mine")
    assert (other["transformers"], other["through_transformers"]) == ("FalconForCausalLM", True)
    assert other["parameters"] == config.parameters()
    text = invoke(tmp_path / "mine")
    assert (
        "FalconForCausalLM; goes through transformers" in text and f"{config.parameters():,}".replace(",", " ") in text
    )


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path: path.mkdir(), "has no readable config.json"),
        (lambda path: path.touch(), "is a file; a model is a directory"),
        (lambda path: (path.mkdir(), (path / "config.json").write_text("{}")), "`architectures` in config.json is"),
    ],
)
def test_what_is_no_model(make, message, tmp_path):
    make(tmp_path / "x")
    with pytest.raises(InputError, match=message):
        invoke(tmp_path / "x")


def test_an_unknown_name_gets_near_ones(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match="there is no model 'llama-8b'") as caught:
        invoke("llama-8b")
    assert "`llama-3-8b`" in (caught.value.hint or "")


@pytest.mark.parametrize("count", [(999, "0.000999M"), (134_515_008, "135M"), (999_885_952, "1B"), (7.1e9, "7.1B")])
def test_short_numbers(count):
    assert short(int(count[0])) == count[1]


def test_it_loads_nothing_heavy(llmctl_env):
    code = (
        "import sys\nfrom llmctl.cli import main\n"
        "try: main(['models', 'llama-7b'])\nexcept SystemExit: pass\n"
        "print([n for n in ('torch', 'numpy', 'pydantic', 'yaml', 'rich', 'transformers') if n in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], env=llmctl_env, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


@pytest.mark.budget
def test_it_is_quick(llmctl_env, budget):
    def cpu():
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run(
            [sys.executable, "-m", "llmctl", "models"], env=llmctl_env, stdout=subprocess.DEVNULL, check=True
        )
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime

    cpu()
    assert min(cpu() for _ in range(3)) < budget(0.5)


def test_a_table_on_a_terminal(monkeypatch):
    monkeypatch.setenv("CLICOLOR_FORCE", "1")
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("COLUMNS", "120")
    coloured = invoke()
    assert "llama-3.1-405b" in coloured and "406B" in coloured
