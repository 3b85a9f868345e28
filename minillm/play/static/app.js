// The parts of the page by their address: #guess, #pick, #train, #chat, #results.

import { $, get, make, trouble } from "./page.js";
import * as guess from "./guess.js";
import * as pick from "./pick.js";
import * as train from "./train.js";
import * as chat from "./chat.js";

async function showLessons() {
  const { lessons } = await get("/api/lessons");
  $("lessons").hidden = lessons.length === 0;
  $("lessons-found").replaceChildren(...lessons.map(({ lesson, claim, verdict, sentence }) => make("div", {},
    make("h4", {}, claim),
    make("p", {}, make("strong", {}, `${verdict}: `), sentence),
    make("img", { src: `/lessons/${lesson}.png`, alt: `The figures of lesson ${lesson}` }))));
}

const results = {
  async show(state) {
    await showLessons();
    if (!state.results) throw new Error("no comparison yet; make demo makes one, or: python -m minillm.compare out/base out/sft out/rlhf/ppo");
    if (!$("results-frame").firstChild) {
      $("results-frame").append(make("iframe", { src: "/results", title: "Comparison of the models" }));
    }
  },
};

const parts = { guess, pick, train, chat, results };

// What a part needs and is not there yet, and how to make it.
function missing(name, state) {
  if (["guess", "chat"].includes(name) && !state.runs.length) return "no model yet: run make demo, which makes some in about ten minutes, then load this page again";
  if (["pick", "train"].includes(name) && state.ranked < 0) return "no responses to pick from yet: run make demo, or python rlhf.py --stage sample, then load this page again";
  return "";
}

async function show(event) {
  const name = parts[location.hash.slice(1)] ? location.hash.slice(1) : "guess";
  for (const part of Object.keys(parts)) $(part).hidden = part !== name;
  for (const link of document.querySelectorAll("nav a")) {
    if (link.hash === `#${name}`) link.setAttribute("aria-current", "page");
    else link.removeAttribute("aria-current");
  }
  if (event) { // from another part: what this one is called is read first
    $(`${name}-title`).tabIndex = -1;
    $(`${name}-title`).focus();
  }
  trouble(null);
  try {
    const state = await get("/api/state");
    $("note").textContent = state.note;
    $("note").hidden = !state.note;
    const lacks = missing(name, state);
    $(name).classList.toggle("missing", lacks !== "");
    trouble(lacks);
    if (!lacks) await parts[name].show(state);
  } catch (error) {
    trouble(error);
  }
}

for (const part of Object.values(parts)) part.begin?.();
addEventListener("hashchange", show);
show();
