// Charts as SVG, drawn for the width that is there and drawn again when it changes.
const color = (number) => `var(--c${number % 7})`;
const charts = [];

function chart(label, draw) {
  const box = el("div", {});
  const redraw = () => {
    if (box.clientWidth) box.replaceChildren(draw(box.clientWidth, label));
  };
  charts.push(redraw);
  return box;
}

function ticks(low, high, most) {
  const raw = (high - low) / Math.max(most, 1) || 1;
  const power = 10 ** Math.floor(Math.log10(raw));
  const unit = [1, 2, 5, 10].find((factor) => factor * power >= raw) * power;
  const found = [];
  for (let at = Math.ceil(low / unit); at * unit <= high + unit * 1e-9; at += 1) found.push(at * unit);
  return found;
}

function frame(width, height, label) {
  return svg("svg", { width, height, viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": label });
}

// Lines or points. series: {name, points: [[x, y]], line, big}; options: xLabel, yLabel, log, at (a step), xFormat.
function plot(series, options) {
  return (width, label) => {
    const [left, right, top, bottom, height] = [46, 10, 10, 36, 260];
    const put = (y) => (options.log ? Math.log10(y) : y);
    const points = series.flatMap((one) => one.points);
    const xs = points.map((p) => p[0]);
    const ys = points.map((p) => put(p[1]));
    const stretch = (low, high, margin) => [low - (high - low || 1) * margin, high + (high - low || 1) * margin];
    const [x0, x1] = stretch(Math.min(...xs), Math.max(...xs), options.at === undefined ? 0.04 : 0);
    const [y0, y1] = stretch(Math.min(...ys), Math.max(...ys), 0.06);
    const X = (x) => left + ((x - x0) / (x1 - x0)) * (width - left - right);
    const Y = (y) => top + ((y1 - put(y)) / (y1 - y0)) * (height - top - bottom);
    const root = frame(width, height, label);
    const marks = options.log ? ticks(y0, y1, 4).filter(Number.isInteger).map((p) => 10 ** p) : ticks(y0, y1, 5);
    for (const y of marks.length ? marks : [10 ** y0, 10 ** y1]) {
      root.append(svg("line", { class: "axis", x1: left, x2: width - right, y1: Y(y), y2: Y(y) }),
        svg("text", { class: "soft", x: left - 6, y: Y(y) + 4, "text-anchor": "end" }, options.log ? y.toExponential(0) : digits(y)));
    }
    for (const x of ticks(x0, x1, width < 420 ? 4 : 8)) {
      root.append(svg("text", { class: "soft", x: X(x), y: height - bottom + 15, "text-anchor": "middle" }, (options.xFormat || String)(x)));
    }
    root.append(svg("text", { class: "soft", x: (left + width) / 2, y: height - 4, "text-anchor": "middle" }, options.xLabel));
    series.forEach((one, number) => {
      if (one.line) {
        const path = one.points.map((p, i) => `${i && p[0] - one.points[i - 1][0] <= 1 ? "L" : "M"}${X(p[0])} ${Y(p[1])}`);
        root.append(svg("path", { d: path.join(""), fill: "none", style: `stroke:${color(number)}`, "stroke-width": 2 }));
      } else {
        for (const p of one.points) {
          const title = `${one.name}: ${(options.xFormat || String)(p[0])}, ${digits(p[1])} dB`;
          root.append(svg("circle", { cx: X(p[0]), cy: Y(p[1]), r: one.big ? 7 : 4, style: `fill:${color(number)}`, "fill-opacity": one.big ? 1 : 0.7 }, svg("title", {}, title)));
        }
      }
    });
    if (options.at !== undefined) {
      root.append(svg("line", { class: "cursor", x1: X(state.step), x2: X(state.step), y1: top, y2: height - bottom }));
    }
    return root;
  };
}

function keyed(series) {
  return el("ul", { class: "legend" }, series.map((one, number) =>
    el("li", {}, el("span", { class: "chip", style: `background:${color(number)}` }), one.name)));
}

// One bar a step; its color says what the step did. What makes a step slow once, such as capturing, is cut off.
function stepBars(width, label) {
  const [left, right, top, bottom, height] = [46, 6, 10, 34, 190];
  const root = frame(width, height, label);
  const totals = DATA.steps.map((step) => sum(step.calls.map((call) => call.ms + call.overhead_ms)));
  const most = 1.3 * Math.max(...DATA.steps.map((step) => sum(step.calls.map((call) => call.ms)))) || 1;
  const wide = (width - left - right) / DATA.steps.length;
  const Y = (ms) => top + (1 - Math.min(ms / most, 1)) * (height - top - bottom);
  for (const ms of ticks(0, most, 4)) {
    root.append(svg("line", { class: "axis", x1: left, x2: width - right, y1: Y(ms), y2: Y(ms) }),
      svg("text", { class: "soft", x: left - 6, y: Y(ms) + 4, "text-anchor": "end" }, digits(ms)));
  }
  DATA.steps.forEach((step, number) => {
    const ran = sum(step.calls.map((call) => call.ms));
    const x = left + number * wide;
    const size = Math.max(wide - 1, 1);
    const bar = svg("g", { onclick: () => go(number), style: "cursor:pointer" }, svg("title", {}, `step ${number}: ${digits(totals[number])} ms`),
      svg("rect", { class: "grid-cell " + stepKind(number), x, y: Y(ran), width: size, height: Math.max(height - bottom - Y(ran), 0) }),
      svg("rect", { class: "overhead", x, y: Y(totals[number]), width: size, height: Math.max(Y(ran) - Y(totals[number]), 0) }));
    root.append(bar);
    if (totals[number] > most) root.append(svg("text", { class: "soft", x: x + wide / 2, y: top, "text-anchor": "middle" }, "⋮"));
  });
  for (const step of ticks(0, DATA.steps.length - 1, width < 500 ? 5 : 10)) {
    if (Number.isInteger(step)) root.append(svg("text", { class: "soft", x: left + (step + 0.5) * wide, y: height - bottom + 15, "text-anchor": "middle" }, step));
  }
  root.append(svg("text", { class: "soft", x: (left + width) / 2, y: height - 4, "text-anchor": "middle" }, "step; milliseconds"),
    svg("rect", { class: "cursor", x: left + state.step * wide - 1, y: top, width: wide + 1, height: height - top - bottom }));
  return root;
}

// Regions from top to bottom, steps from left to right; equal neighbors are one rectangle.
function scheduleGrid(width, label) {
  const line = DATA.regions.length > 40 ? 11 : 16;
  const longest = Math.max(...DATA.regions.map((region) => region.key.length), 4);
  const left = Math.min(longest * 6.1 + 10, width * 0.34);
  const letters = Math.floor((left - 10) / 6.1);
  const wide = (width - left - 2) / DATA.steps.length;
  const height = DATA.regions.length * line + 22;
  const root = frame(width, height, label);
  DATA.regions.forEach((region, column) => {
    const y = column * line;
    const name = region.key.length > letters ? "…" + region.key.slice(1 - letters) : region.key;
    root.append(svg("text", { class: "mono", x: left - 6, y: y + line - 4, "text-anchor": "end" }, name, svg("title", {}, region.key)));
    for (let from = 0, to; from < DATA.steps.length; from = to) {
      const kind = actionOf(from, column).kind;
      for (to = from + 1; to < DATA.steps.length && actionOf(to, column).kind === kind; to += 1);
      root.append(svg("rect", { class: "grid-cell " + kind, x: left + from * wide, y: y + 1, width: Math.max((to - from) * wide - (wide > 4 ? 1 : 0), 0.5), height: line - 2 }));
    }
  });
  for (const step of ticks(0, DATA.steps.length - 1, width < 500 ? 5 : 10)) {
    if (Number.isInteger(step)) root.append(svg("text", { class: "soft", x: left + (step + 0.5) * wide, y: height - 6, "text-anchor": "middle" }, step));
  }
  root.append(svg("rect", { class: "cursor", x: left + state.step * wide - 0.5, y: 0, width: Math.max(wide, 2), height: height - 20 }));
  root.addEventListener("click", (event) => {
    const step = Math.floor((event.clientX - root.getBoundingClientRect().left - left) / wide);
    if (step >= 0) go(step);
  });
  return root;
}
