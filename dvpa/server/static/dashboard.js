/* The dashboard: asks the server every two seconds while the tab is seen, and shows what it says. */

import { call, getKey, setKey } from "./api.js";
import { drawDifficulty, drawFlow, drawFrontier, makeCharts, setTiers } from "./charts.js";
import { $, REASONS, clock, count, duration, element, fixed, p95, percent, reason, regions, tierColor, tierTag } from "./format.js";
import { makePrompt, offerTiers } from "./prompt.js";

const POLL_MS = 2000;
const SLOWEST_POLL_MS = 16000; // while the server does not answer
const TIERS_MS = 30000;
const TIMEOUT_MS = 10000;

/* What the server said last. */
const server = { model: "", tiers: [], tierMap: null, frontier: undefined };
let telemetry = null;
let serverNow = 0; // seconds
let tiersAt = -Infinity;

/* -- asking ------------------------------------------------------------------------------------ */

let timer = 0;
let isAsking = false;
let failures = 0;

async function poll() {
  clearTimeout(timer);
  if (isAsking || document.hidden) return;
  isAsking = true;
  let wait = POLL_MS;
  try {
    if (performance.now() - tiersAt > TIERS_MS) await readTiers();
    const response = await call("v1/dvpa/telemetry?limit=50", { signal: AbortSignal.timeout(TIMEOUT_MS) });
    serverNow = Date.parse(response.headers.get("date") ?? new Date()) / 1000;
    telemetry = await response.json();
    failures = 0;
    setState("live", "live");
    render();
  } catch (error) {
    wait = Math.min(POLL_MS * 2 ** failures++, SLOWEST_POLL_MS);
    tiersAt = -Infinity; // it may come back with another model
    if (error.status === 401) wait = Infinity;
    askForKey(error);
    setState("off", error.status === 401 ? "API key needed" : error.message);
  }
  isAsking = false;
  if (Number.isFinite(wait)) timer = setTimeout(poll, wait);
}

async function readTiers() {
  const response = await call("v1/dvpa/tiers", { signal: AbortSignal.timeout(TIMEOUT_MS) });
  const { model, tiers, tier_map: tierMap, frontier } = await response.json();
  Object.assign(server, { model, tiers, tierMap, frontier });
  tiersAt = performance.now();
  setTiers(tiers.map(({ name }) => name));
  offerTiers();
  $("model-name").textContent = model;
  document.title = `${model} – dvpa`;
  $("map-note").textContent = mapInWords(tierMap);
}

function setState(kind, words) {
  $("state-dot").className = `dot ${kind}`;
  if ($("state").textContent !== words) $("state").textContent = words; // said aloud on change only
}

/** Show the key's field after a 401; other errors are shown where they happened. */
function askForKey(error) {
  $("forget-key").hidden = !getKey();
  if (error.status !== 401 || !$("key-form").hidden) return;
  $("key-form").hidden = false;
  $("key-why").textContent = error.message;
  if (document.activeElement === document.body) $("key").focus();
}

/* -- figures ----------------------------------------------------------------------------------- */

const tierIndex = (name) => server.tiers.findIndex((tier) => tier.name === name);

function render() {
  if (!telemetry) return;
  $("requests-total").textContent = telemetry.requests_total.toLocaleString("en");
  $("since").textContent = `since ${new Date(1000 * telemetry.since).toLocaleString([], { dateStyle: "medium", timeStyle: "short", hour12: false })}`;
  $("forget-key").hidden = !getKey();
  renderShare();
  renderFigures();
  drawFlow(telemetry.throughput, serverNow);
  drawDifficulty(telemetry.difficulty, regions(server.tierMap));
  drawFrontier(server.frontier, activatedNow());
  $("frontier-note").textContent = server.frontier ? `line: adaptive${server.frontier.random ? ", dashed: random" : ""}` : "";
  renderTiers();
  renderDecisions();
}

/** Parameters per token as the frontier counts them: prompt tokens, too. */
function activatedNow() {
  const { flops, flops_always_top: most } = telemetry.savings;
  return most ? (server.tiers.at(-1).activated_params * flops) / most : null;
}

/** Share of requests per tier: of the last two minutes, or of the last requests if there were none. */
function renderShare() {
  const recent = server.tiers.map(({ name }) => telemetry.throughput.reduce((sum, bucket) => sum + (bucket.requests[name] ?? 0), 0));
  const kept = server.tiers.map(({ name }) => telemetry.tiers.find((tier) => tier.name === name)?.requests ?? 0);
  const sum = (values) => values.reduce((total, value) => total + value, 0);
  const isRecent = sum(recent) > 0;
  const counts = isRecent ? recent : kept;
  const total = sum(counts);
  $("share-span").textContent = isRecent ? ", last two minutes" : total ? `, last ${total} requests` : "";
  const bands = counts.map((value, index) => {
    const band = element("span", "band");
    band.style.flexGrow = String(value);
    band.style.background = tierColor(index);
    return band;
  });
  $("share-bar").replaceChildren(...bands.filter((_, index) => counts[index] > 0));
  const items = server.tiers.map(({ name }, index) => element("li", "", tierTag(index, name), element("b", "", total ? percent(counts[index] / total) : "–")));
  $("share-list").replaceChildren(...items);
}

function renderFigures() {
  const { savings, requests, difficulty, requests_total: total } = telemetry;
  const saved = 1 - savings.flops / savings.flops_always_top;
  $("saved").textContent = percent(saved);
  $("saved-note").textContent = Number.isFinite(saved) ? `${count(savings.flops)} FLOP; always top: ${count(savings.flops_always_top)}` : "against always the top tier";
  $("activated").textContent = total ? count(savings.activated_params_mean) : "–";
  $("activated-note").textContent = `mean per generated token; top tier ${count(savings.activated_params_top)}`;
  $("ttft").textContent = duration(p95(requests.filter((request) => request.completion_tokens).map((request) => request.ttft_ms)));
  $("ttft-note").textContent = requests.length ? `last ${requests.length} requests` : "no requests yet";
  const { drift, drift_requests: seen, calibration_counts: expected } = difficulty;
  const words = drift === null ? "unknown" : drift < 0.1 ? "stable" : drift < 0.25 ? "shifting" : "drifted";
  $("drift").textContent = words;
  $("drift").dataset.level = words;
  const why = expected ? "too few requests to tell" : "the tier map has no histogram";
  $("drift-note").textContent = drift === null ? why : `PSI ${fixed(drift)} over ${seen} requests`;
  $("difficulty-note").textContent = expected ? "bars: requests; behind: calibration set" : "";
}

/* -- tables ------------------------------------------------------------------------------------ */

/** A bar to the median with a pale part to p95, on a scale shared by the column, and its numbers. */
function barCell(index, value, extent, full, words) {
  const parts = [[extent, "fill pale"], [value, "fill"]].filter(([length]) => Number.isFinite(length));
  const bars = parts.map(([length, className]) => {
    const bar = element("span", className);
    bar.style.width = `${(100 * length) / (full || 1)}%`;
    bar.style.background = tierColor(index);
    return bar;
  });
  const track = element("span", "track", ...bars);
  track.setAttribute("aria-hidden", "true");
  const numbers = words.map((text, at) => element("span", at ? "numbers quiet" : "numbers", at ? element("span", "p95", "p95 ") : null, text));
  return element("td", "", track, ...numbers);
}

function renderTiers() {
  const rows = server.tiers.map((tier) => ({ ...tier, ...telemetry.tiers.find(({ name }) => name === tier.name) }));
  const most = (pick) => Math.max(0, ...rows.map(pick).filter(Number.isFinite));
  const fullTtft = most((row) => row.ttft_ms?.p95);
  const fullTotal = most((row) => row.total_ms?.p95);
  const fullSpeed = most((row) => row.tokens_per_s);
  const pair = (times) => (Number.isFinite(times?.p50) ? [duration(times.p50), duration(times.p95)] : ["–"]);
  $("tier-rows").replaceChildren(
    ...rows.map((row, index) => {
      const head = element("th", "", tierTag(index, row.name), element("span", "under", `${count(row.activated_params)} activated`));
      head.scope = "row";
      head.append(element("span", "under", `${(row.requests ?? 0).toLocaleString("en")} requests`));
      return element(
        "tr",
        "",
        head,
        barCell(index, row.ttft_ms?.p50, row.ttft_ms?.p95, fullTtft, pair(row.ttft_ms)),
        barCell(index, row.total_ms?.p50, row.total_ms?.p95, fullTotal, pair(row.total_ms)),
        barCell(index, row.tokens_per_s, NaN, fullSpeed, [count(row.tokens_per_s)]),
      );
    }),
  );
}

const ENDINGS = { stop: "complete", length: "max tokens" };

let shown = ""; // what the table holds, so that it is rebuilt on news only

function renderDecisions() {
  const { requests, decided_by: reasons, rejected } = telemetry;
  const counted = Object.entries(reasons).map(([key, value]) => [REASONS[key] ?? key, value]);
  const refused = Object.values(rejected).reduce((sum, value) => sum + value, 0);
  if (refused) counted.push(["rejected", refused]);
  const items = counted.filter(([, value]) => value).map(([name, value]) => element("li", "", name, element("b", "", value.toLocaleString("en"))));
  $("reasons").replaceChildren(...items);
  const state = requests.map((request) => `${request.request_id} ${request.finished_at}`).join("\n");
  if (!requests.length || state === shown) return;
  shown = state;
  $("decision-rows").replaceChildren(...requests.map(decisionRow));
}

function decisionRow(request) {
  const index = tierIndex(request.tier_name);
  const head = element("th", "", tierTag(index, request.tier_name));
  head.scope = "row";
  const id = element("code", "", request.request_id.replace(/^[a-z]+-/, "").slice(0, 8));
  id.title = request.request_id;
  const number = (words) => element("td", "number", words);
  return element(
    "tr",
    "",
    head,
    difficultyCell(request.difficulty, index),
    element("td", "", reason(request)),
    number(`${request.prompt_tokens} + ${request.completion_tokens}`),
    number(request.completion_tokens ? duration(request.ttft_ms) : "–"),
    number(duration(request.total_ms)),
    element("td", "", ENDINGS[request.finish_reason] ?? request.finish_reason),
    element("td", "", id),
    element("td", "quiet", clock(request.finished_at)),
  );
}

function difficultyCell(difficulty, index) {
  const fill = element("span", "fill");
  fill.style.width = `${100 * (difficulty ?? 0)}%`;
  fill.style.background = tierColor(index);
  const track = element("span", "track", fill);
  track.setAttribute("aria-hidden", "true");
  return element("td", "gauge", element("span", "numbers", fixed(difficulty)), track);
}

function mapInWords({ kind, is_fitted: isFitted, thresholds, default_tier: fallback, budget }) {
  const name = server.tiers[fallback]?.name ?? fallback;
  if (!isFitted) return `Tier map: not fitted, so every request goes to ${name}.`;
  const cuts = thresholds.length ? `, cuts at ${thresholds.map((cut) => (cut > 1 ? "never" : fixed(cut))).join(", ")}` : "";
  return `Tier map: ${kind}${cuts}${budgetInWords(budget ?? {})}; without a score ${name}.`;
}

function budgetInWords({ mean_activated: mean, fraction, min_quality: quality }) {
  if (mean) return `, budget ${count(mean)} activated`;
  if (fraction) return `, budget ${percent(fraction)} of the top tier`;
  return quality ? `, keeps ${percent(quality)} of the top tier's quality` : "";
}

/* -- start ------------------------------------------------------------------------------------- */

makeCharts(render);
makePrompt(server, askForKey);

document.addEventListener("visibilitychange", () => {
  if (document.hidden) setState("paused", "paused");
  else poll();
});
for (const radio of document.querySelectorAll("input[name=flow-unit]")) {
  radio.addEventListener("change", () => drawFlow(undefined, undefined, radio.value));
}
$("key-form").addEventListener("submit", (event) => {
  event.preventDefault();
  const key = $("key").value.trim();
  if (!/^[\x21-\x7e]+$/.test(key)) {
    $("key-why").textContent = "A key has no spaces and only plain characters.";
    return;
  }
  setKey(key);
  $("key").value = "";
  $("key-form").hidden = true;
  $("prompt-error").textContent = "";
  poll().then(() => ($("key-form").hidden ? $("main") : $("key")).focus());
});
$("forget-key").addEventListener("click", () => {
  setKey("");
  poll();
});
poll();
