"""Load by locust: users who stream an answer, ask for whole ones, and send what is refused, without a pause.

python -m venv peers && peers/bin/pip install locust==2.47.0
peers/bin/locust -f benchmarks/peers/locustfile.py --headless -u 16 -r 16 -t 20s --host http://127.0.0.1:8000
"""

from __future__ import annotations

import json
import time

from locust import HttpUser, constant, task


class Reader(HttpUser):
    """One user; the server's first model answers."""

    wait_time = constant(0)
    body = {"messages": [{"role": "user", "content": "What is a loom?"}], "max_tokens": 32, "temperature": 0}

    @task(6)
    def stream(self) -> None:
        """A stream must end with [DONE]; the time to its first event is shown by its own name."""
        begun = time.perf_counter()
        with self.client.post(
            "/v1/chat/completions", json={**self.body, "stream": True}, stream=True, catch_response=True, name="stream"
        ) as response:
            lines = response.iter_lines()
            first = next(lines, b"")
            self.environment.events.request.fire(
                request_type="SSE",
                name="first event",
                response_time=1e3 * (time.perf_counter() - begun),
                response_length=len(first),
                exception=None,
                context={},
            )
            last = [first, *filter(None, lines)][-1]
            if response.status_code != 200 or last != b"data: [DONE]":
                response.failure(f"{response.status_code}, ended with {last[:80]!r}")

    @task(3)
    def whole(self) -> None:
        """An answer in one piece."""
        with self.client.post("/v1/chat/completions", json=self.body, catch_response=True, name="whole") as response:
            if response.status_code != 200 or not response.json()["choices"]:
                response.failure(f"{response.status_code}")

    @task(1)
    def refused(self) -> None:
        """What is wrong is told so, and counts as right here."""
        with self.client.post(
            "/v1/chat/completions", data=json.dumps({"messages": 5}), catch_response=True, name="refused"
        ) as response:
            if response.status_code in (400, 415):
                response.success()
            else:
                response.failure(f"{response.status_code}")
