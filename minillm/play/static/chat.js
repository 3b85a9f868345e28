// Part 4: one message to several models at once, streamed; what each was sure of.

import { $, doing, events, make, percent } from "./page.js";

const talks = new Map(); // name → its messages so far
const known = new Set(); // names of runs that were there before
let stopping = null;
let seed = 0;

export function begin() {
  $("chat-form").addEventListener("submit", doing(send));
  $("chat-stop").addEventListener("click", () => stopping?.abort());
  $("chat-reset").addEventListener("click", () => { talks.clear(); drawColumns(); });
  $("chat-columns").addEventListener("keydown", ({ key, target }) =>
    target[{ ArrowRight: "nextElementSibling", ArrowLeft: "previousElementSibling" }[key]]?.focus());
}

export async function show(state) {
  const before = new Set(chosen());
  const wanted = before.size ? before : new Set(["base", "sft", "rlhf/ppo"]);
  const made = state.runs.filter((run) => run.name.startsWith("play/") && !known.has(run.name)).at(-1);
  if (made) wanted.add(made.name); // what the visitor has just trained
  for (const run of state.runs) known.add(run.name);
  const boxes = state.runs.map((run) => make("label", {},
    make("input", { type: "checkbox", value: run.name, checked: wanted.has(run.name), onchange: drawColumns }), run.name));
  $("chat-runs").replaceChildren(make("legend", {}, "Models"), ...boxes);
  if (!chosen().length) $("chat-runs").querySelector("input").checked = true;
  drawColumns();
}

const chosen = () => [...$("chat-runs").querySelectorAll("input:checked")].map((box) => box.value);

function line(who, ...said) {
  return make("p", { class: "said" }, make("span", { class: "who" }, `${who}: `), ...said);
}

function drawColumns() {
  $("chat-columns").replaceChildren(...chosen().map((name) => {
    const said = (talks.get(name) ?? []).map(({ role, content, tool_calls }) =>
      line(role, content, ...(tool_calls ?? []).map((call) => ` ${call.function.name} ${call.function.arguments}`)));
    return make("div", { "data-run": name }, make("h3", {}, name), ...said);
  }));
}

async function send() {
  const text = $("chat-text").value.trim();
  if (!text) return;
  stopping = new AbortController();
  $("chat-stop").hidden = false;
  $("chat-text").value = "";
  seed += 1;
  try {
    const asked = [...$("chat-columns").children].map((column) => ask(column, text, stopping.signal));
    const failed = (await Promise.allSettled(asked)).find((one) => one.status === "rejected");
    const several = asked.length > 1;
    $("chat-token").textContent = failed ? (several ? "Not all have answered." : "It has not answered.")
      : several ? "All have answered." : "It has answered.";
    if (failed) throw failed.reason;
  } finally {
    $("chat-stop").hidden = true;
  }
}

async function ask(column, text, signal) {
  const name = column.dataset.run;
  const messages = [...(talks.get(name) ?? []), { role: "user", content: text }];
  const note = make("p", { class: "quiet" });
  let said = line("assistant");
  column.append(line("user", text), note, said);
  const talk = [...messages];
  let whole = "";
  try {
    const asked = { run: name, messages, temperature: Number($("chat-temperature").value), seed };
    for await (const event of events("/api/chat", asked, signal)) {
      if (event.waiting) note.textContent = `waiting: ${event.waiting} in the queue`;
      else if (event.note && !event.call) note.textContent = event.note;
      else if (event.piece !== undefined) {
        if (note.textContent.startsWith("waiting")) note.textContent = "";
        whole += event.piece;
        said.append(event.piece);
      } else if (event.end) {
        said.replaceChildren(said.firstChild, ...event.tokens.map(token), event.end === "length" ? " [cut]" : "");
        talk.push(event.message);
        whole = "";
      } else if (event.call) {
        said = line("assistant");
        column.append(line("tool", `${event.call} → ${event.result.content}`), said);
        talk.push(event.result);
      }
    }
  } catch (error) {
    if (error.name !== "AbortError") note.textContent = error.message;
    throw error;
  } finally {
    if (whole || talk.length === messages.length) talk.push({ role: "assistant", content: whole });
    talks.set(name, talk);
  }
}

// A token whose probability shows at the pointer or in focus; the Tab key leads to a reply's first.
function token(one, place) {
  const element = make("span", { class: "token", tabindex: one.p === undefined ? false : place ? -1 : 0 }, one.text);
  if (one.p === undefined) return element;
  const instead = one.instead.map(([text, p]) => `“${text}” ${percent(p)}`).join(", ");
  const line = `“${one.text}” had ${percent(one.p)}; most probable here: ${instead}`;
  element.title = line;
  for (const kind of ["mouseenter", "focus"]) element.addEventListener(kind, () => { $("chat-token").textContent = line; });
  return element;
}
