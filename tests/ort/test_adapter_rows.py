"""Several adapters side by side: few are put together, all of it is bounded and counted, and each row has its own."""

from __future__ import annotations

import gc
import shutil
import weakref
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnxruntime as ort
import pytest
from traffic import engine_of, mixed_requests, run_mixed

from llmctl.engine import Request
from llmctl.generator import Sampling
from llmctl.ort import OrtGenerator, open_bundle
from llmctl.ort.adapter_rows import PATIENCE, Places, RowAdapters
from llmctl.ort.adapters import DOWN, MASK, UP, Adapters, kind_of
from llmctl.testing import StageResult


@pytest.fixture(scope="module")
def many(adapted: StageResult, tmp_path_factory: pytest.TempPathFactory) -> OrtGenerator:
    """Twelve adapters of ranks 4 and 3 in turn, no two alike."""
    directory = Path(shutil.copytree(adapted.outputs["model"].path, tmp_path_factory.mktemp("many") / "model"))
    for number in range(5):
        for name in ("polite", "terse"):
            shutil.copy(
                directory / f"adapters/{name}.onnx_adapter", directory / f"adapters/{name}{number}.onnx_adapter"
            )
    generator = open_bundle(directory, "cpu", threads=1)
    assert generator.adapters is not None
    for number, factors in enumerate(generator.adapters._factors):
        for matrix in factors.values():
            matrix *= 1 - number / 24
    return generator


@pytest.fixture
def adapters(many: OrtGenerator) -> Adapters:
    assert many.adapters is not None
    return many.adapters


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """The adapters of all `Places` that are made, each time."""
    found: list[tuple[int, ...]] = []
    init = Places.__init__

    def spy(places: Places, adapters: Adapters, numbers: list[int]) -> None:
        found.append(tuple(numbers))
        init(places, adapters, numbers)

    monkeypatch.setattr(Places, "__init__", spy)
    return found


class Binding:
    """What a call would read."""

    def __init__(self) -> None:
        self.values: dict[str, ort.OrtValue] = {}

    def bind_ortvalue_input(self, name: str, value: ort.OrtValue) -> None:
        self.values[name] = value


def assert_rows_have(binding: Binding, adapters: Adapters, rows: np.ndarray) -> None:
    """`x A * mask B` is that of each row's own adapter."""
    random = np.random.default_rng(0)
    for site, (width, columns) in adapters.sites.items():
        x = random.standard_normal((len(rows), 1, width)).astype(np.float32)
        down, up, mask = (binding.values[name].numpy() for name in (site + DOWN, site + UP, kind_of(site) + MASK))
        found = (x @ down * mask) @ up
        for row, number in enumerate(rows):
            own = adapters.feeds(int(number))
            expected = x[row] @ own[site + DOWN] @ own[site + UP] if number else np.zeros((1, columns))
            np.testing.assert_allclose(found[row], expected, atol=1e-5)


def batches(seed: int) -> Iterator[np.ndarray]:
    """Rows of one batch after another: one comes, goes or changes its adapter."""
    random = np.random.default_rng(seed)
    rows: list[int] = [0]
    for _ in range(120):
        if len(rows) < 8 and random.random() < 0.5:
            rows.append(int(random.integers(13)))
        elif len(rows) > 1 and random.random() < 0.5:
            del rows[int(random.integers(len(rows)))]
        else:
            rows[int(random.integers(len(rows)))] = int(random.integers(13))
        yield np.array(rows)


@pytest.mark.parametrize("seed", range(3))
def test_each_row_has_its_own_adapter_whoever_was_beside_it(adapters: Adapters, seed: int) -> None:
    rows, steps, feed = RowAdapters(adapters), [Binding() for _ in range(9)], Binding()
    for batch in batches(seed):
        for binding, wanted in ((steps[len(batch)], batch), (feed, batch[-1:])):
            rows.bind(binding, wanted)  # type: ignore[arg-type]
            assert_rows_have(binding, adapters, wanted)


def test_300_requests_over_12_adapters_put_few_together_and_keep_one_set(
    many: OrtGenerator, adapters: Adapters, made: list[tuple[int, ...]]
) -> None:
    random, names = np.random.default_rng(0), many.adapter_names
    engine = engine_of(many, slots=16, max_queue=300)
    for client in range(300):
        sampling = Sampling(max_new_tokens=int(random.integers(1, 40)), logit_bias=((1, -100.0),))
        prompt, name = random.integers(3, 97, int(random.integers(2, 20))).tolist(), names[random.integers(12)]
        engine.submit(Request(prompt=prompt, sampling=sampling, adapter=name, client=str(client)))
    counted = engine.memory_bytes - engine.cache_bytes
    assert counted == 2 * sum(adapters.size(number) for number in range(1, 13))
    while engine.busy:
        engine.step()
    alive = [one for one in gc.get_objects() if type(one) is Places]
    assert len(alive) == 1
    (places,) = alive
    assert sum(value.numpy().nbytes for value in places.values.values()) == places.bytes <= counted / 2
    assert 1 < len(made) < 40  # a set for every change was 220
    engine.close()
    assert places.bytes
    del places, alive
    assert not any(type(one) is Places for one in gc.get_objects())


def test_nothing_is_put_together_when_the_same_adapters_come_back(
    adapters: Adapters, made: list[tuple[int, ...]]
) -> None:
    rows, step, feed = RowAdapters(adapters), Binding(), Binding()
    for _ in range(20):
        for batch in ([1, 2, 3, 4], [1, 2, 4, 4], [0, 3, 3, 1], [1, 1, 1, 1]):
            rows.bind(step, np.array(batch))  # type: ignore[arg-type]
            rows.bind(feed, np.array(batch[-1:]))  # type: ignore[arg-type]
    assert made == [(1, 2, 3, 4)]


def test_one_adapter_is_bound_as_it_is(adapters: Adapters, made: list[tuple[int, ...]]) -> None:
    rows, binding = RowAdapters(adapters), Binding()
    for batch in ([1], [12], [0, 5, 5], [7, 7], [0, 0]):
        rows.bind(binding, np.array(batch))  # type: ignore[arg-type]
        for name, matrix in adapters.feeds(max(batch)).items():
            assert not matrix.size or binding.values[name].data_ptr() == matrix.ctypes.data
    assert made == []


def test_another_adapter_takes_a_free_place_and_the_others_stay(
    adapters: Adapters, made: list[tuple[int, ...]]
) -> None:
    rows, binding, other = RowAdapters(adapters), Binding(), Binding()
    rows.bind(other, np.array([1, 3]))  # type: ignore[arg-type]
    places = rows._places
    assert places is not None
    rows.bind(binding, np.array([1, 2]))  # type: ignore[arg-type]  # of a smaller rank
    assert places.owners == [1, 2]
    assert_rows_have(binding, adapters, np.array([1, 2]))
    rows.bind(other, np.array([1, 3]))  # type: ignore[arg-type]
    assert places.owners == [1, 3]
    assert_rows_have(other, adapters, np.array([1, 3]))
    assert made == [(1, 3)]


def test_who_was_longest_out_of_use_loses_its_place(adapters: Adapters, made: list[tuple[int, ...]]) -> None:
    rows, binding = RowAdapters(adapters), Binding()
    for batch in ([1, 2, 3, 4], [1, 2, 4], [1, 2, 5]):
        rows.bind(binding, np.array(batch))  # type: ignore[arg-type]
    assert made == [(1, 2, 3, 4)]
    assert rows._places is not None
    assert rows._places.owners == [1, 2, 5, 4]


def test_places_are_narrowed_for_batches_that_change_with_every_step(
    adapters: Adapters, made: list[tuple[int, ...]]
) -> None:
    rows, binding = RowAdapters(adapters), Binding()
    rows.bind(binding, np.arange(1, 13))  # type: ignore[arg-type]
    for step in range(6):
        rows.bind(binding, np.roll([1, 2, 3], step))  # type: ignore[arg-type]
    assert made[1:] == [(1, 2, 3)]


def test_places_that_were_too_wide_for_long_are_given_back(adapters: Adapters, made: list[tuple[int, ...]]) -> None:
    rows, wide, narrow = RowAdapters(adapters), Binding(), Binding()
    rows.bind(wide, np.arange(1, 13))  # type: ignore[arg-type]
    before = weakref.ref(rows._places)
    steps = 0
    while len(made) == 1:
        rows.bind(narrow, np.arange(1, 11))  # type: ignore[arg-type]
        steps += 1
    assert made[1:] == [tuple(range(1, 11))]
    need, vain = (sum(map(adapters.size, numbers)) for numbers in (range(1, 11), (11, 12)))
    assert steps == PATIENCE * need // vain + 1
    gc.collect()
    assert before() is None
    assert all(value.numpy().size == 0 for name, value in wide.values.items() if name.endswith((DOWN, UP)))
    rows.bind(wide, np.arange(1, 13))  # type: ignore[arg-type]
    assert_rows_have(wide, adapters, np.arange(1, 13))


def test_memory_of_a_device_that_ends_half_way_leaves_no_wrong_owner(adapters: Adapters) -> None:
    class Device:
        """What `Places` asks of adapters, on a device."""

        device = "cuda"

        def __getattr__(self, name: str):
            return getattr(adapters, name)

    class Full:
        def update_inplace(self, array: np.ndarray) -> None:
            raise RuntimeError("out of memory")

    places = Places(adapters, [1, 3])
    values = places.values
    places._adapters = Device()  # type: ignore[assignment]
    places.values = dict.fromkeys(values, Full())  # type: ignore[arg-type]
    with pytest.raises(RuntimeError):
        places.admit({1, 5}, [1, 3])
    assert places.owners == [1, -1]
    places._adapters, places.values = adapters, values
    assert places.admit({1, 5}, [1, 3])
    assert places.owners == [1, 5]


def test_answers_are_those_of_single_runs(many: OrtGenerator) -> None:
    names = (None, *many.adapter_names)
    requests = [replace(one, adapter=names[i % len(names)]) for i, one in enumerate(mixed_requests(52))]
    wrong, close, _ = run_mixed(many, requests)
    assert wrong == 0
    assert close < 10
