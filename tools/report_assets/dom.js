// Elements, text and numbers. Everything that a run holds becomes text here; markup is never built from strings.

const SVG = "http://www.w3.org/2000/svg";
const ODD = /[\p{Cc}\p{Cf}\p{Cs}\p{Co}\p{Zl}\p{Zp}]/u;
const PLAIN = new Set(["\n", "\t", "\u200c", "\u200d"]);
const NAMES = { 0x202a: "LRE", 0x202b: "RLE", 0x202c: "PDF", 0x202d: "LRO", 0x202e: "RLO", 0x2066: "LRI", 0x2067: "RLI",
  0x2068: "FSI", 0x2069: "PDI", 0x200e: "LRM", 0x200f: "RLM", 0x200b: "ZWSP", 0xfeff: "BOM", 0x1b: "ESC", 0: "NUL" };

/** An element; children are nodes, or texts shown with `visible`. Attributes that start with "on" are listeners. */
function el(tag, attributes = {}, ...children) {
  return filled(document.createElement(tag), attributes, children);
}

function svg(tag, attributes = {}, ...children) {
  return filled(document.createElementNS(SVG, tag), attributes, children);
}

function filled(node, attributes, children) {
  for (const [name, value] of Object.entries(attributes)) {
    if (value === null || value === undefined || value === false) continue;
    if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else node.setAttribute(name, value === true ? "" : String(value));
  }
  for (const child of children.flat()) {
    if (child === null || child === undefined) continue;
    node.append(child instanceof Node ? child : visible(child));
  }
  return node;
}

/** A text as nodes: controls, direction marks and halves of characters are spelled out instead of obeyed. */
function visible(text) {
  const nodes = document.createDocumentFragment();
  let plain = "";
  for (const character of String(text)) {
    if (!ODD.test(character) || PLAIN.has(character)) {
      plain += character;
      continue;
    }
    if (plain) nodes.append(document.createTextNode(plain));
    plain = "";
    const mark = document.createElement("span");
    mark.className = "odd";
    mark.textContent = spelled(character);
    nodes.append(mark);
  }
  if (plain) nodes.append(document.createTextNode(plain));
  return nodes;
}

/** Where only a string will do, as in titles: the same, in one line. */
function flat(text) {
  return Array.from(String(text), (c) => (ODD.test(c) || c === "\n" || c === "\t" ? spelled(c) : c)).join("");
}

function spelled(character) {
  const code = character.codePointAt(0);
  const hex = code.toString(16).toUpperCase().padStart(4, "0");
  return "\u27e8" + (NAMES[code] || "U+" + hex) + "\u27e9";
}

/** Replaces what a node holds. */
function fill(node, ...children) {
  node.replaceChildren();
  return filled(node, {}, children);
}

function format(value, digits = 4) {
  if (value === null || value === undefined || Number.isNaN(value)) return "\u2013";
  if (value === 0) return "0";
  const size = Math.abs(value);
  if (Number.isInteger(value) && size < 1e7) return value.toLocaleString("en-US");
  if (size >= 1e6 || size < 1e-3) return value.toExponential(Math.max(0, digits - 2)).replace("e+", "e");
  return String(Number(value.toPrecision(digits)));
}

function bytes(value) {
  if (value === null || value === undefined) return "\u2013";
  return value >= 2 ** 30 / 10 ? (value / 2 ** 30).toFixed(2) + " GiB" : (value / 2 ** 20).toFixed(2) + " MiB";
}

function duration(seconds) {
  if (seconds === null || seconds === undefined) return "\u2013";
  if (seconds < 60) return format(seconds, 3) + " s";
  const minutes = Math.round(seconds / 60);
  return minutes < 60 ? minutes + " min" : Math.floor(minutes / 60) + " h " + (minutes % 60) + " min";
}

/** The colour of the n-th run or kind: chosen to differ for all kinds of colour vision, on light and dark. */
function color(number) {
  return `var(--series-${number % 8})`;
}

function button(label, isOn, act, title) {
  return el("button", { type: "button", "aria-pressed": String(isOn), title, onclick: act }, label);
}

function select(label, options, chosen, act) {
  const menu = el("select", { onchange: (event) => act(event.target.value) },
    options.map(([value, text]) => el("option", { value, selected: String(value) === String(chosen) }, flat(text))));
  return el("label", { class: "field" }, label, menu);
}
