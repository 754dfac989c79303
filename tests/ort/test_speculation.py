"""Speculation changes no token: the answers are those of single runs, whatever is proposed."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import numpy as np
import pytest
import trained
from hypothesis import given
from hypothesis import strategies as st
from traffic import assert_empty, disagreements, engine_of, finish, mixed_requests, run_traffic

from llmctl.engine import Request
from llmctl.errors import UsageError
from llmctl.generator import Sampling
from llmctl.ort import OrtGenerator, speculation
from llmctl.ort.drafts import LONGEST_NGRAM, DraftModel, NgramIndex
from llmctl.ort.slots import Slots
from llmctl.ort.speculation import FIRST_PAUSE, LONGEST_RUN, Acceptance, Costs, Speculation
from llmctl.ort.tasks import Lane, Task


@pytest.fixture
def always(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever is proposed is judged: on this small model time would decide otherwise."""
    monkeypatch.setattr(Speculation, "pays", lambda *_: True)
    monkeypatch.setattr(Speculation, "_gains", lambda _, lane, count: count > 0)


def drafting(kind: str, model: OrtGenerator, random: OrtGenerator) -> dict[str, object]:
    """Options of an engine whose proposals come from the text, the model itself, or one that knows nothing."""
    if kind == "prompt-lookup":
        return {"speculation": "prompt-lookup"}
    return {"speculation": "draft", "draft": model if kind == "itself" else random}


@pytest.mark.usefixtures("always")
@pytest.mark.parametrize(
    ("kind", "least", "most"), [("prompt-lookup", 0.1, 0.9), ("itself", 0.97, 1.0), ("random", 0.0, 0.1)]
)
def test_200_requests_that_join_and_leave_get_the_answers_of_single_runs(
    trained_generator: OrtGenerator, generator: OrtGenerator, kind: str, least: float, most: float
) -> None:
    engine, wrong, close = run_traffic(trained_generator, 200, **drafting(kind, trained_generator, generator))
    stats = engine.stats()
    assert wrong == 0
    assert close < 0.002 * stats.generated_tokens, f"{close} steps of {stats.generated_tokens} were not judged"
    assert stats.drafted > 1000
    assert least <= stats.accepted / stats.drafted <= most


def test_what_the_engine_decides_by_itself_changes_no_token(trained_generator: OrtGenerator) -> None:
    engine, wrong, _ = run_traffic(trained_generator, 60, speculation="prompt-lookup")
    assert (wrong, engine.stats().drafted > 0) == (0, True)


def _keeps_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """The slot is believed to hold what was refused."""
    judge = Speculation.judge

    def wrong(self, lane: Lane, draft: Sequence[int]):
        start = self.slots.lengths[lane.slot]
        found = judge(self, lane, draft)
        self.slots.lengths[lane.slot] = start + 1 + len(draft)
        return found

    monkeypatch.setattr(Speculation, "judge", wrong)


def _one_too_many(monkeypatch: pytest.MonkeyPatch) -> None:
    """The token behind the first wrong one is taken too."""
    follow = speculation.follow

    def wrong(logits: np.ndarray, draft: Sequence[int], *rest) -> list[int]:
        tokens = follow(logits, draft, *rest)
        return [*tokens, int(logits[len(tokens)].argmax())] if len(tokens) <= len(draft) else tokens

    monkeypatch.setattr(speculation, "follow", wrong)


def _believes_the_draft(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is judged."""
    monkeypatch.setattr(speculation, "follow", lambda logits, draft, *_: [*draft, int(logits[-1].argmax())])


@pytest.mark.usefixtures("always")
@pytest.mark.parametrize("fault", [_keeps_refused, _one_too_many, _believes_the_draft])
def test_faults_are_seen(trained_generator: OrtGenerator, monkeypatch: pytest.MonkeyPatch, fault) -> None:
    fault(monkeypatch)
    with pytest.raises(AssertionError):  # what the tests above would say
        _, wrong, _ = run_traffic(trained_generator, 60, speculation="prompt-lookup")
        assert wrong == 0


def follow_the_draft(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Assert at every proposal that the draft model's slot holds the lane's own text; where each began to read."""
    starts: list[int] = []
    propose = DraftModel.propose

    def checked(self, lane: Lane, most: int) -> list[int]:
        slot = self._slot_of.get(lane)
        if slot is not None:
            text = [*lane.task.prompt.tolist(), *lane.answer]
            length = int(self.slots.lengths[slot])
            assert self.slots.contents[slot, :length].tolist() == text[:length]
            assert length < len(text)
        found = propose(self, lane, most)
        if slot is None and lane in self._slot_of:
            starts.append(int(self.slots.lengths[self._slot_of[lane]]))
        return found

    monkeypatch.setattr(DraftModel, "propose", checked)
    return starts


@pytest.mark.usefixtures("always")
def test_the_slots_of_the_draft_model_follow_their_lanes(
    trained_generator: OrtGenerator, generator: OrtGenerator, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert follow_the_draft(monkeypatch) == []
    # At temperature 1 the model itself, which proposes greedily, is refused now and then.
    for draft in (generator, trained_generator):
        engine = engine_of(trained_generator, slots=3, max_queue=99, speculation="draft", draft=draft, prefill_tokens=9)
        for i, request in enumerate(mixed_requests(25)):
            engine.submit(Request(prompt=request.prompt, sampling=Sampling(max_new_tokens=20, temperature=1.0, seed=i)))
        finish(engine)
        assert engine.stats().accepted < engine.stats().drafted
        assert engine._speculation is not None
        assert engine._speculation.failed is None
        assert (engine._speculation.drafter._slot_of, engine._speculation._progress) == ({}, {})  # type: ignore[attr-defined]
    monkeypatch.setattr(DraftModel, "judged", lambda *_: None)
    engine = engine_of(trained_generator, slots=2, speculation="draft", draft=generator)
    engine.submit(Request(prompt=[5, 9, 20], sampling=Sampling(max_new_tokens=40, temperature=1.0, seed=1)))
    finish(engine)
    assert engine._speculation is not None
    assert isinstance(engine._speculation.failed, AssertionError), "refused tokens that are not taken back are seen"


@pytest.mark.usefixtures("always")
def test_the_draft_model_goes_on_from_a_prompt_that_it_has_read(trained_generator: OrtGenerator) -> None:
    random = np.random.default_rng(3)
    prompt = trained.sentence(random, 60)
    fed: list[int] = []
    engine = engine_of(trained_generator, slots=2, speculation="draft", draft=trained_generator)
    assert engine._speculation is not None
    drafter = engine._speculation.drafter
    assert isinstance(drafter, DraftModel)
    feed = drafter.slots.feed
    drafter.slots.feed = lambda slot, ids, **how: (fed.append(len(ids)), feed(slot, ids, **how))[1]  # type: ignore[method-assign]
    sums = []
    for tail in (20, 21):
        fed.clear()
        engine.submit(Request(prompt=[*prompt, tail], sampling=Sampling(max_new_tokens=6)))
        finish(engine)
        sums.append(sum(fed))
    assert sums[0] > 60
    assert sums[1] < 20
    assert engine.memory_bytes > engine_of(trained_generator, slots=2).memory_bytes


@pytest.mark.usefixtures("always")
@pytest.mark.parametrize("kind", ["prompt-lookup", "itself", "random"])
def test_seeds_and_scores_are_those_of_runs_without(
    trained_generator: OrtGenerator, generator: OrtGenerator, kind: str
) -> None:
    requests = [
        Request(
            prompt=request.prompt,
            sampling=Sampling(
                max_new_tokens=15,
                temperature=0.4 + i % 3 / 4,
                top_k=(0, 20)[i % 2],
                top_p=(1.0, 0.9)[i % 3 == 1],
                seed=i,
                n=1 + i % 4,
                repetition_penalty=(1.0, 1.3)[i % 4 == 1],
                frequency_penalty=(0.0, 0.5)[i % 5 == 0],
                logit_bias=((8, 2.0),) if i % 7 == 0 else (),
            ),
            logprobs=(None, 0, 2)[i % 3],
        )
        for i, request in enumerate(mixed_requests(40))
    ]
    engine = engine_of(trained_generator, slots=5, **drafting(kind, trained_generator, generator))
    tickets = [engine.submit(request) for request in requests]
    events = []
    while engine.busy:
        events += engine.step()
    assert engine.stats().drafted > 100
    assert any(len(event.tokens) > 1 for event in events) == (engine.stats().accepted > 0)
    for ticket, request in zip(tickets, requests, strict=True):
        for choice, single in enumerate(request.sampling.draws()):
            own = [event for event in events if (event.ticket, event.choice) == (ticket, choice)]
            answer = [token for event in own for token in event.tokens]
            assert answer == list(trained_generator.stream(request.prompt, single))
            scored = [score for event in own for score in event.scores]
            ended = [own[-1].finish_reason == "stop"]
            if request.logprobs is None:
                assert scored == []
                continue
            assert [score.token for score in scored] == answer + [trained.EOS] * sum(ended)
            expected = trained_generator.logprobs([*request.prompt, *answer])[len(request.prompt) - 1 :]
            assert np.allclose([score.logprob for score in scored][: len(answer)], expected, atol=1e-4)
            assert all(len(score.top) == request.logprobs for score in scored)
    assert_empty(engine)


class _Alternating:
    """A constraint with a memory: even and odd tokens take turns, and none comes back within four."""

    def __init__(self, said: Sequence[int] = ()) -> None:
        self.said = list(said)

    def mask(self) -> np.ndarray:
        allowed = np.arange(trained.VOCABULARY) % 2 == len(self.said) % 2
        allowed[self.said[-4:]] = False
        allowed[trained.EOS] = len(self.said) > 12
        return allowed

    def accept(self, token: int) -> None:
        assert self.mask()[token], f"{token} after {self.said}"
        self.said.append(token)

    def copy(self) -> _Alternating:
        return _Alternating(self.said)


@pytest.mark.usefixtures("always")
@pytest.mark.parametrize("kind", ["prompt-lookup", "itself"])
def test_constrained_answers_are_valid_and_those_of_single_runs(
    trained_generator: OrtGenerator, generator: OrtGenerator, kind: str
) -> None:
    engine = engine_of(trained_generator, slots=4, **drafting(kind, trained_generator, generator))
    wanted = {}
    for i, request in enumerate(mixed_requests(40, seed=5)):
        sampling = Sampling(max_new_tokens=20, temperature=(0.0, 0.8)[i % 2], seed=i)
        wanted[engine.submit(Request(prompt=request.prompt, sampling=sampling, constraint=_Alternating()))] = (
            request.prompt,
            sampling,
        )
    found = finish(engine)
    assert engine.stats().accepted > 10
    for ticket, (prompt, sampling) in wanted.items():
        answer = found[ticket, 0]
        checked = _Alternating()
        for token in answer:
            checked.accept(token)
        assert answer == list(trained_generator.stream(prompt, sampling, _Alternating()))


@pytest.mark.usefixtures("always")
def test_a_draft_that_fails_costs_no_answer(
    trained_generator: OrtGenerator, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    engine = engine_of(trained_generator, slots=3, speculation="draft", draft=trained_generator)
    assert engine._speculation is not None
    requests = [
        Request(prompt=trained.sentence(np.random.default_rng(seed), 20), sampling=Sampling(max_new_tokens=20))
        for seed in range(3)
    ]
    tickets = [engine.submit(request) for request in requests]
    for _ in range(4):
        engine.step()

    def fails(*_: object) -> None:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(engine._speculation, "_drafts", fails)
    before = engine.stats().drafted
    said = {ticket: list[int]() for ticket in tickets}
    while engine.busy:
        for event in engine.step():
            assert event.error is None
            said[event.ticket] += event.tokens
    for ticket, request in zip(tickets, requests, strict=True):
        whole = list(trained_generator.stream(request.prompt, request.sampling))
        assert whole[len(whole) - len(said[ticket]) :] == said[ticket] != []
    assert engine.stats().drafted == before
    assert caplog.text.count("speculation has ended") == 1


@pytest.mark.usefixtures("always")
def test_beams_and_failures_beside_speculation(
    trained_generator: OrtGenerator, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompt = trained.sentence(np.random.default_rng(9), 40)
    engine = engine_of(trained_generator, slots=6, speculation="prompt-lookup")
    greedy = Request(prompt=prompt, sampling=Sampling(max_new_tokens=30))
    beams = Request(prompt=prompt[:20], sampling=Sampling(max_new_tokens=12, beams=3, n=2))
    tickets = [engine.submit(greedy), engine.submit(beams)]
    found = finish(engine)
    assert found[tickets[0], 0] == list(trained_generator.stream(prompt, greedy.sampling))
    expected = [candidate.ids for candidate in trained_generator.candidates(beams.prompt, beams.sampling)]
    assert [found[tickets[1], choice] for choice in range(2)] == expected
    failing, other = engine.submit(greedy), engine.submit(greedy)
    for _ in range(3):
        began = engine.step()
    feed = Slots.feed

    def fails(self, slot: int, tokens: np.ndarray) -> np.ndarray:
        if slot == 0:
            raise RuntimeError("out of memory")
        return feed(self, slot, tokens)

    with monkeypatch.context() as patch:
        patch.setattr(Slots, "feed", fails)
        events = engine.step()
    assert [event.ticket for event in events if event.error is not None] == [failing]
    assert began
    finish(engine)
    assert other not in engine._tasks
    assert_empty(engine)


@given(st.lists(st.integers(0, 3), max_size=40), st.integers(1, 9))
def test_a_continuation_is_what_followed_the_longest_end_when_it_occurred_last(text: list[int], most: int) -> None:
    index = NgramIndex()
    index.extend(text[: len(text) // 2])
    index.extend(text[len(text) // 2 :])
    expected: list[int] = []
    for length in range(min(LONGEST_NGRAM, len(text)), 0, -1):
        starts = [end for end in range(length, len(text)) if text[end - length : end] == text[-length:]]
        if starts:
            grown = list(text)
            for i in range(most):
                grown.append(grown[starts[-1] + i])
            expected = grown[len(text) :]
            break
    assert index.continuation(most) == expected


def test_the_index_scans_nothing() -> None:
    """A text ten times as long makes neither a token nor a look-up dearer: entries are counted, not time."""
    index = NgramIndex()
    index.extend([i % 50 for i in range(1000)])
    small = len(index._after)
    index.extend([i % 50 for i in range(9000)])
    assert len(index._after) == small <= 3 * 51 + 9
    assert index.continuation(4) == [0, 1, 2, 3]


class _Proposing:
    """A drafter that always has something to say."""

    memory_bytes = 0

    def begin(self) -> None: ...

    def plan(self, lane: Lane, most: int) -> int:
        return most

    def propose(self, lane: Lane, most: int) -> list[int]:
        return [7] * most

    def judged(self, lane: Lane, accepted: int) -> None: ...

    def forget(self, lane: Lane) -> None: ...

    def close(self) -> None: ...


def lanes_of(count: int) -> list[Lane]:
    request = Request(prompt=[5], sampling=Sampling(max_new_tokens=100))
    task = Task(0, request, np.array([5], np.int32), 100)
    return [Lane(task, i, None, slot=i, token=9, said=1) for i in range(count)]


def ruled(step: dict[int, float], feed: dict[int, float]) -> Speculation:
    """The rule, where calls take these seconds by their size."""
    found = Speculation(None, _Proposing(), 4, frozenset(), clock=lambda: 0.0)  # type: ignore[arg-type]
    for kind, costs in (("step", step), ("feed", feed)):
        for size, seconds in costs.items():
            found.costs.add(kind, size, seconds)
    return found


def test_it_speculates_where_tokens_per_second_are_more() -> None:
    """Five tokens at once take as long as two: right at 9 of 10 that pays for one row, and for eight rows of a batch
    that takes as long as one row it does not."""
    costs = ({1: 1.0, 8: 1.2}, {1: 1.0, 5: 2.0})
    for count, right, expected in [(1, 0.9, True), (1, 0.2, False), (8, 0.9, False), (2, 0.9, None)]:
        rule = ruled(*costs)
        rule.overall = Acceptance(right=right * 100, judged=100)
        found = rule.drafts(lanes_of(count))
        if expected is None:  # a step of two rows has not been measured
            assert found is None
            assert rule._plain == 0
        else:
            assert (found is not None) == expected
    tokens = 1 + sum(0.9**i for i in range(1, 5))
    assert Acceptance(90, 100).expected(4) == pytest.approx(tokens - 1)


def test_what_does_not_pay_is_tried_again_ever_more_rarely() -> None:
    rule = ruled({8: 1.0}, {1: 1.0, 5: 2.0})
    lanes = lanes_of(8)
    tried = [i for i in range(200) if rule.drafts(lanes) is not None]
    assert tried == [FIRST_PAUSE, 3 * FIRST_PAUSE + 1, 7 * FIRST_PAUSE + 2, 15 * FIRST_PAUSE + 3]
    rule.costs = Costs()
    rule.costs.add("step", 8, 100.0)
    rule.costs.add("feed", 5, 1.0)
    assert rule.drafts(lanes) is not None


def test_the_cost_of_a_plain_step_is_measured_anew_while_speculation_pays() -> None:
    rule = ruled({1: 10.0}, {1: 1.0, 5: 2.0})
    plain = [i for i in range(200) if rule.drafts(lanes_of(1)) is None]
    assert plain == [LONGEST_RUN, 2 * LONGEST_RUN + 1, 3 * LONGEST_RUN + 2]


def test_a_proposal_grows_with_success_shrinks_with_failure_and_ends_before_the_limit() -> None:
    rule = ruled({1: 1.0}, {})
    (lane,) = lanes_of(1)
    lengths = []
    for proposed, accepted in [(4, 0), (3, 1), (2, 0), (1, 0), (1, 0), (1, 1), (3, 3), (4, 4)]:
        rule._learn(lane, proposed, accepted)
        lengths.append(rule._most(lane))
    assert lengths == [3, 2, 1, 1, 1, 3, 4, 4]
    assert (rule.drafted, rule.accepted) == (19, 9)
    lane.said = 98
    assert rule._most(lane) == 1
    lane.said = 99
    assert rule.drafts([lane]) is None


def test_costs_are_medians_and_unknown_sizes_those_of_the_nearest() -> None:
    costs = Costs()
    assert costs.of("feed", 3) == 0
    for seconds in (1.0, 50.0, 1.2):
        costs.add("feed", 2, seconds)
    assert costs.of("feed", 3) == 1.2
    costs.add("feed", 5, 3.0)
    assert (costs.of("feed", 6), costs.known("feed", 6)) == (3.0, False)


def test_options_that_make_no_sense(trained_generator: OrtGenerator) -> None:
    other = copy.copy(trained_generator)
    other.vocab_size = 96
    growing = copy.copy(trained_generator)
    growing.in_place = False
    for options, message in [
        ({"speculation": "guess"}, "'guess' is not known"),
        ({"speculation": "prompt-lookup", "draft_tokens": 0}, "draft_tokens must be at least 1"),
        ({"speculation": "draft"}, "needs one"),
        ({"speculation": "draft", "draft": other}, "vocabulary has 96 ids, the model's 97"),
        ({"speculation": "draft", "draft": growing}, "in-place cache"),
        ({"draft": trained_generator}, "speculation is 'none'"),
        ({"speculation": "prompt-lookup", "draft": trained_generator}, "speculation is 'prompt-lookup'"),
    ]:
        with pytest.raises(UsageError, match=message):
            engine_of(trained_generator, **options)


@pytest.mark.usefixtures("always")
@pytest.mark.parametrize("most", [1, 9])
def test_no_more_is_proposed_than_asked_for(
    trained_generator: OrtGenerator, monkeypatch: pytest.MonkeyPatch, most: int
) -> None:
    fed: list[int] = []
    judge = Speculation.judge
    monkeypatch.setattr(
        Speculation, "judge", lambda self, lane, draft: (fed.append(len(draft)), judge(self, lane, draft))[1]
    )
    prompt = [5, *range(20, 30)] * 4
    engine = engine_of(trained_generator, slots=1, speculation="prompt-lookup", draft_tokens=most)
    ticket = engine.submit(Request(prompt=prompt, sampling=Sampling(max_new_tokens=30)))
    answer = finish(engine)[ticket, 0]
    assert max(fed) == most
    ended = len(answer) < 30
    assert disagreements(trained_generator, Request(prompt=prompt, sampling=Sampling()), answer, ended)[0] == 0
