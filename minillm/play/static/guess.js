// Part 1: a text stops, the visitor and the model guess the next word.

import { $, bars, doing, keys, make, percent, post } from "./page.js";

const OTHER_WORDS = 1000; // among which a visitor's doubt is spread
const score = { rounds: 0, you: 0, it: 0, yours: 0, its: 0 };
let number = Math.floor(Math.random() * 1e9);
let question = null; // with its answer, which shows once the visitor has guessed
let told = false;
let latest = 0; // number of the latest load

export function begin() {
  $("guess-form").addEventListener("submit", doing(() => guess($("guess-typed").value.trim())));
  $("guess-next").addEventListener("click", doing(next));
  $("guess-run").addEventListener("change", doing(() => {
    question = null; // it was of another model
    $("guess-form").hidden = $("guess-told").hidden = true;
    $("guess-text").textContent = "Here comes a text.";
    return ask();
  }));
  $("guess-temperature").addEventListener("input", () => {
    $("guess-temperature-shown").textContent = Number($("guess-temperature").value).toFixed(1);
  });
  $("guess-temperature").addEventListener("input", doing(async () => question && load()));
  keys("guess", (event) => {
    if (!told && question && /^[1-4]$/.test(event.key)) $("guess-choices").children[event.key - 1]?.click();
    else if (told && event.key === "n") $("guess-next").click();
  });
}

export async function show(state) {
  const before = $("guess-run").value;
  $("guess-run").replaceChildren(...state.runs.map((run) => make("option", { value: run.name }, run.name)));
  if (before) $("guess-run").value = before;
  if (!question || $("guess-run").value !== before) await ask();
}

async function ask() {
  if (!await load()) return;
  told = false;
  const pieces = question.pieces.map((piece) => make("span", { class: "token" }, piece));
  $("guess-text").replaceChildren(...pieces, make("span", { class: "gap" }, " ?"));
  $("guess-source").textContent = `From “${question.source}”, held out. The shading shows the model's tokens.`;
  $("guess-choices").replaceChildren(...question.choices.map((word, i) =>
    make("button", { type: "button", onclick: doing(() => guess(word)) }, `${i + 1} ${word}`)));
  $("guess-typed").value = "";
  $("guess-form").hidden = false;
  $("guess-told").hidden = true;
}

// The question, with what the model expects at the temperature of now, also if that was moved meanwhile.
// False where another load has begun since: what came is out of date.
async function load() {
  const mine = ++latest;
  let asked, found;
  do {
    asked = { run: $("guess-run").value, number, temperature: Number($("guess-temperature").value) };
    found = await post("/api/guess", asked);
    if (mine !== latest) return false;
  } while (asked.temperature !== Number($("guess-temperature").value));
  question = found;
  const rows = question.words.map(([word, p]) => [word, p, percent(p), word === question.truth]);
  if (!rows.some((row) => row[3])) rows.push([question.truth, question.p, percent(question.p), true]);
  bars($("guess-bars"), rows);
  return true;
}

async function next() {
  number += 1;
  await ask();
  $("guess-choices").firstChild.focus();
}

function guess(word) {
  if (!word || told) return;
  const sure = Number(document.querySelector("input[name=sure]:checked").value);
  told = true;
  const right = word.toLowerCase() === question.truth.toLowerCase();
  const its = question.words[0]?.[0] === question.truth;
  score.rounds += 1;
  score.you += right;
  score.it += its;
  score.yours -= Math.log(right ? sure : (1 - sure) / OTHER_WORDS);
  score.its -= Math.log(Math.max(question.p, 1e-9));
  $("guess-verdict").textContent = `“${question.truth}” came. You said “${word}”, ${right ? "right" : "wrong"}. ` +
    `The model's first guess was “${question.words[0]?.[0]}”, ${its ? "right" : "wrong"}; it gave the true word ${percent(question.p)}.`;
  $("guess-text").lastChild.textContent = ` ${question.truth}`;
  $("guess-form").hidden = true;
  $("guess-told").hidden = false;
  for (const [id, count] of [["guess-you", score.you], ["guess-it", score.it]]) {
    $(id).textContent = `${count} of ${score.rounds}`;
  }
  $("guess-your-nats").textContent = `${(score.yours / score.rounds).toFixed(2)} nats`;
  $("guess-its-nats").textContent = `${(score.its / score.rounds).toFixed(2)} nats`;
  $("guess-next").focus();
}
