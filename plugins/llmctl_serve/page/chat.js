// The chat page. Whatever a model, a server or a user says enters the page through textContent alone.
"use strict";

const $ = (id) => document.getElementById(id);
const NUMBERS = ["temperature", "top_p", "top_k", "min_p", "presence_penalty", "frequency_penalty", "max_tokens", "seed"];
const KEPT = [...NUMBERS, "system", "stop"];
const STORE = "llmctl.chat";
const ALTERNATIVES = 5;

let turns = []; // {role, content, tokens: [{text, logprob, top}] or absent, note}
let running = null; // the AbortController of the answer that comes
let chosen = ""; // the model, also while the server's list is not there
let scored = true; // this server gives log-probabilities while it streams

// -- what the browser keeps -------------------------------------------------------------------------------------------

function save() {
  const settings = Object.fromEntries(KEPT.map((id) => [id, $(id).value]));
  const kept = { turns, settings, probabilities: $("probabilities").checked, model: chosen, theme: theme() };
  try {
    sessionStorage.setItem(STORE + ".key", $("key").value);
    keep(kept);
  } catch (error) {
    explain("The conversation cannot be kept by this browser: " + error.message);
  }
}

// Alternatives of every token fill what a browser gives after some ten thousand: then the last answer's alone are kept.
function keep(kept) {
  try {
    localStorage.setItem(STORE, JSON.stringify(kept));
  } catch {
    const bare = turns.map((turn, at) => (at < turns.length - 1 ? { ...turn, tokens: undefined } : turn));
    localStorage.setItem(STORE, JSON.stringify({ ...kept, turns: bare }));
  }
}

function restore() {
  let kept = {};
  try {
    kept = JSON.parse(localStorage.getItem(STORE)) || {};
    $("key").value = sessionStorage.getItem(STORE + ".key") || "";
  } catch {
    kept = {}; // what is stored is damaged, or storage is off: begin anew
  }
  const good = (turn) => turn && typeof turn.content === "string" && ["user", "assistant"].includes(turn.role);
  turns = Array.isArray(kept.turns) ? kept.turns.filter(good) : [];
  for (const id of KEPT) $(id).value = (kept.settings || {})[id] || "";
  $("probabilities").checked = kept.probabilities !== false;
  setTheme(kept.theme || "auto");
  return kept.model;
}

// -- the server -------------------------------------------------------------------------------------------------------

function headers() {
  const key = $("key").value.trim();
  return { "Content-Type": "application/json", ...(key ? { Authorization: "Bearer " + key } : {}) };
}

async function failure(response) {
  const text = await response.text();
  let message = text.slice(0, 300);
  try {
    message = JSON.parse(text).error.message;
  } catch {
    // no error of the API: the text itself is shown
  }
  const hint = response.status === 401 ? " Give the API key in Settings." : response.status === 429 ? " Try again later." : "";
  return Object.assign(new Error(`${message} (status ${response.status})${hint}`), { status: response.status });
}

async function loadModels() {
  try {
    const response = await fetch("v1/models", { headers: headers() });
    if (!response.ok) throw await failure(response);
    const names = (await response.json()).data.map((model) => model.id);
    $("model").replaceChildren(...names.map((name) => new Option(name, name)));
    if (names.includes(chosen)) $("model").value = chosen;
    explain(chosen && !names.includes(chosen) ? `The server has no model ${chosen} now; ${names[0]} answers.` : "");
  } catch (error) {
    explain("The models cannot be listed: " + error.message);
  }
}

function body(messages, withScores) {
  const asked = { model: $("model").value || chosen || undefined, messages, stream: true, stream_options: { include_usage: true } };
  for (const id of NUMBERS) if ($(id).value !== "") asked[id] = Number($(id).value);
  const stop = $("stop").value.split("\n").filter((line) => line);
  if (stop.length) asked.stop = stop;
  if (withScores) Object.assign(asked, { logprobs: true, top_logprobs: ALTERNATIVES });
  return JSON.stringify(asked);
}

async function request(messages, signal) {
  if (!$("model").value) await loadModels(); // the server was away, or had not been given the key
  const ask = (withScores) =>
    fetch("v1/chat/completions", { method: "POST", headers: headers(), body: body(messages, withScores), signal });
  const wanted = $("probabilities").checked && scored;
  const response = await ask(wanted);
  if (response.ok) return response;
  const error = await failure(response);
  if (!wanted || response.status !== 400 || !/logprobs/.test(error.message)) throw error;
  const plain = await ask(false);
  if (!plain.ok) throw await failure(plain);
  scored = false;
  explain("This server gives no token probabilities while it streams.");
  return plain;
}

async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) throw new Error("The connection broke off before the answer ended.");
    const lines = (rest + value).split("\n");
    rest = lines.pop();
    for (const line of lines) {
      if (!line.startsWith("data:")) continue;
      const data = line.slice(5).trim();
      if (data === "[DONE]") return;
      const event = JSON.parse(data);
      if (event.error) throw new Error(event.error.message || "the server failed");
      yield event;
    }
  }
}

// -- asking -----------------------------------------------------------------------------------------------------------

// Answers the last turn. Without a word of an answer the conversation is `before` again; true if there was one.
async function answer(before) {
  const system = $("system").value.trim();
  const messages = turns.map(({ role, content }) => ({ role, content }));
  if (system) messages.unshift({ role: "system", content: system });
  const turn = { role: "assistant", content: "", tokens: [], note: "" };
  const held = []; // tokens whose text has not come yet: parts of a character, or of what may be a stop string
  running = new AbortController();
  turns.push(turn);
  const item = show(turn, turns.length - 1);
  item.classList.add("waiting");
  busy(true);
  explain("");
  const begun = performance.now();
  let usage = null;
  let ended = false;
  try {
    for await (const event of events(await request(messages, running.signal))) {
      usage = event.usage || usage;
      for (const choice of event.choices || []) take(turn, item, choice, held);
    }
    ended = true;
    if (!turn.note) turn.note = counted(usage, (performance.now() - begun) / 1000);
  } catch (error) {
    if (error.name === "AbortError") turn.note = "stopped";
    else {
      turn.note = turn.content ? "broken off" : "";
      explain(error instanceof TypeError ? "The server does not answer: " + error.message : error.message);
    }
  }
  running = null;
  const good = ended || turn.content !== "";
  if (!good) turns = before;
  if (turn.tokens.map((token) => token.text).join("") !== turn.content) delete turn.tokens;
  $("live").textContent = turn.content;
  busy(false);
  save();
  draw();
  return good;
}

function take(turn, item, choice, held) {
  const text = (choice.delta || {}).content || "";
  const found = (choice.logprobs || {}).content || [];
  if (choice.finish_reason === "length") turn.note = "ended at the limit of tokens";
  if (!text && !found.length) return;
  turn.content += text;
  for (const one of found) {
    const top = (one.top_logprobs || []).map((other) => [other.token, other.logprob]);
    held.push({ text: one.token, logprob: one.logprob, top });
  }
  if (!text) return;
  const same = held.map((token) => token.text).join("") === text;
  const sum = held.reduce((total, token) => total + token.logprob, 0);
  if (same) turn.tokens.push(...held);
  else if (held.length) turn.tokens.push({ text, logprob: sum, top: [] });
  held.length = 0;
  const place = item.querySelector(".text");
  const down = scroller();
  const atEnd = down.scrollHeight - down.scrollTop - down.clientHeight < 60;
  place.append(document.createTextNode(text));
  if (atEnd) down.scrollTop = down.scrollHeight;
}

function counted(usage, seconds) {
  if (!usage) return `${seconds.toFixed(1)} s`;
  return `${usage.completion_tokens} tokens, ${(usage.completion_tokens / seconds).toFixed(1)} tokens/s`;
}

async function send(text, before = [...turns]) {
  if (running || !text.trim()) return;
  turns.push({ role: "user", content: text });
  draw();
  if (!(await answer(before)) && !$("question").value) $("question").value = text; // nothing typed is lost
}

function again(at) {
  const before = turns;
  turns = turns.slice(0, at);
  draw();
  answer(before);
}

// -- the page ---------------------------------------------------------------------------------------------------------

function element(tag, className, text) {
  const made = document.createElement(tag);
  if (className) made.className = className;
  if (text !== undefined) made.textContent = text;
  return made;
}

function button(text, action, label) {
  const made = element("button", "", text);
  made.type = "button";
  if (label) made.setAttribute("aria-label", label);
  made.disabled = Boolean(running);
  made.addEventListener("click", action);
  return made;
}

function draw() {
  $("conversation").replaceChildren();
  turns.forEach(show);
  $("empty").hidden = turns.length > 0;
  const down = scroller();
  down.scrollTop = down.scrollHeight;
}

function scroller() {
  const main = $("conversation").parentElement;
  return getComputedStyle(main).overflowY === "visible" ? main.parentElement : main; // narrow screens scroll as a whole
}

function show(turn, at) {
  const item = element("li", "turn " + turn.role);
  item.append(element("div", "who", turn.role === "user" ? "You" : "Model"));
  const text = element("div", "text");
  if (turn.tokens && turn.tokens.length && !running) text.append(...turn.tokens.map((token, place) => tokenSpan(token, place === 0)));
  else text.textContent = turn.content;
  item.append(text);
  const tools = element("div", "tools");
  if (turn.role === "user") tools.append(button("Edit", () => edit(item, at), `Edit question ${at / 2 + 1}`));
  else tools.append(button("Regenerate", () => again(at)));
  tools.append(button("Copy", (event) => copy(turn.content, event.target)));
  if (turn.note) tools.append(element("span", "soft", turn.note));
  item.append(tools);
  $("conversation").append(item);
  return item;
}

function edit(item, at) {
  const area = element("textarea", "edit");
  area.value = turns[at].content;
  area.rows = Math.min(10, area.value.split("\n").length + 1);
  area.setAttribute("aria-label", "Edit the question");
  const done = () => {
    if (!area.value.trim()) return;
    const before = turns;
    turns = turns.slice(0, at);
    send(area.value, before);
  };
  area.addEventListener("keydown", (event) => {
    if (enters(event)) {
      event.preventDefault();
      done();
    } else if (event.key === "Escape") draw();
  });
  item.querySelector(".text").replaceWith(area);
  item.querySelector(".tools").replaceChildren(button("Ask again", done), button("Cancel", draw));
  area.focus();
}

async function copy(text, where) {
  try {
    await navigator.clipboard.writeText(text);
    where.textContent = "Copied";
  } catch {
    where.textContent = "Not allowed"; // the browser offers the clipboard to secure pages alone
  }
  setTimeout(() => (where.textContent = "Copy"), 1500);
}

function tokenSpan(token, first) {
  const probability = Math.exp(token.logprob);
  const span = element("span", "token" + (probability < 0.2 ? " p3" : probability < 0.5 ? " p2" : probability < 0.8 ? " p1" : ""));
  span.textContent = token.text;
  const tip = () => showTip(span, token);
  span.tabIndex = first ? 0 : -1; // the others by the arrow keys: a stop for every token would make Tab useless
  span.addEventListener("mouseenter", tip);
  span.addEventListener("focus", tip);
  span.addEventListener("mouseleave", hideTip);
  span.addEventListener("blur", hideTip);
  return span;
}

function showTip(span, token) {
  const rows = token.top.length ? token.top : [[token.text, token.logprob]];
  const all = rows.some(([text]) => text === token.text) ? rows : [...rows, [token.text, token.logprob]];
  const table = element("table");
  for (const [text, logprob] of all) {
    const row = element("tr", text === token.text ? "chosen" : "");
    row.append(element("td", "", JSON.stringify(text)), element("td", "", (100 * Math.exp(logprob)).toFixed(1) + " %"));
    table.append(row);
  }
  const tip = $("tip");
  tip.replaceChildren(table);
  tip.hidden = false;
  const box = span.getBoundingClientRect();
  const above = box.top - tip.offsetHeight - 6;
  tip.style.left = Math.max(8, Math.min(box.left, innerWidth - tip.offsetWidth - 8)) + "px";
  tip.style.top = (above > 0 ? above : box.bottom + 6) + "px";
}

function hideTip() {
  $("tip").hidden = true;
}

function busy(is) {
  $("send").hidden = is;
  $("stop-button").hidden = !is;
  $("conversation").setAttribute("aria-busy", is);
  for (const one of document.querySelectorAll("#conversation button")) one.disabled = is;
  $("clear").disabled = is;
}

function explain(text) {
  $("problem").textContent = text;
  $("problem").hidden = !text;
  if (text) $("problem").scrollIntoView({ block: "nearest" });
}

function enters(event) {
  return event.key === "Enter" && !event.shiftKey && !event.isComposing;
}

function theme() {
  return document.documentElement.dataset.theme || "auto";
}

function setTheme(name) {
  if (name === "auto") delete document.documentElement.dataset.theme;
  else document.documentElement.dataset.theme = name;
  $("theme").textContent = "Theme: " + name;
}

function openSettings(open) {
  $("settings").hidden = !open;
  $("settings-button").setAttribute("aria-expanded", open);
}

function stopAnswer() {
  if (running) running.abort();
}

$("form").addEventListener("submit", (event) => {
  event.preventDefault();
  if (running) return;
  send($("question").value);
  $("question").value = "";
});
$("question").addEventListener("keydown", (event) => {
  if (enters(event)) {
    event.preventDefault();
    $("form").requestSubmit();
  }
});
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape") {
    hideTip();
    stopAnswer();
  }
  const span = document.activeElement;
  const token = span && span.classList.contains("token");
  if (token && (event.key === "ArrowRight" || event.key === "ArrowLeft")) {
    const next = event.key === "ArrowRight" ? span.nextElementSibling : span.previousElementSibling;
    if (next) next.focus();
    event.preventDefault();
  }
});
$("stop-button").addEventListener("click", stopAnswer);
$("clear").addEventListener("click", () => {
  turns = [];
  explain("");
  save();
  draw();
  $("question").focus();
});
$("theme").addEventListener("click", () => {
  setTheme({ auto: "dark", dark: "light", light: "auto" }[theme()]);
  save();
});
$("settings-button").addEventListener("click", () => openSettings($("settings").hidden));
$("model").addEventListener("change", () => {
  chosen = $("model").value;
  save();
});
for (const id of [...KEPT, "probabilities"]) $(id).addEventListener("change", save);
$("key").addEventListener("change", () => {
  save();
  loadModels();
});

chosen = restore() || "";
draw();
loadModels();
