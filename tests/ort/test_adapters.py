"""LoRA adapters beside one graph: each answers as transformers does with it merged, whoever answers beside it."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import lora
import numpy as np
import onnxruntime as ort
import pytest
import trained
from traffic import engine_of, finish, mixed_requests, run_mixed

from llmctl.engine import Request
from llmctl.errors import InputError, UsageError
from llmctl.generator import Sampling, choose_adapter
from llmctl.one_by_one import OneByOne
from llmctl.ort import OrtGenerator, open_bundle
from llmctl.ort.adapter_rows import Places, RowAdapters
from llmctl.ort.adapters import MASK
from llmctl.ort.slots import Slots
from llmctl.testing import StageResult

NAMES = (None, "polite", "terse")
PROMPT = [3, 50, 7, 71, 90, 12, 40]


def mixed_adapters(count: int) -> list[Request]:
    """Requests that begin alike, each with the next of the model and its two adapters."""
    return [replace(request, adapter=NAMES[i % 3]) for i, request in enumerate(mixed_requests(count))]


@pytest.mark.parametrize("name", ["polite", "terse"])
def test_logits_are_those_of_transformers_with_the_adapter_merged(
    adapted_generator: OrtGenerator, trained_dir: Path, adapter_dirs: dict[str, Path], name: str
) -> None:
    import torch

    expected = lora.merged(trained_dir, adapter_dirs[name])(torch.tensor([PROMPT])).logits[0].detach().numpy()
    found = adapted_generator.with_adapter(name).logits(PROMPT)
    assert np.abs(found - expected).max() < 1e-5
    others = [adapted_generator.with_adapter(other).logits(PROMPT) for other in NAMES if other != name]
    assert all(np.abs(found - other).max() > 0.1 for other in others)  # control: the others would be seen


@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`")
def test_logits_are_those_of_peft(tmp_path: Path, trained_dir: Path) -> None:
    peft = pytest.importorskip("peft")
    import torch
    from transformers import AutoModelForCausalLM

    import llmctl_export_onnx
    from llmctl import Artifact
    from llmctl.testing import run_stage

    configs = {
        "all": {"r": 4, "lora_alpha": 8, "target_modules": "all-linear"},
        "patterns": {
            "r": 3,
            "lora_alpha": 5,
            "use_rslora": True,
            "target_modules": ["q_proj", "v_proj", "down_proj", "lm_head"],
            "alpha_pattern": {"layers.1.self_attn.q_proj": 2},
            "rank_pattern": {"v_proj": 6},
        },
    }
    expected = {}
    for name, config in configs.items():
        torch.manual_seed(len(name))
        base = AutoModelForCausalLM.from_pretrained(trained_dir, dtype=torch.float32)
        model = peft.get_peft_model(base, peft.LoraConfig(task_type="CAUSAL_LM", **config)).eval()
        for parameter, tensor in model.named_parameters():
            if "lora_B" in parameter:
                tensor.data = torch.randn_like(tensor) * 0.1
        model.save_pretrained(tmp_path / name)
        expected[name] = model(torch.tensor([PROMPT])).logits[0].detach().numpy()
    adapters = [Artifact(tmp_path / name, "model.adapter") for name in configs]
    done = run_stage(
        llmctl_export_onnx.EXPORT_ONNX,
        tmp_path / "out",
        {"parity_prompts": 2, "threads": 1},
        model=Artifact(trained_dir, "model.hf"),
        adapters=adapters,
    )
    generator = open_bundle(done.outputs["model"].path, "cpu", threads=1)
    for name, logits in expected.items():
        assert np.abs(generator.with_adapter(name).logits(PROMPT) - logits).max() < 1e-5


def test_without_an_adapter_the_bundle_answers_bit_for_bit_as_the_plain_one(
    adapted_generator: OrtGenerator, trained_generator: OrtGenerator
) -> None:
    assert np.array_equal(adapted_generator.logits(PROMPT), trained_generator.logits(PROMPT))
    requests = list(mixed_requests(12))
    for generator in (adapted_generator, trained_generator):
        assert not generator.adapter
    found = []
    for generator in (adapted_generator, trained_generator):
        engine = engine_of(generator, slots=4, prefill_tokens=10, max_queue=12)
        tickets = [engine.submit(request) for request in requests]
        answers = finish(engine)
        found.append([answers[ticket, 0] for ticket in tickets])
    assert found[0] == found[1]


def test_onnxruntime_itself_applies_the_files(adapted: StageResult, adapted_generator: OrtGenerator) -> None:
    """Its own way, `RunOptions.add_active_adapter`, reads the same file to the same logits."""
    generator, layout = adapted_generator.with_adapter("polite"), adapted_generator.layout
    adapter, options = ort.LoraAdapter(), ort.RunOptions()
    adapter.Load(str(adapted.outputs["model"].path / "adapters" / "polite.onnx_adapter"))
    options.add_active_adapter(adapter)
    empty = np.zeros((1, layout.kv_heads, 0, layout.head_dim), np.float32)
    feeds = {"input_ids": np.array([PROMPT]), "attention_mask": np.ones((1, len(PROMPT)), np.int64)}
    feeds |= dict.fromkeys(layout.past, empty)
    (logits,) = generator.session.run(["logits"], feeds, options)
    np.testing.assert_allclose(logits[0], generator.logits(PROMPT), atol=1e-6)


@pytest.mark.parametrize("options", [{}, {"prefix_cache": False}, {"speculation": "prompt-lookup"}, "draft"])
def test_50_requests_over_the_model_and_two_adapters_get_the_answers_of_single_runs(
    adapted_generator: OrtGenerator, trained_generator: OrtGenerator, options: dict | str
) -> None:
    """The draft model knows no adapter: it proposes what the model alone would say, and less of it is accepted."""
    drafting = {"speculation": "draft", "draft": trained_generator}
    wrong, close, found = run_mixed(
        adapted_generator, mixed_adapters(51), **(drafting if options == "draft" else options)
    )
    assert (wrong, sorted(map(len, found.values()))) == (0, [17, 17, 17])
    assert close < 10


def test_other_adapters_give_other_tokens(adapted_generator: OrtGenerator) -> None:
    """Control: what the test above compares differs between the adapters."""
    swapped = {None: "polite", "polite": "terse", "terse": None}
    requests = mixed_adapters(30)
    _, _, right = run_mixed(adapted_generator, requests)
    _, _, other = run_mixed(adapted_generator, [replace(one, adapter=swapped[one.adapter]) for one in requests])
    assert all(right[name] != other[swapped[name]] for name in NAMES)


def _crossed_prefixes(monkeypatch: pytest.MonkeyPatch) -> None:
    """A slot's keys and values are taken over whichever adapter computed them."""
    match = Slots.match
    monkeypatch.setattr(
        Slots, "match", lambda s, tokens, adapter=0: np.maximum.reduce([match(s, tokens, i) for i in range(3)])
    )


def _moved_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two slots change places, and their adapters do not."""
    exchange = Slots.exchange

    def wrong(slots: Slots, one: int, other: int) -> None:
        kept = slots.adapters.copy()
        exchange(slots, one, other)
        slots.adapters[:] = kept

    monkeypatch.setattr(Slots, "exchange", wrong)


def _no_masks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every row gets the sum of all adapters of the batch."""
    monkeypatch.setattr(Places, "masks", lambda places, rows: places._adapters._ones)


@pytest.mark.parametrize("fault", [_crossed_prefixes, _moved_rows, _no_masks])
def test_faults_are_seen(adapted_generator: OrtGenerator, monkeypatch: pytest.MonkeyPatch, fault) -> None:
    fault(monkeypatch)
    wrong, _, _ = run_mixed(adapted_generator, mixed_adapters(51))
    assert wrong > 0


def test_greedy_answers_are_those_of_transformers(
    adapted_generator: OrtGenerator, trained_dir: Path, adapter_dirs: dict[str, Path]
) -> None:
    import torch

    requests = mixed_adapters(9)
    engine = engine_of(adapted_generator, slots=4, prefill_tokens=10)
    tickets = [engine.submit(request) for request in requests]
    found = finish(engine)
    for ticket, request in zip(tickets, requests, strict=True):
        if request.adapter is None:
            continue
        model = lora.merged(trained_dir, adapter_dirs[request.adapter])
        ids = torch.tensor([request.prompt])
        limit = min(request.sampling.max_new_tokens, trained.CONTEXT - len(request.prompt))
        out = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=limit, do_sample=False, pad_token_id=2
        )
        expected = out[0, len(request.prompt) :].tolist()
        assert found[ticket, 0] == (expected[:-1] if expected[-1] == trained.EOS else expected)


def test_beams_and_draws_of_one_adapter_beside_another(adapted_generator: OrtGenerator) -> None:
    beams = Sampling(max_new_tokens=10, beams=3, n=2)
    draws = Sampling(max_new_tokens=10, temperature=1.0, n=3, seed=5)
    requests = [
        Request(prompt=PROMPT, sampling=s, adapter=name) for s in (beams, draws) for name in ("polite", "terse")
    ]
    engine = engine_of(adapted_generator, slots=10)
    tickets = [engine.submit(request) for request in requests]
    found = finish(engine)
    for ticket, request in zip(tickets, requests, strict=True):
        alone = adapted_generator.with_adapter(request.adapter).candidates(PROMPT, request.sampling)
        assert [one.ids for one in alone] == [found[ticket, choice] for choice in range(len(alone))]


def test_one_generator_for_each_adapter(adapted_generator: OrtGenerator) -> None:
    polite, terse = (adapted_generator.with_adapter(name) for name in ("polite", "terse"))
    sampling = Sampling(max_new_tokens=12)
    prompts = [request.prompt for request in mixed_requests(4)]
    single = {
        one: [list(one.stream(prompt, sampling)) for prompt in prompts] for one in (polite, terse, adapted_generator)
    }
    assert len(set(map(str, single.values()))) == 3
    for one, answers in single.items():
        assert one.generate(prompts, sampling) == answers
    assert choose_adapter(adapted_generator, "polite").adapter == "polite"  # type: ignore[attr-defined]
    assert choose_adapter(adapted_generator, None) is adapted_generator
    engine = OneByOne(adapted_generator)
    tickets = [engine.submit(Request(prompt=one, sampling=sampling, adapter="terse")) for one in prompts]
    found = finish(engine)
    assert [found[ticket, 0] for ticket in tickets] == single[terse]


def test_an_unknown_adapter_is_named_with_those_that_exist(
    adapted_generator: OrtGenerator, generator: OrtGenerator
) -> None:
    request = Request(prompt=PROMPT, sampling=Sampling(), adapter="polit")
    for call in (engine_of(adapted_generator).submit, OneByOne(adapted_generator).submit):
        with pytest.raises(UsageError, match="there is no adapter `polit`") as refused:
            call(request)
        assert refused.value.hint == "the model has polite, terse"
    for call in (engine_of(generator).submit, OneByOne(generator).submit):
        with pytest.raises(UsageError, match="there is no adapter `polit`: the model has none"):
            call(request)


def test_a_file_of_another_graph_is_refused(adapted: StageResult, tmp_path: Path, bundle: Path) -> None:
    broken = Path(shutil.copytree(bundle, tmp_path / "broken"))  # a model of another width, without inputs for adapters
    shutil.copytree(adapted.outputs["model"].path / "adapters", broken / "adapters")
    with pytest.raises(
        InputError, match=r"polite.onnx_adapter does not fit the graph: it has no input `blocks\.0\.attention"
    ):
        open_bundle(broken, "cpu", threads=1)
    whole = Path(shutil.copytree(adapted.outputs["model"].path, tmp_path / "whole"))
    (whole / "adapters" / "polite.onnx_adapter").write_bytes(b"nothing")
    with pytest.raises(InputError, match=r"polite.onnx_adapter cannot be read"):
        open_bundle(whole, "cpu", threads=1)


def test_a_graph_without_masks_is_refused(adapted: StageResult, tmp_path: Path) -> None:
    """Other programs write graphs of the same convention, with one adapter for all rows of a call."""
    import onnx

    foreign = Path(shutil.copytree(adapted.outputs["model"].path, tmp_path / "foreign"))
    model = onnx.load(foreign / "model.onnx", load_external_data=False)
    mask = next(value for value in model.graph.input if value.name.endswith(MASK))
    model.graph.input.remove(mask)  # it is still there, as a constant
    onnx.save(model, foreign / "model.onnx")
    with pytest.raises(InputError, match=f"polite.onnx_adapter cannot be used: its graph has no input `{mask.name}`"):
        open_bundle(foreign, "cpu", threads=1)


def test_adapters_that_were_bound_half_way_are_bound_again(adapted_generator: OrtGenerator) -> None:
    """Memory may end while the second value is copied to a device; then the binding has neither adapter."""
    assert adapted_generator.adapters is not None
    bound: dict[str, ort.OrtValue] = {}
    left = [1000]

    class Binding:
        def bind_ortvalue_input(self, name: str, value: ort.OrtValue) -> None:
            if not left[0]:
                raise RuntimeError("out of memory")
            left[0] -= 1
            bound[name] = value

    binding, rows = Binding(), RowAdapters(adapted_generator.adapters)
    polite, terse = np.array([1]), np.array([2])
    rows.bind(binding, polite)  # type: ignore[arg-type]
    whole = dict(bound)
    left[0] = len(whole) // 2
    with pytest.raises(RuntimeError):
        rows.bind(binding, terse)  # type: ignore[arg-type]
    assert bound != whole
    left[0] = 1000
    rows.bind(binding, polite)  # type: ignore[arg-type]
    assert bound == whole


def test_the_bundle_says_where_its_adapters_come_from(adapted: StageResult) -> None:
    found = json.loads((adapted.outputs["model"].path / "adapters" / "adapters.json").read_text())
    assert found == {
        "polite": {"artifact": "sha256:polite", "rank": 4},
        "terse": {"artifact": "sha256:terse", "rank": 3},
    }
    assert adapted.metrics["adapters"] == 2
    assert 0 < adapted.metrics["parity.adapters_max_abs_diff"] < 1e-5
