"""Rate limits under a clock that the test turns: never too much in any window, nothing lost by refunds."""

from __future__ import annotations

import json
import threading
from collections import deque

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmctl import InputError
from llmctl_serve import quotas as quotas_module
from llmctl_serve.quotas import CLIENTS, EVERY, Quotas
from llmctl_serve.rate_limits import MINUTE, SHARED, LimitedError, Limits, RateLimiter, Window, address, duration

SECOND = 10**9


class Clock:
    def __init__(self, now=10**15):
        self.now = now

    def __call__(self):
        return self.now

    def seconds(self):
        return self.now / 1e9


def limiter(clock, quotas=None, addresses=100, **limits):
    return RateLimiter(Limits(**limits), quotas, clock, addresses)


def refused(call, *args):
    with pytest.raises(LimitedError) as caught:
        call(*args)
    return caught.value


STEPS = st.lists(
    st.tuples(st.integers(0, 40 * SECOND), st.integers(1, 120), st.integers(0, 120), st.integers(0, 3)), max_size=60
)


@given(STEPS, st.integers(1, 200))
def test_no_window_of_a_minute_holds_more_than_the_limit(steps, limit):
    window, now, kept, open_ = Window(limit), 0, [], deque()
    for pause, units, used, finish in steps:
        now += pause
        wait = window.wait(units, now)
        assert (wait is None) == (units > limit)
        if wait == 0:
            entry = [now, units]
            kept.append(entry)
            open_.append((entry, window.take(units, now)))
        for _ in range(min(finish, len(open_))):
            entry, part = open_.popleft()
            back = max(0, entry[1] - used)
            window.give_back(part, back, now)
            entry[1] -= back
        # What was taken and not given back, in every minute that ends with something taken.
        for end, _ in kept:
            assert sum(units for at, units in kept if end - MINUTE < at <= end) <= limit
        assert 0 <= limit - window.remaining(now) <= sum(units for _, units in kept)


@given(STEPS)
def test_the_wait_is_the_shortest_that_suffices(steps):
    window, now = Window(120), 0
    for pause, units, _, _ in steps:
        now += pause
        wait = window.wait(units, now)
        if wait == 0:
            window.take(units, now)
        else:
            assert window.wait(units, now + wait - 1) == 1
            assert window.wait(units, now + wait) == 0
            assert wait <= MINUTE + MINUTE // 60
            now += wait
            window.take(units, now)


def test_memory_of_a_window_is_constant():
    window = Window(10**9)
    for now in range(0, 10 * MINUTE, SECOND // 20):
        window.take(1, now)
    window.remaining(now)
    assert len(window._parts) <= 62


def test_the_limit_of_requests_is_reached_and_frees_itself():
    clock = Clock()
    limits = limiter(clock, requests_per_minute=3)
    for _ in range(3):
        limits.admit("key:a").settle(0)
    error = refused(limits.admit, "key:a")
    assert (error.reason, error.limit) == ("requests", 3)
    assert 60 * SECOND <= error.wait <= 61 * SECOND
    limits.admit("key:b")  # nobody else is touched
    clock.now += error.wait - 1
    refused(limits.admit, "key:a")
    clock.now += 1
    limits.admit("key:a")


def test_tokens_are_reserved_and_what_is_left_comes_back():
    clock = Clock()
    limits = limiter(clock, tokens_per_minute=100)
    first = limits.admit("key:a")
    first.reserve(90)
    second = limits.admit("key:a")
    assert refused(second.reserve, 11).reason == "tokens"
    second.reserve(10)
    first.settle(30)
    assert limits.headers(second)["x-ratelimit-remaining-tokens"] == "60"
    first.settle(0)  # a second settlement gives nothing
    assert limits.headers(second)["x-ratelimit-remaining-tokens"] == "60"
    second.settle(1000)  # more than was reserved is not taken either
    third = limits.admit("key:a")
    assert limits.headers(third) == {
        "x-ratelimit-limit-tokens": "100",
        "x-ratelimit-remaining-tokens": "60",
        "x-ratelimit-reset-tokens": "1m1s",
    }


def test_a_failure_of_the_server_costs_nothing():
    limits = limiter(Clock(), tokens_per_minute=100, requests_per_minute=1)
    admission = limits.admit("key:a")
    admission.reserve(100)
    admission.settle(100, failed=True)
    limits.admit("key:a").reserve(100)


def test_more_than_the_limit_can_never_be_had():
    limits = limiter(Clock(), tokens_per_minute=100)
    assert refused(limits.admit("key:a").reserve, 101).wait is None


def test_what_is_refused_costs_nothing():
    limits = limiter(Clock(), tokens_per_minute=100)
    admission = limits.admit("key:a")
    refused(admission.reserve, 101)
    admission.settle(50)
    limits.admit("key:a").reserve(100)


def test_requests_at_a_time():
    limits = limiter(Clock(), concurrent=2)
    running = [limits.admit("key:a") for _ in range(2)]
    assert refused(limits.admit, "key:a").reason == "concurrency"
    running[0].settle(0)
    running[0].settle(0)
    limits.admit("key:a")
    assert refused(limits.admit, "key:a").reason == "concurrency"


def test_limits_of_a_key_that_change_hold_at_once_and_running_requests_still_count():
    limits = limiter(Clock())
    running = limits.admit("key:a", Limits(concurrent=1))
    assert refused(limits.admit, "key:a", Limits(concurrent=1, requests_per_minute=5)).reason == "concurrency"
    running.settle(0)
    limits.admit("key:a", Limits(concurrent=1, requests_per_minute=5))


def test_unknown_addresses_take_bounded_memory_and_no_allowance_is_lost():
    clock = Clock()
    limits = limiter(clock, addresses=10, requests_per_minute=2)
    for number in range(10):
        limits.admit(f"addr:10.0.0.{number}").settle(0)
    limits.admit("addr:10.0.1.1").settle(0)
    limits.admit("addr:10.0.1.2").settle(0)
    assert refused(limits.admit, "addr:10.0.1.3").reason == "requests"  # the late ones share one allowance
    assert len(limits) == 11
    assert SHARED in limits._clients
    clock.now += 2 * MINUTE
    for number in range(200):
        limits.admit(f"addr:10.1.0.{number}").settle(0)
        clock.now += 7 * SECOND
    assert len(limits) <= 11


def test_addresses():
    assert address("10.0.0.7") == "addr:10.0.0.7"
    assert address("2001:db8:1:2:aaaa::1") == address("2001:db8:1:2:bbbb::9") == "addr:2001:db8:1:2::/64"
    assert address("2001:db8:1:3::1") != address("2001:db8:1:2::1")
    assert address("::ffff:10.0.0.7") == "addr:10.0.0.7"
    assert address("") == address("unix:") == "addr:unknown"


@pytest.mark.parametrize(
    ("nanoseconds", "text"),
    [(0, "0ms"), (1, "1ms"), (17 * 10**6, "17ms"), (SECOND, "1s"), (SECOND + 1, "2s"), (360 * SECOND, "6m0s")],
)
def test_durations_are_written_as_openai_does(nanoseconds, text):
    assert duration(nanoseconds) == text


def test_the_quota_of_a_day_survives_a_restart_and_ends_at_midnight(tmp_path):
    clock = Clock(now=86_400 * SECOND * 20_000 + 86_000 * SECOND)  # 400 seconds before midnight UTC
    path = tmp_path / "state" / "quotas.json"
    quotas = Quotas(path, clock.seconds)
    limits = limiter(clock, quotas, tokens_per_day=100, requests_per_day=5)
    admission = limits.admit("key:a")
    admission.reserve(90)
    admission.settle(40)
    quotas.save()
    assert path.stat().st_mode & 0o777 == 0o600
    again = limiter(clock, Quotas(path, clock.seconds), tokens_per_day=100, requests_per_day=5)
    admission = again.admit("key:a")
    error = refused(admission.reserve, 61)
    assert (error.reason, error.wait) == ("tokens_per_day", 400 * SECOND)
    admission.reserve(60)
    for _ in range(3):
        again.admit("key:a")
    assert refused(again.admit, "key:a").reason == "requests_per_day"
    clock.now += 400 * SECOND
    admission.settle(0)  # a refund of yesterday is void
    today = again.admit("key:a")
    today.reserve(100)
    assert again.quotas.used("key:a").tokens == 100


def test_quotas_are_written_rarely_and_a_damaged_file_is_named(tmp_path):
    clock = Clock()
    quotas = Quotas(tmp_path / "q.json", clock.seconds)
    assert not quotas.due()
    quotas.add("key:a", 1, 5)
    assert quotas.due()
    quotas.save()
    quotas.add("key:a", 1, 5)
    assert not quotas.due()
    clock.now += int(EVERY * SECOND)
    assert quotas.due()
    (tmp_path / "q.json").write_text("{")
    with pytest.raises(InputError, match=r"q\.json: no counts"):
        Quotas(tmp_path / "q.json")


def test_a_disk_that_refuses_is_warned_of_and_tried_again(tmp_path):
    warnings = []
    (tmp_path / "file").write_text("")
    quotas = Quotas(tmp_path / "file" / "q.json", warn=warnings.append)
    quotas.add("key:a", 1, 1)
    quotas.save()
    assert len(warnings) == 1
    assert quotas._changed


def test_no_caller_waits_for_a_slow_disk_and_later_counts_are_not_overwritten(tmp_path, monkeypatch):
    go, written = threading.Event(), []

    def slow(path, text):
        if not written:
            assert go.wait(10)
        written.append(json.loads(text)["used"]["key:a"]["tokens"])
        path.write_text(text)

    monkeypatch.setattr(quotas_module, "replace_file", slow)
    quotas = Quotas(tmp_path / "q.json")
    quotas.add("key:a", 1, 5)
    quotas.save_beside()  # returns though the disk does not
    quotas.add("key:a", 1, 5)
    quotas.save_beside()
    first, second = (thread for thread in threading.enumerate() if thread.name == "quotas")
    assert written == []
    go.set()
    for thread in (first, second):
        thread.join(10)
    assert Quotas(tmp_path / "q.json").used("key:a").tokens == 10
    before = list(written)
    quotas._write(1, "{}")  # a thread that the scheduler left for last
    assert written == before


def test_addresses_with_quotas_take_bounded_memory():
    quotas = Quotas(None)
    for number in range(CLIENTS + 50):
        quotas.add(f"addr:{number}", 1, 1)
    assert len(quotas._used) == CLIENTS + 1
    assert quotas.used("addr:new").requests == 50
    assert json.dumps(quotas.used(SHARED).requests) == "50"


@pytest.mark.parametrize("value", [0, -1, True, 1.5, "7"])
def test_limits_are_whole_numbers(value):
    with pytest.raises(ValueError, match="requests_per_minute"):
        Limits(requests_per_minute=value)


def test_tokens_of_the_day_are_given_back_on_the_day_they_were_counted():
    """A request that came before midnight and was read after it: its refund belongs to the new day."""
    clock = Clock(now=86_400 * SECOND * 20_000 + 86_399 * SECOND)
    limits = limiter(clock, Quotas(None, clock.seconds), tokens_per_day=100, requests_per_day=5)
    admission = limits.admit("key:a")
    clock.now += 2 * SECOND
    admission.reserve(90)
    assert limits.quotas.used("key:a").tokens == 90
    admission.settle(10, failed=False)
    assert limits.quotas.used("key:a").tokens == 10
    assert limits.quotas.used("key:a").requests == 0
