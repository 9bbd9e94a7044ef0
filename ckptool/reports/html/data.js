"use strict";
// What the page holds, as rows and a tree of modules. Names from the file are only ever text nodes.

const DOC = JSON.parse(document.getElementById("data").textContent);
const DIFF = DOC.command === "diff";
const REPORT = DOC.result;

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
const percent = (share) => (share > 0.995 && share < 1 ? "> 99 %" : share >= 0.0995 || share === 0 ? `${Math.round(share * 100)} %` : share < 0.001 ? "< 0.1 %" : `${(share * 100).toFixed(1)} %`);
const dims = (shape) => (shape === null || shape === undefined ? "?" : shape.length ? shape.join("×") : "scalar");

function figure(number) {
  if (number === null || number === undefined) return "–";
  if (Number.isInteger(number) && Math.abs(number) < 1e6) return String(number);
  const size = Math.abs(number);
  return size && (size < 1e-3 || size >= 1e6) ? number.toExponential(2).replace("e+", "e") : Number(number.toPrecision(4)).toString();
}

/** Returns the value of every row in a column (see data.py); undefined where a row has none. */
function valuesOf({ at, table, values, of, as }, length) {
  const found = table ? listOfObjects(table) : values || (as ? as.map((place) => of[place]) : new Array(at ? at.length : length).fill(of[0]));
  if (!at) return found;
  const made = new Array(length).fill(undefined);
  at.forEach((row, number) => { made[row] = found[number]; });
  return made;
}

function listOfObjects({ length, columns }) {
  const found = Object.entries(columns).map(([name, column]) => [name, valuesOf(column, length)]);
  return Array.from({ length }, (_, row) => Object.fromEntries(found.map(([name, values]) => [name, values[row]])));
}

const KIND = { equal: "equal", close: "close", values: "values differ", shape: "shape differs", dtype: "dtype differs", devices: "device differs",
  "only-in-a": "only in A", "only-in-b": "only in B", bookkeeping: "counter of one side", ties: "tied in one side", renamed: "renamed", uncompared: "not compared", allowed: "allowed" };
const WORST = ["equal", "bookkeeping", "ties", "close", "allowed", "uncompared", "renamed", "devices", "values", "dtype", "only-in-b", "only-in-a", "shape"];

/** Returns whether a relative change is undefined for a row, as A is all zeros there. */
const fromZero = (row) => row.rel_l2 === null && row.max_abs !== null;

/** Returns the text of a distance that may be null. */
const distance = (row, name) => (row[name] === undefined ? "" : row[name] !== null ? figure(row[name]) : row.by ? `other ${row.by}` : fromZero(row) ? "A is zero" : "not finite");

/** A tensor. What the page holds of it is read from the columns; a tie counts where the first of its names is, if B has the tie. */
class Row {
  constructor(at) {
    this.at = at;
    this.elements = this.shape ? this.shape.reduce((product, size) => product * size, 1) : this.parts || 0;
    const counts = this.tied_to === undefined || ["shape", "only-in-a", "only-in-b"].includes(this.status);
    [this.numel, this.nbytes] = counts ? [this.elements, this.bytes] : [0, 0];
  }

  get key() {
    return joint(MODULES[this.in], this.name);
  }

  /** Its difference, or that it is allowed. */
  get grade() {
    return this.allowed ? "allowed" : this.status;
  }
}

for (const [name, column] of Object.entries(DOC.rows.columns)) {
  let values = null;
  const get = function get() {
    values ??= valuesOf(column, DOC.rows.length);
    return values[this.at];
  };
  Object.defineProperty(Row.prototype, { nbytes: "bytes", elements: "parts" }[name] || name, { get });
}

class Module {
  constructor(name, path) {
    this.name = name;
    this.path = path;
    this.modules = [];
    this.rows = [];
    this.tensors = this.numel = this.nbytes = 0;
  }

  /** Yields every row below. */
  *all() {
    const waiting = [this];
    while (waiting.length) {
      const module = waiting.pop();
      yield* module.rows;
      for (let at = module.modules.length - 1; at >= 0; at -= 1) waiting.push(module.modules[at]);
    }
  }

  add(part, tensors) {
    this.tensors += tensors;
    this.numel += part.numel;
    this.nbytes += part.nbytes;
  }

  /** Returns the modules and rows directly below, the largest first. */
  parts(by) {
    return [...this.modules, ...this.rows].sort((one, other) => other[by] - one[by]);
  }
}

/** Returns the key or path of a name in a module; the path of the module around all is null, as names may be empty. */
const joint = (module, name) => (module.path === null ? name : `${module.path}.${name}`);

/** Returns a name or a key as text that can be seen. */
const named = (name) => safe(name) || '""';

/** Returns the modules with the rows that are in them. */
function modulesOf(rows) {
  const [names, around] = ["name", "in"].map((name) => valuesOf(DOC.modules.columns[name], DOC.modules.length));
  const modules = [new Module("", null)];
  for (let at = 1; at < names.length; at += 1) {
    const outer = modules[around[at]];
    modules.push(new Module(names[at], joint(outer, names[at])));
    outer.modules.push(modules[at]);
  }
  for (const row of rows) {
    modules[row.in].rows.push(row);
    modules[row.in].add(row, 1);
  }
  for (let at = modules.length - 1; at > 0; at -= 1) modules[around[at]].add(modules[at], modules[at].tensors);
  return modules;
}

/** Joins a module to the only one in it: `model.encoder` is one step. */
function joined(top) {
  const waiting = [top];
  while (waiting.length) {
    const node = waiting.pop();
    node.modules = node.modules.map((inner) => {
      while (!inner.rows.length && inner.modules.length === 1) {
        const [only] = inner.modules;
        only.name = `${inner.name}.${only.name}`;
        inner = only;
      }
      waiting.push(inner);
      return inner;
    });
  }
}

const ROWS = Array.from({ length: DOC.rows.length }, (_, at) => new Row(at));
const MODULES = modulesOf(ROWS);
const TOP = MODULES[0];
joined(TOP);
const HAS = {
  stats: "stats" in Row.prototype, hash: "hash" in Row.prototype, tied: "tied_to" in Row.prototype,
  device: new Set(ROWS.map((row) => row.device)).size > 1, values: DIFF && REPORT.compared && !("by" in Row.prototype),
};

let byKey = null;

/** Returns the row of a key; undefined if there is none. */
function rowOf(key) {
  if (key === null) return undefined;
  byKey ??= new Map(ROWS.map((row) => [row.key, row]));
  return byKey.get(key);
}

/** Returns the modules from the top to the one of a path, or as far as they go. */
function trail(path) {
  const found = [TOP];
  for (let here = TOP; here && path !== null && here.path !== path; ) {
    here = here.modules.find((one) => path === one.path || path.startsWith(`${one.path}.`));
    if (here) found.push(here);
  }
  return found;
}

function textOf(row) {
  row.text ??= `${row.key} ${row.dtype} ${(row.shape || []).join("x")} ${row.status ? KIND[row.status] : ""} ${row.allowed ? "allowed" : ""} ${row.planned || ""}`.toLowerCase();
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
