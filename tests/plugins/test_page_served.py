"""The chat page of a real `llmctl serve`, and its absence."""

from __future__ import annotations

import http.client
import os
import subprocess
import sys

import pytest

from llmctl_serve.bench.host import _free_port, _wait


@pytest.mark.slow
@pytest.mark.parametrize(("flag", "status"), [("--page", 200), ("--no-page", 404)])
def test_the_page_is_there_unless_it_is_turned_off(real_models, tmp_path, flag, status):
    _, onnx = real_models
    port, log = _free_port(), tmp_path / "log"
    command = [sys.executable, "-m", "llmctl", "serve", "--model", str(onnx.path), "--port", str(port), flag]
    command += ["--threads", "1"]
    environment = {**os.environ, "LLMCTL_STORE": str(tmp_path / "store")}
    with log.open("wb") as file:
        process = subprocess.Popen(command, stdout=file, stderr=file, cwd=tmp_path, env=environment)
    try:
        _wait(process, port, log)
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
        connection.request("GET", "/")
        response = connection.getresponse()
        body = response.read()
        connection.close()
        assert response.status == status
        assert (b"llmctl chat" in body) == (status == 200)
    finally:
        process.terminate()
        process.wait(30)
