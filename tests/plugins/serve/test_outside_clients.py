"""lm-evaluation-harness against the server, where it is installed; schemathesis is in `test_fuzzing`.

python -m venv peers && peers/bin/pip install 'lm-eval[api]==0.4.13' 'transformers<4.58'
LLMCTL_PEERS=$PWD/peers pytest -m slow tests/plugins/serve/test_outside_clients.py
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest

from llmctl.generator import Sampling

pytestmark = pytest.mark.slow
PEERS = os.environ.get("LLMCTL_PEERS", "")
CHOICES = [" a loom", " the weaver's hand", " no thread at all"]
QUESTIONS = 12


def peer(name: str) -> str:
    """The program of an environment that LLMCTL_PEERS names."""
    program = Path(PEERS) / "bin" / name
    if not PEERS or not program.is_file():
        pytest.skip(f"set LLMCTL_PEERS to an environment with {name}")
    return str(program)


@pytest.fixture(scope="module")
def server(real_models, serving):
    with serving(real_models[1], max_new_tokens=16) as found:
        yield found


@pytest.fixture
def tasks(server, tmp_path) -> Path:
    """Two tasks on files of this machine whose right results are known from the model alone."""
    service = server.service
    rows = []
    for number in range(QUESTIONS):
        question = f"Question {number}: what is woven?"
        scores = []
        for choice in CHOICES:
            ids = [0, *service.tokenizer.encode(question + choice)]
            answer = len(service.tokenizer.encode(choice))
            scores.append(float(service.generator.logprobs(ids)[-answer:].sum()))
        best = max(range(len(CHOICES)), key=scores.__getitem__)
        asked = service.tokenizer.encode_chat([{"role": "user", "content": question}], add_generation_prompt=True).ids
        said = service.tokenizer.decode(list(service.generator.stream(asked, Sampling(max_new_tokens=8))))
        right = number % 3 != 0  # every third label is wrong: the accuracy must be two thirds
        rows.append(
            {"question": question, "choices": CHOICES, "label": best if right else (best + 1) % 3, "said": said}
        )
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    common = (
        f"dataset_path: json\ndataset_kwargs:\n  data_files:\n    test: {tmp_path}/rows.jsonl\ntest_split: test\n"
        "doc_to_text: '{{question}}'\n"
    )
    (tmp_path / "choice.yaml").write_text(
        "task: local_choice\noutput_type: multiple_choice\ntarget_delimiter: ''\n"
        + common
        + "doc_to_choice: '{{choices}}'\n"
        "doc_to_target: '{{label}}'\nmetric_list:\n  - metric: acc\n    aggregation: mean\n    higher_is_better: true\n"
    )
    (tmp_path / "generate.yaml").write_text(
        "task: local_generate\noutput_type: generate_until\n" + common + "doc_to_target: '{{said}}'\n"
        "generation_kwargs:\n  until: []\n  max_gen_toks: 8\n  do_sample: false\n  temperature: 0\n"
        "metric_list:\n  - metric: exact_match\n    aggregation: mean\n    higher_is_better: true\n"
    )
    tokenizer = tmp_path / "tokenizer"
    tokenizer.mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(service.tokenizer.directory / name, tokenizer / name)
    config = json.loads((tokenizer / "tokenizer_config.json").read_text())
    config["tokenizer_class"] = "PreTrainedTokenizerFast"
    (tokenizer / "tokenizer_config.json").write_text(json.dumps(config))
    return tmp_path


def evaluate(server, tasks: Path, model: str, path: str, task: str, *more: str) -> dict:
    """The results of lm-evaluation-harness."""
    given = f"model=byte-model,base_url={server.base}{path},num_concurrent=4,max_retries=1,tokenizer={tasks}/tokenizer"
    given += ",tokenizer_backend=huggingface" + (",add_bos_token=True" if model == "local-completions" else "")
    command = [peer("lm_eval"), "run", "--model", model, "--model_args", given, "--include_path", str(tasks)]
    command += ["--tasks", task, "--output_path", str(tasks / "out"), *more]
    environment = {
        **os.environ, "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HOME": str(tasks / "hf"),
        "OPENAI_API_KEY": "none",
    }  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, cwd=tasks, env=environment, timeout=280)
    assert done.returncode == 0, done.stderr[-3000:]
    (found,) = (tasks / "out").rglob("results_*.json")
    return json.loads(found.read_text())["results"][task]


def test_lm_evaluation_harness_scores_completions(server, tasks) -> None:
    found = evaluate(server, tasks, "local-completions", "/v1/completions", "local_choice")
    assert found["acc,none"] == pytest.approx(2 / 3)


def test_lm_evaluation_harness_chats(server, tasks) -> None:
    found = evaluate(
        server, tasks, "local-chat-completions", "/v1/chat/completions", "local_generate", "--apply_chat_template"
    )
    assert found["exact_match,none"] == 1
