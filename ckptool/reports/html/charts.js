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

const LAYERS = 160;
const KINDS = 48;

/** Returns [layer, kind] of a key: up to its first number, and the rest; keys without one have a layer of their own. */
function placed(key, folded) {
  const found = /^(.*?(?:^|\.)\d+)\.(.+)$/.exec(key);
  const [layer, kind] = found ? [found[1], found[2]] : [key.replace(/\.?[^.]*$/, "") || key, key.replace(/^.*\./, "")];
  return [layer, folded ? kind.replace(/(^|\.)\d+(?=\.|$)/g, "$1*") : kind];
}

function cellsOf(rows, folded) {
  const [layers, kinds] = [new Map(), new Map()];
  for (const row of rows) {
    const [layer, kind] = placed(row.key, folded);
    if (!layers.has(layer)) layers.set(layer, new Map());
    const cells = layers.get(layer);
    if (!cells.has(kind)) cells.set(kind, []);
    cells.get(kind).push(row);
    kinds.set(kind, (kinds.get(kind) || 0) + 1);
  }
  return { layers, kinds };
}

/** Returns the matrix for one colour: layers are rows, kinds of weight are columns; `find` searches for a cell's keys. */
function matrix(name, find) {
  const colour = COLOURS[name];
  prepare(colour);
  const rows = ROWS.filter((row) => row.elements > 0 && (name === "status" || row.status === "a" || row.status === "b" || colour.of(row) !== undefined));
  let { layers, kinds } = cellsOf(rows, rows.length > 20000);
  if (kinds.size > KINDS / 2 && rows.length <= 20000) ({ layers, kinds } = cellsOf(rows, true));
  const columns = [...kinds.keys()].slice(0, KINDS);
  const families = new Map();
  const family = (layer) => layer.replace(/\d+$/, "");
  for (const layer of layers.keys()) if (!families.has(family(layer))) families.set(family(layer), families.size);
  const lines = [...layers].sort(([one], [other]) => families.get(family(one)) - families.get(family(other)) || collator.compare(one, other)).slice(0, LAYERS);
  const cell = (layer, kind, found) => {
    if (!found.length) return make("td", { class: "none" });
    const part = { all: () => found, values: new Map(), classes: {} };
    Object.setPrototypeOf(part, Module.prototype);
    const shown = make("td", {});
    const value = name === "status" ? KIND[classOf(part, "status")] : valueOf(part, colour);
    const lone = found.every((row) => row.status === "a" || row.status === "b" || row.status === "shape");
    if (name === "status" || lone) shown.classList.add(`is-${classOf(part, "status")}`);
    else heat(shown, colour.share(value));
    const words = name === "status" || lone ? KIND[classOf(part, "status")] : value === null ? (found.every(fromZero) ? "A is zero" : "not finite") : figure(value);
    const says = `${safe(layer)} ${safe(kind)}: ${words}${found.length > 1 ? `, the largest of ${found.length}` : ""}`;
    shown.append(make("button", { type: "button", title: says, "aria-label": says, tabindex: -1, onclick: () => find(layer, kind) }));
    return shown;
  };
  const head = (kind) => make("th", { scope: "col" }, make("span", { title: safe(kind) }, safe(kind)));
  const body = lines.map(([layer, cells]) => make("tr", {}, make("th", { scope: "row", class: "key", title: safe(layer) }, safe(layer)), cell(layer, "", [...cells.values()].flat()), columns.map((kind) => cell(layer, kind, cells.get(kind) || []))));
  const table = make("table", { class: "matrix", onkeydown: walked }, make("caption", { class: "unseen" }, `${colour.label} by layer and kind of weight`),
    make("thead", {}, make("tr", {}, make("td", {}), make("th", { scope: "col", class: "all" }, make("span", {}, "all")), columns.map(head))), make("tbody", {}, body));
  const first = table.querySelector("button");
  if (first) first.tabIndex = 0;
  const left = [layers.size > LAYERS ? `the first ${LAYERS} of ${whole(layers.size)} layers` : "", kinds.size > KINDS ? `the first ${KINDS} of ${whole(kinds.size)} kinds` : ""].filter(Boolean).join(", ");
  return { table, left, useful: layers.size > 1 };
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
