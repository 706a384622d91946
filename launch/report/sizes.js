// Drift, regret and forecasts over the sizes, with what theory and the forecast say beside what was measured. After
// page.js, whose helpers these share.
"use strict";

const PARAMETERIZATION_COLOURS = {
  light: ["#1f5f99", "#b04a00", "#0b6e4f", "#8b1a4a", "#5d4b8a", "#5d5d00"],
  dark: ["#7ec8ff", "#ffb866", "#6fdcb0", "#ff9fc4", "#c9b6ff", "#e0e070"],
};
const parameterizations = unique(record.sizes.map((size) => size.parameterization));
const percent = (share) => `${Number((100 * share).toPrecision(2))} %`;

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
  Object.assign(shape, { height: 440, legend: { orientation: "h", yref: "container", y: 0, yanchor: "bottom" } });
  shape.margin.b = 140; // for the longest legend and names of three lines
  const names = places.map((place) => place.replaceAll(/, (\w+) /g, "<br>$1<br>"));
  Object.assign(shape.xaxis, { tickvals: places.map((_, i) => i), ticktext: names, range: [-0.5, places.length - 0.5] });
  if (places.length > 5) shape.xaxis.tickangle = -35;
  Object.assign(shape.xaxis, { showgrid: false, zeroline: false, ticklabeloverflow: "allow" });
  Object.assign(shape.yaxis, { type: "linear", zeroline: true });
  change(shape);
  Plotly.react(element, traces, shape, options);
}

// Crosses at the foot of a figure, for sizes of one parameterization that have no number there.
function crosses(own, y, why) {
  return {
    x: own.map((size) => placeOf(size, size.parameterization)),
    y: own.map(() => y),
    text: own.map((size) => `${size.parameterization}, ${nameOf(size)}<br>${why}`),
    ...{ hoverinfo: "text", mode: "markers", showlegend: false },
    marker: { color: own.map((size) => lineOf(size.parameterization).color), symbol: "x", size: 9 },
  };
}

function drawDrift() {
  const limit = Math.max(2, ...record.sizes.map((size) => Math.abs(size.drift_octaves ?? 0))) + 0.5;
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
    const untrained = record.sizes.filter((size) => size.parameterization === parameterization && size.optimum_log2 === null);
    return [seen, ...(foretold.length ? [theory] : []), crosses(untrained, -0.92 * limit, "no value trains")];
  });
  overSizes(element("drift"), "Drift of the optimum", `octaves of ${record.octaves_of}`, traces, (shape) => {
    shape.yaxis.range = [-limit, limit];
  });
}

function drawRegret() {
  const largest = Math.max(record.regret_limit, ...record.sizes.map((size) => size.regret ?? 0));
  const lost = [];
  const traces = parameterizations.map((parameterization) => {
    const { color, symbol } = lineOf(parameterization);
    const own = record.sizes.filter((size) => size.parameterization === parameterization && size.regret !== null);
    const regrets = own.map((size) => 100 * size.regret);
    const scaled = (bounds) => bounds && bounds.map((bound) => (bound === null ? null : 100 * bound));
    const failing = record.sizes.filter((size) => size.parameterization === parameterization && size.fails_at_base_optimum);
    lost.push(crosses(failing, -8 * largest, "fails at the carried value"));
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
  const rule = (share, text, dash) => ({
    x: [-0.5, places.length - 0.5],
    y: [100 * share, 100 * share],
    ...{ mode: "lines", hoverinfo: "skip", name: `${text} below ${percent(share)}` },
    line: { color: dark.matches ? "#aaa" : "#666", width: 1.5, dash },
  });
  traces.push(rule(record.regret_limit, "transfers", "dot"), rule(record.cost_limit, "costs", "dash"));
  traces.push(...lost);
  overSizes(element("regret"), "Regret at the carried value", "% of the loss", traces, (shape) => {
    shape.yaxis.range = [-12 * largest, 130 * largest];
  });
}

// The loss at the carried value, and at the best value of each size.
function drawLoss() {
  const traces = parameterizations.flatMap((parameterization) => {
    const { color, symbol } = lineOf(parameterization);
    const trace = (key, what, marker, rest) => {
      const own = record.sizes.filter((size) => size.parameterization === parameterization && size[key] !== null);
      return {
        x: own.map((size) => placeOf(size, parameterization)),
        y: own.map((size) => size[key]),
        text: own.map((size) => `${parameterization}, ${nameOf(size)}<br>${number(size[key])} ${what}`),
        ...{ hoverinfo: "text", mode: "markers", name: parameterization, legendgroup: parameterization },
        marker: { color, symbol: marker, size: 9, line: { color, width: 2 } },
        ...rest,
      };
    };
    return [
      trace("metric_at_base_optimum", "at the carried value", symbol, {}),
      trace("best_metric", "at its own best", `${symbol}-open`, { showlegend: false }),
    ];
  });
  const losses = traces.flatMap((trace) => trace.y);
  overSizes(element("loss"), "Loss", record.metric.replace("_", " "), traces, (shape) => {
    shape.yaxis.type = "log";
    plainTicks(shape.yaxis, losses);
  });
}

// A parameterization without a number has its reason in the table.
const told = record.forecasts.filter((forecast) => forecast.predicted !== null && forecast.interval);

function drawForecasts() {
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
  drawLoss();
  drawForecasts();
}

// Before anything is drawn: figures are as wide as the hidden ones leave them.
function hideEmpty() {
  element("regret").hidden = !record.sizes.some((size) => size.regret !== null || size.fails_at_base_optimum);
  element("loss").hidden = !record.sizes.some((size) => size.best_metric !== null);
  element("forecast").hidden = !told.length;
}

if (element("sizes")) {
  element("sizes").hidden = false;
  hideEmpty();
  drawSizes();
  dark.addEventListener("change", drawSizes);
  for (const figure of document.querySelectorAll("#sizes ~ figure.plain")) figure.classList.add("replaced");
}
