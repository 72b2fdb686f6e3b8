// The rollout browser: a response token by token, coloured by one of its numbers.

const COLUMNS = {
  kl: { label: "KL", unit: "nats", about: "log-prob of the policy less that of the reference, as ppo.kl_estimator has it" },
  advantages: { label: "advantage", unit: "", about: "GAE: above 0 the token is made more likely" },
  values: { label: "value", unit: "", about: "what the critic expected here; the colour is the distance from the mean" },
  token_rewards: { label: "reward", unit: "", about: "KL penalty, and the scaled score at the last token" },
  logprobs: { label: "log-prob", unit: "nats", about: "of the policy that sampled" },
  ref_logprobs: { label: "ref log-prob", unit: "nats", about: "of the reference" },
};
const COLOURED = ["kl", "advantages", "values", "token_rewards"];

/** load(run number, step): a promise of the rows. */
function rolloutPanel(data, view, load) {
  const withRollouts = data.runs.map((run, number) => [number, run]).filter(([, run]) => run.rollouts.length);
  if (!withRollouts.length) return null;
  const body = el("div", { class: "browser" });
  const state = view.rollouts;
  const show = async () => {
    if (!withRollouts.some(([number]) => number === state.run)) state.run = withRollouts[0][0];
    const { rollouts } = data.runs[state.run];
    const step = rollouts.includes(state.step) ? state.step : rollouts[rollouts.length - 1];
    const rows = await load(state.run, step).catch((error) => String(error));
    if (typeof rows === "string") { fill(body, controls(step), el("p", { class: "muted" }, rows)); return; }
    const row = rows[Math.min(state.sample, rows.length - 1)];
    const scale = scaleOf(rows, state.column);
    fill(body, controls(step), key(scale, state.column), el("div", { class: "split" }, sampleList(rows, row), response(row, scale, state.column)));
  };
  const set = (change) => { Object.assign(state, change); show(); };
  const controls = (step) => el("div", { class: "controls" },
    withRollouts.length > 1 ? select("run", withRollouts.map(([number, run]) => [number, run.name]), state.run, (number) => set({ run: Number(number), step: null })) : null,
    select("step", data.runs[state.run].rollouts.map((one) => [one, format(one)]), step, (one) => set({ step: Number(one) })),
    el("span", { class: "buttons", role: "group", "aria-label": "colour by" }, COLOURED.map((name) =>
      button(COLUMNS[name].label, name === state.column, () => set({ column: name }), COLUMNS[name].about))));
  const sampleList = (rows, chosen) => {
    const scores = rows.map((row) => row.score).filter((score) => score !== null);
    const low = Math.min(...scores), high = Math.max(...scores);
    return el("div", { class: "list", role: "listbox", "aria-label": "responses" }, rows.map((row, number) => {
      const length = high > low && row.score !== null ? (row.score - low) / (high - low) : 0.5;
      return el("button", { type: "button", role: "option", "aria-selected": String(row === chosen), onclick: () => set({ sample: number }) },
        el("b", {}, format(row.score, 3)), el("small", {}, `${row.pieces.length} tokens${row.finished ? "" : ", cut"}`),
        svg("svg", { viewBox: "0 0 100 4", preserveAspectRatio: "none", "aria-hidden": "true" }, svg("rect", { width: 2 + 98 * length, height: 4, fill: color(0) })));
    }));
  };
  show();
  return body;
}

/** Center and reach of the colours: the 98th percentile of the distance from the center over all rows shown. */
function scaleOf(rows, column) {
  const values = rows.flatMap((row) => row[column]).filter((value) => value !== null);
  const center = column === "values" && values.length ? values.reduce((a, b) => a + b, 0) / values.length : 0;
  const far = values.map((value) => Math.abs(value - center)).sort((a, b) => a - b);
  return { center, reach: far[Math.floor(0.98 * (far.length - 1))] || 1e-6 };
}

/** Orange above the center, blue below, the fuller the farther. */
function shade(value, scale) {
  if (value === null) return "transparent";
  const share = Math.max(-1, Math.min(1, (value - scale.center) / scale.reach));
  return `rgb(var(--${share < 0 ? "below" : "above"}) / ${(0.85 * Math.abs(share)).toFixed(3)})`;
}

function key(scale, column) {
  const { label, unit, about } = COLUMNS[column];
  const at = (share) => scale.center + share * scale.reach;
  const boxes = [-1, -0.75, -0.5, -0.25, 0, 0.25, 0.5, 0.75, 1].map((share) => {
    const box = el("i");
    box.style.background = shade(at(share), scale);
    return box;
  });
  return el("div", { class: "key" }, el("b", {}, label), el("span", {}, format(at(-1), 3)), el("span", { class: "ramp" }, boxes),
    el("span", {}, format(at(1), 3) + (unit ? " " + unit : "")), el("span", { class: "muted" }, about));
}

function response(row, scale, column) {
  const tip = el("div", { class: "tip", hidden: true });
  const tokens = row.pieces.map((piece, t) => {
    const token = el("span", { class: piece === "" ? "token part" : "token", "data-token": t }, piece === "" ? "\u00b7" : shownPiece(piece));
    token.style.background = shade(row[column][t], scale);
    return token;
  });
  const text = el("div", { class: "said tokens" }, tokens);
  const strip = stripOf(row, scale, column);
  const point = (t, target) => {
    for (const old of text.querySelectorAll(".here")) old.classList.remove("here");
    tip.hidden = t === null;
    strip.mark(t);
    if (t === null) return;
    tokens[t].classList.add("here");
    fill(tip, el("div", {}, el("b", { class: "said" }, row.pieces[t] === "" ? "part of the next character" : row.pieces[t]),
      el("small", {}, ` token ${t + 1} of ${row.pieces.length}, id ${row.tokens[t]}`)),
      Object.entries(COLUMNS).map(([name, { label }]) => el("div", { class: name === column ? "row chosen" : "row" }, label, el("b", {}, format(row[name][t])))));
    const box = target.getBoundingClientRect(), home = panel.getBoundingClientRect();
    tip.style.left = Math.max(0, Math.min(box.left - home.left, home.width - tip.offsetWidth - 4)) + "px";
    tip.style.top = box.bottom - home.top + 6 + "px";
  };
  text.addEventListener("pointerover", (event) => {
    const target = event.target.closest(".token");
    if (target) point(Number(target.dataset.token), target);
  });
  text.addEventListener("pointerleave", () => point(null));
  strip.addEventListener("pointermove", (event) => {
    const t = Math.min(tokens.length - 1, Math.max(0, Math.floor((event.offsetX / strip.clientWidth) * tokens.length)));
    point(t, strip);
  });
  strip.addEventListener("pointerleave", () => point(null));
  const panel = el("div", { class: "reading" }, el("div", { class: "said prompt" }, row.prompt), text,
    el("div", { class: "muted" }, `score ${format(row.score)}, ${row.pieces.length} tokens, ` + (row.finished ? "ended by EOS" : "cut: no EOS")), strip, tip);
  return panel;
}

/** Line breaks are shown and still break the line. */
function shownPiece(piece) {
  return piece.replaceAll("\n", "\u21b5\n").replaceAll("\t", "\u21e5\t");
}

/** The chosen number of every token as bars around the center. */
function stripOf(row, scale, column) {
  const n = Math.max(1, row.pieces.length), height = 64;
  const body = svg("svg", { viewBox: `0 0 ${n} ${height}`, preserveAspectRatio: "none", class: "strip", role: "img", "aria-label": `${COLUMNS[column].label} of every token` });
  body.append(svg("line", { x1: 0, x2: n, y1: height / 2, y2: height / 2, class: "zero" }));
  row[column].forEach((value, t) => {
    if (value === null) return;
    const size = (height / 2) * Math.max(-1, Math.min(1, (value - scale.center) / scale.reach));
    body.append(svg("rect", { x: t + 0.1, width: 0.8, y: height / 2 - Math.max(0, size), height: Math.abs(size), class: size < 0 ? "below" : "above" }));
  });
  const mark = svg("rect", { y: 0, width: 1, height, class: "mark", visibility: "hidden" });
  body.append(mark);
  body.mark = (t) => {
    mark.setAttribute("visibility", t === null ? "hidden" : "visible");
    if (t !== null) mark.setAttribute("x", t);
  };
  return body;
}
