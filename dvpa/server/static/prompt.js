/* Try a prompt: the decision alone, or a streamed answer with its telemetry. */

import { call, events } from "./api.js";
import { $, count, duration, element, fixed, percent, reason, regions, tierColor, tierTag } from "./format.js";

let server; // {model, tiers, tierMap}, kept up to date by dashboard.js
let running = null; // the AbortController of the request under way

/** Wire the form. `onError` is told every ApiError, so that a 401 can ask for the key. */
export function makePrompt(live, onError) {
  server = live;
  $("use-quality").addEventListener("change", showDial);
  $("quality").addEventListener("input", showDial);
  $("tier").addEventListener("change", showDial);
  $("route").addEventListener("click", () => $("try-form").reportValidity() && act(decide, onError));
  $("try-form").addEventListener("submit", (event) => {
    event.preventDefault();
    if (!running) act(generate, onError);
  });
  $("stop").addEventListener("click", () => running?.abort());
  $("prompt").addEventListener("keydown", (event) => {
    if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) $("try-form").requestSubmit();
  });
  showDial();
}

/** Offer the server's tiers, keeping what was chosen. */
export function offerTiers() {
  const chosen = $("tier").value;
  const names = ["auto", ...server.tiers.map(({ name }) => name)];
  const offered = [...$("tier").options].map((option) => option.value);
  if (offered.join("\n") === names.join("\n")) return; // it may be open
  $("tier").replaceChildren(...names.map((name) => new Option(name, name, false, name === chosen)));
  showDial();
}

function showDial() {
  const isAuto = $("tier").value === "auto";
  const isOn = isAuto && $("use-quality").checked;
  $("use-quality").disabled = !isAuto;
  $("quality").disabled = !isOn;
  $("quality-value").textContent = isOn ? fixed(Number($("quality").value)) : isAuto ? "as calibrated" : "not with a fixed tier";
}

/** Run one action at a time, its buttons and errors in place. */
async function act(action, onError) {
  if (running) return;
  running = new AbortController();
  const buttons = [$("route"), $("generate")];
  buttons.forEach((button) => button.setAttribute("aria-disabled", "true")); // disabled would lose the focus
  $("stop").disabled = false;
  $("prompt-error").textContent = "";
  try {
    await action(running.signal);
  } catch (error) {
    if (error.name === "AbortError") $("answer-state").textContent = "stopped";
    else {
      $("prompt-error").textContent = error.message;
      $("answer-state").textContent = "";
      onError(error);
    }
  } finally {
    running = null;
    buttons.forEach((button) => button.removeAttribute("aria-disabled"));
    $("stop").disabled = true;
    $("answer").setAttribute("aria-busy", "false");
  }
}

/** The `dvpa` options of the form. */
function options() {
  const chosen = { tier: $("tier").value };
  if (!$("quality").disabled) chosen.quality = Number($("quality").value);
  return chosen;
}

async function decide(signal) {
  const body = { prompt: $("prompt").value, dvpa: options() };
  const response = await call("v1/dvpa/route", { body, signal });
  showDecision(await response.json());
}

async function generate(signal) {
  const body = {
    model: server.model,
    prompt: $("prompt").value,
    max_tokens: Number($("max-tokens").value),
    temperature: Number($("temperature").value),
    stream: true,
    stream_options: { include_usage: true },
    dvpa: options(),
  };
  const answer = $("answer");
  answer.textContent = "";
  answer.setAttribute("aria-busy", "true"); // read out once, when it is complete
  $("answer-facts").replaceChildren();
  $("answer-state").textContent = "waiting";
  const response = await call("v1/completions", { body, signal });
  const tier = response.headers.get("x-dvpa-tier");
  $("answer-state").textContent = tier ? `streaming from tier ${tier}` : "streaming";
  let record = null;
  let finish = "";
  for await (const event of events(response)) {
    const choice = event.choices?.[0];
    if (choice?.text) answer.append(choice.text);
    finish = choice?.finish_reason ?? finish;
    record = event.usage?.dvpa ?? record;
    answer.scrollTop = answer.scrollHeight;
  }
  $("answer-state").textContent = { stop: "complete", length: "cut at max tokens" }[finish] ?? finish;
  if (record) {
    showDecision(record);
    showFacts(record);
  }
}

/* -- the decision ------------------------------------------------------------------------------ */

function showDecision(record) {
  const { difficulty, tier, tier_name: name, score_ms: scoreMs, prompt_tokens: tokens, activated_params: params } = record;
  const top = server.tiers.at(-1)?.activated_params;
  const cost = top ? ` (${percent(params / top)} of ${server.tiers.at(-1).name})` : "";
  $("decision").replaceChildren(
    element("p", "verdict", tierTag(tier, name), element("span", "quiet", reason(record))),
    difficultyStrip(difficulty),
    successBars(record.success_by_tier ?? [], tier),
    element("p", "quiet", `${count(params)} activated parameters${cost}; ${tokens} prompt tokens, scored in ${duration(scoreMs)}`),
  );
}

/** A scale from 0 to 1 in the colours of the tiers, with a pin at the difficulty. */
function difficultyStrip(difficulty) {
  const known = regions(server.tierMap ?? {});
  const found = known.length ? known : [{ from: 0, tier: -1 }]; // -1: the colour of no tier
  const bands = found.map(({ from, tier }, index) => band((found[index + 1]?.from ?? 1) - from, tierColor(tier)));
  const strip = element("div", "strip", ...bands);
  strip.setAttribute("aria-hidden", "true");
  if (Number.isFinite(difficulty)) {
    const pin = element("span", "pin");
    pin.style.left = `${100 * difficulty}%`;
    strip.append(pin);
  }
  const words = Number.isFinite(difficulty) ? `difficulty ${fixed(difficulty)}` : "no difficulty";
  return element("div", "strip-row", element("span", "quiet", words), strip);
}

function band(width, color) {
  const made = element("span", "band");
  made.style.flexGrow = String(width);
  made.style.background = color;
  return made;
}

/** P(success) of every tier as bars, the chosen one in bold. */
function successBars(success, chosen) {
  const rows = success.map((value, index) => {
    const fill = element("span", "fill");
    fill.style.width = `${100 * value}%`;
    fill.style.background = tierColor(index);
    const name = server.tiers[index]?.name ?? `tier ${index}`;
    const row = element("div", index === chosen ? "chosen" : "", element("dt", "", name), element("dd", "", element("span", "track", fill), element("span", "part", percent(value))));
    return row;
  });
  if (!rows.length) return element("p", "quiet", "This tier map has no calibrated chances of success.");
  const list = element("dl", "bars", ...rows);
  list.setAttribute("aria-label", "Chance of success by tier");
  return element("div", "", element("p", "quiet", "Chance of success by tier"), list);
}

/* -- the answer's telemetry --------------------------------------------------------------------- */

function showFacts(record) {
  const speed = (1000 * record.completion_tokens) / record.total_ms;
  const decoded = record.tier_tokens.map((tokens, index) => (tokens ? `${server.tiers[index]?.name ?? index} ${tokens}` : ""));
  const facts = [
    ["tokens", `${record.prompt_tokens} in, ${record.completion_tokens} out`],
    ["by tier", decoded.filter(Boolean).join(", ") || "–"],
    ["first token", duration(record.ttft_ms)],
    ["total", duration(record.total_ms)],
    ["queued", duration(record.queue_ms)],
    ["speed", Number.isFinite(speed) ? `${count(speed)} tokens/s` : "–"],
    ["compute", `${count(record.flops)} FLOP`],
    ["escalations", String(record.escalations)],
  ];
  $("answer-facts").replaceChildren(...facts.map(([name, value]) => element("div", "", element("dt", "", name), element("dd", "", value))));
}
