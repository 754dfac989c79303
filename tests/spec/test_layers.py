from __future__ import annotations

from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

from llmctl.spec.diagnostics import Mark, Text
from llmctl.spec.layers import merge
from llmctl.spec.nodes import Entry, Map, Node, Scalar, Sequence
from llmctl.spec.validate import plain

VALUES = st.recursive(
    st.integers(0, 3) | st.booleans() | st.sampled_from(["a", "b"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from("pqr"), inner, max_size=3),
    max_leaves=8,
)
MAPS = st.dictionaries(st.sampled_from("pqr"), VALUES, max_size=3)


def node(value, layer: str) -> Node:
    mark = Mark(Text(layer, "", Path("/")), 1, 1, 1, 2)
    if isinstance(value, dict):
        return Map(mark, {key: Entry(mark, node(item, layer)) for key, item in value.items()})
    if isinstance(value, list):
        return Sequence(mark, tuple(node(item, layer) for item in value))
    return Scalar(mark, value, str(value))


def merged(low, high):
    """The rule, written again over plain values."""
    if isinstance(low, dict) and isinstance(high, dict):
        return {key: merged(low[key], high[key]) if key in low and key in high else high.get(key, low.get(key))
                for key in {**low, **high}}  # fmt: skip
    return high


@given(MAPS, MAPS)
def test_maps_merge_and_all_else_replaces(low, high):
    assert plain(merge(node(low, "low"), node(high, "high"))) == merged(low, high)


@given(MAPS, MAPS, MAPS)
def test_the_order_of_grouping_does_not_matter_for_map_only_layers(a, b, c):
    def maps_only(value):
        return {key: maps_only(item) if isinstance(item, dict) else {} for key, item in value.items()}

    x, y, z = (node(maps_only(value), "x") for value in (a, b, c))
    assert plain(merge(merge(x, y), z)) == plain(merge(x, merge(y, z)))


@given(MAPS)
def test_an_empty_layer_and_the_same_layer_change_nothing(value):
    assert plain(merge(node(value, "a"), node({}, "b"))) == value
    assert plain(merge(node({}, "b"), node(value, "a"))) == value
    assert plain(merge(node(value, "a"), node(value, "b"))) == value


def leaves(found: Node, path=()):
    if isinstance(found, Map):
        for key, entry in found.entries.items():
            yield from leaves(entry.value, (*path, key))
    elif isinstance(found, Scalar):
        yield path, found.mark.text.name


@given(MAPS, MAPS)
def test_every_value_keeps_the_layer_that_set_it(low, high):
    def given_by(value, path):
        for key in path:
            if not isinstance(value, dict) or key not in value:
                return False
            value = value[key]
        return True

    for path, layer in leaves(merge(node(low, "low"), node(high, "high"))):
        assert layer == ("high" if given_by(high, path) else "low")
