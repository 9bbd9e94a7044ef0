// Histograms, and the matrix of layers by kinds of weight.

const tallest = (counts) => counts.reduce((most, one) => Math.max(most, one), 1);

/** Returns a path of bars in a box of a width and a height. */
function bars(counts, width, height, gap) {
  const [most, step] = [tallest(counts), width / counts.length];
  const one = (found, at) => {
    const high = found ? Math.max(1, (found / most) * height) : 0;
    return high ? `M${(at * step).toFixed(2)} ${height}v${(-high).toFixed(2)}h${(step - gap).toFixed(2)}v${high.toFixed(2)}z` : "";
  };
  return counts.map(one).join("");
}

/** Returns a histogram with empty bins at both sides, so that a single bin is no block. */
function padded({ counts, start, width, ...rest }) {
  const side = Math.max(0, Math.ceil((11 - counts.length) / 2));
  const empty = new Array(side).fill(0);
  return { counts: [...empty, ...counts, ...empty], start: start - side * width, width, ...rest };
}

function spark(histogram) {
  const { counts } = padded(histogram);
  return draw("svg", { class: "spark", viewBox: "0 0 108 20", width: 108, height: 20, "aria-hidden": "true" }, draw("path", { d: bars(counts, 108, 20, counts.length > 16 ? 0.6 : 1.5) }));
}

/** Returns a histogram with its axis. `marks`: [value, name] of vertical lines. */
function chart(histogram, marks) {
  const { start, width, counts, below = 0, above = 0 } = padded(histogram);
  const [wide, high, end] = [320, 112, start + width * counts.length];
  const at = (value) => ((value - start) / (end - start)) * wide;
  const inside = marks.filter(([value]) => value !== null && value !== undefined && value >= start && value <= end);
  const text = (x, words, anchor) => draw("text", { x, y: high + 16, "text-anchor": anchor }, words);
  const total = counts.reduce((sum, one) => sum + one, below + above);
  const says = `Histogram of ${whole(total)} values in ${counts.length} bins from ${figure(start)} to ${figure(end)}; the fullest has ${whole(tallest(counts))}`;
  const out = below + above ? make("p", { class: "muted" }, `${whole(below)} below and ${whole(above)} above these bins`) : null;
  return make("figure", { class: "chart" },
    draw("svg", { viewBox: `-2 -4 ${wide + 4} ${high + 24}`, role: "img", "aria-label": says },
      draw("path", { class: "bars", d: bars(counts, wide, high, counts.length > 16 ? 1.2 : 2) }),
      draw("line", { class: "axis", x1: 0, x2: wide, y1: high + 0.5, y2: high + 0.5 }),
      inside.map(([value, name]) => draw("g", { class: `mark-${name}` }, draw("line", { x1: at(value), x2: at(value), y1: -2, y2: high + 4 }, draw("title", {}, `${name} ${figure(value)}`)))),
      text(0, figure(start), "start"), text(wide, figure(end), "end"),
      start < 0 && end > 0 && at(0) > 50 && at(0) < wide - 50 ? text(at(0), "0", "middle") : null),
    out);
}

/** Returns the histogram of several, in the bins of a power of two that hold nearly all; null if there are too many. */
function merged(rows) {
  const parts = [];
  for (const row of rows) {
    const found = row.stats?.histogram;
    if (!found || row.tied_to || /int|bool/.test(row.dtype)) continue;
    const { counts, start, width } = found;
    const share = row.elements / (counts.reduce((sum, one) => sum + one, 0) || 1);
    for (let at = 0; at < counts.length; at += 1) if (counts[at]) parts.push([start + at * width, width, counts[at] * share]);
    if (parts.length > 200000) return null;
  }
  if (!parts.length) return null;
  parts.sort((one, other) => one[0] - other[0]);
  const total = parts.reduce((sum, part) => sum + part[2], 0);
  let [sum, low, high] = [0, null, 0];
  for (const [start, width, found] of parts) {
    if (sum + found > total / 400 && low === null) low = start;
    if (sum < total * 0.9975) high = Math.max(high, start + width, low ?? start);
    sum += found;
  }
  const width = 2 ** Math.ceil(Math.log2((high - low) / 40 || 1));
  const first = Math.floor(low / width);
  const counts = new Array(Math.min(64, Math.ceil(high / width) - first)).fill(0);
  let [below, above] = [0, 0];
  for (const [start, wide, found] of parts) {
    const pieces = Math.max(1, Math.round(wide / width));
    for (let piece = 0; piece < pieces && pieces < 4096; piece += 1) {
      const at = Math.floor((start + (piece * wide) / pieces) / width) - first;
      if (at < 0) below += found / pieces;
      else if (at >= counts.length) above += found / pieces;
      else counts[at] += found / pieces;
    }
  }
  return { start: first * width, width, counts: counts.map(Math.round), below: Math.round(below), above: Math.round(above) };
}

// --- the matrix ---------------------------------------------------------------------------------------------------

const MANY = 20000;
const LAYERS = 160;
const KINDS = 48;

/** Returns [layer, kind] of a row: its key up to the first number, and the rest; without one, its module and its name. */
function placed(row, folded) {
  const module = MODULES[row.in];
  if (module === TOP) return [row.key, row.key];
  module.layer ??= /^(.*?(?:^|\.)\d+)(?:\.(.*))?$/s.exec(module.path) || [module.path, module.path];
  const [, layer, inner] = module.layer;
  const kind = inner === undefined ? row.name : `${inner}.${row.name}`;
  return [layer, folded && /\d/.test(kind) ? kind.replace(/(^|\.)\d+(?=\.|$)/g, "$1*") : kind];
}

/** Returns {layer: its rows, and those of each kind} and {kind: its rows}, as modules. */
function cellsOf(rows, folded) {
  const [layers, kinds] = [new Map(), new Map()];
  const at = (parts, name, row) => {
    if (!parts.has(name)) parts.set(name, Object.assign(new Module(name, name), { cells: new Map() }));
    const part = parts.get(name);
    part.rows.push(row);
    return part;
  };
  for (const row of rows) {
    const [layer, kind] = placed(row, folded);
    at(at(layers, layer, row).cells, kind, row);
    at(kinds, kind, row);
  }
  return { layers, kinds };
}

/** Returns those of parts that have the largest values, in the order that they have. */
function largest(parts, limit, name) {
  if (parts.length <= limit) return parts;
  const place = (part) => {
    if (name === "status") return WORST.indexOf(classOf(part, "grade"));
    const value = valueOf(part, COLOURS[name]);
    return value === null ? Infinity : value ?? Number.MIN_VALUE;
  };
  const places = new Map(parts.map((part) => [part, place(part)]));
  const sorted = [...parts].sort((one, other) => (places.get(one) < places.get(other)) - (places.get(one) > places.get(other)));
  const chosen = new Set(sorted.slice(0, limit));
  return parts.filter((part) => chosen.has(part));
}

/** Returns the matrix for one colour: layers are rows, kinds of weight are columns; `find` shows the keys of a cell. */
function matrix(name, find) {
  const colour = COLOURS[name];
  prepare(colour);
  const rows = ROWS.filter((row) => row.elements > 0 && (DIFF || colour.of(row) !== undefined));
  let { layers, kinds } = cellsOf(rows, rows.length > MANY);
  if (kinds.size > KINDS / 2 && rows.length <= MANY) ({ layers, kinds } = cellsOf(rows, true));
  const columns = largest([...kinds.values()], KINDS, name).map((part) => part.name);
  const families = new Map();
  const family = (layer) => layer.replace(/\d+$/, "");
  for (const layer of layers.keys()) if (!families.has(family(layer))) families.set(family(layer), families.size);
  const lines = largest([...layers.values()], LAYERS, name).sort(({ name: one }, { name: other }) => families.get(family(one)) - families.get(family(other)) || collator.compare(one, other));
  const cell = (layer, kind, part) => {
    if (!part) return make("td", { class: "none" });
    const shown = make("td", {});
    const value = name === "status" ? undefined : valueOf(part, colour);
    const bare = value === undefined ? part.rows : part.rows.filter((row) => colour.of(row) === undefined);
    const others = bare.length ? KIND[WORST.findLast((one) => bare.some((row) => row.grade === one))] : "";
    if (value === undefined) shown.classList.add(`is-${classOf(part, "grade")}`);
    else heat(shown, colour.share(value));
    const words = value === undefined ? others : value === null ? (part.rows.every(fromZero) ? "A is zero" : "not finite") : figure(value);
    const many = part.rows.length > 1 ? `, the largest of ${part.rows.length}${others && value !== undefined ? `; ${others}` : ""}` : "";
    const says = `${named(layer)} ${safe(kind)}: ${words}${many}`;
    shown.append(make("button", { type: "button", title: says, "aria-label": says, tabindex: -1, onclick: () => find(layer, kind, part.rows) }));
    return shown;
  };
  const head = (kind) => make("th", { scope: "col" }, make("span", { title: safe(kind) }, named(kind)));
  const body = lines.map((line) => make("tr", {}, make("th", { scope: "row", class: "key", title: safe(line.name) }, named(line.name)), cell(line.name, "", line), columns.map((kind) => cell(line.name, kind, line.cells.get(kind)))));
  const table = make("table", { class: "matrix", onkeydown: walked }, make("caption", { class: "unseen" }, `${colour.label} by layer and kind of weight`),
    make("thead", {}, make("tr", {}, make("td", {}), make("th", { scope: "col", class: "all" }, make("span", {}, "all")), columns.map(head))), make("tbody", {}, body));
  const first = table.querySelector("button");
  if (first) first.tabIndex = 0;
  const which = { change: "that moved most", status: "that differ most" }[name] || "of the largest values";
  const left = [[lines, layers, "layers"], [columns, kinds, "kinds of weight"]].filter(([some, all]) => some.length < all.size).map(([some, all, word]) => `${some.length} of ${whole(all.size)} ${word}`);
  return { table, left: left.length ? `${left.join(" and ")} are shown, those ${which}` : "", useful: layers.size > 1 };
}

/** Arrows move from cell to cell. */
function walked(event) {
  const step = { ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0] }[event.key];
  const cell = event.target.closest("td");
  if (!step || !cell) return;
  event.preventDefault();
  let [line, at] = [cell.parentElement, cell.cellIndex];
  for (;;) {
    if (step[0]) line = step[0] > 0 ? line.nextElementSibling : line.previousElementSibling;
    at += step[1];
    const next = line?.cells[at];
    if (!next) return;
    const button = next.querySelector("button");
    if (!button) continue;
    event.target.tabIndex = -1;
    button.tabIndex = 0;
    button.focus();
    return;
  }
}
