// The lines of two graphs that differ. Lines are numbers: equal numbers are equal lines.

// Lines that both have, in an order that both have: those that occur once in each, by a longest increasing subsequence.
function anchors(before, after) {
  const places = (lines) => {
    const found = new Map();
    lines.forEach((line, at) => found.set(line, found.has(line) ? -1 : at));
    return found;
  };
  const there = places(after);
  const pairs = [...places(before)].filter(([line, at]) => at >= 0 && there.get(line) >= 0).map(([line, at]) => [at, there.get(line)]);
  const tails = [];
  const chain = [];
  for (const pair of pairs) {
    let low = 0;
    for (let high = tails.length; low < high; ) {
      const middle = (low + high) >> 1;
      if (tails[middle].pair[1] < pair[1]) low = middle + 1;
      else high = middle;
    }
    tails[low] = { pair, last: low ? tails[low - 1] : null };
  }
  for (let at = tails[tails.length - 1]; at; at = at.last) chain.push(at.pair);
  return chain.reverse();
}

// [[line, " " or "-" or "+"]]
function difference(before, after) {
  const merged = [];
  let [i, j] = [0, 0];
  for (const [a, b] of [...anchors(before, after), [before.length, after.length]]) {
    while (i < a && j < b && before[i] === after[j]) merged.push([before[i++], " "]), (j += 1);
    const tail = [];
    let [x, y] = [a, b];
    while (x > i && y > j && before[x - 1] === after[y - 1]) tail.push([before[--x], " "]), (y -= 1);
    while (i < x) merged.push([before[i++], "-"]);
    while (j < y) merged.push([after[j++], "+"]);
    merged.push(...tail.reverse());
    [i, j] = [a, b];
    if (a < before.length) merged.push([before[a], " "]), (i += 1), (j += 1);
  }
  return merged;
}

const CONTEXT = 2;
const CLASSES = { "+": "added", "-": "removed", " ": null };

function lineNode([line, sign]) {
  const text = DATA.graphs.lines[line];
  return el("div", { class: [CLASSES[sign], state.lines.has(line) ? "hit" : null].filter(Boolean).join(" ") || null }, `${sign} ${text}`);
}

function changedLines(before, after) {
  const merged = difference(before, after);
  const near = new Uint8Array(merged.length);
  merged.forEach(([line, sign], at) => {
    if (sign !== " " || state.lines.has(line)) near.fill(1, Math.max(0, at - CONTEXT), at + CONTEXT + 1);
  });
  const nodes = [];
  let skipped = 0;
  const gap = () => {
    if (skipped) nodes.push(el("div", { class: "gap" }, `  … ${count(skipped, "line")} the same`));
    skipped = 0;
  };
  merged.forEach((entry, at) => {
    if (!near[at]) skipped += 1;
    else gap(), nodes.push(lineNode(entry));
  });
  gap();
  return nodes;
}

// What an opened pass shows: the lines that differ, or both graphs in full.
function showGraphs(body, [before, after], mode) {
  const [left, right] = [DATA.graphs.texts[before], DATA.graphs.texts[after]];
  const button = (name, says) => el("button", { type: "button", "aria-pressed": String(mode === name), onclick: () => showGraphs(body, [before, after], name) }, says);
  const graph = (nodes, label) => el("div", { class: "graph mono", tabindex: "0", role: "region", "aria-label": label }, nodes);
  const full = (lines, label) => el("div", {}, el("h3", {}, label), graph(lines.map((line) => lineNode([line, " "])), label));
  body.replaceChildren(el("p", {}, button("changes", "Changes"), " ", button("full", "Before and after")),
    mode === "changes" ? graph(changedLines(left, right), "Lines that differ") : el("div", { class: "sides" }, full(left, "Before"), full(right, "After")));
}
