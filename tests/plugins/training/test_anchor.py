"""The anchor benchmark: what it gives the stage, and (slowly) that it runs and tells recipes apart."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import pytest
import yaml

from llmctl.nn.presets import preset
from llmctl_train_pretrain.params import PretrainParams

ROOT = Path(__file__).parents[3]
spec = importlib.util.spec_from_file_location("anchor", ROOT / "benchmarks" / "anchor.py")
assert spec is not None and spec.loader is not None
anchor = importlib.util.module_from_spec(spec)
spec.loader.exec_module(anchor)


def test_the_speedrun_spec_is_what_is_measured_and_small_enough(tmp_path: Path) -> None:
    flag, path = anchor.flags("speedrun", tmp_path)
    values = yaml.safe_load(Path(path).read_text())["with"]
    params = PretrainParams(**values, context=anchor.CONTEXT)
    config = preset(params.preset, vocab_size=anchor.VOCABULARY + anchor.SPECIAL, overrides=params.shape())
    assert flag == "--config"
    assert config.parameters() <= 1_310_000
    assert (config.dim, config.layers, config.arch) == (128, 4, "speedrun")


def test_the_corpus_is_the_library_in_order_of_names(tmp_path: Path) -> None:
    digest = anchor.write_corpus(tmp_path / "text")
    train, held = ((tmp_path / "text" / f"{split}.jsonl").read_text().splitlines() for split in ("train", "validation"))
    assert len(held) == anchor.VALIDATION and len(train) > 100
    assert '"id": "zipimport.py"' in held[-1] or '"id": "zipapp.py"' in held[-1]
    assert re.fullmatch("[0-9a-f]{12}", digest)


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize(("recipe", "most"), [("speedrun", 3.33), ("default", 3.60)])
def test_the_recipes_reach_what_is_said_of_them(capsys, recipe: str, most: float) -> None:
    """One seed of the three that `benchmarks/RESULTS.md` has: nanochat ends at 3.300 nats on this corpus."""
    anchor.main(["--recipe", recipe, "--seeds", "0"])
    first, *_, last = capsys.readouterr().out.splitlines()
    if "corpus 2e31e854ce7c" not in first:
        pytest.skip("the library of another Python is another corpus")
    assert float(last.split()[1]) <= most


@pytest.mark.slow
def test_a_short_run_tells_recipes_apart(capsys) -> None:
    found = {}
    for recipe in ("speedrun", "adamw"):
        anchor.main(["--recipe", recipe, "--seeds", "0", "--steps", "25"])
        last = capsys.readouterr().out.splitlines()[-1]
        match = re.fullmatch(r"val_nats (\d\.\d{3}) ± nan", last)
        assert match is not None
        found[recipe] = float(match[1])
    assert found["speedrun"] < found["adamw"] - 0.3
