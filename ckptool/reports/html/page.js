// The page: its state, which the address's fragment holds, and what is drawn from it.

const DEFAULTS = { module: null, search: "", grade: "", sort: DIFF ? "-status" : "", size: "numel", colour: DIFF ? (HAS.values ? "change" : "status") : "module", tensor: null };
const FRAGMENT = { module: "m", search: "q", grade: "d", sort: "sort", size: "size", colour: "colour", tensor: "t" };
let state = { ...DEFAULTS };

function fromFragment() {
  const given = new URLSearchParams(location.hash.slice(1));
  const found = { ...DEFAULTS };
  for (const [name, short] of Object.entries(FRAGMENT)) if (given.has(short)) found[name] = given.get(short);
  if (!COLOURS[found.colour]) found.colour = DEFAULTS.colour;
  if (found.size !== "nbytes") found.size = "numel";
  if (!GRADES.includes(found.grade)) found.grade = "";
  const meant = (parts, name, text) => (text === null ? null : (parts.find((one) => one[name] === text) ?? parts.find((one) => one[name] !== null && safe(one[name]) === text))?.[name] ?? null);
  found.module = trail(meant(MODULES, "path", found.module)).at(-1).path;
  found.tensor = meant(ROWS, "key", found.tensor);
  return found;
}

function toFragment() {
  const made = new URLSearchParams();
  for (const [name, short] of Object.entries(FRAGMENT)) if (state[name] !== DEFAULTS[name]) made.set(short, /\p{Cs}/u.test(state[name]) ? safe(state[name]) : state[name]);
  return `#${made}`;
}

/** Changes the state and shows it; `enters`: the browser's button for going back comes back to what was before. */
function change(parts, enters = false) {
  const before = state;
  state = { ...state, ...parts };
  const fragment = toFragment();
  if (fragment !== (location.hash || "#")) history[enters ? "pushState" : "replaceState"](null, "", fragment);
  show(before);
}

/** Opens a part of the map: enters a module, selects a tensor. */
function open(part) {
  if (isModule(part)) {
    change({ module: part.path, tensor: null }, true);
    map.focus();
  } else {
    change({ tensor: part.key });
    if (matchMedia("(max-width: 999px)").matches) side.scrollIntoView({ block: "nearest" });
  }
}

function up() {
  const path = trail(state.module);
  if (path.length > 1) change({ module: path.at(-2).path, tensor: null }, true);
}

const map = new Treemap(open);
const table = new Table((sort) => change({ sort }), (row) => change({ tensor: row.key }));
const crumbs = make("ol");
const side = make("aside", { class: "side", "aria-label": "What is here" });
const key = make("p", { class: "legend" });
const search = make("input", { type: "search", id: "search", placeholder: "layer1 weight, *.bias, float16 …", autocomplete: "off", spellcheck: "false", oninput: () => change({ search: search.value }) });
const found = make("span", { class: "muted", id: "found" });
const options = (choices, name, label) => make("label", {}, make("span", {}, label), make("select", { id: name, onchange: (event) => change({ [name]: event.target.value }) }, choices.map(([value, text]) => make("option", { value }, text))));
const sizes = options([["numel", "parameters"], ["nbytes", "bytes"]], "size", "Area");
const colours = options(Object.entries(COLOURS).map(([name, { label }]) => [name, label]), "colour", "Colour");
const grades = GRADES.length > 1 ? options([["", "all"], ...GRADES.map((grade) => [grade, KIND[grade]])], "grade", "Difference") : null;
const grid = make("div");
const matrixName = HAS.values ? "change" : HAS.stats ? "std" : DIFF ? "status" : "";

function show(before) {
  const path = trail(state.module);
  const module = path.at(-1);
  const moved = !before || before.module !== state.module;
  if (!before || ["module", "size", "colour"].some((name) => before[name] !== state[name])) {
    crumbs.replaceChildren(...path.map((one, at) => make("li", {}, at === path.length - 1
      ? make("span", { "aria-current": "location", class: "key" }, at ? named(one.name) : "all")
      : make("button", { type: "button", class: "link key", onclick: () => { change({ module: one.path, tensor: null }, true); map.focus(); } }, at ? named(one.name) : "all"))));
    map.show(module, state.size, state.colour);
    key.replaceChildren(...legend(state.colour, map.hues));
    [sizes.lastChild.value, colours.lastChild.value] = [state.size, state.colour];
  }
  if (search.value !== state.search) search.value = state.search;
  if (grades) grades.lastChild.value = state.grade;
  const row = rowOf(state.tensor);
  if (moved || ["search", "grade", "sort"].some((name) => before[name] !== state[name])) {
    table.show(module, state, row);
    const text = table.rows.length === ROWS.length ? plural(ROWS.length, "tensor") : `${whole(table.rows.length)} of ${plural(ROWS.length, "tensor")}`;
    const within = module === TOP ? "" : ` in ${named(module.path)}`;
    found.textContent = text + within;
    document.getElementById("status").textContent = before ? `${text}${within}` : "";
  } else if (before.tensor !== state.tensor) {
    table.selected = row;
    table.render();
  }
  const sums = row ? null : HAS.stats && module.tensors < 5000 ? merged(module.all()) : null;
  side.replaceChildren(...(row ? [detail(row, open, () => change({ tensor: null }))] : [
    make("div", { class: "line" }, make("h3", { class: "key" }, module === TOP ? "All modules" : named(module.path)), make("span", { class: "muted" }, `${plural(module.tensors, "tensor")}, ${sizeText(module, state.size)}`)),
    sums ? chart(sums, []) : null,
    listOf(module, state.size, open)].filter(Boolean)));
}

/** Shows the matrix, if there is something to see in one. */
function showMatrix() {
  const found = matrix(matrixName, (layer, kind, rows) => {
    const [key] = rows.length === 1 ? [rows[0].key] : [null];
    change({ module: null, grade: "", search: (key ?? `${layer}.${kind || "*"}`).replace(/\s/g, "?"), tensor: key });
    document.getElementById("table").scrollIntoView({ block: "start" });
  });
  if (!found.useful) return;
  const title = { change: "Change", std: "Standard deviation", status: "Difference" }[matrixName];
  grid.append(section(`${title} by layer and kind of weight`, "matrix", make("p", { class: "legend" }, legend(matrixName), found.left),
    make("div", { class: "scroll-x" }, found.table)));
}

function start() {
  const themes = ["", "light", "dark"];
  const theme = make("button", { type: "button", class: "quiet", id: "theme", onclick: () => {
    const dark = document.documentElement.dataset.theme || (matchMedia("(prefers-color-scheme: dark)").matches ? themes[2] : themes[1]);
    document.documentElement.dataset.theme = dark === "dark" ? "light" : "dark";
  } }, "Light or dark");
  const [what, title, ...figures] = heading();
  document.getElementById("head").append(make("div", {}, what, title), make("div", { class: "tools" }, theme));
  const alarming = !DIFF && REPORT.check && REPORT.check.findings.length > 0;
  document.getElementById("main").append(...[
    make("section", { class: "top", "aria-label": "Figures" }, figures),
    alarming ? findings(open) : null,
    DIFF ? sections(open) : null,
    make("section", { class: "card", "aria-labelledby": "map-title" },
      make("div", { class: "bar-line" }, make("h2", { id: "map-title" }, "Modules"), make("nav", { "aria-label": "Module" }, crumbs), make("div", { class: "choices" }, sizes, colours)),
      make("div", { class: "map-side" }, make("div", { class: "map-box" }, map.box, key), side)),
    grid,
    make("section", { class: "card", "aria-labelledby": "table-title" },
      make("div", { class: "bar-line" }, make("h2", { id: "table-title" }, "Tensors"), make("label", { class: "search" }, make("span", { class: "unseen" }, "Search"), search), grades, found), table.box),
    DIFF ? null : sections(open),
    !DIFF && REPORT.check?.unchecked.length && !alarming ? findings(open) : null,
  ].flat().filter(Boolean));
  document.getElementById("foot").append(`Made by ckptool ${safe(DOC.version)}. Everything is in this file: it asks no network, and its address holds the view.`);
  state = fromFragment();
  show(null);
  if (matrixName && ROWS.length < MANY) showMatrix();
  else if (matrixName) setTimeout(showMatrix);
  addEventListener("hashchange", () => { const before = state; state = fromFragment(); show(before); });
  addEventListener("popstate", () => { const before = state; state = fromFragment(); show(before); });
  new ResizeObserver(() => { if (map.box.clientWidth !== map.width) map.show(map.module, state.size, state.colour); }).observe(map.box);
  addEventListener("keydown", (event) => {
    const typing = event.target.matches("input, select, textarea");
    if (event.key === "/" && !typing) {
      event.preventDefault();
      search.focus();
    } else if (event.key === "Escape" && state.tensor !== null) change({ tensor: null });
    else if (event.key === "Escape" && typing && state.search) change({ search: "" });
    else if ((event.key === "Escape" || event.key === "Backspace") && !typing) {
      up();
      map.focus();
    }
  });
}

start();
