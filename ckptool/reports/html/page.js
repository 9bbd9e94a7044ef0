// The page: its state, which the address's fragment holds, and what is drawn from it.

const DEFAULTS = { module: "", search: "", sort: DIFF ? "-status" : "", size: "numel", colour: DIFF ? (HAS.values ? "change" : "status") : "module", tensor: "" };
const FRAGMENT = { module: "m", search: "q", sort: "sort", size: "size", colour: "colour", tensor: "t" };
let state = { ...DEFAULTS };

function fromFragment() {
  const given = new URLSearchParams(location.hash.slice(1));
  const found = { ...DEFAULTS };
  for (const [name, short] of Object.entries(FRAGMENT)) if (given.has(short)) found[name] = given.get(short);
  if (!COLOURS[found.colour]) found.colour = DEFAULTS.colour;
  if (found.size !== "nbytes") found.size = "numel";
  if (trail(found.module).at(-1).path !== found.module) found.module = "";
  if (!BY_KEY.has(found.tensor)) found.tensor = ROWS.find((row) => found.tensor && safe(row.key) === found.tensor)?.key ?? "";
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

const moduleOf = (row) => row.key.replace(/\.?[^.]*$/, "");

/** Opens a part of the map: enters a module, selects a tensor. */
function open(part) {
  if (isModule(part)) {
    change({ module: part.path, tensor: "" }, true);
    map.focus();
  } else {
    change({ tensor: part.key });
    if (matchMedia("(max-width: 999px)").matches) side.scrollIntoView({ block: "nearest" });
  }
}

function up() {
  const path = trail(state.module);
  if (path.length > 1) change({ module: path.at(-2).path, tensor: "" }, true);
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
const heats = make("div", { class: "scroll-x" });
const matrixName = HAS.values ? "change" : HAS.stats ? "std" : DIFF ? "status" : "";

function show(before) {
  const path = trail(state.module);
  const module = path.at(-1);
  const moved = !before || before.module !== state.module;
  if (!before || ["module", "size", "colour"].some((name) => before[name] !== state[name])) {
    crumbs.replaceChildren(...path.map((one, at) => make("li", {}, at === path.length - 1
      ? make("span", { "aria-current": "location", class: "key" }, at ? safe(one.name) : "all")
      : make("button", { type: "button", class: "link key", onclick: () => { change({ module: one.path, tensor: "" }, true); map.focus(); } }, at ? safe(one.name) : "all"))));
    map.show(module, state.size, state.colour);
    key.replaceChildren(...legend(state.colour, map.hues));
    [sizes.lastChild.value, colours.lastChild.value] = [state.size, state.colour];
  }
  if (search.value !== state.search) search.value = state.search;
  const row = state.tensor ? BY_KEY.get(state.tensor) : undefined;
  if (moved || before.search !== state.search || before.sort !== state.sort) {
    table.show(module, state.search, state.sort, row);
    const text = table.rows.length === ROWS.length ? plural(ROWS.length, "tensor") : `${whole(table.rows.length)} of ${plural(ROWS.length, "tensor")}`;
    const within = module.path ? ` in ${safe(module.path)}` : "";
    found.textContent = text + within;
    document.getElementById("status").textContent = before ? `${text}${within}` : "";
  } else if (before.tensor !== state.tensor) {
    table.selected = row;
    table.render();
  }
  const sums = row ? null : HAS.stats && module.tensors < 5000 ? merged(module.all()) : null;
  side.replaceChildren(...(row ? [detail(row, open, () => change({ tensor: "" }))] : [
    make("div", { class: "line" }, make("h3", { class: "key" }, module.path ? safe(module.path) : "All modules"), make("span", { class: "muted" }, `${plural(module.tensors, "tensor")}, ${sizeText(module, state.size)}`)),
    sums ? chart(sums, []) : null,
    listOf(module, state.size, open)].filter(Boolean)));
}

function start() {
  const themes = ["", "light", "dark"];
  const theme = make("button", { type: "button", class: "quiet", id: "theme", onclick: () => {
    const dark = document.documentElement.dataset.theme || (matchMedia("(prefers-color-scheme: dark)").matches ? themes[2] : themes[1]);
    document.documentElement.dataset.theme = dark === "dark" ? "light" : "dark";
  } }, "Light or dark");
  document.getElementById("head").append(make("div", {}, heading().slice(0, 2)), make("div", { class: "tools" }, theme));
  const grids = matrixName ? matrix(matrixName, (layer, kind) => {
    const words = kind.includes("*") || !kind ? `${layer}.${kind ? `${kind}` : "*"}` : `${layer}.${kind}`;
    change({ module: "", search: BY_KEY.has(kind) ? kind : words });
    document.getElementById("table").scrollIntoView({ block: "start" });
  }) : null;
  if (grids) heats.append(grids.table);
  const label = matrixName && { change: "Change by layer and kind of weight", std: "Standard deviation by layer and kind of weight", status: "Difference by layer and kind of weight" }[matrixName];
  const alarming = !DIFF && REPORT.check && REPORT.check.findings.length > 0;
  document.getElementById("main").append(...[
    make("section", { class: "top", "aria-label": "Figures" }, heading().slice(2)),
    alarming ? findings(open) : null,
    make("section", { class: "card", "aria-labelledby": "map-title" },
      make("div", { class: "bar-line" }, make("h2", { id: "map-title" }, "Modules"), make("nav", { "aria-label": "Module" }, crumbs), make("div", { class: "choices" }, sizes, colours)),
      make("div", { class: "map-side" }, make("div", { class: "map-box" }, map.box, key), side)),
    grids?.useful ? section(label, "matrix", make("p", { class: "legend" }, legend(matrixName), grids.left ? `; ${grids.left}` : ""), heats) : null,
    make("section", { class: "card", "aria-labelledby": "table-title" },
      make("div", { class: "bar-line" }, make("h2", { id: "table-title" }, "Tensors"), make("label", { class: "search" }, make("span", { class: "unseen" }, "Search"), search), found), table.box),
    ...[...sections(open), !DIFF && REPORT.check?.unchecked.length && !alarming ? findings(open) : null].filter(Boolean),
  ].filter(Boolean));
  document.getElementById("foot").append(`Made by ckptool ${safe(DOC.version)}. Everything is in this file: it asks no network, and its address holds the view.`);
  state = fromFragment();
  show(null);
  addEventListener("hashchange", () => { const before = state; state = fromFragment(); show(before); });
  addEventListener("popstate", () => { const before = state; state = fromFragment(); show(before); });
  new ResizeObserver(() => map.show(map.module, state.size, state.colour)).observe(map.box);
  addEventListener("keydown", (event) => {
    const typing = event.target.matches("input, select, textarea");
    if (event.key === "/" && !typing) {
      event.preventDefault();
      search.focus();
    } else if (event.key === "Escape" && state.tensor) change({ tensor: "" });
    else if (event.key === "Escape" && typing && state.search) change({ search: "" });
    else if ((event.key === "Escape" || event.key === "Backspace") && !typing) {
      up();
      map.focus();
    }
  });
}

start();
