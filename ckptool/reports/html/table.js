// The table of tensors: only the rows in sight are elements, so that 100,000 keys scroll as 100 do.

const HIGH = 30;
const PRINTED = 3000;
const collator = new Intl.Collator("en", { numeric: true });

const number = (name, of, text = figure) => ({ name, of, text, numeric: true });

/** The columns: a name, a value to sort by, and its text or element. */
function columnsOf() {
  const shape = (row) => (row.other === undefined ? dims(row.shape) : `${dims(row.shape)} → ${dims(row.other)}`);
  const stat = (label, name) => number(label, (row) => row.stats?.[name]);
  const value = (label, name) => number(label, (row) => row[name], (found, row) => distance(row, name));
  const known = (name) => ROWS.some((row) => row[name] !== undefined && row[name] !== null);
  return [
    { name: "Key", id: "key", wide: Math.min(innerWidth < 600 ? 190 : 470, Math.max(180, 28 + 7.3 * ROWS.reduce((most, row) => Math.max(most, (MODULES[row.in].path?.length ?? -1) + 1 + row.name.length), 0))), of: (row) => row.key },
    ...(DIFF ? [{ name: "Difference", id: "status", wide: ROWS.some((row) => row.allowed) ? 200 : 150, of: (row) => WORST.indexOf(row.grade), text: (_, row) => badge(row) }] : []),
    ...(HAS.values ? [{ ...value("Relative L2", "rel_l2"), id: "rel_l2", wide: 110, warm: true }, { ...value("Max abs", "max_abs"), id: "max_abs", wide: 96 }] : []),
    ...(known("mean_abs") ? [{ ...value("Mean abs", "mean_abs"), id: "mean_abs", wide: 96 }] : []),
    ...(known("cosine") ? [{ ...value("Cosine", "cosine"), id: "cosine", wide: 96 }] : []),
    { name: "Shape", id: "shape", wide: "other" in Row.prototype ? 170 : 120, of: (row) => row.elements, text: (_, row) => shape(row) },
    { name: "Dtype", id: "dtype", wide: DTYPES.some((dtype) => dtype.length > 10) ? 140 : 92, of: (row) => row.dtype },
    { ...number("Parameters", (row) => row.elements, count), id: "numel", wide: 106 },
    { ...number("Bytes", (row) => row.bytes, bytes), id: "nbytes", wide: 92 },
    ...(HAS.stats ? [
      { name: "Values", id: "histogram", wide: 128, of: (row) => row.stats?.std ?? -1, text: (_, row) => (row.stats?.histogram ? spark(row.stats.histogram) : "") },
      { ...stat("Mean", "mean"), id: "mean", wide: 88 }, { ...stat("Std", "std"), id: "std", wide: 80 },
      { ...stat("Min", "min"), id: "min", wide: 80 }, { ...stat("Max", "max"), id: "max", wide: 80 },
      { ...number("Zeros", (row) => (row.stats && row.elements ? row.stats.zeros / row.elements : undefined), (share) => (share === undefined ? "–" : percent(share))), id: "zeros", wide: 76 },
      { ...number("NaN, inf", (row) => row.stats && row.stats.nan + row.stats.inf, (found) => (found ? whole(found) : found === 0 ? "0" : "–")), id: "nan", wide: 84 },
    ] : []),
    ...(HAS.device ? [{ name: "Device", id: "device", wide: 88, of: (row) => row.device || "" }] : []),
    ...(HAS.tied ? [{ name: "Tied to", id: "tied", wide: 200, of: (row) => row.tied_to || "" }] : []),
    ...(HAS.hash ? [{ name: "sha256", id: "hash", wide: 150, of: (row) => row.hash || "", text: (hash) => (hash ? `${hash.slice(0, 12)}…` : "") }] : []),
  ];
}

const badge = (row) => make("span", { class: `badge is-${row.grade}`, title: row.planned && safe(row.planned) }, KIND[row.status] + (row.allowed ? ", allowed" : ""));

class Table {
  constructor(changed, open) {
    this.changed = changed;
    this.open = open;
    this.columns = columnsOf();
    this.rows = ROWS;
    this.active = 0;
    const wide = this.columns.reduce((sum, column) => sum + column.wide, 0);
    this.heads = this.columns.map((column) => make("th", { scope: "col", class: column.numeric ? "number" : "" },
      make("button", { type: "button", onclick: () => this.sorted(column) }, column.name)));
    this.above = make("td", { colspan: this.columns.length });
    this.below = make("td", { colspan: this.columns.length });
    this.body = make("tbody", { onkeydown: (event) => this.moved(event), onclick: (event) => {
      const row = event.target.closest("tr[data-row]");
      if (row) this.chosen(Number(row.dataset.row));
    } });
    const widths = this.columns.map((column) => {
      const col = make("col");
      col.style.width = `${column.wide}px`;
      return col;
    });
    this.table = make("table", { class: "tensors" }, make("caption", { class: "unseen" }, "Tensors"), make("colgroup", {}, widths),
      make("thead", {}, make("tr", { "aria-rowindex": 1 }, this.heads)),
      make("tbody", { "aria-hidden": "true", class: "space" }, make("tr", {}, this.above)), this.body,
      make("tbody", { "aria-hidden": "true", class: "space" }, make("tr", {}, this.below)));
    this.table.style.minWidth = `${wide}px`;
    this.box = make("div", { class: "scroll", id: "table", tabindex: -1, role: "region", "aria-label": "Table of tensors", onscroll: () => this.render() }, this.table);
    addEventListener("beforeprint", () => this.render(true));
    addEventListener("afterprint", () => this.render());
  }

  sorted(column) {
    const falls = column.numeric || ["status", "shape", "histogram"].includes(column.id);
    const [first, second] = falls ? [`-${column.id}`, column.id] : [column.id, `-${column.id}`];
    this.changed(this.sort === first ? second : this.sort === second ? "" : first);
  }

  /** Shows the rows of a module that match what was typed and chosen, in an order: a column's name, with - the largest first. */
  show(module, { search, grade, sort }, selected) {
    const prefix = joint(module, "");
    let rows = prefix ? ROWS.filter((row) => row.key.startsWith(prefix)) : ROWS;
    if (search) rows = rows.filter(matcher(search));
    if (grade) rows = rows.filter((row) => row.grade === grade);
    const column = this.columns.find((one) => one.id === sort.replace("-", ""));
    if (column) {
      const sign = sort.startsWith("-") ? -1 : 1;
      const values = new Map(rows.map((row) => [row, column.of(row)]));
      const moved = (row) => (row.rel_l2 === null ? Infinity : row.rel_l2 || 0);
      const absent = (value) => value === undefined || value === "";
      rows = [...rows].sort((one, other) => {
        let [a, b] = [values.get(one), values.get(other)];
        if (absent(a) || absent(b)) return absent(a) - absent(b);
        if (typeof a === "string") return sign * collator.compare(a, b);
        [a, b] = [a === null ? Infinity : a, b === null ? Infinity : b];
        return a === b ? (column.id === "status" ? Math.sign(moved(other) - moved(one)) || 0 : 0) : sign * (a - b);
      });
    }
    this.heads.forEach((head, at) => {
      const sorted = this.columns[at] === column;
      if (sorted) head.setAttribute("aria-sort", sort.startsWith("-") ? "descending" : "ascending");
      else head.removeAttribute("aria-sort");
    });
    [this.rows, this.sort, this.selected] = [rows, sort, selected];
    this.active = Math.max(0, selected ? rows.indexOf(selected) : 0);
    this.table.setAttribute("aria-rowcount", rows.length + 1);
    this.box.scrollTop = 0;
    this.render();
  }

  render(whole = false) {
    const room = Math.ceil(Math.min(640, innerHeight) / HIGH);
    let from = Math.max(0, Math.floor(this.box.scrollTop / HIGH) - 8);
    let to = Math.min(this.rows.length, from + room + 16);
    if (whole) [from, to] = [0, Math.min(this.rows.length, PRINTED)];
    const focused = this.body.contains(document.activeElement);
    this.above.style.height = `${from * HIGH}px`;
    this.below.style.height = `${whole ? 0 : (this.rows.length - to) * HIGH}px`;
    const lines = [];
    for (let at = from; at < to; at += 1) lines.push(this.line(this.rows[at], at));
    if (whole && to < this.rows.length) lines.push(make("tr", {}, make("td", { colspan: this.columns.length }, `and ${this.rows.length - to} more tensors`)));
    if (!lines.length) lines.push(make("tr", {}, make("td", { colspan: this.columns.length, class: "nothing" }, "No tensor matches.")));
    this.body.replaceChildren(...lines);
    if (focused) this.body.querySelector("[tabindex='0']")?.focus({ preventScroll: true });
  }

  line(row, at) {
    const cells = this.columns.map((column, place) => {
      const value = column.of(row);
      const shown = column.text ? column.text(value, row) : safe(value);
      if (!place) {
        const name = make("button", { type: "button", class: "link key", tabindex: at === this.active ? 0 : -1, title: safe(row.key) }, named(row.key));
        return make("th", { scope: "row" }, name);
      }
      const cell = make("td", { class: column.numeric ? "number" : column.id === "tied" || column.id === "hash" ? "key" : "", title: typeof shown === "string" && column.id !== "hash" ? shown : column.id === "hash" ? value : null }, shown);
      if (column.warm && row.rel_l2 !== undefined && row.status !== "equal") {
        prepare(COLOURS.change);
        heat(cell, COLOURS.change.share(value));
      }
      if (column.id === "nan" && value) cell.classList.add("alarm");
      return cell;
    });
    return make("tr", { "data-row": at, "aria-rowindex": at + 2, class: row === this.selected ? "selected" : "" }, cells);
  }

  chosen(at) {
    this.active = at;
    this.open(this.rows[at]);
  }

  moved(event) {
    const page = Math.max(1, Math.floor(this.box.clientHeight / HIGH) - 2);
    const step = { ArrowDown: 1, ArrowUp: -1, PageDown: page, PageUp: -page, Home: -Infinity, End: Infinity }[event.key];
    if (step === undefined || !this.rows.length) return;
    event.preventDefault();
    this.active = Math.max(0, Math.min(this.rows.length - 1, this.active + step));
    const [top, head] = [this.active * HIGH, this.table.tHead.offsetHeight];
    if (top < this.box.scrollTop) this.box.scrollTop = top;
    else if (top + HIGH + head > this.box.scrollTop + this.box.clientHeight) this.box.scrollTop = top + HIGH + head - this.box.clientHeight;
    this.render();
    this.body.querySelector("[tabindex='0']")?.focus({ preventScroll: true });
  }
}
