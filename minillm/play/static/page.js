// What the parts of the page share: elements, requests, events, bars. Text of models and visitors is only
// ever set as text, never as HTML.

export const $ = (id) => document.getElementById(id);

export function make(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (value !== false && value !== null) element.setAttribute(name, value === true ? "" : value);
  }
  element.append(...children);
  return element;
}

export function trouble(error) {
  const line = error ? String(error.message ?? error) : "";
  $("trouble").textContent = line;
  $("trouble").hidden = !line;
  if (line) $("trouble").scrollIntoView({ block: "nearest" });
}

async function checked(response) {
  if (response.ok) return response;
  let line = `the server answered ${response.status}`;
  try {
    line = (await response.json()).error;
  } catch { /* no JSON: the status must do */ }
  throw new Error(line);
}

export async function get(path) {
  return (await checked(await fetch(path))).json();
}

function posted(path, body, signal) {
  return fetch(path, { method: "POST", signal, headers: { "Content-Type": "application/json" }, body: JSON.stringify(body) });
}

export async function post(path, body) {
  return (await checked(await posted(path, body))).json();
}

// The events of a stream, one after the other; ends when it does, or with `signal`.
export async function* events(path, body, signal) {
  const response = await checked(await (body ? posted(path, body, signal) : fetch(path, { signal })));
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let held = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) return;
    const parts = (held + value).split("\n\n");
    held = parts.pop();
    for (const part of parts) {
      const event = JSON.parse(part.slice("data: ".length));
      if (event.error && !event.stage) throw new Error(event.error);
      yield event;
    }
  }
}

// Rows of name, bar and number. A row is [name, length in 0 to 1, text, marked].
export function bars(target, rows) {
  target.replaceChildren(...rows.flatMap(([name, length, text, marked]) => {
    const bar = make("span", { class: marked ? "bar truth" : "bar" });
    bar.style.width = `${Math.max(0, Math.min(1, length)) * 100}%`;
    const own = marked ? "name truth" : "name";
    return [make("span", { class: own }, name), bar, make("span", marked ? { class: "truth" } : {}, text)];
  }));
}

export const percent = (p) => (p > 0 && p < 0.001 ? "<0.1%" : `${(100 * p).toFixed(p < 0.1 ? 1 : 0)}%`);

// A button's work: one at a time, and what goes wrong is said on the page.
export function doing(work) {
  let under_way = false;
  return async (event) => {
    event?.preventDefault?.();
    if (under_way) return;
    under_way = true;
    trouble(null);
    try {
      await work(event);
    } catch (error) {
      if (error.name !== "AbortError") trouble(error);
    } finally {
      under_way = false;
    }
  };
}

// Keys that count while a part is shown and nobody types.
export function keys(part, handler) {
  document.addEventListener("keydown", (event) => {
    const typing = event.target.matches("input:not([type=checkbox], [type=radio], [type=range]), select");
    if (!$(part).hidden && !typing && !event.ctrlKey && !event.metaKey && !event.altKey) handler(event);
  });
}
