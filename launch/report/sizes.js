// Drift, regret and forecasts over the sizes, with what theory and the forecast say beside what was measured. After
// page.js, whose helpers these share.
"use strict";

const PARAMETERIZATION_COLOURS = {
  light: ["#1f5f99", "#b04a00", "#0b6e4f", "#8b1a4a", "#5d4b8a", "#5d5d00"],
  dark: ["#7ec8ff", "#ffb866", "#6fdcb0", "#ff9fc4", "#c9b6ff", "#e0e070"],
};
const parameterizations = unique(record.sizes.map((size) => size.parameterization));
const isBase = (size) => Object.entries(record.base).every(([axis, value]) => size[axis] === value);
const percent = (share) => `${(100 * share).toPrecision(2)} %`;

function lineOf(parameterization) {
  const colours = PARAMETERIZATION_COLOURS[dark.matches ? "dark" : "light"];
  const at = parameterizations.indexOf(parameterization);
  return { color: colours[at % colours.length], symbol: SYMBOLS[at % SYMBOLS.length] };
}

// Of an interval that is open on a side, the bar goes to the edge of the figure.
function errorBars(values, intervals, reach) {
  const bar = (value, bound) => (bound === null ? reach : Math.abs(value - bound));
  return {
    type: "data",
    symmetric: false,
    array: values.map((value, i) => (intervals[i] ? bar(value, intervals[i][1]) : 0)),
    arrayminus: values.map((value, i) => (intervals[i] ? bar(value, intervals[i][0]) : 0)),
  };
}

// Sizes stand in the order of the study, each with its name: width and depth may both differ. Parameterizations stand
// side by side at a size, so that intervals of those that agree stay readable.
const places = unique(record.sizes.map(nameOf));

function placeOf(size, parameterization) {
  const aside = parameterizations.indexOf(parameterization) - (parameterizations.length - 1) / 2;
  return places.indexOf(nameOf(size)) + (0.6 * aside) / parameterizations.length;
}

function overSizes(element, title, y, traces, change) {
  const shape = layout(title, "width x depth", y, false);
  Object.assign(shape, { height: 440 });
  Object.assign(shape.xaxis, { tickvals: places.map((_, i) => i), ticktext: places, range: [-0.5, places.length - 0.5] });
  Object.assign(shape.xaxis, { showgrid: false, zeroline: false });
  Object.assign(shape.yaxis, { type: "linear", zeroline: true });
  change(shape);
  Plotly.react(element, traces, shape, options);
}

function drawDrift() {
  const traces = parameterizations.flatMap((parameterization) => {
    const { color, symbol } = lineOf(parameterization);
    const own = record.sizes.filter((size) => size.parameterization === parameterization && size.drift_octaves !== null);
    const drifts = own.map((size) => size.drift_octaves);
    const seen = {
      x: own.map((size) => placeOf(size, parameterization)),
      y: drifts,
      error_y: errorBars(drifts, own.map((size) => (isBase(size) ? null : size.drift_interval_octaves)), 9),
      text: own.map((size) => `${parameterization}, ${nameOf(size)}<br>drift ${size.drift_octaves.toFixed(2)} octaves`),
      hoverinfo: "text",
      mode: "markers",
      name: parameterization,
      marker: { color, symbol, size: 9 },
    };
    const foretold = record.predicted_drifts.filter((drift) => drift.parameterization === parameterization);
    const at = (drift) => ({ ...record.base, depth: drift.depth });
    const theory = {
      x: foretold.map((drift) => placeOf(at(drift), parameterization)),
      y: foretold.map((drift) => drift.octaves),
      text: foretold.map((drift) => `${parameterization}, ${nameOf(at(drift))}<br>in theory ${drift.octaves.toFixed(2)} octaves`),
      hoverinfo: "text",
      mode: "markers",
      name: `${parameterization}, in theory`,
      marker: { color, symbol: "line-ew-open", size: 22, line: { width: 3 } },
    };
    return foretold.length ? [seen, theory] : [seen];
  });
  const limit = Math.max(2, ...record.sizes.map((size) => Math.abs(size.drift_octaves ?? 0))) + 0.5;
  overSizes(element("drift"), "Drift of the optimum", `octaves of ${record.octaves_of}`, traces, (shape) => {
    shape.yaxis.range = [-limit, limit];
  });
}

function drawRegret() {
  const traces = parameterizations.map((parameterization) => {
    const { color, symbol } = lineOf(parameterization);
    const own = record.sizes.filter((size) => size.parameterization === parameterization && size.regret !== null);
    const regrets = own.map((size) => 100 * size.regret);
    const scaled = (bounds) => bounds && bounds.map((bound) => (bound === null ? null : 100 * bound));
    return {
      x: own.map((size) => placeOf(size, parameterization)),
      y: regrets,
      error_y: errorBars(regrets, own.map((size) => scaled(size.regret_interval)), 100),
      text: own.map((size) => `${parameterization}, ${nameOf(size)}<br>regret ${percent(size.regret)}`),
      hoverinfo: "text",
      mode: "markers",
      name: parameterization,
      marker: { color, symbol, size: 9 },
    };
  });
  const rule = (share, text) => ({
    type: "line",
    ...{ xref: "paper", x0: 0, x1: 1, y0: 100 * share, y1: 100 * share },
    line: { color: dark.matches ? "#aaa" : "#666", width: 1, dash: "dot" },
    label: { text, textposition: "start", font: { size: 11 } },
  });
  const largest = Math.max(record.regret_limit, ...record.sizes.map((size) => size.regret ?? 0));
  overSizes(element("regret"), "Regret at the carried value", "% of the loss", traces, (shape) => {
    shape.yaxis.range = [-4 * largest, 130 * largest];
    shape.shapes = [rule(record.regret_limit, "transfers below"), rule(record.cost_limit, "costs below")];
  });
}

// A parameterization without a number has its reason in the table.
function drawForecasts() {
  const told = record.forecasts.filter((forecast) => forecast.predicted !== null && forecast.interval);
  element("forecast").hidden = !told.length;
  if (!told.length) return;
  const name = (forecast) => `${forecast.parameterization}, ${nameOf(forecast.target)}`;
  const color = dark.matches ? "#e6e6e6" : "#222";
  const predicted = told.map((forecast) => forecast.predicted);
  const seen = told.filter((forecast) => forecast.seen !== null);
  const traces = [
    {
      x: told.map(name),
      y: predicted,
      error_y: errorBars(predicted, told.map((forecast) => forecast.interval), 0),
      text: told.map((forecast) => `${name(forecast)}<br>forecast ${number(forecast.predicted)}, ${forecast.law}`),
      ...{ hoverinfo: "text", mode: "markers", name: "forecast", marker: { color, symbol: "line-ew-open", size: 22 } },
    },
    {
      x: seen.map(name),
      y: seen.map((forecast) => forecast.seen),
      text: seen.map((forecast) => `${name(forecast)}<br>seen ${number(forecast.seen)}`),
      ...{ hoverinfo: "text", mode: "markers", name: "seen" },
      marker: { color: seen.map((forecast) => lineOf(forecast.parameterization).color), symbol: "circle", size: 10 },
    },
  ];
  const shape = layout("Forecast of the largest size", "", record.metric.replace("_", " "), false);
  shape.xaxis.type = "category";
  shape.yaxis.type = "linear";
  Plotly.react(element("forecast"), traces, shape, options);
}

function drawSizes() {
  drawDrift();
  drawRegret();
  drawForecasts();
}

if (element("sizes")) {
  element("sizes").hidden = false;
  drawSizes();
  dark.addEventListener("change", drawSizes);
}
for (const figure of document.querySelectorAll("figure.plain")) figure.classList.add("replaced");
