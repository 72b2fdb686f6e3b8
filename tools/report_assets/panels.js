// Groups of charts, reward histograms, time by phase, and samples side by side.

const DASHES = [null, "5 3", "2 2", "9 3 2 3", "1 3"];
const TONES = [0, 2, 3, 4, 5, 6, 7];

/** Lines of one chart: each run's stage and held-out evaluations, each metric of the chart. */
function linesOf(data, metrics) {
  const isOne = data.runs.length === 1;
  const lines = [];
  data.runs.forEach((run, number) => {
    metrics.forEach((metric, m) => {
      for (const [kind, curves] of Object.entries(run.curves)) {
        const curve = curves[metric];
        if (!curve) continue;
        const isHeldOut = kind === "evaluation";
        const name = metrics.length === 1 ? (isOne && isHeldOut ? null : isOne ? metric : null) : brief(metric, metrics);
        const label = [isOne ? null : run.name, name, isHeldOut ? "held out" : null].filter(Boolean).join(", ");
        const tone = isOne ? (isHeldOut ? 1 : TONES[m % TONES.length]) : number;
        const dash = DASHES[isOne ? Number(metric.startsWith("ref_")) : m % DASHES.length];
        lines.push({ label, curve, color: color(tone), dash, dots: isHeldOut });
      }
    });
  });
  return lines;
}

/** What tells a metric from the others of its chart: p10 of reward_p10 beside reward_p90. */
function brief(metric, metrics) {
  const base = metric.slice(0, metric.lastIndexOf("_") + 1);
  return base && metrics.every((one) => one.startsWith(base)) ? metric.slice(base.length) : metric;
}

function eventMarks(data) {
  return data.runs.flatMap((run) => run.events.map(({ step, severity: kind, detector, message }) =>
    ({ step, severity: kind, text: `${detector}: ${message}` })));
}

function grid(data, list, view) {
  const events = eventMarks(data);
  return el("div", { class: "grid" }, list.map(({ title, unit, metrics }) =>
    chart({ title, unit, lines: linesOf(data, metrics), events, view })));
}

function overview(data, view) {
  const every = data.groups.flatMap((group) => group.charts);
  const named = data.overview.map((name) => every.find((one) => one.title === name)).filter(Boolean);
  return named.length ? grid(data, named, view) : null;
}

/** All metrics, by group; a search box leaves those whose name contains its text. */
function allMetrics(data, view) {
  const body = el("div");
  const show = () => {
    const groups = data.groups
      .map((group) => ({ ...group, charts: group.charts.filter((one) => one.title.includes(view.search)) }))
      .filter((group) => group.charts.length);
    fillWithCharts(body, groups.map((group) => el("details", { class: "group", open: view.search !== "" || !view.closed.has(group.title),
      ontoggle: (event) => { if (!view.search) view.closed[event.target.open ? "delete" : "add"](group.title); } },
      el("summary", {}, group.title, el("small", {}, ` ${group.charts.length}`)), grid(data, group.charts, view))));
    if (!groups.length) fillWithCharts(body, el("p", { class: "muted" }, "No metric has this text in its name."));
  };
  show();
  const search = el("input", { id: "search", type: "search", placeholder: "find a metric", "aria-label": "find a metric", value: view.search,
    oninput: (event) => { view.search = event.target.value.trim(); show(); } });
  return [search, body];
}

/** Rewards over steps: a column per step or stretch of steps, the darker the more responses have this reward. */
function histogramPanel(run) {
  const { columns, edges, source } = run.histogram;
  const width = 1000, height = 220, cell = width / columns.length, bin = height / (edges.length - 1);
  const note = el("p", { class: "muted hint" }, "Point at a cell for its numbers.");
  const body = svg("svg", { viewBox: `0 0 ${width} ${height}`, preserveAspectRatio: "none", class: "heat", role: "img",
    "aria-label": "histograms of rewards over steps" });
  columns.forEach((column, c) => {
    const most = Math.max(...column.counts), sum = column.counts.reduce((a, b) => a + b, 0);
    column.counts.forEach((count, b) => {
      if (!count) return;
      body.append(svg("rect", { x: c * cell, y: height - (b + 1) * bin, width: cell + 0.3, height: bin + 0.3, fill: color(0),
        "fill-opacity": (0.08 + 0.92 * (count / most)).toFixed(3), onpointerenter: () => fill(note,
          `${steps(column)}: reward ${format(edges[b], 3)} to ${format(edges[b + 1], 3)}, ${Math.round((1000 * count) / sum) / 10} % of ${format(Math.round(sum))} responses`) }));
    });
  });
  return el("figure", { class: "card" }, el("figcaption", {}, el("span", { class: "name" }, run.name), el("span", { class: "unit" }, source)),
    el("div", { class: "heatbox" },
      el("div", { class: "scale" }, el("span", {}, format(edges[edges.length - 1], 3)), el("span", {}, format(edges[0], 3))), body),
    el("div", { class: "ends" }, el("span", {}, steps(columns[0])), el("span", {}, steps(columns[columns.length - 1]))), note);
}

function steps({ from, to }) {
  return from === to ? `step ${format(from)}` : `steps ${format(from)} to ${format(to)}`;
}

/** Seconds per step, stacked by phase, and the shares of the whole run. */
function phasePanel(run) {
  const { names, totals, bars } = run.phases;
  const sum = totals.reduce((a, b) => a + b, 0) || 1;
  const height = 160, width = 1000, step = width / bars.length;
  const most = Math.max(...bars.map((bar) => bar.means.reduce((a, b) => a + b, 0))) || 1;
  const body = svg("svg", { viewBox: `0 0 ${width} ${height}`, preserveAspectRatio: "none", class: "heat", role: "img", "aria-label": "seconds per step by phase" });
  const note = el("p", { class: "muted hint" }, "Point at a bar for its numbers.");
  bars.forEach((bar, b) => {
    let y = height;
    const text = `${steps(bar)}: ` + names.map((name, n) => `${name} ${format(bar.means[n], 3)} s`).join(", ");
    bar.means.forEach((mean, n) => {
      const size = (mean / most) * height;
      y -= size;
      body.append(svg("rect", { x: b * step, y, width: Math.max(step - (step > 4 ? 1 : -0.3), 0.5), height: size, fill: color(n), onpointerenter: () => fill(note, text) }));
    });
  });
  return el("figure", { class: "card" }, el("figcaption", {}, el("span", { class: "name" }, run.name), el("span", { class: "unit" }, `seconds per step, up to ${format(most, 3)}`)),
    body, el("div", { class: "ends" }, el("span", {}, steps(bars[0])), el("span", {}, steps(bars[bars.length - 1]))),
    table(["phase", "share", "total", "per step"], names.map((name, n) => [
      el("td", {}, swatch(n), name), numeric(((100 * totals[n]) / sum).toFixed(1) + " %"), numeric(duration(totals[n])),
      numeric(format(totals[n] / run.phases.num_steps, 3) + " s")])), note);
}

/** Responses to the same prompts in two evaluations: by default the first and the last. */
function samplePanel(data, view) {
  const every = data.runs.flatMap((run, r) => Object.keys(run.samples).map((step) => ({ id: `${r}/${step}`, run, step: Number(step),
    label: (data.runs.length > 1 ? run.name + ", " : "") + (run.stage === "evaluation" ? "samples" : `step ${step}`), rows: run.samples[step] })));
  if (!every.length) return null;
  const find = (id, other) => every.find((one) => one.id === id) || other;
  const body = el("div");
  const show = () => {
    const left = find(view.left, every[0]), right = find(view.right, every[every.length - 1]);
    const options = every.map((one) => [one.id, one.label]);
    const pairs = left.rows.map((row, i) => [row, partner(row, i, left.rows, right.rows)]);
    fill(body,
      el("div", { class: "controls" }, select("left", options, left.id, (id) => { view.left = id; show(); }),
        select("right", options, right.id, (id) => { view.right = id; show(); }),
        el("span", { class: "muted" }, `${pairs.length} held-out prompts`)),
      pairs.slice(0, view.allSamples ? undefined : 5).map(([before, after]) => el("article", { class: "card pair" },
        el("div", { class: "said prompt" }, before.prompt.map((turn) => el("div", {}, turn.role ? el("b", {}, turn.role + ": ") : null, turn.text))),
        el("div", { class: "sides" }, side(before, left.label), after ? side(after, right.label) : el("p", { class: "muted" }, "This prompt is not in the other evaluation.")))),
      pairs.length > 5 && !view.allSamples ? button(`show all ${pairs.length}`, false, () => { view.allSamples = true; show(); }) : null);
  };
  show();
  return body;
}

/** The same prompt in the other evaluation; of equal prompts the one at the same place among them. */
function partner(row, index, rows, others) {
  const key = JSON.stringify(row.prompt);
  const rank = rows.slice(0, index).filter((one) => JSON.stringify(one.prompt) === key).length;
  return others.filter((one) => JSON.stringify(one.prompt) === key)[rank];
}

function side(row, label) {
  return el("div", { class: "side" }, el("div", { class: "muted" }, label, " ", el("b", { class: "reward" }, `reward ${format(row.reward, 3)}`),
    row.finished === false ? el("span", { class: "pill" }, "not finished") : null), el("div", { class: "said" }, row.response));
}
