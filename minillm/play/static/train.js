// Part 3: a reward model from the picks, then PPO, with live curves and the same five prompts.

import { $, doing, events, make, post } from "./page.js";

const CURVES = {
  score: "what the reward model gives its answers",
  kl: "how far it has moved from the assistant (KL, nats a response)",
  rubric: "how good they are by the world's rubric, which nobody trains on",
};
let following = null;
let curves = {};
let first = null; // the answers before training
let run = null;
let iterations = 0;

export function begin() {
  $("train-form").addEventListener("submit", doing(async () => {
    await post("/api/train", { beside: $("train-beside").checked, iterations: Number($("train-iterations").value) });
    follow();
  }));
  $("train-stop").addEventListener("click", doing(() => post("/api/change", { what: "stop", name: run, new: "" })));
  $("train-undo").addEventListener("click", doing(() => change("undo", "")));
  $("train-after").addEventListener("submit", doing(() => change("keep", $("train-name").value.trim())));
}

export async function show(state) {
  if (state.training.running || (state.training.name && !first)) follow();
  else if (!state.training.name) {
    const missing = Math.max(0, state.needed - state.ranked);
    $("train-state").replaceChildren(...(missing
      ? [`Picks so far: ${state.ranked}. `, make("a", { href: "#pick" }, `Pick ${missing} more`), ", then come back."]
      : [`${state.ranked} picks to learn from. It takes about a minute.`]));
    $("train-start").disabled = missing > 0;
  }
}

async function change(what, name) {
  await post("/api/change", { what, name: run, new: name });
  $("train-after").hidden = true;
  $("train-state").replaceChildren(...(what === "undo" ? ["It is gone; the assistant is as it was."]
    : [`Kept as play/${name}: see it under `, make("a", { href: "#chat" }, "4 Compare"), "."]));
  $("train-state").focus();
}

// Whoever is at a button that goes away is led to what is said of it.
function running(now) {
  const led = [$("train-start"), $("train-stop")].includes(document.activeElement);
  $("train-start").disabled = now;
  $("train-stop").hidden = !now;
  if (led) $("train-state").focus();
}

const follow = doing(async () => {
  following?.abort();
  following = new AbortController();
  curves = Object.fromEntries(Object.keys(CURVES).map((name) => [name, []]));
  first = null;
  draw();
  $("train-answers").replaceChildren();
  $("train-prompts").hidden = true;
  $("train-after").hidden = true;
  running(true);
  try {
    for await (const event of events("/api/train", null, following.signal)) tell(event);
  } finally {
    running(false);
  }
});

function tell(event) {
  if (event.stage) {
    ({ run, iterations } = event);
    const said = {
      reward: ["A reward model learns from the picks …"],
      policy: ["The reward model is ready; now the assistant learns by PPO …"],
      done: [`Done in ${Math.round(event.seconds)} s. Talk with it: it is play/${run}/ppo under `, make("a", { href: "#chat" }, "4 Compare"), "."],
      stopped: ["Stopped; what was learned so far is kept."],
      failed: [`It failed: ${event.error}`],
    };
    $("train-state").replaceChildren(...said[event.stage]);
    $("train-progress").textContent = "";
    if (event.stage === "done" || event.stage === "stopped") {
      $("train-after").hidden = false;
      $("train-name").value = run;
      $("train-export").hidden = !first; // stopped before there was a policy
      $("train-export").href = `/api/export?run=${encodeURIComponent(`play/${run}/ppo`)}`;
    }
  } else if (event.answers) {
    first ??= event.answers;
    $("train-prompts").hidden = false;
    $("train-answers").replaceChildren(...event.answers.map((now, i) => make("div", {},
      make("p", { class: "who" }, now.prompt),
      make("p", {}, make("span", { class: "who" }, "before: "), first[i].text),
      ...(event.step ? [make("p", now.text === first[i].text ? {} : { class: "good" }, make("span", { class: "who" }, `after ${event.step}: `), now.text)] : []))));
  } else if (event.of === "policy" && event.event === "val") {
    for (const name of Object.keys(CURVES)) if (event[name] !== undefined) curves[name].push([event.step, event[name]]);
    draw();
  } else if (event.of === "reward" && event.event === "train") {
    $("train-progress").textContent = `step ${event.step}, loss ${event.loss.toFixed(2)}`;
  } else if (event.event === "train") {
    $("train-progress").textContent = `iteration ${event.step} of ${iterations}: score ${event.score.toFixed(2)}, KL ${event.kl.toFixed(2)}`;
  }
}

function draw() {
  $("train-plots").replaceChildren(...Object.entries(CURVES).filter(([name]) => curves[name].length).map(([name, title]) => {
    const points = curves[name];
    const [last, values] = [points.at(-1)[0] || 1, points.map(([, value]) => value)];
    const [low, high] = [Math.min(...values), Math.max(...values)];
    const x = (step) => 6 + (188 * step) / last;
    const y = (value) => 74 - (68 * (value - low)) / (high - low || 1);
    const svg = document.createElementNS("http://www.w3.org/2000/svg", "svg");
    svg.setAttribute("viewBox", "0 0 200 80");
    svg.setAttribute("role", "img");
    svg.setAttribute("aria-label", `${title}: from ${values[0].toFixed(2)} to ${values.at(-1).toFixed(2)}`);
    const path = document.createElementNS("http://www.w3.org/2000/svg", "path");
    path.setAttribute("d", points.map(([step, value], i) => `${i ? "L" : "M"}${x(step)} ${y(value)}`).join(""));
    svg.append(path);
    return make("figure", {}, svg, make("figcaption", {}, `${title}: ${values[0].toFixed(2)} → ${values.at(-1).toFixed(2)}`));
  }));
}
