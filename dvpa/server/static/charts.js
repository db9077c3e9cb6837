/* Tier colours and the three charts: live share, difficulty, frontier. Drawn with Chart.js. */

import { $, count, fixed, percent } from "./format.js";

const Chart = window.Chart;
const SLOTS = 60; // of two seconds each
const SECONDS = 2;
const STRIP = 8; // pixels above a plot for `bands`

/* -- colours ----------------------------------------------------------------------------------- */

const dark = matchMedia("(prefers-color-scheme: dark)");
let tierNames = [];
let colors = {}; // of the page and of the tiers, as the charts need them

/** OKLCH to "rgb(...)", with less chroma where the screen cannot show it. */
function oklch(lightness, chroma, hue) {
  const a = chroma * Math.cos((hue * Math.PI) / 180);
  const b = chroma * Math.sin((hue * Math.PI) / 180);
  const l = (lightness + 0.3963377774 * a + 0.2158037573 * b) ** 3;
  const m = (lightness - 0.1055613458 * a - 0.0638541728 * b) ** 3;
  const s = (lightness - 0.0894841775 * a - 1.291485548 * b) ** 3;
  const linear = [
    4.0767416621 * l - 3.3077115913 * m + 0.2309699292 * s,
    -1.2684380046 * l + 2.6097574011 * m - 0.3413193965 * s,
    -0.0041960863 * l - 0.7034186147 * m + 1.707614701 * s,
  ];
  if (chroma > 0.005 && linear.some((part) => part < 0 || part > 1)) return oklch(lightness, chroma - 0.005, hue);
  const coded = linear.map((part) => {
    const inside = Math.min(Math.max(part, 0), 1);
    return Math.round(255 * (inside <= 0.0031308 ? 12.92 * inside : 1.055 * inside ** (1 / 2.4) - 0.055));
  });
  return `rgb(${coded.join(", ")})`;
}

/** A ramp that is even to the eye: the more a tier computes, the further from the background. */
function ramp(length) {
  const ends = dark.matches ? [[0.54, 0.1, 200], [0.84, 0.12, 300]] : [[0.65, 0.115, 190], [0.37, 0.17, 285]];
  return Array.from({ length }, (_, index) => {
    const at = length > 1 ? index / (length - 1) : 1;
    return oklch(...ends[0].map((from, part) => from + (ends[1][part] - from) * at));
  });
}

const translucent = (rgb, alpha) => rgb.replace("rgb(", "rgba(").replace(")", `, ${alpha})`);

function readColors() {
  const style = getComputedStyle(document.documentElement);
  colors = { tiers: ramp(tierNames.length) };
  for (const name of ["text", "muted", "grid", "panel", "accent"]) colors[name] = style.getPropertyValue(`--${name}`).trim();
  colors.tiers.forEach((color, index) => document.documentElement.style.setProperty(`--tier-${index}`, color));
}

/* -- what the charts share --------------------------------------------------------------------- */

const mono = { size: 11 };

/** Options of one axis; colours are read when drawn, so that a change of theme needs only an update. */
function axis(title, ticks, more = {}) {
  return {
    border: { color: () => colors.grid },
    grid: { color: () => colors.grid, tickLength: 4 },
    title: { display: Boolean(title), text: title, color: () => colors.muted, font: mono, padding: 2 },
    ticks: { color: () => colors.muted, font: mono, maxRotation: 0, ...ticks },
    ...more,
  };
}

/** A left axis that keeps its width, whatever its numbers. */
const upright = (title, ticks, more) =>
  axis(title, { maxTicksLimit: 5, ...ticks }, { beginAtZero: true, afterFit: (scale) => { scale.width = 52; }, ...more });

function settings(scales, tooltip) {
  const text = () => colors.panel;
  return {
    animation: false,
    maintainAspectRatio: false,
    interaction: { mode: "index", intersect: false },
    scales,
    layout: { padding: { top: 4, right: 8 } },
    plugins: {
      legend: { display: false },
      tooltip: {
        backgroundColor: () => colors.text, titleColor: text, bodyColor: text, footerColor: text,
        boxWidth: 8, boxHeight: 8, boxPadding: 4, padding: 8, cornerRadius: 4, animation: false, ...tooltip,
      },
    },
  };
}

/** Vertical lines with a label above: `chart.marks = [{x, label, color}]`. */
const marks = {
  id: "marks",
  afterDatasetsDraw({ ctx, chartArea, scales, marks: lines = [], bands: ranges = [] }) {
    const top = chartArea.top - (ranges.length ? STRIP : 0);
    const ends = [-Infinity, -Infinity]; // of the labels in two rows, for neighbours that are close
    ctx.save();
    ctx.font = `600 11px ${Chart.defaults.font.family}`;
    ctx.textBaseline = "bottom";
    for (const { x, label, color } of lines) {
      const at = Math.round(scales.x.getPixelForValue(x)) + 0.5;
      if (at < chartArea.left || at > chartArea.right + 1) continue;
      const width = ctx.measureText(label).width;
      const left = Math.min(Math.max(at - width / 2, chartArea.left), chartArea.right - width);
      const row = ends.findIndex((end) => left >= end + 6); // -1: a line without its label
      if (row >= 0) ends[row] = left + width;
      ctx.strokeStyle = ctx.fillStyle = color;
      ctx.lineWidth = 1.5;
      ctx.setLineDash([4, 3]);
      ctx.beginPath();
      ctx.moveTo(at, top - (row > 0 ? 15 : 2));
      ctx.lineTo(at, chartArea.bottom);
      ctx.stroke();
      if (row >= 0) ctx.fillText(label, left, top - 2 - 13 * row);
    }
    ctx.restore();
  },
};

/** A strip above the plot in the colours of ranges of x: `chart.bands = [{from, to, color}]`. */
const bands = {
  id: "bands",
  afterDatasetsDraw({ ctx, chartArea, scales, bands: ranges = [] }) {
    for (const { from, to, color } of ranges) {
      const [left, right] = [from, to].map((x) => scales.x.getPixelForValue(x));
      ctx.fillStyle = color;
      ctx.fillRect(left, chartArea.top - STRIP, right - left, STRIP - 2);
    }
  },
};

/** Names below the points of the last dataset. */
const names = {
  id: "names",
  afterDatasetsDraw(chart) {
    const last = chart.data.datasets.length - 1;
    const { ctx, chartArea } = chart;
    ctx.save();
    ctx.font = `600 12px ${Chart.defaults.font.family}`;
    ctx.fillStyle = colors.text;
    ctx.strokeStyle = colors.panel; // a rim, so that lines do not cross the letters
    ctx.lineWidth = 4;
    ctx.lineJoin = "round";
    ctx.textAlign = "center";
    ctx.textBaseline = "middle";
    chart.getDatasetMeta(last).data.forEach((point, index) => {
      const { name } = chart.data.datasets[last].data[index];
      const half = ctx.measureText(name).width / 2;
      const x = Math.min(Math.max(point.x, chartArea.left + half + 4), chartArea.right - half);
      ctx.strokeText(name, x, point.y + 18); // below: the curve is above
      ctx.fillText(name, x, point.y + 18);
    });
    ctx.restore();
  },
};

/** Show the chart, or the words that stand in for it. */
function show(name, hasData, label, words) {
  $(`${name}-chart`).classList.toggle("blank", !hasData);
  $(`${name}-chart`).setAttribute("aria-label", label);
  $(`${name}-empty`).hidden = hasData;
  if (words) $(`${name}-empty`).textContent = words;
}

/* -- live tier share --------------------------------------------------------------------------- */

let flow, difficulty, frontier;
let flowBuckets = [];
let flowNow = 0;
let flowUnit = "tokens";

function makeFlow() {
  const ago = (slot) => SECONDS * (SLOTS - slot);
  const at = { 0: "2 min ago", 30: "1 min ago", 59: "now" };
  const scales = {
    x: axis("", { autoSkip: false, align: "inner", callback: (slot) => at[slot] ?? null }, { stacked: true, grid: { display: false } }),
    y: upright("", { callback: (value) => (flowUnit === "share" ? `${value} %` : count(value)) }, { stacked: true, grace: "4%" }),
  };
  const unit = () => (flowUnit === "share" ? " %" : " tokens/s");
  const callbacks = {
    title: ([item]) => (item ? `${ago(item.dataIndex)} s ago` : ""),
    label: ({ dataset, raw }) => `${dataset.label}: ${count(raw)}${unit()}`,
  };
  const labels = Array.from({ length: SLOTS }, (_, slot) => slot);
  flow = new Chart($("flow-chart"), {
    type: "bar",
    data: { labels, datasets: [] },
    options: settings(scales, { callbacks, filter: ({ raw }) => raw > 0, itemSort: (a, b) => b.datasetIndex - a.datasetIndex }),
  });
}

/** Draw the buckets of the last two minutes; `now` is the server's time in seconds. */
export function drawFlow(buckets = flowBuckets, now = flowNow, unit = flowUnit) {
  [flowBuckets, flowNow, flowUnit] = [buckets, now, unit];
  const last = Math.floor(now / SECONDS) - 1; // the one that is full
  const slots = Array.from({ length: SLOTS }, () => ({}));
  for (const bucket of buckets) {
    const slot = SLOTS - 1 - (last - Math.floor(bucket.t / SECONDS));
    if (slot >= 0 && slot < SLOTS) slots[slot] = bucket.tokens;
  }
  const totals = slots.map((tokens) => Object.values(tokens).reduce((sum, part) => sum + part, 0));
  flow.data.datasets = tierNames.map((label, index) => ({
    label,
    data: slots.map((tokens, slot) => {
      const part = tokens[label] ?? 0;
      return unit === "share" ? (100 * part) / (totals[slot] || 1) : part / SECONDS;
    }),
    backgroundColor: () => colors.tiers[index],
    hoverBackgroundColor: () => colors.tiers[index],
    barPercentage: 1,
    categoryPercentage: 0.86,
  }));
  flow.options.scales.y.max = unit === "share" ? 100 : undefined;
  flow.update("none");
  const total = totals.reduce((sum, part) => sum + part, 0);
  const parts = tierNames.map((name) => `${name} ${percent(slots.reduce((sum, tokens) => sum + (tokens[name] ?? 0), 0) / total)}`);
  show("flow", total > 0, `Tokens of the last two minutes: ${count(total)}; ${parts.join(", ")}`);
}

/* -- difficulty -------------------------------------------------------------------------------- */

function makeDifficulty() {
  const scales = {
    x: axis("easier  –  difficulty  –  harder", { stepSize: 0.25, callback: (value) => Number(value.toFixed(2)) }, { type: "linear", min: 0, max: 1, offset: false, grid: { display: false } }),
    y: upright("", { callback: (value) => `${value} %` }),
  };
  const callbacks = {
    title: ([item]) => (item ? `difficulty ${fixed(item.raw.from)} to ${fixed(item.raw.to)}` : ""),
    label: ({ raw }) => `${raw.count} requests, ${fixed(raw.y, 1)} %`,
    footer: ([item]) => (item && item.raw.expected !== null ? `calibration set ${fixed(item.raw.expected, 1)} %` : ""),
  };
  const options = settings(scales, { callbacks, displayColors: false, filter: ({ datasetIndex }) => datasetIndex === 1 });
  options.interaction.mode = "x";
  difficulty = new Chart($("difficulty-chart"), { type: "bar", data: { datasets: [] }, options, plugins: [bands, marks] });
}

/** Draw the histogram of requests over the calibration set's, with the tier map's cuts. */
export function drawDifficulty({ bins, counts, calibration_counts: expected }, tierRegions) {
  const sum = (values) => values.reduce((total, value) => total + value, 0) || 1;
  const edges = [...bins.slice(0, counts.length), 1];
  const share = expected && expected.map((value) => (100 * value) / sum(expected));
  const tierAt = (d) => tierRegions.findLast(({ from }) => from <= d)?.tier;
  const barColor = ({ raw }) => colors.tiers[tierAt(raw?.x)] ?? colors.muted;
  const bars = counts.map((value, bin) => ({
    x: (edges[bin] + edges[bin + 1]) / 2, y: (100 * value) / sum(counts), count: value,
    from: edges[bin], to: edges[bin + 1], expected: share ? share[bin] : null,
  }));
  const outline = share ? edges.map((x, bin) => ({ x, y: share[Math.min(bin, share.length - 1)] })) : [];
  difficulty.data.datasets = [
    {
      type: "line", data: outline, stepped: true, fill: "origin", pointRadius: 0, pointHitRadius: 0, borderWidth: 1, order: 2,
      borderColor: () => colors.muted, backgroundColor: () => colors.grid,
    },
    {
      data: bars, grouped: false, barPercentage: 1, categoryPercentage: 0.8, order: 1,
      backgroundColor: barColor, hoverBackgroundColor: barColor,
    },
  ];
  difficulty.bands = tierRegions.map(({ from, tier }, index) => ({ from, to: tierRegions[index + 1]?.from ?? 1, color: colors.tiers[tier] }));
  // The cuts of a gain map can be many and close: the strip alone is clearer then.
  const cuts = tierRegions.length <= tierNames.length + 1 ? tierRegions.slice(1) : [];
  difficulty.marks = cuts.map(({ from }) => ({ x: from, label: fixed(from), color: colors.text }));
  difficulty.options.layout.padding.top = cuts.length ? 38 : 14; // the strip, and the labels of the cuts
  difficulty.update("none");
  const total = counts.reduce((all, value) => all + value, 0);
  show("difficulty", total > 0 || Boolean(share), `Difficulty of ${total} requests; tier map: ${tierRegions.map(({ from, tier }) => `${tierNames[tier]} from ${fixed(from)}`).join(", ") || "no cuts"}`);
}

/* -- frontier ---------------------------------------------------------------------------------- */

function makeFrontier() {
  const callbacks = {
    title: ([item]) => (item ? item.raw.name ?? "adaptive" : ""),
    label: ({ raw }) => `quality ${fixed(raw.y, 3)} at ${count(raw.x)} activated`,
  };
  const scales = {
    x: axis("activated parameters per token", { callback: (value) => count(value), maxTicksLimit: 8, includeBounds: false }, { type: "linear" }),
    y: upright("", { callback: (value) => fixed(value), maxTicksLimit: 7, includeBounds: false }, { beginAtZero: false }),
  };
  const options = settings(scales, { callbacks, displayColors: false });
  options.interaction = { mode: "nearest", intersect: false };
  options.layout.padding.top = 18;
  frontier = new Chart($("frontier-chart"), { type: "scatter", data: { datasets: [] }, options, plugins: [marks, names] });
}

/** Limits of an axis that leave a margin around its values. */
function around(values, margin) {
  if (!values.length) return {};
  const [low, high] = [Math.min(...values), Math.max(...values)];
  const space = margin * (high - low || high || 1);
  return { min: Math.max(0, low - space), max: high + space };
}

/** Draw the calibration report's frontier and where traffic is on it; null: say that there is none. */
export function drawFrontier(data, activatedNow) {
  const curve = ({ cost, quality } = { cost: [], quality: [] }) => cost.map((x, index) => ({ x, y: quality[index] })).sort((a, b) => a.x - b.x);
  const line = curve(data?.adaptive);
  const points = (data?.tiers ?? []).map(({ name, cost, quality }) => ({ x: cost, y: quality, name }));
  frontier.data.datasets = [
    {
      type: "line", data: line, borderWidth: 2, pointRadius: line.length > 1 ? 0 : 4, pointHitRadius: 6, order: 2,
      borderColor: () => colors.accent, backgroundColor: () => colors.accent,
    },
    {
      type: "line", data: curve(data?.random), borderWidth: 1.5, borderDash: [3, 3], pointRadius: 0, pointHitRadius: 0, order: 3,
      borderColor: () => colors.muted,
    },
    {
      data: points, pointRadius: 7, pointHoverRadius: 8, borderWidth: 2, order: 1,
      borderColor: () => colors.panel,
      backgroundColor: ({ raw }) => colors.tiers[tierNames.indexOf(raw?.name)] ?? colors.muted,
    },
  ];
  const all = [...line, ...points];
  Object.assign(frontier.options.scales.x, around(all.map(({ x }) => x), 0.08));
  Object.assign(frontier.options.scales.y, around(all.map(({ y }) => y), 0.2));
  frontier.marks = activatedNow ? [{ x: activatedNow, label: "traffic now", color: colors.muted }] : [];
  frontier.update("none");
  const label = points.map(({ name, x, y }) => `${name}: quality ${fixed(y)} at ${count(x)}`).join("; ");
  show("frontier", Boolean(data), `Quality against activated parameters. ${label}`,
    data === null ? "No calibration report beside this checkpoint: run dvpa calibrate to measure quality per tier." : "");
}

/* -- all of them ------------------------------------------------------------------------------- */

/** Make the charts. `redraw` is called after a change between light and dark. */
export function makeCharts(redraw) {
  Chart.defaults.font.family = getComputedStyle(document.body).fontFamily;
  readColors();
  makeFlow();
  makeDifficulty();
  makeFrontier();
  dark.addEventListener("change", () => {
    readColors();
    redraw();
  });
}

/** Name the tiers, base first. */
export function setTiers(names) {
  if (names.join("\n") === tierNames.join("\n")) return;
  tierNames = [...names];
  readColors();
}
