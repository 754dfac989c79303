"""The chat page in headless Chromium, as a person uses it: keyboard, hover, dark mode, text that would be a script."""

from __future__ import annotations

import asyncio
import json
import os
import re
import shutil
from contextlib import contextmanager
from pathlib import Path

import pytest

playwright = pytest.importorskip("playwright.sync_api", reason="the extra test-browser is not installed")

from fastapi import FastAPI, Request  # noqa: E402
from fastapi.responses import JSONResponse, StreamingResponse  # noqa: E402

from llmctl_serve.pages import FOLDER, mount_page  # noqa: E402
from llmctl_serve.server import HttpServer, listen, url  # noqa: E402

PROGRAMS = ("chromium-headless-shell", "chromium", "chromium-browser", "google-chrome")
CHROMIUM = next(filter(None, map(shutil.which, PROGRAMS)), None)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no chromium here: apt-get install chromium-headless-shell")
ATTACK = "<script>window.hit=1</script><img src=x onerror='window.hit=1'>"
KEY = "s3cret"


class Server:
    """The page, and an API behind it that says what it is told to."""

    def __init__(self):
        self.parts, self.delay, self.asked, self.left = ["Hello", " there"], 0.0, [], 0
        self.scores, self.key, self.broken, self.url = True, "", False, ""
        self.fault = ""

    def app(self):
        app = FastAPI(telemetry={"tracing": False, "metrics": False, "logs": False})
        mount_page(app)

        @app.get("/v1/models", response_model=None)
        async def models(request: Request):
            if self.key and request.headers.get("authorization") != f"Bearer {self.key}":
                return JSONResponse({"error": {"message": "the API key is missing or wrong"}}, 401)
            return {"data": [{"id": "small"}, {"id": "large"}]}

        @app.post("/v1/chat/completions", response_model=None)
        async def chat(request: Request):
            body = await request.json()
            self.asked.append(body)
            if self.fault:
                return JSONResponse({"error": {"message": self.fault}}, 500)
            if body.get("logprobs") and not self.scores:
                message = "`logprobs` is not supported together with `stream`"
                return JSONResponse({"error": {"message": message}}, 400)
            return StreamingResponse(self.events(body), media_type="text/event-stream")

        return app

    async def events(self, body):
        try:
            for part in self.parts:
                choice = {"index": 0, "delta": {"content": part}, "finish_reason": None}
                if body.get("logprobs"):
                    top = [{"token": part, "logprob": -0.5}, {"token": "<b>other</b>", "logprob": -1.2}]
                    choice["logprobs"] = {"content": [{"token": part, "logprob": -0.5, "top_logprobs": top}]}
                yield f"data: {json.dumps({'choices': [choice]})}\n\n"
                await asyncio.sleep(self.delay)
            if not self.broken:
                usage = {"prompt_tokens": 9, "completion_tokens": len(self.parts)}
                yield f"data: {json.dumps({'choices': [], 'usage': usage})}\n\ndata: [DONE]\n\n"
        except asyncio.CancelledError:
            self.left += 1
            raise


@pytest.fixture(scope="module")
def served():
    server = Server()
    with listen("127.0.0.1", 0) as listener, HttpServer(server.app(), listener, 1, lambda: None):
        server.url = url(listener)
        yield server


@pytest.fixture
def server(served):
    base = served.url
    served.__init__()
    served.url = base
    return served


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def opened(browser, server):
    """`with opened(options) as page`; afterwards the page has logged no error and loaded nothing from elsewhere."""

    @contextmanager
    def run(expected="", **options):
        context = browser.new_context(viewport={"width": 1000, "height": 720}, **options)
        page = context.new_page()
        page.set_default_timeout(20_000)
        logged, loaded = [], []
        page.on("console", lambda message: logged.append(message.text) if message.type == "error" else None)
        page.on("pageerror", lambda error: logged.append(str(error)))
        page.on("request", lambda request: loaded.append(request.url))
        page.goto(server.url)
        page.wait_for_selector("#model option", state="attached") if not server.key else None
        yield page
        assert [text for text in logged if not (expected and expected in text)] == []
        assert all(address.startswith(server.url) for address in loaded)
        context.close()

    return run


def shoot(page, tmp_path, name):
    """A screenshot for people: in $LLMCTL_SCREENSHOTS, if set."""
    folder = Path(os.environ.get("LLMCTL_SCREENSHOTS") or tmp_path)
    page.screenshot(path=folder / f"{name}.png")
    assert (folder / f"{name}.png").stat().st_size > 5000


def ask(page, text):
    page.locator("#question").fill(text)
    page.keyboard.press("Enter")


def answered(page, text, at=-1):
    answer = page.locator(".assistant .text")
    answer = answer.last if at == -1 else answer.nth(at)
    playwright.expect(answer).to_have_text(text)
    playwright.expect(page.locator("#send")).to_be_visible()


def test_a_conversation_by_keyboard_and_what_is_sent(opened, server, tmp_path):
    with opened() as page:
        assert page.evaluate("document.activeElement.id") == "question"
        page.keyboard.type("line one")
        page.keyboard.press("Shift+Enter")
        page.keyboard.type("line two")
        page.keyboard.press("Enter")
        answered(page, "Hello there")
        assert server.asked[0]["messages"] == [{"role": "user", "content": "line one\nline two"}]
        assert server.asked[0]["model"] == "small"
        assert page.locator("#live").text_content() == "Hello there"
        assert page.locator("#live").get_attribute("aria-live") == "polite"
        assert "2 tokens" in page.locator(".assistant .tools").text_content()
        page.locator("#settings-button").click()
        page.locator("#system").fill("be kind")
        page.locator("#temperature").fill("0.3")
        page.locator("#top_k").fill("7")
        page.locator("#max_tokens").fill("12")
        page.locator("#stop").fill("END\nSTOP")
        page.locator("#model").select_option("large")
        ask(page, "again")
        answered(page, "Hello there")
        second = server.asked[1]
        assert [turn["role"] for turn in second["messages"]] == ["system", "user", "assistant", "user"]
        assert (second["model"], second["temperature"], second["top_k"], second["max_tokens"]) == ("large", 0.3, 7, 12)
        assert second["stop"] == ["END", "STOP"]
        assert "top_p" not in second and "seed" not in second
        shoot(page, tmp_path, "settings")


def test_the_conversation_is_kept_until_it_is_cleared(opened, server):
    with opened() as page:
        ask(page, "remember me")
        answered(page, "Hello there")
        page.locator("#settings-button").click()
        page.locator("#key").fill(KEY)
        page.locator("#seed").fill("5")
        page.locator("#seed").blur()
        page.reload()
        answered(page, "Hello there")
        assert page.locator("#seed").input_value() == "5"
        assert page.locator("#key").input_value() == KEY
        assert KEY not in page.evaluate("JSON.stringify(localStorage)")
        page.locator("#clear").click()
        page.reload()
        playwright.expect(page.locator(".turn")).to_have_count(0)
        playwright.expect(page.locator("#empty")).to_be_visible()


def test_the_chosen_model_is_remembered_while_the_server_does_not_list_it(opened, server):
    with opened() as page:
        page.locator("#settings-button").click()
        page.locator("#model").select_option("large")
    with opened("401") as page:
        page.evaluate("localStorage.setItem('llmctl.chat', JSON.stringify({model: 'large'}))")
        server.key = KEY
        page.reload()
        playwright.expect(page.locator("#problem")).to_contain_text("cannot be listed")
        page.locator("#settings-button").click()
        page.locator("#key").fill(KEY)
        page.locator("#key").blur()
        playwright.expect(page.locator("#model")).to_have_value("large")
        ask(page, "hello?")
        answered(page, "Hello there")
        assert server.asked[-1]["model"] == "large"


def test_a_full_store_keeps_the_conversation_without_old_alternatives(opened, server):
    with opened() as page:
        for question in ("one", "two"):
            ask(page, question)
            answered(page, "Hello there", at=-1)
        page.evaluate(
            """() => {
                const plain = Storage.prototype.setItem;
                const most = localStorage.getItem("llmctl.chat").length - 40;
                Storage.prototype.setItem = function (name, value) {
                    if (value.length > most) throw new Error("quota");
                    plain.call(this, name, value);
                };
            }"""
        )
        page.locator("#theme").click()
        kept = page.evaluate("JSON.parse(localStorage.getItem('llmctl.chat'))")
        assert [turn["content"] for turn in kept["turns"]] == ["one", "Hello there", "two", "Hello there"]
        assert kept["theme"] == "dark"
        assert "tokens" not in kept["turns"][1] and kept["turns"][3]["tokens"]


def test_escape_and_the_button_stop_an_answer(opened, server):
    server.parts, server.delay = ["a "] * 200, 0.05
    with opened() as page:
        ask(page, "go on")
        playwright.expect(page.locator(".assistant .text")).to_contain_text("a a a")
        page.keyboard.press("Escape")
        playwright.expect(page.locator(".assistant .tools")).to_contain_text("stopped")
        assert len(page.locator(".assistant .text").text_content()) < 150
        ask(page, "once more")
        playwright.expect(page.locator(".assistant .text").last).to_contain_text("a a")
        page.locator("#stop-button").click()
        playwright.expect(page.locator(".assistant .tools").last).to_contain_text("stopped")


def test_regenerate_edit_and_copy(opened, server, browser):
    with opened(permissions=["clipboard-read", "clipboard-write"]) as page:
        ask(page, "first")
        answered(page, "Hello there")
        server.parts = ["Other"]
        page.get_by_role("button", name="Regenerate").click()
        answered(page, "Other")
        assert len(server.asked[1]["messages"]) == 1
        page.get_by_role("button", name="Copy").last.click()
        assert page.evaluate("navigator.clipboard.readText()") == "Other"
        server.parts = ["Third"]
        page.get_by_role("button", name="Edit question 1").click()
        page.get_by_label("Edit the question").fill("changed")
        page.keyboard.press("Enter")
        answered(page, "Third")
        assert server.asked[2]["messages"] == [{"role": "user", "content": "changed"}]
        playwright.expect(page.locator(".turn")).to_have_count(2)


def test_token_probabilities_on_hover_and_by_keyboard(opened, server, tmp_path):
    with opened() as page:
        ask(page, "hello?")
        answered(page, "Hello there")
        assert server.asked[0]["logprobs"] is True and server.asked[0]["top_logprobs"] == 5
        page.locator(".token").nth(1).hover()
        tip = page.locator("#tip")
        playwright.expect(tip).to_be_visible()
        assert "60.7 %" in tip.text_content()  # exp(-0.5)
        assert "<b>other</b>" in tip.text_content()
        shoot(page, tmp_path, "hover")
        page.mouse.move(5, 5)
        playwright.expect(tip).to_be_hidden()
        page.locator(".token").first.focus()
        page.keyboard.press("ArrowRight")
        assert '" there"' in tip.text_content()


def test_a_server_without_probabilities_in_streams_answers_all_the_same(opened, server):
    server.scores = False
    with opened("400 (Bad Request)") as page:
        ask(page, "hello?")
        answered(page, "Hello there")
        assert "logprobs" not in server.asked[-1]
        playwright.expect(page.locator("#problem")).to_contain_text("no token probabilities")
        ask(page, "more")
        answered(page, "Hello there")
        assert len(server.asked) == 3


@pytest.mark.parametrize("scores", [True, False])
def test_text_is_never_markup(opened, server, scores):
    server.parts = [ATTACK, ATTACK]
    with opened() as page:
        if not scores:
            page.locator("#settings-button").click()
            page.locator("#probabilities").uncheck()
        ask(page, ATTACK)
        answered(page, ATTACK * 2)
        if scores:
            page.locator(".token").first.hover()
            playwright.expect(page.locator("#tip")).to_contain_text("<script>")
        page.reload()
        answered(page, ATTACK * 2)
        assert page.evaluate("window.hit") is None
        assert page.locator("#conversation img, #conversation script, #tip img, #tip b").count() == 0


def test_errors_are_said_in_words(opened, server):
    server.key = KEY
    with opened("Failed to load resource") as page:
        playwright.expect(page.locator("#problem")).to_contain_text("the API key is missing or wrong (status 401)")
        page.locator("#settings-button").click()
        page.locator("#key").fill(KEY)
        page.locator("#key").blur()
        playwright.expect(page.locator("#problem")).to_be_hidden()
        server.fault = "the server failed on this request"
        ask(page, "my question")
        playwright.expect(page.locator("#problem")).to_contain_text("the server failed on this request (status 500)")
        playwright.expect(page.locator(".turn")).to_have_count(0)
        assert page.locator("#question").input_value() == "my question"  # it is not lost
        server.fault, server.broken = "", True
        ask(page, "hello")
        playwright.expect(page.locator("#problem")).to_contain_text("broke off")
        answered(page, "Hello there")  # what came is kept


def test_dark_mode_follows_the_system_and_the_button(opened, server, tmp_path):
    def background(page):
        return page.evaluate("getComputedStyle(document.body).backgroundColor")

    dark, light = "rgb(20, 23, 26)", "rgb(251, 251, 250)"
    with opened(color_scheme="dark") as page:
        ask(page, "Which colours?")
        answered(page, "Hello there")
        assert background(page) == dark
        shoot(page, tmp_path, "dark")
        page.locator("#theme").click()
        page.locator("#theme").click()
        assert background(page) == light
        page.reload()
        assert background(page) == light
        shoot(page, tmp_path, "light")


def test_narrow_screens_do_not_scroll_sideways(opened, server, tmp_path):
    server.parts = ["word " * 30, "x" * 200]
    with opened() as page:
        page.set_viewport_size({"width": 360, "height": 640})
        ask(page, "A question that is longer than the narrow screen is wide, so that it has to be broken")
        playwright.expect(page.locator(".assistant .text")).to_contain_text("xxx")
        playwright.expect(page.locator("#send")).to_be_visible()
        playwright.expect(page.get_by_role("button", name="Regenerate")).to_be_in_viewport(
            ratio=1
        )  # scrolled to the end
        shoot(page, tmp_path, "narrow")
        page.locator("#settings-button").click()
        assert page.evaluate("document.documentElement.scrollWidth") <= 360
        shoot(page, tmp_path, "narrow-settings")
        assert page.locator("#send").bounding_box()["y"] < 640


def test_everything_is_reached_by_tab_and_has_a_name(opened, server):
    with opened() as page:
        ask(page, "hello")
        answered(page, "Hello there")
        page.locator("#settings-button").click()
        page.evaluate("document.body.focus(); document.activeElement.blur()")
        reached, nameless = set(), []
        for _ in range(40):
            page.keyboard.press("Tab")
            found = page.evaluate(
                "(() => { const e = document.activeElement; const s = getComputedStyle(e);"
                "return [e.id || e.textContent.slice(0, 20), (e.labels && e.labels.length) || e.textContent.trim()"
                " || e.getAttribute('aria-label'), s.outlineStyle, e.tagName]; })()"
            )
            reached.add(found[0])
            if found[3] != "BODY" and (not found[1] or found[2] == "none"):
                nameless.append(found)
        assert nameless == []
        wanted = {"model", "settings-button", "theme", "clear", "system", "temperature", "seed", "stop", "key", "send"}
        assert wanted | {"question", "probabilities", "Regenerate", "Copy", "Edit", "Hello"} <= reached


def test_the_files_have_nothing_inline_and_come_with_a_policy(server):
    import http.client

    html = (FOLDER / "index.html").read_text()
    assert not re.search(r"<style|\son\w+=|style=|<script(?![^>]*src=)|https?://", html)
    assert "innerHTML" not in (FOLDER / "chat.js").read_text()
    host = server.url.removeprefix("http://")
    for path, kind in (("/", "text/html"), ("/page/chat.js", "text/javascript"), ("/page/chat.css", "text/css")):
        connection = http.client.HTTPConnection(host)
        connection.request("GET", path)
        response = connection.getresponse()
        response.read()
        connection.close()
        assert (response.status, response.headers.get_content_type()) == (200, kind)
        assert response.headers["content-security-policy"].startswith("default-src 'self'")
    connection = http.client.HTTPConnection(host)
    connection.request("GET", "/page/..%2fapp.py")
    assert connection.getresponse().status == 404
    connection.close()
