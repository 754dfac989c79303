"""HTTP says what the model says, in torch and in ONNX Runtime."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from llmctl.text.tokenizer import Tokenizer

WITHOUT_TORCH = """
import importlib.util, json, sys
from pathlib import Path
from llmctl import Artifact
from llmctl.testing import run_stage
from llmctl_serve import SERVE
params = {"port": 0, "mode": "smoke", "smoke_questions": ["Hello?", "Why?"], "max_new_tokens": 12, "threads": 1}
result = run_stage(SERVE, Path(sys.argv[2]), params, model=Artifact(Path(sys.argv[1]), "model.onnx"))
answers = json.loads((result.outputs["receipt"] / "receipt.json").read_text())["questions"]
heavy = [name for name in ("torch", "transformers", "onnx", "optimum") if name in sys.modules]
installed = importlib.util.find_spec("torch") is not None
print(json.dumps([[one["answer"] for one in answers], heavy, installed]))
"""


def greedy(hf, question, count):
    """What transformers answers."""
    torch = pytest.importorskip("torch")
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(hf.path, dtype=torch.float32).eval()
    tokenizer = Tokenizer.load(hf.path)
    ids = tokenizer.encode_chat([{"role": "user", "content": question}], add_generation_prompt=True).ids
    prompt = torch.tensor([ids])
    out = model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=count, do_sample=False)
    answer = [token for token in out[0, len(ids) :].tolist() if token != tokenizer.eos_id]
    with torch.inference_mode():
        scores = model(torch.tensor([ids + answer])).logits[0].double().log_softmax(-1)[len(ids) - 1 : -1]
    return tokenizer.decode(answer), [float(row[token]) for row, token in zip(scores, answer, strict=True)]


@pytest.mark.parametrize("kind", [0, 1], ids=["torch", "onnx"])
def test_http_gives_the_answers_and_logprobs_of_transformers(real_models, kind, serving):
    text, scores = greedy(real_models[0], "Which module?", 24)
    with serving(real_models[kind]) as server:
        answer = server.client.chat.completions.create(
            model="byte-model",
            messages=[{"role": "user", "content": "Which module?"}],
            temperature=0,
            logprobs=True,
            top_logprobs=1,
        )
        assert answer.choices[0].message.content == text
        content = answer.choices[0].logprobs.content
        assert [score.logprob for score in content] == pytest.approx(scores[: len(content)], abs=1e-4)
        assert all(score.top_logprobs[0].logprob == score.logprob for score in content)  # greedy takes the likeliest
        stream = server.client.chat.completions.create(
            model="byte-model", messages=[{"role": "user", "content": "Which module?"}], temperature=0, stream=True
        )
        assert "".join(chunk.choices[0].delta.content or "" for chunk in stream) == text


def test_a_bundle_is_served_without_importing_torch(tmp_path, real_models):
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_TORCH, real_models[1].path, tmp_path / "out"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    answers, heavy, _ = json.loads(done.stdout.splitlines()[-1])
    assert heavy == []
    assert answers[1] == greedy(real_models[0], "Hello?", 12)[0]


@pytest.mark.slow
def test_an_environment_without_torch_serves_a_bundle(tmp_path, real_models):
    root = Path(__file__).parents[3]
    subprocess.run([sys.executable, "-m", "venv", tmp_path / "env"], check=True)
    python = tmp_path / "env" / "bin" / "python"
    command = [python, "-m", "pip", "install", "-q", "-c", root / "constraints.txt", f"{root}[serve]"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    command = [python, "-c", WITHOUT_TORCH, real_models[1].path, tmp_path / "out"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=120)
    assert done.returncode == 0, done.stderr
    answers, heavy, installed = json.loads(done.stdout.splitlines()[-1])
    assert (heavy, installed) == ([], False)
    assert answers[1] == greedy(real_models[0], "Hello?", 12)[0]
