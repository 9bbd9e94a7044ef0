"use strict";
// The document that --json prints, as rows and a tree of modules. Names from the file are only ever text nodes.

const DOC = JSON.parse(document.getElementById("data").textContent);
const DIFF = DOC.command === "diff";
const REPORT = DIFF ? DOC.result : DOC.result[0];

/** Returns text with what has no glyph, or changes the direction of others, escaped. */
function safe(text) {
  text = String(text);
  if (/^[ -~]*$/.test(text)) return text;
  return text.replace(/[\p{Cc}\p{Cf}\p{Co}\p{Cs}\p{Zl}\p{Zp}]/gu, (char) => "\\u{" + char.codePointAt(0).toString(16) + "}");
}

/** Returns an element; properties that begin with "on" are listeners, kids are elements or text. */
function make(tag, properties = {}, ...kids) {
  return fill(document.createElement(tag), properties, kids);
}

function draw(tag, properties = {}, ...kids) {
  return fill(document.createElementNS("http://www.w3.org/2000/svg", tag), properties, kids);
}

function fill(element, properties, kids) {
  for (const [name, value] of Object.entries(properties)) {
    if (value === null || value === undefined || value === false) continue;
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else element.setAttribute(name, value === true ? "" : value);
  }
  element.append(...kids.flat(Infinity).filter((kid) => kid !== null && kid !== undefined && kid !== ""));
  return element;
}

const cut = (number, digits) => (number >= 999.5 ? Math.round(number).toString() : Number(number.toPrecision(digits)).toString());

function scaled(number, step, units) {
  let unit = 0;
  while (number >= step * 0.9995 && unit < units.length - 1) {
    number /= step;
    unit += 1;
  }
  return unit ? `${cut(number, 4)} ${units[unit]}` : `${number}${units[0]}`;
}

const bytes = (number) => scaled(number, 1000, [" B", "kB", "MB", "GB", "TB", "PB"]);
const count = (number) => scaled(number, 1000, ["", "k", "M", "G", "T"]);
const whole = (number) => number.toLocaleString("en-US");
const plural = (number, word) => `${whole(number)} ${word}${number === 1 ? "" : "s"}`;
const percent = (share) => (share >= 0.0995 || share === 0 ? `${Math.round(share * 100)} %` : share < 0.001 ? "< 0.1 %" : `${(share * 100).toFixed(1)} %`);
const dims = (shape) => (shape === null || shape === undefined ? "?" : shape.length ? shape.join("×") : "scalar");

function figure(number) {
  if (number === null || number === undefined) return "–";
  if (Number.isInteger(number) && Math.abs(number) < 1e6) return String(number);
  const size = Math.abs(number);
  return size && (size < 1e-3 || size >= 1e6) ? number.toExponential(2).replace("e+", "e") : Number(number.toPrecision(4)).toString();
}

const KIND = { equal: "equal", close: "close", differ: "values differ", shape: "shape differs", dtype: "dtype differs", device: "device differs",
  a: "only in A", b: "only in B", bookkeeping: "counter of one side", tied: "tied in one side", unknown: "not compared" };
const WORST = ["equal", "bookkeeping", "tied", "close", "unknown", "device", "differ", "dtype", "b", "a", "shape"];

/** Returns whether a relative change is undefined for a row, as A is all zeros there. */
const fromZero = (row) => row.rel_l2 === null && row.max_abs !== null;

/** Returns the text of a distance that may be null. */
const distance = (row, name) => (row[name] === undefined ? "" : row[name] !== null ? figure(row[name]) : fromZero(row) ? "A is zero" : "not finite");

/** Returns the rows of the page: of `inspect`, or of both sides of `diff`. */
function rowsOf() {
  if (!DIFF) return [...REPORT.tensors, ...(REPORT.inside || [])];
  const rows = new Map(DOC.a.map((row) => [row.key, { ...row, status: "equal", rel_l2: 0, max_abs: 0 }]));
  const sideB = new Map(DOC.b.map((row) => [row.key, row]));
  const put = (key, change) => {
    const row = rows.get(key) || (sideB.has(key) ? { ...sideB.get(key) } : { key, shape: null, dtype: "", nbytes: 0 });
    rows.set(key, Object.assign(row, change));
  };
  for (const key of REPORT.uncompared || []) put(key, { status: "unknown", rel_l2: undefined, max_abs: undefined });
  for (const { key, ...found } of REPORT.values) put(key, found);
  for (const { key, a, b } of REPORT.devices) put(key, { status: "device", devices: `${a} → ${b}` });
  for (const { key, a, b } of REPORT.dtype) put(key, { status: "dtype", dtype: `${a} → ${b}` });
  for (const { key, a, b } of REPORT.shape) put(key, { status: "shape", other: b, shape: a, rel_l2: undefined, max_abs: undefined });
  const lone = { rel_l2: undefined, max_abs: undefined };
  for (const key of REPORT.only_in_a) put(key, { status: "a", ...lone });
  for (const key of REPORT.only_in_b) put(key, { status: "b", ...lone });
  for (const { key, tied_to } of REPORT.tied || []) put(key, { status: "tied", tied_to, ...lone });
  for (const key of REPORT.bookkeeping) put(key, { status: "bookkeeping", ...lone });
  return [...rows.values()];
}

const ROWS = rowsOf();
const HAS = {
  stats: ROWS.some((row) => row.stats), hash: ROWS.some((row) => row.hash), device: new Set(ROWS.map((row) => row.device)).size > 1,
  tied: ROWS.some((row) => row.tied_to), values: DIFF && REPORT.compared,
};

class Module {
  constructor(name, path) {
    Object.assign(this, { name, path, modules: new Map(), rows: [], tensors: 0, numel: 0, nbytes: 0 });
  }

  /** Yields every row below. */
  *all() {
    yield* this.rows;
    for (const module of this.modules.values()) yield* module.all();
  }

  /** Adds up what is below. */
  sum() {
    this.tensors = this.rows.length;
    for (const module of this.modules.values()) this.tensors += module.sum().tensors;
    for (const part of [...this.modules.values(), ...this.rows]) {
      this.numel += part.numel;
      this.nbytes += part.nbytes;
    }
    return this;
  }

  /** Returns the modules and rows directly below, the largest first. */
  parts(by) {
    return [...this.modules.values(), ...this.rows].sort((one, other) => other[by] - one[by]);
  }
}

/** Returns the tree of modules; the bytes and elements of a tie count where the first of its names is. */
function treeOf(rows) {
  const top = new Module("", "");
  const known = new Map([["", top]]);
  const moduleAt = (path) => {
    let found = known.get(path);
    if (!found) {
      const dot = path.lastIndexOf(".");
      found = new Module(path.slice(dot + 1), path);
      known.set(path, found);
      (dot < 0 ? top : moduleAt(path.slice(0, dot))).modules.set(found.name, found);
    }
    return found;
  };
  let last = top;
  for (const row of rows) {
    const dot = row.key.lastIndexOf(".");
    const path = dot < 0 ? "" : row.key.slice(0, dot);
    if (path !== last.path) last = moduleAt(path);
    row.name = row.key.slice(dot + 1);
    row.elements = row.shape ? row.shape.reduce((product, size) => product * size, 1) : 0;
    row.bytes = row.nbytes;
    row.numel = row.tied_to ? 0 : row.elements;
    if (row.tied_to) row.nbytes = 0;
    last.rows.push(row);
  }
  joined(top);
  top.sum();
  return top;
}

/** Joins a module to the only one in it: `model.encoder` is one step. */
function joined(top) {
  const waiting = [top];
  while (waiting.length) {
    const node = waiting.pop();
    for (const [key, module] of node.modules) {
      let inner = module;
      while (!inner.rows.length && inner.modules.size === 1) {
        const [only] = inner.modules.values();
        only.name = `${inner.name}.${only.name}`;
        inner = only;
      }
      node.modules.set(key, inner);
      waiting.push(inner);
    }
  }
}

const TOP = treeOf(ROWS);
const BY_KEY = new Map(ROWS.map((row) => [row.key, row]));

/** Returns the modules from the top to the one of a path, or as far as they go. */
function trail(path) {
  const found = [TOP];
  for (let here = TOP; here && here.path !== path; ) {
    here = [...here.modules.values()].find((one) => path === one.path || path.startsWith(`${one.path}.`));
    if (here) found.push(here);
  }
  return found;
}

function textOf(row) {
  row.text ??= `${row.key} ${row.dtype} ${(row.shape || []).join("x")} ${row.status ? KIND[row.status] : ""}`.toLowerCase();
  return row.text;
}

/** Returns a test of rows for what was typed: every word must occur; one with * or ? is a pattern of whole keys. */
function matcher(typed) {
  const words = typed.toLowerCase().split(/\s+/).filter(Boolean);
  const tests = words.map((word) => {
    if (!/[*?]/.test(word)) return (row) => textOf(row).includes(word);
    const source = word.replace(/[.+^${}()|[\]\\]/g, "\\$&").replace(/\*+/g, ".*").replace(/\?/g, ".");
    const pattern = new RegExp(`^${source}$`, "s");
    return (row) => pattern.test(row.key.toLowerCase());
  });
  return (row) => tests.every((test) => test(row));
}
