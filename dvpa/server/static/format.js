/* Numbers in words and digits, reasons in sentences, and the one way elements are made. */

export const $ = (id) => document.getElementById(id);

/** An element with a class and children; text is always inserted as text. */
export function element(tag, className = "", ...children) {
  const made = document.createElement(tag);
  if (className) made.className = className;
  made.append(...children.filter((child) => child !== null && child !== undefined));
  return made;
}

const isNumber = (value) => typeof value === "number" && Number.isFinite(value);

/** Three digits and a unit: 812, 181k, 1.24M, 31.9B. */
export function count(value) {
  if (!isNumber(value)) return "–";
  for (const [limit, unit] of [[1e15, "P"], [1e12, "T"], [1e9, "B"], [1e6, "M"], [1e3, "k"]]) {
    if (Math.abs(value) >= limit * 0.9995) return `${Number((value / limit).toPrecision(3))}${unit}`;
  }
  return `${Number(value.toPrecision(3))}`;
}

/** Milliseconds: 0.4 ms, 34 ms, 1.2 s, 35 s. */
export function duration(ms) {
  if (!isNumber(ms)) return "–";
  if (ms < 999.5) return `${ms < 9.95 ? Number(ms.toFixed(1)) : Math.round(ms)}\u00a0ms`;
  return `${ms < 9950 ? (ms / 1000).toFixed(1) : Math.round(ms / 1000)}\u00a0s`;
}

export const fixed = (value, digits = 2) => (isNumber(value) ? value.toFixed(digits) : "–");
export const percent = (part) => (isNumber(part) ? `${Math.round(100 * part)}\u00a0%`.replace("-", "−") : "–");
export const clock = (seconds) => new Date(1000 * seconds).toLocaleTimeString([], { hour12: false });

/** The smallest value that 95 % of `values` do not exceed; NaN without values. */
export function p95(values) {
  const sorted = values.filter(isNumber).sort((a, b) => a - b);
  return sorted[Math.ceil(0.95 * sorted.length) - 1] ?? NaN;
}

export const REASONS = {
  tier_map: "tier map",
  override: "asked for",
  cap: "cap",
  load: "load",
  escalation: "escalation",
  fallback: "fallback",
};

/** Why a request got its tier, in a sentence's length. */
export function reason(record) {
  const { decided_by: by, difficulty, thresholds = [], success_by_tier: success = [], tier, escalations = 0 } = record;
  if (by === "override") return "asked for by the client";
  if (by === "cap") return "moved by the request's or session's bounds";
  if (by === "load") return "lowered: the server is busy";
  if (by === "fallback") return isNumber(difficulty) ? "fallback of the server" : "fallback: no usable difficulty";
  if (by === "escalation") return `raised ${escalations === 2 ? "twice" : "once"} while decoding`;
  if (by !== "tier_map") return String(by ?? "–");
  if (!isNumber(difficulty) || !thresholds.length) return `tier map: ${gain(tier, success) || "best gain for its cost"}`;
  const reached = thresholds.filter((cut) => cut <= difficulty);
  if (reached.length !== tier) return "tier map: by its guard or upper cut";
  const above = reached.length ? `at least ${fixed(reached.at(-1))}` : "";
  const below = thresholds.length > tier && thresholds[tier] <= 1 ? `below ${fixed(thresholds[tier])}` : "";
  return `tier map: ${[above, below].filter(Boolean).join(", ") || "its only choice"}`;
}

/** A gain map weighs these chances of success against their cost. */
function gain(tier, success) {
  if (success.length < 2) return "";
  const top = success.length - 1;
  return `chance ${percent(success[tier])}, at ${tier < top ? `top ${percent(success[top])}` : `base ${percent(success[0])}`}`;
}

/** Where each tier begins on the scale of difficulty: [{from, tier}]; none if the map does not say. */
export function regions({ regions: given, thresholds = [], upper_cut: upper }) {
  if (given) return given;
  if (!thresholds.length) return [];
  const cuts = [0, ...thresholds];
  const found = cuts.map((from, tier) => ({ from, tier })).filter(({ from }, tier) => from < (cuts[tier + 1] ?? 1.01));
  if (isNumber(upper)) return [...found.filter(({ from }) => from < upper), { from: upper, tier: 0 }];
  return found.filter(({ from }) => from <= 1);
}

/** The tier's colour and its name. */
export function tierTag(index, name) {
  const swatch = element("span", "swatch");
  swatch.style.background = tierColor(index);
  swatch.setAttribute("aria-hidden", "true");
  return element("span", "tag", swatch, String(name));
}

/** The CSS variable of a tier's colour; charts.js keeps it right for light and dark. */
export const tierColor = (index) => `var(--tier-${index}, var(--muted))`;
