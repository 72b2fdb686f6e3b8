// One chart of curves over steps: hover values, zoom by dragging (shared by all charts), log scale, smoothing, events.

const HEIGHT = 190;
const EDGE = { left: 52, right: 10, top: 8, bottom: 22 };
const shownCharts = new Set();

/** lines: [{label, color, dash, dots, curve}]; events: [{step, severity, text}]; view: {zoom, smooth, log}. */
function chart({ title, unit, lines, events, view }) {
  const plot = el("div", { class: "plot" });
  const tip = el("div", { class: "tip", hidden: true });
  const last = lines.length === 1 || lines.every((line) => line.label === lines[0].label) ? lines[0].curve.last : null;
  const canLog = lines.every((line) => line.curve.y.every((y, i) => y === null || lowest(line.curve, i) > 0));
  const log = button("log", view.log.has(title), () => {
    view.log.has(title) ? view.log.delete(title) : view.log.add(title);
    log.setAttribute("aria-pressed", String(view.log.has(title)));
    card.draw();
  }, "logarithmic scale");
  const card = el("figure", { class: "card chart", "data-metric": title },
    el("figcaption", {},
      el("span", { class: "name" }, title), el("span", { class: "unit" }, unit),
      last === null ? null : el("span", { class: "last" }, format(last)), canLog ? log : null),
    el("div", { class: "legend" }, legend(lines)), plot, tip);
  const state = { plot, tip, lines, events, view, title, canLog, card };
  card.draw = () => { if (plot.clientWidth > 0) drawChart(state); };
  card.cross = (step) => moveCross(state, step);
  observe(card);
  return card;
}

/** Draws a card when it comes into view, and again when its width changes. */
const seen = new IntersectionObserver((entries) => {
  for (const { target, isIntersecting } of entries) {
    if (isIntersecting) { shownCharts.add(target); target.draw(); } else shownCharts.delete(target);
  }
}, { rootMargin: "200px" });
const sized = new ResizeObserver((entries) => {
  for (const { target } of entries) if (shownCharts.has(target)) target.draw();
});

function observe(card) {
  seen.observe(card);
  sized.observe(card);
}

/** Replaces what a node holds, charts included; those that were in view are drawn at once, so that nothing flickers. */
function fillWithCharts(node, ...children) {
  const drawn = new Set();
  for (const card of node.querySelectorAll(".chart")) {
    if (shownCharts.delete(card)) drawn.add(card.dataset.metric);
    seen.unobserve(card);
    sized.unobserve(card);
  }
  fill(node, ...children);
  for (const card of node.querySelectorAll(".chart")) {
    if (!drawn.has(card.dataset.metric)) continue;
    shownCharts.add(card);
    card.draw();
  }
}

function redraw() {
  for (const card of shownCharts) card.isConnected ? card.draw() : shownCharts.delete(card);
}

function legend(lines) {
  if (lines.length < 2 && !lines[0].curve.lo) return [];
  return lines.map((line) => el("span", {},
    svg("svg", { width: 18, height: 8, "aria-hidden": "true" }, line.dots
      ? svg("circle", { cx: 9, cy: 4, r: 3, fill: line.color })
      : svg("path", { d: "M0 4H18", stroke: line.color, "stroke-width": 2, "stroke-dasharray": line.dash })),
    line.label, line.curve.lo ? el("em", {}, "mean, lowest to highest") : null));
}

function lowest(curve, i) {
  return curve.lo ? curve.lo[i] : curve.y[i];
}

/** Exponential moving average without the bias of its start; gaps stay gaps. */
function smoothed(y, weight) {
  if (!weight) return y;
  let mean = 0, share = 0;
  return y.map((value) => {
    if (value === null) return null;
    mean = weight * mean + (1 - weight) * value;
    share = weight * share + (1 - weight);
    return mean / share;
  });
}

function drawChart(state) {
  const { plot, lines, events, view } = state;
  const width = plot.clientWidth;
  const isLog = state.canLog && view.log.has(state.title);
  const [x0, x1] = view.zoom || extent(lines.flatMap((line) => [line.curve.x[0], line.curve.x[line.curve.x.length - 1]]));
  const inside = [];
  const curves = lines.map((line) => {
    const y = line.dots ? line.curve.y : smoothed(line.curve.y, view.smooth);
    line.curve.x.forEach((x, i) => {
      if (x < x0 || x > x1 || y[i] === null) return;
      inside.push(y[i]);
      if (line.curve.lo && !view.smooth) inside.push(line.curve.lo[i], line.curve.hi[i]);
    });
    return y;
  });
  let [y0, y1] = extent(inside.length ? inside : [0, 1]);
  if (isLog) [y0, y1] = [Math.log10(y0), Math.log10(y1)];
  const pad = y1 > y0 ? (y1 - y0) * 0.06 : Math.abs(y1) * 0.1 || 0.5;
  [y0, y1] = [y0 - pad, y1 + pad];
  const right = width - EDGE.right, bottom = HEIGHT - EDGE.bottom;
  const spanX = x1 > x0 ? x1 - x0 : 1;
  const px = (x) => EDGE.left + ((x - x0) / spanX) * (right - EDGE.left);
  const py = (y) => bottom - (((isLog ? Math.log10(y) : y) - y0) / (y1 - y0)) * (bottom - EDGE.top);
  const clip = "clip-" + state.title.replace(/[^A-Za-z0-9]/g, "-");
  const body = svg("g", { "clip-path": `url(#${clip})` });
  const root = svg("svg", { width, height: HEIGHT, role: "img", "aria-label": flat(state.title) + " over steps" },
    svg("clipPath", { id: clip }, svg("rect", { x: EDGE.left - 4, y: 0, width: Math.max(0, right - EDGE.left + 8), height: bottom + 4 })),
    axes(x0, x1, y0, y1, isLog, px, bottom, right), body);
  for (const event of events) {
    if (event.step < x0 || event.step > x1) continue;
    body.append(svg("line", { class: "event " + severity(event.severity), x1: px(event.step), x2: px(event.step),
      y1: EDGE.top, y2: bottom }));
  }
  lines.forEach((line, n) => drawLine(body, line, curves[n], px, py, view.smooth, bottom));
  const cross = svg("line", { class: "cross", y1: EDGE.top, y2: bottom, visibility: "hidden" });
  const brush = svg("rect", { class: "brush", y: EDGE.top, height: bottom - EDGE.top, visibility: "hidden" });
  root.append(cross, brush);
  fill(plot, root);
  Object.assign(state, { cross, brush, px, curves, x0, x1, spanX, right });
  listen(state, root);
}

function drawLine(body, line, y, px, py, smooth, bottom) {
  const { curve } = line;
  for (const [oldX, oldY] of curve.old || [])
    body.append(svg("path", { class: "old", d: path(oldX, oldY, px, py), stroke: line.color }));
  if (curve.lo) body.append(svg("path", { class: "band", d: band(curve, px, py), fill: line.color }));
  else if (smooth && !line.dots) body.append(svg("path", { class: "raw", d: path(curve.x, curve.y, px, py), stroke: line.color }));
  body.append(svg("path", { class: line.dots ? "line thin" : "line", d: path(curve.x, y, px, py), stroke: line.color,
    "stroke-dasharray": line.dots ? "2 3" : line.dash }));
  if (line.dots || curve.x.length < 3)
    curve.x.forEach((x, i) => y[i] !== null && body.append(svg("circle", { cx: px(x), cy: py(y[i]), r: 3, fill: line.color })));
  for (const step of curve.bad || [])
    body.append(svg("path", { class: "bad", d: `M${px(step) - 3} ${bottom}l3 -7l3 7z` }, svg("title", {}, `step ${step}: not a number`)));
}

function path(xs, ys, px, py) {
  let d = "", isGap = true;
  xs.forEach((x, i) => {
    if (ys[i] === null) { isGap = true; return; }
    d += `${isGap ? "M" : "L"}${px(x).toFixed(1)} ${py(ys[i]).toFixed(1)}`;
    isGap = false;
  });
  return d;
}

function band(curve, px, py) {
  const known = curve.x.map((x, i) => i).filter((i) => curve.lo[i] !== null);
  const up = known.map((i) => `${px(curve.x[i]).toFixed(1)} ${py(curve.hi[i]).toFixed(1)}`);
  const down = known.reverse().map((i) => `${px(curve.x[i]).toFixed(1)} ${py(curve.lo[i]).toFixed(1)}`);
  return up.length ? `M${up.join("L")}L${down.join("L")}Z` : "";
}

function axes(x0, x1, y0, y1, isLog, px, bottom, right) {
  const group = svg("g", { class: "axes" });
  const marks = ticks(y0, y1, isLog);
  const apart = marks.length > 1 ? Math.abs(marks[1][0] - marks[0][0]) : 0;
  for (const [value, place] of marks) {
    const y = bottom - ((place - y0) / (y1 - y0)) * (bottom - EDGE.top);
    group.append(svg("line", { x1: EDGE.left, x2: right, y1: y, y2: y }),
      svg("text", { x: EDGE.left - 6, y: y + 3.5, "text-anchor": "end" }, tickLabel(value, isLog ? 0 : apart)));
  }
  for (const step of round(x0, x1, 5).filter(Number.isInteger))
    group.append(svg("text", { x: px(step), y: HEIGHT - 6, "text-anchor": "middle" }, format(step)));
  return group;
}

function ticks(low, high, isLog) {
  if (!isLog) return round(low, high, 4).map((value) => [value, value]);
  const powers = round(low, high, 4).filter((p) => Number.isInteger(p));
  const places = powers.length > 1 ? powers : round(low, high, 4);
  return places.map((place) => [10 ** place, place]);
}

/** With as many digits as tell it from the next one, `apart` away. */
function tickLabel(value, apart) {
  const digits = apart > 0 && value !== 0 ? Math.floor(Math.log10(Math.abs(value))) - Math.floor(Math.log10(apart)) + 1 : 3;
  return format(value, Math.min(8, Math.max(2, digits)));
}

/** Round numbers between two. */
function round(low, high, count) {
  if (!(high > low)) return [low];
  const raw = (high - low) / count, size = 10 ** Math.floor(Math.log10(raw));
  const step = [1, 2, 5, 10].map((m) => m * size).find((s) => s >= raw);
  const found = [];
  for (let i = Math.ceil(low / step); i * step <= high + step * 1e-9; i++) found.push(Number((i * step).toPrecision(12)));
  return found;
}

function extent(values) {
  let low = Infinity, high = -Infinity;
  for (const value of values) { if (value < low) low = value; if (value > high) high = value; }
  return [low, high];
}

function listen(state, root) {
  const at = (event) => state.x0 + ((event.offsetX - EDGE.left) / (state.right - EDGE.left)) * state.spanX;
  let from = null;
  root.addEventListener("pointermove", (event) => {
    const step = at(event);
    for (const card of shownCharts) if (card.cross) card.cross(step);
    hover(state, step, event.offsetX);
    if (from !== null) {
      const [a, b] = [state.px(from), event.offsetX].sort((p, q) => p - q);
      for (const [name, value] of Object.entries({ x: a, width: b - a, visibility: "visible" })) state.brush.setAttribute(name, value);
    }
  });
  root.addEventListener("pointerdown", (event) => { from = at(event); root.setPointerCapture(event.pointerId); });
  root.addEventListener("pointerup", (event) => {
    const range = [from, at(event)].sort((a, b) => a - b);
    const isDrag = from !== null && Math.abs(state.px(range[1]) - state.px(range[0])) > 8;
    from = null;
    if (isDrag) setZoom(state.view, range);
    else state.brush.setAttribute("visibility", "hidden");
  });
  root.addEventListener("dblclick", () => setZoom(state.view, null));
  root.addEventListener("pointerleave", () => {
    state.tip.hidden = true;
    for (const card of shownCharts) if (card.cross) card.cross(null);
  });
}

function setZoom(view, range) {
  view.zoom = range;
  view.changed();
  redraw();
}

function moveCross(state, step) {
  if (!state.cross) return;
  const isInside = step !== null && step >= state.x0 && step <= state.x1;
  state.cross.setAttribute("visibility", isInside ? "visible" : "hidden");
  if (isInside) for (const name of ["x1", "x2"]) state.cross.setAttribute(name, state.px(step));
}

function hover(state, step, offset) {
  const rows = state.lines.map((line, n) => {
    const i = nearest(line.curve.x, step);
    const range = line.curve.lo ? ` (${format(line.curve.lo[i])} to ${format(line.curve.hi[i])})` : "";
    return el("div", {}, el("i", { class: "swatch", "data-color": line.color }), `${line.label} `,
      el("b", {}, format(line.curve.y[i], 5)), range, el("small", {}, ` step ${format(line.curve.x[i])}`));
  });
  const near = state.events.filter((event) => Math.abs(state.px(event.step) - offset) < 6).slice(0, 3);
  fill(state.tip, rows, near.map((event) => el("div", { class: "happened " + severity(event.severity) }, `step ${event.step}: ${event.text}`)));
  for (const swatch of state.tip.querySelectorAll(".swatch")) swatch.style.background = swatch.dataset.color;
  state.tip.hidden = false;
  const room = state.card.clientWidth - state.tip.offsetWidth - 8;
  state.tip.style.left = Math.max(4, Math.min(room, offset + 16)) + "px";
}

function nearest(xs, step) {
  let low = 0, high = xs.length - 1;
  while (high - low > 1) {
    const middle = (low + high) >> 1;
    xs[middle] < step ? (low = middle) : (high = middle);
  }
  return Math.abs(xs[low] - step) <= Math.abs(xs[high] - step) ? low : high;
}

/** One of the classes that the style knows. */
function severity(name) {
  const text = String(name).toLowerCase();
  return /err|crit|alarm|stop|fatal|severe/.test(text) ? "severe" : /info|note|recover|clear|ok/.test(text) ? "note" : "warning";
}
