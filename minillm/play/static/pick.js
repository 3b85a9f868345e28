// Part 2: responses in blind order; a pick of the best, or an order of all, with ties.

import { $, bars, doing, keys, make, post } from "./page.js";

const LETTERS = "ABCDEFGHI";
let shown = null; // the set, by /api/rank
let needed = 10; // picks before there can be a training
let order = []; // of indices, in groups of ties, as far as the visitor has ordered them
let tie = false; // whether the next goes beside the last
let dragged = null;

export function begin() {
  $("pick-name").addEventListener("change", doing(load));
  $("pick-all").addEventListener("change", () => reorder([]));
  $("pick-send").addEventListener("click", doing(() => send(letters(order))));
  $("pick-tie").addEventListener("click", doing(() => send(letters([shown.responses.map((_, i) => i)]))));
  $("pick-skip").addEventListener("click", doing(() => send("skip")));
  $("pick-undo").addEventListener("click", doing(() => send("undo")));
  keys("pick", (event) => {
    if (/^[1-9]$/.test(event.key) && shown?.responses[event.key - 1] !== undefined) choose(event.key - 1);
    else if (event.key === "=" && $("pick-all").checked && order.length) setTie(true);
    else if (event.key === "Escape") reorder([]);
    else if (event.key === "Enter" && !event.target.matches("button, a") && !$("pick-send").hidden) $("pick-send").click();
    else ({ t: $("pick-tie"), s: $("pick-skip"), u: $("pick-undo") })[event.key]?.click();
  });
}

export async function show(state) {
  needed = state.needed;
  await load();
}

const load = () => send("");

// Carries out an action, and shows the next set and, after a ranking, what the reward model says of the last.
async function send(action) {
  const before = shown;
  shown = await post("/api/rank", { name: $("pick-name").value, key: shown?.key ?? "", action });
  const missing = needed - shown.ranked;
  $("pick-count").textContent = `${shown.done} of ${shown.of} ranked by ${$("pick-name").value}${shown.skipped ? `, ${shown.skipped} skipped` : ""}.`;
  $("pick-to-train").replaceChildren(missing > 0 ? `${missing} more and you can train on them.` : make("a", { href: "#train" }, "Enough to train on: go to 3 Train"));
  $("pick-messages").replaceChildren(...(shown.messages ?? []).map((message) =>
    make("p", {}, make("span", { class: "who" }, `${message.role}: `), message.content)));
  if (!shown.key) $("pick-messages").replaceChildren(make("p", {}, "Nothing is left to rank."));
  shown.responses ??= [];
  reorder([]);
  const scores = shown.scores;
  $("pick-candy").hidden = !scores;
  if (!scores) return;
  const [low, high] = [Math.min(...scores), Math.max(...scores)];
  const best = action.split(" > ")[0];
  $("pick-last").textContent = before.messages.at(-1).content;
  bars($("pick-scores"), before.responses.map((text, i) => [
    `${best.includes(LETTERS[i]) ? "✓ " : ""}${text.length > 60 ? `${text.slice(0, 60)}…` : text || "(nothing)"}`,
    (scores[i] - low + 0.1) / (high - low + 0.1), scores[i].toFixed(2), scores[i] === high,
  ]));
}

const letters = (groups) => groups.map((tied) => tied.map((i) => LETTERS[i]).join(" = ")).join(" > ");

// A pick of the best, or, when all are ranked, the next best.
const choose = doing(async (index) => {
  if (!$("pick-all").checked) {
    const rest = shown.responses.map((_, i) => i).filter((i) => i !== index);
    return send(letters(rest.length ? [[index], rest] : [[index]]));
  }
  const without = order.map((tied) => tied.filter((i) => i !== index)).filter((tied) => tied.length);
  if (order.some((tied) => tied.includes(index))) return reorder(without); // named again: taken out
  if (tie && without.length) without.at(-1).push(index);
  else without.push([index]);
  reorder(without);
});

function setTie(pending) {
  tie = pending;
  $("pick-pending").textContent = pending ? `The next goes beside the last, as a tie at place ${order.length}.` : "";
}

const buttons = () => [...$("pick-responses").querySelectorAll("button"), $("pick-send")];

// Draws the responses with their places. The focus stays where it was, or goes on to what keeps the order.
function reorder(groups) {
  const focused = buttons().indexOf(document.activeElement);
  order = groups;
  setTie(false);
  const all = $("pick-all").checked;
  const placed = order.flat();
  const rest = shown.responses.map((_, i) => i).filter((i) => !placed.includes(i));
  const place = (i) => (placed.includes(i) ? String(order.findIndex((tied) => tied.includes(i)) + 1) : "");
  $("pick-responses").replaceChildren(...shown.responses.map((text, i) => {
    const action = all ? (placed.includes(i) ? "Take out" : "Next best") : "Best";
    const box = make("div", { class: "response", draggable: all },
      make("p", {}, ...(all ? [make("span", { class: "place" }, place(i)), " "] : []), text || "(nothing)"),
      make("button", { type: "button", "aria-label": `${action}: response ${i + 1}`, onclick: () => choose(i) }, action));
    box.addEventListener("dragstart", () => { dragged = i; });
    box.addEventListener("dragover", (event) => { event.preventDefault(); box.classList.add("over"); });
    box.addEventListener("dragleave", () => box.classList.remove("over"));
    box.addEventListener("drop", (event) => { event.preventDefault(); drop(i); });
    return make("li", {}, box);
  }));
  $("pick-send").hidden = !all || rest.length > 0 || !shown.key;
  for (const id of ["pick-tie", "pick-skip"]) $(id).disabled = !shown.key;
  if (focused >= 0) ($("pick-send").hidden ? buttons()[focused % shown.responses.length] : $("pick-send"))?.focus();
}

// Dropped on another: the dragged one is better than it, and all that were not ordered yet follow in their order.
function drop(target) {
  if (dragged === null || dragged === target) return;
  const placed = order.flat();
  const groups = [...order, ...shown.responses.map((_, i) => i).filter((i) => !placed.includes(i)).map((i) => [i])]
    .map((tied) => tied.filter((i) => i !== dragged)).filter((tied) => tied.length);
  groups.splice(groups.findIndex((tied) => tied.includes(target)), 0, [dragged]);
  dragged = null;
  reorder(groups);
}
