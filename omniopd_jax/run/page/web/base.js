"use strict";
// Elements, texts and the state in the URL. Everything from a run is shown as text: no HTML is ever parsed here.

const VISIBLE = /[\u0000-\u0008\u000b-\u001f\u007f-\u009f\u200b-\u200f\u2028-\u202e\u2060-\u2069\ufeff]|[\ud800-\udbff](?![\udc00-\udfff])|(?<![\ud800-\udbff])[\udc00-\udfff]/g;

/** A text with what a reader can't see made visible: control characters, direction marks, half surrogate pairs. */
function visible(text) {
  return String(text).replace(VISIBLE, (c) => {
    const code = c.charCodeAt(0);
    if (code >= 0xd800 && code <= 0xdfff) return "\ufffd";
    if (code < 0x20) return String.fromCharCode(0x2400 + code);
    return "\u27e8U+" + code.toString(16).toUpperCase().padStart(4, "0") + "\u27e9";
  });
}

/** An element: attributes by name, `on` an object of handlers, children texts or elements. */
function el(tag, attributes, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes || {})) {
    if (value === null || value === undefined || value === false) continue;
    if (name === "on") for (const [event, handler] of Object.entries(value)) node.addEventListener(event, handler);
    else if (name === "style") for (const [property, v] of Object.entries(value)) node.style.setProperty(property, v);
    else if (name === "value" || name === "checked" || name === "selected") node[name] = value;
    else node.setAttribute(name, value === true ? "" : String(value));
  }
  for (const child of children.flat(3)) {
    if (child === null || child === undefined || child === false) continue;
    node.append(child instanceof Node ? child : document.createTextNode(visible(child)));
  }
  return node;
}

function fill(node, ...children) {
  node.replaceChildren();
  for (const child of children.flat(3)) if (child !== null && child !== undefined && child !== false) node.append(child);
  return node;
}

const DEFAULTS = {
  run: "0", x: "step", theme: "auto", step: "", search: "", grade: "", kept: "", sort: "step", order: "up", audit: "",
  agreementFrom: "", agreementTo: "", entropyFrom: "", entropyTo: "", lengthFrom: "", lengthTo: "", answers: "",
};
const State = Object.assign({}, DEFAULTS);
const listeners = [];

function readState() {
  const given = new URLSearchParams(location.hash.slice(1));
  for (const key of Object.keys(DEFAULTS)) State[key] = given.has(key) ? given.get(key) : DEFAULTS[key];
}

/** Changes the state, writes it into the URL and tells whoever listens which keys changed. */
function setState(changes) {
  const changed = Object.keys(changes).filter((key) => State[key] !== String(changes[key]));
  if (!changed.length) return;
  for (const key of changed) State[key] = String(changes[key]);
  const kept = Object.keys(DEFAULTS).filter((key) => State[key] !== DEFAULTS[key]);
  const hash = kept.map((key) => key + "=" + encodeURIComponent(wellFormed(State[key]))).join("&");
  history.replaceState(null, "", location.pathname + location.search + (hash ? "#" + hash : ""));
  for (const listener of listeners) listener(new Set(changed));
}

function wellFormed(text) {
  return String(text).replace(VISIBLE, (c) => (c >= "\ud800" && c <= "\udfff" ? "\ufffd" : c));
}

function number(value, digits) {
  if (value === null || value === undefined || !Number.isFinite(value)) return "\u2013";
  if (digits !== undefined) return value.toFixed(digits);
  const size = Math.abs(value);
  if (size >= 1e9) return (value / 1e9).toPrecision(3) + " G";
  if (size >= 1e6) return (value / 1e6).toPrecision(3) + " M";
  if (size >= 1e4) return (value / 1e3).toPrecision(3) + " k";
  if (size >= 100 || Number.isInteger(value)) return value.toLocaleString("en", { maximumFractionDigits: 0 });
  return size && size < 1e-3 ? value.toExponential(1) : String(Number(value.toPrecision(3)));
}

const percent = (value) => (Number.isFinite(value) ? (100 * value).toFixed(1) + "%" : "\u2013");
const plural = (n, one) => n.toLocaleString("en") + " " + one + (n === 1 ? "" : "s");

/** A named select; options are [value, text]. */
function choice(label, key, options, extra) {
  const select = el("select", { name: key, on: { change: () => setState({ [key]: select.value, ...(extra || {}) }) } },
    options.map(([value, text]) => el("option", { value, selected: State[key] === String(value) }, text)));
  return el("label", {}, el("span", {}, label), select);
}

/** A named field; `kind` is search or number. */
function field(label, key, kind, width) {
  const input = el("input", {
    type: kind, name: key, value: State[key], step: "any", class: width || "",
    on: { input: () => setState({ [key]: input.value, audit: State.audit }) },
  });
  return el("label", {}, el("span", {}, label), input);
}

/** The run's data: base64 of deflated JSON. */
async function readData() {
  const text = document.getElementById("data").textContent;
  const bytes = Uint8Array.from(atob(text), (c) => c.charCodeAt(0));
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("deflate"));
  return new Response(stream).json();
}
