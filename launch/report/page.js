// The curves of a study's page. They read the record, which the page holds as JSON, and draw with plotly, which stands
// before. Without scripts the page still shows every table and figure.
"use strict";

const record = JSON.parse(document.getElementById("record").textContent);
const dark = matchMedia("(prefers-color-scheme: dark)");
const SIZE_COLOURS = {
  light: ["#3b0f70", "#21618c", "#0b6e4f", "#8a4b00", "#b0213f", "#5d5d00", "#6a1b9a", "#37474f"],
  dark: ["#c9a6ff", "#7ec8ff", "#6fdcb0", "#ffb866", "#ff8fa3", "#e0e070", "#e0a0f0", "#b8c4cc"],
};
const DASHES = ["solid", "dash", "dot", "dashdot"]; // colour is not the only difference
const SYMBOLS = ["circle", "square", "diamond", "triangle-up", "star", "pentagon", "hexagon", "triangle-down"];

const element = (id) => document.getElementById(id);
const chosen = (name) => document.querySelector(`input[name="${name}"]:checked`)?.value;
// '32 x 3', and '32 x 3, batch 256' where that is not the base's.
const OTHER_AXES = { num_experts: "experts", batch: "batch", samples: "samples" };
const nameOf = (size) =>
  `${size.width} x ${size.depth}` +
  Object.entries(OTHER_AXES)
    .map(([axis, name]) => (size[axis] && size[axis] !== record.base[axis] ? `, ${name} ${size[axis]}` : ""))
    .join("");
const octavesOf = (value) => (record.octaves_of.startsWith("1 - ") ? 1 - value : value); // momentum: of 1 - momentum
const axisName = record.octaves_of.startsWith("1 - ") ? record.octaves_of : record.hyperparameter;
const valueText = (value) => `${value.toPrecision(4)} (${axisName === record.hyperparameter ? "" : "1 - "}2^${Math.log2(octavesOf(value)).toFixed(2)})`;
const number = (value) => (value === null ? "diverged" : Number(value).toPrecision(4));
const result = (run) => run.failed ?? number(run.metric);
const isBase = (size) => Object.entries(record.base).every(([axis, value]) => size[axis] === value);
const unique = (values) => [...new Set(values)];
const sizes = unique(record.runs.map(nameOf));

function style(size) {
  const colours = SIZE_COLOURS[dark.matches ? "dark" : "light"];
  const at = sizes.indexOf(size);
  return { colour: colours[at % colours.length], dash: DASHES[at % DASHES.length], symbol: SYMBOLS[at % SYMBOLS.length] };
}

function layout(title, x, y, logarithmicX) {
  const grid = dark.matches ? "#444" : "#ddd";
  const axis = { gridcolor: grid, zerolinecolor: grid, automargin: true };
  return {
    title: { text: title, font: { size: 15 } },
    height: 380,
    margin: { l: 55, r: 10, t: 45, b: 45 },
    paper_bgcolor: "rgba(0,0,0,0)",
    plot_bgcolor: "rgba(0,0,0,0)",
    font: { color: dark.matches ? "#e6e6e6" : "#222", family: "system-ui, sans-serif" },
    hovermode: "closest",
    legend: { orientation: "h", y: -0.25 },
    xaxis: { ...axis, title: { text: x, standoff: 8 }, type: logarithmicX ? "log" : "linear", exponentformat: "power" },
    yaxis: { ...axis, title: { text: y }, type: "log", exponentformat: "none" },
  };
}

const options = { responsive: true, displayModeBar: false }; // a double click on a figure undoes a zoom

// 0.1, 0.2, 0.5, 1, ...: plotly's own labels of a short logarithmic axis are single digits. Fewer than two: plotly's.
function plainTicks(axis, losses) {
  const [low, high] = [Math.min(...losses), Math.max(...losses)];
  const decades = [...Array(40).keys()].map((i) => i - 20);
  const marks = (digits) =>
    decades.flatMap((decade) => digits.map((digit) => Number(`${digit}e${decade}`))).filter((mark) => mark >= low && mark <= high);
  const coarse = marks([1, 2, 5]);
  const inside = coarse.length > 2 ? coarse : marks([1, 1.5, 2, 3, 4, 5, 6, 8]);
  if (inside.length > 1) Object.assign(axis, { tickvals: inside, ticktext: inside.map(String) });
}

// 2^-9, 2^-7, ...: octaves are what a study counts in.
function octaveTicks(axis, values) {
  const [low, high] = [Math.ceil(Math.log2(Math.min(...values))), Math.floor(Math.log2(Math.max(...values)))];
  const step = Math.max(1, Math.ceil((high - low) / 7));
  const powers = [...Array(Math.max(high - low + 1, 0)).keys()].filter((i) => i % step === 0).map((i) => low + i);
  if (powers.length > 1) {
    Object.assign(axis, { tickvals: powers.map((power) => 2 ** power), ticktext: powers.map((power) => `2<sup>${power}</sup>`) });
  }
}

// The range of a logarithmic axis that shows the values with room beside them, and a single one in the middle.
function reach(values) {
  const [low, high] = [Math.min(...values), Math.max(...values)].map(Math.log10);
  const room = Math.max(0.05 * (high - low), 0.15);
  return [low - room, high + room];
}

function hoverText(run) {
  const lines = [`run ${run.folder}`, `${nameOf(run)}, seed ${run.seed}`];
  lines.push(`${record.hyperparameter} ${valueText(run.value)}`, `${record.metric} ${result(run)}`);
  if (run.wandb) lines.push(run.wandb);
  return lines.join("<br>");
}

// Of a point that is a mean: each run in a line of its own, and no more lines than fit beside the point.
const MOST_RUNS = 6;
function meanText(group, loss) {
  const [run] = group;
  const lines = [`${nameOf(run)}, ${record.hyperparameter} ${valueText(run.value)}`];
  if (group.length > 1) lines.push(`mean of ${group.length} seeds: ${record.metric} ${number(loss)}`);
  for (const each of group.slice(0, MOST_RUNS)) {
    lines.push(`seed ${each.seed}: ${result(each)}, run ${each.folder}`);
    if (each.wandb) lines.push(each.wandb);
  }
  if (group.length > MOST_RUNS) lines.push(`and ${group.length - MOST_RUNS} more: show every seed`);
  return lines.join("<br>");
}

// One point per value: the geometric mean over seeds, none where a seed diverged or ended early.
function means(runs, position) {
  const byValue = new Map();
  for (const run of runs) byValue.set(run.value, [...(byValue.get(run.value) ?? []), run]);
  return [...byValue.values()]
    .filter((group) => group.every((run) => run.metric !== null))
    .map((group) => {
      const loss = Math.exp(group.reduce((sum, run) => sum + Math.log(run.metric), 0) / group.length);
      return { x: position(group[0]), y: loss, run: group[0], text: meanText(group, loss) };
    })
    .sort((one, other) => one.x - other.x);
}

// The fitted optima of a parameterization's sizes. `factor`: of a size, from its value to its effective value.
function optima(parameterization, factor) {
  const shapes = { low: "triangle-left", high: "triangle-right" };
  const own = record.sizes.filter((size) => size.parameterization === parameterization);
  return own
    .filter((size) => size.optimum_log2 !== null && size.best_metric !== null)
    .map((size) => {
      const { colour, symbol } = style(nameOf(size));
      const edge = size.censored ? `<br>censored: on the ${size.censored} edge of what was run` : "";
      return {
        x: [2 ** size.optimum_log2 * factor(size)],
        y: [size.best_metric],
        text: [`${nameOf(size)}, fitted optimum 2^${size.optimum_log2.toFixed(2)}${edge}`],
        hoverinfo: "text",
        mode: "markers",
        showlegend: false,
        legendgroup: nameOf(size),
        marker: {
          color: colour,
          symbol: shapes[size.censored] ?? symbol,
          size: 12,
          line: { color: dark.matches ? "#fff" : "#000", width: 2 },
        },
      };
    });
}

// A dotted line at the base's optimum. On the axis of effective rates each size has its own.
function carriedLine(parameterization) {
  const base = record.sizes.find((size) => size.parameterization === parameterization && isBase(size));
  if (!base || base.optimum_log2 === null) return [];
  const at = 2 ** base.optimum_log2;
  const line = { color: dark.matches ? "#ccc" : "#444", width: 1.5, dash: "dot" };
  return [{ type: "line", xref: "x", yref: "paper", x0: at, x1: at, y0: 0, y1: 1, line, layer: "below" }];
}

function drawCurves() {
  const effective = chosen("axis") === "effective";
  const position = (run) => (effective ? run.effective_value : octavesOf(run.value));
  const finite = record.runs.map((run) => run.metric).filter((metric) => metric !== null);
  const margin = Math.max((Math.max(...finite) / Math.min(...finite)) ** 0.06, 1.05);
  const top = Math.max(...finite) * margin; // where runs are shown that diverged or ended early
  const bottom = Math.min(...finite) / margin;
  for (const panel of document.querySelectorAll("[data-parameterization]")) {
    const own = record.runs.filter((run) => run.parameterization === panel.dataset.parameterization);
    const traces = [];
    for (const size of sizes) {
      const runs = own.filter((run) => nameOf(run) === size);
      const { colour, dash, symbol } = style(size);
      const single = runs.map((run) => ({ x: position(run), y: run.metric ?? top, run, text: hoverText(run) }));
      const lost = single.filter((point) => point.run.metric === null);
      const kept = single.filter((point) => point.run.metric !== null);
      const shown = chosen("shown") === "mean" ? means(runs, position) : kept;
      const trace = (points, rest) => ({
        x: points.map((point) => point.x),
        y: points.map((point) => point.y),
        text: points.map((point) => point.text),
        customdata: points.map((point) => point.run.folder),
        hoverinfo: "text",
        name: size,
        legendgroup: size,
        ...rest,
      });
      const mode = chosen("shown") === "mean" ? "lines+markers" : "markers";
      traces.push(trace(shown, { mode, line: { color: colour, dash }, marker: { color: colour, symbol, size: 8 } }));
      if (lost.length) {
        traces.push(trace(lost, { mode: "markers", showlegend: false, marker: { color: colour, symbol: "x", size: 9 } }));
      }
    }
    const factor = (size) => {
      const run = own.find((each) => nameOf(each) === nameOf(size));
      return effective && run ? run.effective_value / run.value : 1;
    };
    traces.push(...optima(panel.dataset.parameterization, factor));
    const x = effective ? "effective learning rate" : axisName;
    const shape = layout(panel.dataset.parameterization, x, record.metric.replace("_", " "), true);
    shape.legend.title = { text: "width x depth ", font: { size: 12 } };
    shape.shapes = effective ? [] : carriedLine(panel.dataset.parameterization);
    shape.yaxis.range = [Math.log10(bottom), Math.log10(top * margin)];
    plainTicks(shape.yaxis, finite);
    octaveTicks(shape.xaxis, own.map(position));
    shape.xaxis.range = reach(own.map(position));
    Plotly.react(panel, traces, shape, options);
    panel.removeAllListeners("plotly_click");
    panel.on("plotly_click", (event) => {
      showRun(event.points[0].customdata, panel.dataset.parameterization);
      remember();
    });
  }
}

// The training curve of a run, with those of all runs of its size and parameterization behind it.
function showRun(folder, parameterization) {
  const run = record.runs.find((each) => each.folder === folder && each.parameterization === parameterization);
  if (!run) return;
  element("run").value = String(record.runs.indexOf(run));
  const beside = record.runs.filter(
    (each) => each.parameterization === parameterization && nameOf(each) === nameOf(run) && each !== run,
  );
  const trace = (each, line) => ({
    x: record.training_curves[each.folder]?.steps ?? [],
    y: record.training_curves[each.folder]?.loss ?? [],
    text: hoverText(each),
    hoverinfo: "text+y",
    mode: "lines",
    showlegend: false,
    line,
  });
  const behind = { color: dark.matches ? "#777" : "#aaa", width: 1 };
  const traces = beside.map((each) => trace(each, behind));
  traces.push(trace(run, { color: style(nameOf(run)).colour, width: 3 }));
  const shape = layout(`${parameterization}, ${nameOf(run)}`, "step", "training loss", false);
  plainTicks(shape.yaxis, traces.flatMap((each) => each.y).filter((loss) => loss > 0));
  Plotly.react(element("training"), traces, shape, options);
  const said = element("said");
  said.textContent = `${record.metric} ${result(run)}, ${record.hyperparameter} ${valueText(run.value)}, seed ${run.seed}. Folder: `;
  addLink(said, `runs/${run.folder}/`, run.folder);
  if (run.wandb) {
    said.append(", W&B: ");
    addLink(said, run.wandb, "its page");
  }
  if (!record.training_curves[run.folder]) said.append(". It has no training curve here.");
}

// What is chosen stands behind the # of the address: a page that loads itself again, or a link to it, shows the same.
function remember() {
  const run = record.runs[Number(element("run").value)];
  const state = { axis: chosen("axis") ?? "value", shown: chosen("shown"), run: run.folder, of: run.parameterization };
  history.replaceState(null, "", `#${new URLSearchParams(state)}`);
}

function recall() {
  const state = new URLSearchParams(location.hash.slice(1));
  for (const name of ["axis", "shown"]) {
    const input = document.querySelector(`input[name="${name}"][value="${state.get(name)}"]`);
    if (input) input.checked = true;
  }
  return record.runs.find((run) => run.folder === state.get("run") && run.parameterization === state.get("of"));
}

function addLink(parent, address, text) {
  const link = document.createElement("a");
  link.href = address;
  link.textContent = text;
  parent.append(link);
}

function fillRuns() {
  const select = element("run");
  record.runs.forEach((run, index) => {
    const text = `${run.parameterization}, ${nameOf(run)}, ${valueText(run.value)}, seed ${run.seed}: ${result(run)}`;
    select.add(new Option(text, String(index)));
  });
  select.addEventListener("change", () => {
    const run = record.runs[Number(select.value)];
    showRun(run.folder, run.parameterization);
    remember();
  });
}

if (record.runs.some((run) => run.metric !== null)) {
  element("interactive").hidden = false;
  fillRuns();
  const best = record.runs.reduce((one, other) => ((other.metric ?? Infinity) < (one.metric ?? Infinity) ? other : one));
  const run = recall() ?? best;
  drawCurves();
  showRun(run.folder, run.parameterization);
  for (const input of document.querySelectorAll("#interactive input")) {
    input.addEventListener("change", () => {
      drawCurves();
      remember();
    });
  }
  document.querySelector("figure.plain")?.classList.add("replaced"); // the curves; paper still has them
  dark.addEventListener("change", () => {
    drawCurves();
    element("run").dispatchEvent(new Event("change"));
  });
}
