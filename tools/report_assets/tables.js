// What is best read as a table: runs, final values, events, configuration, memory, versions.

function table(head, rows, attributes = {}) {
  return el("div", { class: "scroll" }, el("table", attributes,
    el("thead", {}, el("tr", {}, head.map((cell) => el("th", {}, cell)))),
    el("tbody", {}, rows.map((cells) => el("tr", {}, cells.map((cell) =>
      cell instanceof Node && cell.nodeName === "TD" ? cell : el("td", {}, cell)))))));
}

function numeric(value, attributes = {}) {
  return el("td", { class: "number", ...attributes }, value);
}

function swatch(number) {
  return svg("svg", { class: "dot", width: 10, height: 10, "aria-hidden": "true" },
    svg("circle", { cx: 5, cy: 5, r: 4.5, fill: color(number) }));
}

function runCards(runs) {
  return el("div", { class: "runs" }, runs.map((run, number) => {
    const share = run.num_steps ? Math.min(1, run.step / run.num_steps) : null;
    const severe = run.events.filter((event) => severity(event.severity) === "severe").length;
    return el("div", { class: "card run" },
      el("h2", {}, runs.length > 1 ? swatch(number) : null, run.name),
      el("p", { class: "path" }, run.folder),
      share === null ? null : el("progress", { max: 1, value: share, "aria-label": "steps done" }),
      el("div", { class: "facts" },
        fact("stage", run.stage || "\u2013"), fact("step", format(run.step) + (run.num_steps ? ` of ${format(run.num_steps)}` : "")),
        fact("time", duration(run.seconds)),
        fact("events", run.num_events ? `${run.num_events}${severe ? `, ${severe} severe` : ""}` : "none",
          severe ? "severe" : run.num_events ? "warning" : "")),
      run.notes.length ? el("ul", { class: "notes" }, run.notes.map((note) => el("li", {}, note))) : null);
  }));
}

function fact(name, value, kind = "") {
  return el("div", { class: "fact " + kind }, el("span", {}, name), el("b", {}, value));
}

/** One run: first and last values with the extremes. Several: the last value of each. */
function finals(runs) {
  const stage = (run) => ({ ...run.curves[run.stage], ...run.curves.timing });
  const names = [...new Set(runs.flatMap((run) => Object.keys(stage(run))))];
  if (!names.length) return null;
  if (runs.length > 1)
    return table(["last value", ...runs.map((run) => run.name)],
      names.map((name) => [name, ...runs.map((run) => numeric(stage(run)[name] ? format(stage(run)[name].last, 5) : "\u2013"))]),
      { class: "finals" });
  const curves = stage(runs[0]);
  return table(["metric", "first", "last", "lowest", "at step", "highest", "at step"], names.map((name) => {
    const curve = curves[name];
    const low = extreme(curve, curve.lo || curve.y, (a, b) => a < b), high = extreme(curve, curve.hi || curve.y, (a, b) => a > b);
    return [name, numeric(format(curve.y.find((y) => y !== null), 5)), numeric(format(curve.last, 5)),
      numeric(format(low.y, 5)), numeric(format(low.x)), numeric(format(high.y, 5)), numeric(format(high.x))];
  }), { class: "finals" });
}

function extreme(curve, ys, isBetter) {
  let best = { x: null, y: null };
  ys.forEach((y, i) => { if (y !== null && (best.y === null || isBetter(y, best.y))) best = { x: curve.x[i], y }; });
  return best;
}

function eventList(runs) {
  const all = runs.flatMap((run, number) => run.events.map((event) => ({ ...event, run, number })));
  if (!all.length) return null;
  all.sort((a, b) => a.step - b.step);
  return el("div", { class: "events" }, all.map((event) => el("details", { class: "card happened " + severity(event.severity) },
    el("summary", {}, runs.length > 1 ? swatch(event.number) : null, el("b", {}, `step ${event.step}`), " ",
      el("span", { class: "pill" }, event.severity || "event"), " ", el("b", {}, event.detector), " ",
      el("span", {}, event.message), event.action ? el("span", { class: "pill" }, event.action) : null),
    event.evidence.length ? table(["evidence", ""], event.evidence.map(([key, value]) => [key, el("td", { class: "said" }, value)])) : null,
    event.samples.map((sample) => el("div", { class: "said sample" },
      sample.map(([key, value]) => el("div", {}, key ? el("b", {}, key + " ") : null, value)))))));
}

function configTable(data) {
  const { rows, bases } = data.config;
  if (!rows.length) return el("p", { class: "muted" }, `No field differs from ${bases.join(", ")}.`);
  const sameBase = rows.every((row) => new Set(row.base).size < 2);
  const head = ["field", ...(sameBase ? [bases[0]] : bases.map((base, n) => `${data.runs[n].name}: ${base}`)),
    ...data.runs.map((run) => run.name)];
  return table(head, rows.map((row) => [
    el("td", { class: row.differs ? "setting differs" : "setting" }, row.key),
    ...(sameBase ? [row.base[0]] : row.base).map((value) => el("td", { class: "code muted" }, value)),
    ...row.values.map((value, n) => el("td", { class: row.changed[n] ? "code changed" : "code" }, value))]), { class: "config" });
}

function planPanel(run) {
  const { plan } = run;
  const kinds = [...new Set(Object.values(plan.phases).flatMap((phase) => Object.keys(phase)))]
    .filter((kind) => Object.values(plan.phases).some((phase) => phase[kind] > 0));
  const total = (phase) => kinds.reduce((sum, kind) => sum + (phase[kind] || 0), 0);
  const largest = Math.max(plan.capacity || 0, ...Object.values(plan.phases).map(total)) || 1;
  return el("div", { class: "card" },
    el("h3", {}, run.name),
    el("p", { class: "muted" }, `Planned memory of rank ${plan.fullest}, by phase` + (plan.capacity ? `; the GPU has ${bytes(plan.capacity)}` : "")),
    el("div", { class: "bars" }, Object.entries(plan.phases).map(([name, phase]) => el("div", { class: "bar" },
      el("span", {}, name),
      svg("svg", { viewBox: "0 0 1000 16", preserveAspectRatio: "none", "aria-hidden": "true" }, stacked(kinds.map((kind) => phase[kind] || 0), largest)),
      el("b", {}, bytes(total(phase)))))),
    el("div", { class: "legend" }, kinds.map((kind, n) => el("span", {}, swatch(n), kind))),
    table(["rank", "planned", "measured", "of plan"], plan.ranks.map(([rank, planned, measured]) => [
      String(rank), numeric(bytes(planned)), numeric(bytes(measured)), numeric(measured && planned ? Math.round((100 * measured) / planned) + " %" : "\u2013")])),
    plan.ranks.length < plan.num_ranks ? el("p", { class: "muted" }, `The first ${plan.ranks.length} of ${plan.num_ranks} ranks.`) : null,
    el("p", { class: "muted" }, plan.what ? `Measured: ${plan.what}.` : ""));
}

function stacked(values, whole) {
  let x = 0;
  return values.map((value, n) => {
    const width = (1000 * value) / whole;
    x += width;
    return svg("rect", { x: x - width, y: 0, width, height: 16, fill: color(n) });
  });
}

function versionTable(runs) {
  const names = [...new Set(runs.flatMap((run) => Object.keys(run.versions)))];
  if (!names.length) return null;
  return table(["", ...runs.map((run) => run.name)], names.map((name) => [name, ...runs.map((run) => el("td", { class: "code" }, run.versions[name] || "\u2013"))]));
}
