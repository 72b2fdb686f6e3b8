// Puts the page together, and in a live page asks its server for news.

const POLL_MS = 2000;
const view = { zoom: null, smooth: 0, log: new Set(), search: "", closed: new Set(), left: null, right: null, allSamples: false,
  rollouts: { run: 0, step: null, sample: 0, column: "kl" }, changed: () => showZoom() };
const built = {};
const isLive = JSON.parse(document.getElementById("data").textContent) === null;
const status = el("span", { class: "status", role: "status" });
const zoomed = el("span", { class: "zoomed" });
const links = el("nav", { "aria-label": "sections" });
const heading = el("h1", {}, "ppomax");
const page = el("main");
document.body.append(el("header", {}, el("div", { class: "top" }, heading, status, el("span", { class: "grow" }), toolbar()), links), page,
  el("footer", {}, "Drag over a chart to zoom all of them, double-click to go back. Control and direction characters in texts are spelled out, as in ",
    el("code", {}, "\u202e"), ". This page loads nothing from anywhere."));

function toolbar() {
  const shown = el("output", {}, "off");
  return el("div", { class: "toolbar" }, zoomed,
    el("label", { class: "field" }, "smoothing", el("input", { type: "range", min: 0, max: 0.98, step: 0.02, value: 0, "aria-label": "smoothing",
      oninput: (event) => {
        view.smooth = Number(event.target.value);
        fill(shown, view.smooth ? view.smooth.toFixed(2) : "off");
        redraw();
      } }), shown));
}

function showZoom() {
  fill(zoomed, view.zoom ? button(`steps ${format(Math.round(view.zoom[0]))} to ${format(Math.round(view.zoom[1]))} \u2715`, true, () => setZoom(view, null), "show all steps") : null);
}

/** A section is built again only when what it shows has changed: what a person has opened or chosen stays. */
function section(id, title, shown, build) {
  const text = JSON.stringify(shown);
  if (!built[id]) {
    built[id] = { node: el("section", { id }), text: null };
    page.append(built[id].node);
  }
  if (built[id].text === text) return;
  const content = build();
  const isTyping = document.activeElement?.id === "search" && built[id].node.contains(document.activeElement);
  built[id].text = text;
  built[id].title = title;
  fillWithCharts(built[id].node, content ? [title ? el("h2", {}, title) : null, content].flat() : null);
  if (isTyping) document.getElementById("search")?.focus();
  built[id].isShown = Boolean(content);
}

function render(data, load) {
  const { runs } = data;
  const having = (name) => runs.filter((run) => run[name]);
  const curves = [data.groups, data.overview, runs.map((run) => [run.name, run.curves, run.events])];
  document.title = "ppomax: " + runs.map((run) => flat(run.name)).join(", ");
  section("runs", "", runs.map((run) => [run.name, run.folder, run.stage, run.step, run.num_steps, run.seconds, run.notes, run.num_events, run.events]), () => runCards(runs));
  section("overview", "Overview", curves, () => overview(data, view));
  section("events", "Events", runs.map((run) => run.events), () => eventList(runs));
  section("samples", "Samples", runs.map((run) => [run.name, run.samples]), () => samplePanel(data, view));
  section("rollouts", "Rollouts, token by token", runs.map((run) => [run.name, run.rollouts]), () => rolloutPanel(data, view, load));
  section("rewards", "Rewards over steps", having("histogram").map((run) => [run.name, run.histogram]),
    () => (having("histogram").length ? el("div", { class: "wide" }, having("histogram").map(histogramPanel)) : null));
  section("metrics", "All metrics", curves, () => (data.groups.length ? allMetrics(data, view) : null));
  section("values", runs.length > 1 ? "Final values" : "Values", curves, () => finals(runs));
  section("time", "Time", having("phases").map((run) => [run.name, run.phases]),
    () => (having("phases").length ? el("div", { class: "wide" }, having("phases").map(phasePanel)) : null));
  section("memory", "Memory", having("plan").map((run) => [run.name, run.plan]), () => (having("plan").length ? el("div", { class: "wide" }, having("plan").map(planPanel)) : null));
  section("config", "Configuration", data.config, () => configTable(data));
  section("versions", "Versions", runs.map((run) => run.versions), () => versionTable(runs));
  fill(links, Object.entries(built).filter(([, one]) => one.isShown && one.title).map(([id, one]) => el("a", { href: "#" + id }, one.title.split(",")[0])));
}

async function poll(seen) {
  let version = seen;
  try {
    const response = await fetch("data.json?seen=" + encodeURIComponent(seen), { cache: "no-store" });
    if (response.status === 200) {
      const { data, version: found } = await response.json();
      render(data, fetchRollouts);
      version = found;
    }
    if (response.ok) show("live", "live");
    else show((await response.json()).error, "lost");
  } catch (error) {
    show("no answer: has ppomax watch ended?", "lost");
  }
  setTimeout(() => poll(version), document.hidden ? 5 * POLL_MS : POLL_MS);
}

function show(text, kind) {
  status.className = "status " + kind;
  fill(status, text);
}

const kept = new Map();
async function fetchRollouts(run, step) {
  const key = `${run}/${step}`;
  if (!kept.has(key)) {
    const response = await fetch(`rollouts.json?run=${run}&step=${step}`, { cache: "no-store" });
    const content = await response.json();
    if (!response.ok) throw new Error(content.error);
    kept.set(key, content.rows);
  }
  return kept.get(key);
}

if (isLive) {
  show("connecting", "");
  poll("");
} else {
  const data = JSON.parse(document.getElementById("data").textContent);
  show(`ppomax ${data.version}, ${data.made}`, "");
  render(data, (run, step) => Promise.resolve(data.runs[run].dumps[step]));
}
