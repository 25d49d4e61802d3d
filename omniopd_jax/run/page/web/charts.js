// Curves (uPlot), against steps, tokens or dollars; histograms of agreement; time by phase.

const AXES = [["step", "steps"], ["student_tokens", "student tokens"], ["teacher_tokens", "teacher tokens"], ["usd", "dollars"]];
const CHARTS = [
  ["Accuracy", "share", [["eval/accuracy", "held-out accuracy"], ["reward/mean", "reward"]]],
  ["Agreement", "of n continuations", [["audit/k_sem_mean", "k_sem"], ["audit/n_eff", "n that arrived"]]],
  ["pi_hat: the chunks' target", "", [["audit/pi_hat_mean", "mean"], ["audit/pi_hat_spread", "spread (standard deviation)"], ["audit/pi_bar_mean", "pi_bar, the student's own"]]],
  ["Loss", "", [["loss", "loss"], ["loss/chunks", "chunks"], ["loss/anchor", "anchor"]]],
  ["KL(ref || student)", "nats per token", [["anchor/kl_ref_to_student_exact", "exact KL"]]],
  ["Entropy", "nats", [["entropy", "all tokens"], ["audit/entropy_at_peak", "at the peaks"]]],
  ["Chunks in the middle band", "share", [["audit/midband_fraction", "neither all matched nor all missed"]]],
  ["Audits that count for nothing", "a step", [["audit/dropped", "dropped"], ["audit/short", "with too few continuations"], ["teacher/failed", "failed continuations"]]],
  ["Response length", "tokens", [["completions/mean_length", "mean"], ["completions/max_length", "longest"]]],
  ["Cut and repeated", "share", [["completions/truncated_fraction", "cut at the cap"], ["completions/repeated_fraction", "repeated 4-grams"]]],
  ["Teacher latency", "s", [["teacher/latency_p50", "median"], ["teacher/latency_p95", "95th percentile"]]],
  ["Teacher tokens a step", "tokens", [["teacher/tokens_in", "in"], ["teacher/tokens_out", "out"]]],
  ["Gradient norm", "", [["grad_norm", "gradient norm"]]],
  ["Sampler against training graph", "nats per token", [["rollout/score_logp_gap", "log-prob gap"]]],
];
const DASHES = [[], [6, 4], [2, 3]];
const drawn = [];

const css = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
const colour = (i) => css("--series-" + (i % 6));

/** The options that all charts share. */
function baseOptions(width, xLabel, unit, range) {
  const axis = { stroke: css("--soft"), grid: { stroke: css("--line"), width: 1 }, ticks: { stroke: css("--line") }, font: "11px system-ui, sans-serif" };
  return {
    width, height: 190, legend: { show: false }, padding: [10, 12, 0, 0],
    scales: { x: { time: false }, y: range ? { range } : {} },
    cursor: { sync: { key: "all" }, drag: { x: false, y: false }, points: { size: 6 } },
    axes: [
      { ...axis, label: xLabel, labelSize: 16, labelFont: axis.font, size: 34, values: (_, ticks) => ticks.map((v) => number(v)) },
      { ...axis, size: 52, values: (_, ticks) => ticks.map((v) => number(v)) },
    ],
  };
}

/** A figure that holds a chart: title, what it shows in words, a legend with the values under the cursor. */
function figure(title, unit, summary, series, data, options, atRest) {
  const values = series.map((s) => el("span", { class: "value" }));
  const legend = el("ul", { class: "legend" }, series.map((s, i) =>
    el("li", {}, el("span", { class: "swatch" + (s.dash && s.dash.length ? " dashed" : ""), style: { "--c": s.stroke } }), s.label + " ", values[i])));
  const plot = el("div", { class: "plot", role: "img", "aria-label": title + ". " + summary });
  const node = el("figure", {}, el("figcaption", {}, el("h3", {}, title, unit && el("small", {}, " " + unit))), legend, plot);
  const show = (index) => series.forEach((s, i) => {
    const column = data[i + 1];
    let at = index;
    if (at === null || at === undefined) {
      if (atRest) { values[i].textContent = atRest[i]; return; }
      for (at = column.length - 1; at > 0 && (column[at] === null || column[at] === undefined); at--);
    }
    values[i].textContent = number(column[at]);
  });
  drawn.push({
    plot, node, chart: null, draw(width) {
      if (this.chart) this.chart.destroy();
      const o = options(width);
      o.series = [{}, ...series];
      o.hooks = { setCursor: [(u) => show(u.cursor.idx)] };
      this.chart = new uPlot(o, data, plot);
      show(null);
    },
  });
  return node;
}

function summaryOf(label, column) {
  const known = column.filter((v) => v !== null && v !== undefined);
  if (!known.length) return label + ": no values.";
  const low = known.reduce((a, b) => Math.min(a, b)), high = known.reduce((a, b) => Math.max(a, b));
  return `${label}: first ${number(known[0])}, last ${number(known[known.length - 1])}, between ${number(low)} and ${number(high)}.`;
}

/** One chart of metrics; all runs overlaid. */
function metricChart(runs, title, unit, keys) {
  const tables = [], series = [], words = [];
  runs.forEach((run, r) => {
    const found = keys.filter(([key]) => run.curves.series[key]);
    if (!found.length) return;
    tables.push([axisValues(run), ...found.map(([key]) => run.curves.series[key])]);
    for (const [key, label] of found) {
      const k = keys.findIndex((pair) => pair[0] === key), many = runs.length > 1;
      const name = many ? run.label + ", " + label : label;
      const alone = run.curves.series[key].filter((v) => v !== null).length < 12;
      series.push({ label: name, stroke: colour(many ? r : k), width: 2, dash: many ? DASHES[k % 3] : [], spanGaps: true, points: { show: alone, size: 6 } });
      words.push(summaryOf(name, run.curves.series[key]));
    }
  });
  if (!tables.length) return null;
  const data = uPlot.join(tables);
  const most = data.slice(1).flat().reduce((a, v) => (v !== null && v !== undefined && v > a ? v : a), -Infinity);
  const shares = unit === "share" || most === 0 ? (_, low, high) => [Math.min(0, low), Math.max(high * 1.05, unit === "share" ? 0.05 : 1)] : null;
  return figure(title, unit, words.join(" "), series, data, (w) => baseOptions(w, axisName(), unit, shares));
}

const axisName = () => AXES.find(([key]) => key === State.x)[1];

/** A run's values on the chosen axis, strictly rising: uPlot wants them in order, and a run without a teacher has no dollars. */
function axisValues(run) {
  const values = run.curves.x[State.x] || run.curves.x.step, out = [];
  for (const v of values) out.push(out.length && v <= out[out.length - 1] ? out[out.length - 1] + 1e-9 + Math.abs(out[out.length - 1]) * 1e-12 : v);
  return out;
}

/** Seconds by phase, stacked. */
function phaseChart(run) {
  const names = Object.keys(run.curves.series).filter((k) => k.startsWith("time/") && k !== "time/step");
  if (!names.length) return null;
  const total = (k) => run.curves.series[k].reduce((sum, v) => sum + (v || 0), 0);
  names.sort((a, b) => total(b) - total(a));
  const columns = [], sums = run.curves.x.step.map(() => 0);
  for (const name of names) {
    run.curves.series[name].forEach((v, i) => { sums[i] += v || 0; });
    columns.push(sums.slice());
  }
  const series = names.map((name, i) => ({ label: name.slice(5), stroke: colour(i), fill: colour(i), width: 1, points: { show: false } }));
  const order = names.map((_, i) => names.length - 1 - i); // the highest first, so that lower ones are painted over it
  const words = names.map((n) => `${n.slice(5)}: ${number(total(n))} s in all.`).join(" ");
  return figure("Time by phase", "s a step, stacked", words, order.map((i) => series[i]),
    [axisValues(run), ...order.map((i) => columns[i])], (w) => baseOptions(w, axisName(), "s", (_, low, high) => [0, high * 1.05]));
}

/** Dollars, or calls where nothing was paid, by step. */
function costChart(run) {
  const paid = (run.curves.series["teacher/cost_usd"] || []).some((v) => v > 0);
  const key = paid ? "teacher/cost_usd" : "teacher/calls", column = run.curves.series[key];
  if (!column || !column.some((v) => v > 0)) return null;
  const series = [{ label: paid ? "dollars" : "calls", stroke: colour(0), fill: colour(0), width: 0, paths: uPlot.paths.bars({ size: [0.7, 40] }), points: { show: false } }];
  return figure(paid ? "Cost by step" : "Teacher calls by step", paid ? "dollars" : "requests", summaryOf(key, column), series,
    [axisValues(run), column], (w) => baseOptions(w, axisName(), "", (_, low, high) => [0, high * 1.1 || 1]));
}

/** Two distributions over [0, 1] as stepped areas. */
function histogramChart(title, unit, parts) {
  const bins = parts[0][1].length, x = [...Array(bins + 1)].map((_, i) => i / bins);
  const series = parts.map(([label], i) => ({ label, stroke: colour(i), fill: colour(i) + "33", width: 2, paths: uPlot.paths.stepped({ align: 1 }), points: { show: false } }));
  const data = [x, ...parts.map(([, values]) => [...values, values[values.length - 1]])];
  const words = parts.map(([label, , mean, count]) => `${label}: mean ${number(mean)}, ${count} values.`).join(" ");
  return figure(title, unit, words, series, data, (w) => {
    const o = baseOptions(w, "similarity", unit, (_, low, high) => [0, high * 1.1 || 1]);
    o.scales.x.range = [0, 1];
    delete o.cursor.sync;
    return o;
  }, parts.map(([, , mean]) => "mean " + number(mean)));
}

function agreementCharts(run) {
  const a = run.agreement, out = [];
  if (!a.own_count) return [el("p", {}, "This run has no audits to compare.")];
  const own = ["own prompt", a.own, a.own_mean, a.own_count];
  if (a.chance) {
    out.push(histogramChart("Similarity, and what chance would give", "share of continuations", [own, ["another prompt", a.chance, a.chance_mean, a.chance_count]]));
  } else out.push(histogramChart("Similarity", "share of continuations", [own]));
  const graded = [["right", "right answers"], ["wrong", "wrong answers"]].filter(([key]) => a[key] && a[key + "_count"]);
  if (graded.length) out.push(histogramChart("k_sem / n of right and wrong answers", "share of chunks", graded.map(([key, label]) => [label, a[key], a[key + "_mean"], a[key + "_count"]])));
  return out;
}

/** Draws what is waiting, at the width that its place has; again when the window or the theme changes. */
function drawAll() {
  for (const item of drawn) if (item.node.isConnected && item.plot.clientWidth) item.draw(item.plot.clientWidth);
}
