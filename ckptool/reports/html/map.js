// The treemap: modules by their size, and the table beside it that says the same.

const DEEPEST = 3;
const WIDEST = 240;

/** Returns rectangles {x, y, w, h} for sizes, the largest first, as square as may be (Bruls, Huizing and van Wijk 2000). */
function squarified(sizes, x, y, w, h) {
  const scale = (w * h) / sizes.reduce((sum, size) => sum + size, 0);
  const found = [];
  let at = 0;
  while (at < sizes.length) {
    const side = Math.min(w, h);
    let sum = 0;
    let worst = Infinity;
    let end = at;
    while (end < sizes.length) {
      const next = sum + sizes[end] * scale;
      const thick = next / side;
      const ratio = Math.max((sizes[at] * scale) / thick / thick, (thick * thick) / (sizes[end] * scale));
      if (ratio > worst) break;
      [sum, worst, end] = [next, ratio, end + 1];
    }
    const thick = side ? sum / side : 0;
    let along = 0;
    for (; at < end; at += 1) {
      const length = thick ? (sizes[at] * scale) / thick : 0;
      found.push(w >= h ? { x, y: y + along, w: thick, h: length } : { x: x + along, y, w: length, h: thick });
      along += length;
    }
    if (w >= h) [x, w] = [x + thick, w - thick];
    else [y, h] = [y + thick, h - thick];
  }
  return found;
}

/** What differs somewhere, the gravest first; none for `inspect`. */
const GRADES = DIFF ? WORST.filter((grade) => ROWS.some((row) => row.grade === grade)).reverse() : [];

const isModule = (part) => part instanceof Module;

/** What the colours can mean: a name, and how a value is made from rows; log: on a scale of powers of ten. */
const COLOURS = {
  module: { label: "module" },
  dtype: { label: "dtype" },
  ...(DIFF ? { status: { label: "difference" } } : {}),
  ...(HAS.values ? { change: { label: "relative change", log: true, low: 1e-6, high: 1, of: (row) => row.rel_l2 } } : {}),
  ...(HAS.stats ? {
    std: { label: "standard deviation", log: true, of: (row) => row.stats?.std ?? undefined },
    abs_max: { label: "largest magnitude", log: true, of: (row) => row.stats?.abs_max ?? undefined },
    zeros: { label: "share of zeros", low: 0, high: 1, of: (row) => (row.stats && row.elements ? row.stats.zeros / row.elements : undefined) },
  } : {}),
};

function prepare(colour) {
  if (colour.ready || !colour.of) return;
  colour.ready = true;
  if (colour.low === undefined) {
    let [low, high] = [Infinity, 0];
    for (const row of ROWS) {
      const value = colour.of(row);
      if (value > 0 && row.elements > 1) [low, high] = [Math.min(low, value), Math.max(high, value)];
    }
    [colour.low, colour.high] = high ? [low === high ? low / 10 : Math.max(low, high * 1e-6), high] : [0.1, 1];
  }
  colour.share = (value) => {
    if (value === undefined || value === null || Number.isNaN(value)) return null;
    const [low, high] = colour.log ? [Math.log(colour.low), Math.log(colour.high)] : [colour.low, colour.high];
    const place = colour.log ? (value > 0 ? Math.log(value) : -Infinity) : value;
    return value ? Math.max(0.04, Math.min(1, (place - low) / (high - low))) : 0;
  };
}

/** Returns the value of a row, or the largest of a module's rows: of those that have one, null where one is not finite. */
function valueOf(part, colour) {
  if (!isModule(part)) return colour.of(part);
  part.values = part.values || new Map();
  if (!part.values.has(colour)) {
    let found;
    const rows = [...part.all()];
    for (const row of rows.every(fromZero) ? rows : rows.filter((one) => !fromZero(one))) {
      const value = colour.of(row);
      if (value === null) { found = null; break; }
      if (value !== undefined && (found === undefined || value > found)) found = value;
    }
    part.values.set(colour, found);
  }
  return part.values.get(colour);
}

const DTYPES = [...new Set(ROWS.map((row) => row.dtype))];

/** Returns the most frequent dtype, or the gravest difference, below a part. */
function classOf(part, name) {
  if (!isModule(part)) return part[name];
  part.classes = part.classes || {};
  if (!part.classes[name]) {
    const sums = new Map();
    for (const row of part.all()) sums.set(row[name], (sums.get(row[name]) || 0) + (name === "dtype" ? row.numel : 1));
    part.classes[name] = name === "dtype"
      ? [...sums].sort((one, other) => other[1] - one[1])[0]?.[0]
      : WORST.findLast((kind) => sums.has(kind));
  }
  return part.classes[name];
}

/** Colours an element for a part: by class, or by a share of the accent. `hue`: the number of its colour, if it has one. */
function paint(element, part, name, hue) {
  const colour = COLOURS[name];
  if (name === "module") element.classList.add(hue === null ? "plain" : `hue${hue % 8}`);
  else if (name === "dtype") element.classList.add(`hue${DTYPES.indexOf(classOf(part, "dtype")) % 8}`);
  else if (name === "status" || (name === "change" && valueOf(part, colour) === undefined)) element.classList.add(`is-${classOf(part, "grade")}`);
  else heat(element, colour.share(valueOf(part, colour)));
}

/** Colours an element by a share from 0 to 1; null: not a number. */
function heat(element, share) {
  element.classList.add(share === null ? "no-value" : "heat");
  element.classList.toggle("deep", share > 0.57);
  element.classList.toggle("deepest", share > 0.94);
  if (share !== null) element.style.setProperty("--share", `${Math.round(share * 100)}%`);
}

function sizeText(part, by) {
  return by === "nbytes" ? bytes(part.nbytes) : count(part.numel);
}

function saying(part, by) {
  if (part.rest) return `${whole(part.rest)} smaller ones, ${sizeText(part, by)}`;
  const what = isModule(part) ? `module, ${plural(part.tensors, "tensor")}` : `tensor ${dims(part.shape)} ${part.dtype}`;
  const sizes = `${count(part.numel)} parameters, ${bytes(part.nbytes)}`;
  return `${named(isModule(part) ? part.path : part.key)}: ${what}, ${sizes}${part.status ? `, ${KIND[part.status]}` : ""}${part.allowed ? ", allowed" : ""}`;
}

/** The treemap of one module. */
class Treemap {
  constructor(open) {
    this.open = open;
    this.tiles = [];
    this.box = make("div", {
      class: "map", role: "group", "aria-label": "Treemap of modules. The table beside it has the same content.",
      onclick: (event) => this.chosen(event.target.closest("[data-tile]")), onkeydown: (event) => this.moved(event),
    });
  }

  chosen(tile) {
    const part = tile && this.tiles[tile.dataset.tile];
    if (part && !part.rest) this.open(part);
  }

  show(module, by, colour) {
    [this.module, this.by, this.colour] = [module, by, colour];
    const { clientWidth: width, clientHeight: height } = this.box;
    this.width = width;
    this.tiles = [];
    this.hues = new Map();
    this.box.replaceChildren();
    prepare(COLOURS[colour]);
    this.place(this.box, module, width, height, 0, null);
    if (!this.tiles.length) this.box.append(make("p", { class: "nothing" }, "No elements here."));
    const first = this.box.querySelector("button");
    if (first) first.tabIndex = 0;
  }

  place(box, module, width, height, depth, hue) {
    const { by } = this;
    let parts = module.parts(by).filter((part) => part[by] > 0);
    const most = depth ? 60 : WIDEST;
    if (parts.length > most) {
      const rest = parts.slice(most - 1);
      const sum = (name) => rest.reduce((total, part) => total + part[name], 0);
      parts = [...parts.slice(0, most - 1), { rest: rest.length, numel: sum("numel"), nbytes: sum("nbytes") }];
      parts.sort((one, other) => other[by] - one[by]);
    }
    if (!parts.length) return;
    const coloured = hue === null ? telling(parts, module[by], by) : () => false;
    const places = squarified(parts.map((part) => part[by]), 0, 0, width, height);
    parts.forEach((part, number) => {
      const { x, y, w, h } = places[number];
      if (w < 3 || h < 3) return;
      const inner = isModule(part) && depth < DEEPEST && w > 56 && h > 40 && this.tiles.length < 900;
      const tile = make(depth ? "div" : "button", {
        class: `tile${inner ? " holds" : ""} d${depth}`, "data-tile": this.tiles.length, title: saying(part, by),
        ...(depth ? { "aria-hidden": "true" } : { type: "button", tabindex: -1, "aria-label": saying(part, by) }),
      });
      for (const [name, value] of Object.entries({ left: x, top: y, width: w - 2, height: h - 2 })) tile.style[name] = `${Math.max(value, 1)}px`;
      const owns = !part.rest && (coloured(part) || (hue === null && !inner));
      if (owns && !this.hues.has(part.name)) this.hues.set(part.name, this.hues.size);
      const shade = owns ? this.hues.get(part.name) : hue;
      if (part.rest) tile.classList.add("rest");
      else paint(tile, part, this.colour, shade);
      this.tiles.push(part);
      if (w > 34 && h > 20) {
        const name = part.rest ? `${whole(part.rest)} smaller` : named(part.name);
        tile.append(make("span", { class: "name" }, name));
        if (h > 34 && w > 50 && !inner) tile.append(make("span", { class: "size" }, sizeText(part, by)));
        else if (inner && w > 110) tile.append(make("span", { class: "size" }, sizeText(part, by)));
      }
      if (inner) {
        const inside = make("div", { class: "inside" });
        this.place(inside, part, w - 10, h - 26, depth + 1, shade);
        if (inside.childElementCount) tile.append(inside);
      }
      box.append(tile);
    });
  }

  /** Arrows move to the nearest tile on that side. */
  moved(event) {
    const step = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] }[event.key];
    const here = event.target.closest("button");
    if (!step || !here) return;
    event.preventDefault();
    const centre = (tile) => [tile.offsetLeft + tile.offsetWidth / 2, tile.offsetTop + tile.offsetHeight / 2];
    const [x, y] = centre(here);
    let best = null;
    let least = Infinity;
    for (const tile of this.box.querySelectorAll(":scope > button")) {
      const [dx, dy] = [centre(tile)[0] - x, centre(tile)[1] - y];
      const ahead = dx * step[0] + dy * step[1];
      const aside = Math.abs(dx * step[1]) + Math.abs(dy * step[0]);
      if (tile !== here && ahead > 1 && ahead + 2 * aside < least) [best, least] = [tile, ahead + 2 * aside];
    }
    if (best) this.focus(best);
  }

  focus(tile = this.box.querySelector("button")) {
    for (const one of this.box.querySelectorAll(":scope > button")) one.tabIndex = -1;
    if (tile) {
      tile.tabIndex = 0;
      tile.focus();
    }
  }
}

/** Returns a test of parts that have a colour of their own: no numbered layers, and no module that is nearly all. */
function telling(parts, total, by) {
  const numbered = parts.filter((part) => /^\d+$/.test(part.name)).length;
  return (part) => numbered < parts.length / 2 && (part[by] < total * 0.8 || !isModule(part));
}

/** Returns what the colours mean; `hues`: the names of modules and the numbers of their colours. */
function legend(name, hues) {
  const colour = COLOURS[name];
  prepare(colour);
  const entry = (mark, text) => make("span", { class: "entry" }, make("i", { class: `mark ${mark}` }), text);
  if (name === "module") return [...hues].slice(0, 8).map(([module, number]) => entry(`hue${number}`, named(module)));
  if (name === "dtype") return DTYPES.map((dtype, number) => entry(`hue${number % 8}`, safe(dtype)));
  if (name === "status") return GRADES.map((kind) => entry(`is-${kind}`, KIND[kind]));
  const steps = [0, 0.25, 0.5, 0.75, 1].map((share) => {
    const step = make("i", { class: "mark" });
    heat(step, share || 0.04);
    return step;
  });
  const low = colour.low === 0 ? "0" : figure(colour.low);
  const others = name !== "change" ? [] : [...GRADES.filter((kind) => ROWS.some((row) => row.grade === kind && row.rel_l2 === undefined)).map((kind) => entry(`is-${kind}`, KIND[kind])),
    ROWS.some((row) => row.rel_l2 === null) ? entry("no-value", ROWS.some(fromZero) ? "not finite, or A is zero" : "not finite") : null].filter(Boolean);
  return [...others, make("span", { class: "entry" }, low, make("span", { class: "ramp" }, steps), figure(colour.high)), colour.log ? "logarithmic; of a module, the largest" : "of a module, the largest"];
}

/** Returns the table of what is directly below a module. */
function listOf(module, by, open) {
  const parts = module.parts(by);
  const total = module[by] || 1;
  const line = (part) => make("tr", {},
    make("th", { scope: "row" }, make("button", { type: "button", class: "link key", onclick: () => open(part), title: saying(part, by) },
      isModule(part) ? `${safe(part.name)}.` : named(part.name))),
    make("td", { class: "number" }, part[by] || !isTied(part) ? sizeText(part, by) : "tied"),
    make("td", { class: "number share" }, part[by] ? bar(part[by] / total) : null, part[by] ? make("span", {}, percent(part[by] / total)) : null));
  const shown = parts.slice(0, 100);
  const more = parts.length - shown.length;
  return make("table", { class: "list" },
    make("caption", { class: "unseen" }, `What is in ${module.path === null ? "the checkpoint" : named(module.path)}`),
    make("thead", {}, make("tr", {}, make("th", { scope: "col" }, "Name"), make("th", { scope: "col", class: "number" }, by === "nbytes" ? "Bytes" : "Parameters"), make("th", { scope: "col", class: "number" }, "Share"))),
    make("tbody", {}, shown.map(line), more > 0 ? make("tr", {}, make("td", { colspan: 3, class: "muted" }, `and ${whole(more)} more, in the table of tensors`)) : null));
}

const isTied = (part) => (isModule(part) ? [...part.all()].every((row) => row.tied_to) : Boolean(part.tied_to));

function bar(share) {
  const inner = make("i", {});
  inner.style.width = `${Math.max(0, Math.min(1, share)) * 100}%`;
  return make("span", { class: "bar", "aria-hidden": "true" }, inner);
}
