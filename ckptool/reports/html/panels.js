// What stands around the map and the table: figures, one tensor, findings, ties, and the tree beside the weights.

function section(title, id, ...kids) {
  return make("section", { class: "card", "aria-labelledby": `${id}-title`, id }, make("h2", { id: `${id}-title` }, title), kids);
}

const terms = (pairs) => make("dl", {}, pairs.filter(([, value]) => value !== null && value !== undefined && value !== "").map(([name, value]) => [make("dt", {}, name), make("dd", {}, value)]));
const rowButton = (row, open) => make("button", { type: "button", class: "link key", onclick: () => open(row) }, named(row.key));
const keyButton = (key, open) => (rowOf(key) ? rowButton(rowOf(key), open) : make("span", { class: "key" }, named(key)));

function card(label, value, more, id) {
  return make("div", { class: "figure", id }, make("span", { class: "label" }, label), make("span", { class: "value" }, value), more ? make("span", { class: "more" }, more) : null);
}

const baseName = (path) => safe(path.replace(/[\\/]+$/, "").replace(/^.*[\\/]/, "") || path);

/** Returns the heading and the figures above everything. */
function heading() {
  if (DIFF) {
    const [a, b] = [DOC.paths[0], DOC.paths[1]];
    const counts = new Map(GRADES.map((kind) => [kind, 0]));
    for (const row of ROWS) counts.set(row.grade, counts.get(row.grade) + 1);
    const parts = GRADES.map((kind) => {
      const part = make("i", { class: `is-${kind}`, title: `${KIND[kind]}: ${whole(counts.get(kind))}` });
      part.style.flexGrow = counts.get(kind);
      return part;
    });
    return [
      make("p", { class: "kind" }, "Difference of two checkpoints"),
      make("h1", {}, make("span", { title: safe(a) }, "A ", make("b", { class: "key" }, baseName(a))), " ", make("span", { title: safe(b) }, "B ", make("b", { class: "key" }, baseName(b)))),
      make("div", { class: "figures" }, card("Result", DOC.headline.split(": ")[0], REPORT.compared ? "values compared" : "values not compared"),
        GRADES.map((kind) => card(KIND[kind], whole(counts.get(kind)), percent(counts.get(kind) / ROWS.length)))),
      make("div", { class: "stack", role: "img", "aria-label": GRADES.map((kind) => `${KIND[kind]}: ${counts.get(kind)}`).join(", ") }, parts),
    ];
  }
  const dtypes = Object.entries(REPORT.dtypes).sort((one, other) => other[1][1] - one[1][1]);
  const failing = REPORT.check ? REPORT.check.findings.filter((one) => !one.passes).length : 0;
  return [
    make("p", { class: "kind" }, `${safe(REPORT.format)} checkpoint`),
    make("h1", { title: safe(REPORT.path) }, make("b", { class: "key" }, baseName(REPORT.path))),
    make("div", { class: "figures" },
      card("Parameters", count(REPORT.parameters), whole(REPORT.parameters)),
      card("Tensors", whole(REPORT.tensors), REPORT.root ? `at ${safe(REPORT.root)}` : "at the top"),
      card("Weights", bytes(REPORT.tensor_nbytes), `file ${bytes(REPORT.nbytes)}`),
      card("Dtypes", safe(dtypes[0]?.[0] ?? "–"), dtypes.slice(1, 4).map(([name, [number]]) => `${number} × ${safe(name)}`).join(", ")),
      REPORT.check ? card("Check", failing ? plural(failing, "finding") : REPORT.check.findings.length ? "passed" : "nothing found", `${REPORT.check.unchecked.length ? "not everything has a checksum" : "everything read"}`, failing ? "alarm" : "fine") : null,
      REPORT.hash ? card("sha256 of the weights", make("span", { class: "key", title: REPORT.hash }, `${REPORT.hash.slice(0, 12)}…`), "") : null),
  ];
}

/** Returns what is known of one tensor. */
function detail(row, open, close) {
  const { stats } = row;
  const changed = DIFF && row.status !== "equal";
  return make("div", { class: "detail" },
    make("div", { class: "line" }, make("h3", { class: "key", tabindex: -1 }, named(row.key)), make("button", { type: "button", class: "quiet", onclick: close, "aria-label": "Close the tensor" }, "✕")),
    changed ? badge(row) : null,
    stats?.histogram ? chart(stats.histogram, [[stats.mean, "mean"]]) : null,
    terms([
      ["Allowed", row.planned && safe(row.planned)],
      ["Name in B", row.renamed && safe(row.renamed)],
      ["Shape", row.other === undefined ? dims(row.shape) : `${dims(row.shape)} → ${dims(row.other)}`], ["Dtype", `${safe(row.dtype)}${row.kind ? ` ${safe(row.kind)}` : ""}`],
      ["Parameters", whole(row.elements)], ["Bytes", `${bytes(row.bytes)}`], ["Device", row.device && row.device !== "cpu" ? safe(row.device) : ""], ["Devices", row.devices && safe(row.devices)],
      ["Tied to", row.tied_to ? keyButton(row.tied_to, open) : ""],
      ...(changed && HAS.values ? [["Relative L2", distance(row, "rel_l2")], ["Max abs", distance(row, "max_abs")],
        ["Mean abs", row.mean_abs === undefined ? "" : figure(row.mean_abs)], ["Cosine", row.cosine === undefined ? "" : figure(row.cosine)]] : []),
      ...(stats ? [["Mean", figure(stats.mean)], ["Std", figure(stats.std)], ["Min", figure(stats.min)], ["Max", figure(stats.max)], ["Zeros", whole(stats.zeros)], ["NaN", stats.nan ? whole(stats.nan) : ""], ["Infinite", stats.inf ? whole(stats.inf) : ""]] : []),
      ["sha256", row.hash ? make("span", { class: "key wrap" }, row.hash) : ""],
    ]));
}

/** Returns [grave, text] of what stands out in a tensor's values; null if nothing does. */
function strange(row) {
  const { stats } = row;
  if (stats.nan || stats.inf) return [1e9 + stats.nan + stats.inf, [stats.nan ? `${whole(stats.nan)} NaN` : "", stats.inf ? `${whole(stats.inf)} infinite` : ""].filter(Boolean).join(", ")];
  if (row.elements > 1 && stats.std === 0) return [row.elements > 64 ? 1 : 0, `all are ${figure(stats.mean)}`];
  if (!stats.std) return null;
  const far = Math.max(stats.max - stats.mean, stats.mean - stats.min) / stats.std;
  const most = Math.abs(stats.max) >= Math.abs(stats.min) ? stats.max : stats.min;
  if (far > 10) return [far, `${figure(most)} is ${Number(far.toPrecision(2))} standard deviations from the mean`];
  const zeros = stats.zeros / row.elements;
  return zeros > 0.5 && row.elements > 64 ? [10 * zeros, `${percent(zeros)} are zero`] : null;
}

/** Returns the tensors whose values stand out; those of one kind that say the same are one line. */
function outliers(open) {
  const groups = new Map();
  for (const row of ROWS) {
    const found = row.stats && !row.tied_to ? strange(row) : null;
    if (!found) continue;
    const [grave, text] = found;
    const name = `${row.name} ${text}`;
    if (!groups.has(name)) groups.set(name, { row, grave, text, more: 0 });
    else groups.get(name).more += 1;
  }
  const found = [...groups.values()].sort((one, other) => other.grave - one.grave);
  if (!found.length) return null;
  const line = ({ row, text, more }) => make("li", {}, row.stats.histogram ? spark(row.stats.histogram) : make("span", { class: "spark" }),
    make("span", {}, rowButton(row, open), make("span", { class: "muted" }, ` ${text}${more ? `; so are ${whole(more)} more of this name` : ""}`)));
  return section("Values that stand out", "outliers", make("ul", { class: "plain" }, found.slice(0, 15).map(line)),
    found.length > 15 ? make("p", { class: "muted" }, `and ${whole(found.length - 15)} more`) : null);
}

function findings(open) {
  const { findings: all, unchecked } = REPORT.check;
  const line = (one) => make("tr", { class: one.passes ? "muted" : "" }, make("th", { scope: "row" }, make("span", { class: `badge ${one.passes ? "" : "alarm"}` }, one.kind)), make("td", {}, one.key === undefined ? "" : keyButton(one.key, open)), make("td", {}, safe(one.text) + (one.passes ? ", let pass" : "")));
  return section("Findings", "findings",
    all.length ? make("table", { class: "plain" }, make("caption", { class: "unseen" }, "Findings"), make("thead", { class: "unseen" }, make("tr", {}, ["Kind", "Key", "What"].map((name) => make("th", { scope: "col" }, name)))), make("tbody", {}, all.slice(0, 500).map(line))) : make("p", {}, "Nothing found."),
    all.length > 500 ? make("p", { class: "muted" }, `and ${whole(all.length - 500)} more`) : null,
    unchecked.map((text) => make("p", { class: "muted" }, `Not checked: ${safe(text)}`)));
}

function listed(title, id, texts) {
  if (!texts.length) return null;
  return section(title, id, make("ul", { class: "plain wrap" }, texts.slice(0, 200).map((text) => make("li", {}, text)), texts.length > 200 ? make("li", { class: "muted" }, `and ${whole(texts.length - 200)} more`) : null));
}

/** Returns the tree of what is no weight; what is folded is made when it is opened. */
function branches(nodes) {
  return make("ul", { class: "tree" }, nodes.map((node) => {
    const label = [make("span", { class: "key" }, safe(node.name)), " ", make("span", { class: "muted" }, safe(node.text)), node.nbytes ? make("span", { class: "muted" }, `, ${bytes(node.nbytes)}`) : null];
    if (!node.children) return make("li", {}, make("span", { class: "leaf" }, label));
    return make("li", {}, make("details", { ontoggle: (event) => {
      if (event.target.open && event.target.children.length === 1) event.target.append(branches(node.children));
    } }, make("summary", {}, label)));
  }));
}

/** Returns the other sections: of `diff` above the map, of `inspect` below the table. */
function sections(open) {
  const notes = [...(REPORT.problems || []), ...(DIFF ? [] : REPORT.notes || []), ...DOC.notes].map(safe);
  if (DIFF) {
    const refused = REPORT.loadability.map(({ key, why }) => [make("span", { class: "key" }, named(key)), `: ${safe(why)}`]);
    return [listed("Notes", "notes", notes), listed("Why load_state_dict(strict=True) of A's model would refuse B", "loadability", refused)];
  }
  const names = Object.entries(REPORT.kinds || {}).sort(([, one], [, other]) => "aou".indexOf(one[0]) - "aou".indexOf(other[0]));
  const texts = new Map(REPORT.beside.map((one) => [one.path, one.text]));
  const rank = { acting: "alarm", unknown: "warn", ordinary: "" };
  return [
    HAS.stats ? outliers(open) : null,
    listed("Tied weights", "ties", REPORT.tied.map((group) => make("span", { class: "tie" }, group.map((key, at) => [at ? make("span", { class: "muted" }, " = ") : "", keyButton(key, open)]).flat()))),
    DOC.tree.length ? section("Beside the weights", "beside", branches(DOC.tree.map((node) => ({ ...node, text: texts.get(node.name) || node.text })))) : null,
    listed("Notes", "notes", notes),
    Object.keys(REPORT.metadata).length ? section("Metadata", "metadata", terms(Object.entries(REPORT.metadata).map(([name, value]) => [safe(name), make("span", { class: "wrap" }, safe(value))]))) : null,
    names.length ? section("Names in the pickle beyond tensors", "names", make("p", { class: "muted" }, "None of them was imported or called."), make("ul", { class: "plain" }, names.slice(0, 200).map(([name, kind]) => make("li", {}, make("span", { class: `badge ${rank[kind]}` }, kind), make("span", { class: "key" }, safe(name)))))) : null,
  ];
}
