// Small helpers: elements, numbers. Texts of the data are set as text, never as markup.
const DATA = JSON.parse(document.getElementById("data").textContent);
const SVG = "http://www.w3.org/2000/svg";

function fill(node, attributes, children) {
  for (const [name, value] of Object.entries(attributes || {})) {
    if (value === null || value === undefined || value === false) continue;
    if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else node.setAttribute(name, value);
  }
  for (const child of children.flat(Infinity)) {
    if (child !== null && child !== undefined && child !== false) node.append(child);
  }
  return node;
}
const el = (tag, attributes, ...children) => fill(document.createElement(tag), attributes, children);
const svg = (tag, attributes, ...children) => fill(document.createElementNS(SVG, tag), attributes, children);
const byId = (id) => document.getElementById(id);

const percent = (share) => (share * 100).toFixed(share < 0.0995 && share > 0 ? 1 : 0) + " %";
const digits = (value) => (value === 0 ? "0" : Math.abs(value) >= 100 ? value.toFixed(0) : value.toPrecision(3));
const count = (n, noun) => n + " " + noun + (n === 1 ? "" : "s");
const sum = (values) => values.reduce((total, value) => total + value, 0);
const mean = (values) => (values.length ? sum(values) / values.length : 0);

function amount(bytes) {
  const units = ["B", "KiB", "MiB", "GiB"];
  let unit = 0;
  for (; bytes >= 1024 && unit < 3; unit += 1) bytes /= 1024;
  return digits(bytes) + " " + units[unit];
}

// [1, 2, 3, 7] as "1 to 3, 7"
function ranges(numbers) {
  const runs = [];
  for (const n of [...new Set(numbers)].sort((a, b) => a - b)) {
    const last = runs[runs.length - 1];
    if (last && n === last[1] + 1) last[1] = n;
    else runs.push([n, n]);
  }
  return runs.map(([a, b]) => (a === b ? a : b === a + 1 ? a + ", " + b : a + " to " + b)).join(", ");
}

function table(headings, rows, label) {
  const cell = (value, i) => el("td", { class: headings[i].startsWith("#") ? "number" : i ? null : "mono" }, value);
  const head = headings.map((name) => el("th", { scope: "col", class: name.startsWith("#") ? "number" : null }, name.replace(/^#/, "")));
  const body = rows.map((row) => el("tr", { "data-text": row.text }, row.cells.map(cell)));
  return el("div", { class: "scroll", tabindex: "0", role: "region", "aria-label": label },
    el("table", {}, el("thead", {}, el("tr", {}, head)), el("tbody", {}, body)));
}
