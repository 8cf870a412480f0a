// One function a section; each returns an element, or null where there is nothing to show.
const UNKNOWN = { name: "decided when it runs", kind: "unknown" };
const PAST = { name: "past the schedule's end", kind: "unknown" };

const fullRow = () => DATA.rows.findIndex((row) => row.every((act) => DATA.actions[act].kind === "compute"));
// A cold step computes everything, whatever its row says.
const rowOf = (step) => (DATA.steps[step].calls.some((call) => call.cold) && fullRow() >= 0 ? fullRow() : DATA.steps[step].row);
const variantOf = (step) => DATA.variants[rowOf(step)] || null;

function actionOf(step, column) {
  const row = rowOf(step);
  if (row === null) return DATA.schedule.adaptive ? UNKNOWN : PAST;
  return DATA.actions[DATA.rows[row][column]];
}

function stepKind(step) {
  const kinds = new Set(DATA.regions.map((_, column) => actionOf(step, column).kind));
  return kinds.has("compute") || !kinds.size ? (kinds.size > 1 ? "partial" : "compute") : kinds.size === 1 ? [...kinds][0] : kinds.has("partial") ? "partial" : "forecast";
}

const NOUN = { attention: "attention", experts: "experts", mlp: "MLP", span: "span of blocks" };
const doing = (action, region) => (action.kind === "unknown" ? action.name : action.does[region.kind]);

// What a step does, in sentences: for each kind of region and action the layers.
function sentences(step) {
  const groups = new Map();
  DATA.regions.forEach((region, column) => {
    const action = actionOf(step, column);
    const key = region.kind + " " + action.name;
    if (!groups.has(key)) groups.set(key, { region, action, layers: [] });
    groups.get(key).layers.push(region.layer);
  });
  return [...groups.values()].map(({ region, action, layers }) => {
    const each = region.experts ? ` (${region.experts} experts each)` : "";
    return el("li", {}, el("b", {}, `${NOUN[region.kind]} ${doing(action, region)}`), `: ${new Set(layers).size > 1 ? "layers" : "layer"} ${ranges(layers)}${each}`);
  });
}

function stepText() {
  const step = DATA.steps[state.step];
  const variant = variantOf(state.step);
  const ms = sum(step.calls.map((call) => call.ms + call.overhead_ms));
  const cold = step.calls.some((call) => call.cold);
  const head = [
    `Step ${state.step}`,
    step.timestep === null ? null : `timestep ${digits(step.timestep)}`,
    variant && `program ${variant.name}, ${percent(variant.share)} of the MACs`,
    step.calls.length ? `${digits(ms)} ms${step.calls.length > 1 ? ` in ${step.calls.length} calls` : ""}` : null,
    cold ? "cold: no state was there, so everything was computed" : null,
  ];
  return [el("p", {}, el("b", {}, head.filter(Boolean).join(" · "))), el("ul", {}, sentences(state.step))];
}

function legend() {
  const shown = new Map();
  for (const row of DATA.rows) row.forEach((act, column) => shown.set(doing(DATA.actions[act], DATA.regions[column]), DATA.actions[act].kind));
  return el("ul", { class: "legend" }, [...shown].map(([says, kind]) => el("li", {}, el("span", { class: "chip " + kind }), says)));
}

function map() {
  const layers = new Map();
  DATA.regions.forEach((region, column) => {
    if (!layers.has(region.layer)) layers.set(region.layer, []);
    layers.get(region.layer).push([region, column]);
  });
  return el("ul", { id: "map", "aria-label": "Blocks of the model, colored by what the step does" }, [...layers].map(([layer, members]) =>
    el("li", { class: "block" }, el("h3", {}, `block ${layer}`), members.map(([region, column]) =>
      el("div", { class: "region", role: "group", id: "region-" + column, title: region.key },
        el("b", {}, el("span", {}, NOUN[region.kind]), el("span", { class: "share" }, percent(region.share))),
        region.experts > 0 && region.experts <= 64 && el("div", { class: "experts", "aria-hidden": "true" }, Array.from({ length: region.experts }, () => el("i", {}))),
        el("span", { class: "does" }), el("span", { class: "mono" }, region.key))))));
}

function paintMap() {
  DATA.regions.forEach((region, column) => {
    const node = byId("region-" + column);
    const action = actionOf(state.step, column);
    node.className = "region " + action.kind + (node.classList.contains("hit") ? " hit" : "") + (node.classList.contains("dim") ? " dim" : "");
    node.dataset.action = action.kind;
    node.querySelector(".does").textContent = doing(action, region);
    node.setAttribute("aria-label", `${region.key}, ${NOUN[region.kind]}: ${doing(action, region)}`);
  });
}

function stepSection() {
  if (!DATA.regions.length) return el("p", {}, DATA.model.breaks || "Nothing of this model is cached.");
  return [el("div", { class: "told", id: "told", role: "status", "aria-live": "polite" }), legend(), map(),
    DATA.actions.some((action) => action.kind === "partial") && el("p", { class: "soft" }, "An expert branch is one expert's output for one token. Of a part, each step computes first the branches whose expert the cache doesn't hold for the token, then those of the highest priority (gate weight, age, drift); every other branch and token is forecast from its own last values."),
    el("p", { class: "soft" }, "The number beside a region is its share of the model's multiply-accumulates (MACs) when it is computed. Squares are experts. What lies outside the regions is computed at every step.")];
}

function scheduleSection() {
  if (!DATA.regions.length) return null;
  const repeats = DATA.schedule.period ? `The last ${DATA.schedule.period} rows repeat for as long as the trajectory lasts. ` : "";
  const ran = DATA.steps.some((step) => step.calls.length) ? "Shown as the last trajectory ran it. " : "Shown as planned. ";
  const adapts = DATA.schedule.adaptive ? "Each step chooses its row when it runs. " : "";
  const label = `Schedule: ${count(DATA.regions.length, "region")} by ${count(DATA.steps.length, "step")}`;
  const grid = el("div", { class: "scroll", tabindex: "0", role: "region", "aria-label": "Schedule grid" }, chart(label, scheduleGrid));
  return [el("p", { class: "soft" }, ran + adapts + repeats + "Click a column to go to its step."), legend(), grid];
}

function advice(text, code) {
  return el("div", { class: "advice" }, el("p", {}, text), code && el("pre", {}, code));
}

function timeSection() {
  const timed = DATA.steps.filter((step) => step.calls.length);
  if (!timed.length) {
    return advice("No trajectory of this schedule has run, so there are no milliseconds. Sample once with the compiled model, then explain it without inputs:",
      'model = moeca.compile(model, schedule=...)\nsample(model)\nmoeca.explain(model, html="report.html")');
  }
  const total = (step) => sum(step.calls.map((call) => call.ms + call.overhead_ms));
  const groups = new Map();
  for (const step of timed) {
    const name = variantOf(step.step) ? variantOf(step.step).name : step.calls[0].variant;
    groups.set(name, [...(groups.get(name) || []), total(step)]);
  }
  const full = variantOf(timed[0].step) && DATA.variants[fullRow()] ? groups.get(DATA.variants[fullRow()].name) : null;
  const spent = sum(timed.map(total));
  const says = [...groups].map(([name, ms]) => `${count(ms.length, "step")} of ${name}, ${digits(mean(ms))} ms each on average`);
  const speedup = full && full.length > 1 && groups.size > 1
    ? ` Had every step taken as long as those of ${DATA.variants[fullRow()].name}: ${digits(mean(full) * timed.length)} ms, ${digits((mean(full) * timed.length) / spent)} times as long.` : "";
  const rows = timed.flatMap((step) => step.calls.map((call) => ({ text: `step ${step.step}`, cells: [
    String(step.step), call.stream, call.timestep === null ? "" : digits(call.timestep), call.variant, digits(call.ms), digits(call.overhead_ms), call.cold ? "cold" : ""] })));
  return [el("p", {}, `${digits(spent)} ms in all: ${says.join("; ")}.${speedup}`),
    el("p", { class: "soft" }, "Host milliseconds without compiling; gray: what a call takes beside its program. On an accelerator, work that still runs there isn't counted."),
    chart("Milliseconds of each step", stepBars),
    el("details", {}, el("summary", {}, "The calls as a table"), el("div", {}, table(["step", "stream", "#timestep", "program", "#ms", "#overhead ms", ""], rows, "Calls of the last trajectory")))];
}

function qualitySection() {
  const { drift, front, tried } = DATA.measured;
  const driftSeries = Object.entries(drift).map(([name, line]) => ({ name, line: true, points: line.map((y, x) => [x, y]).filter((p) => p[1] !== null && p[1] > 0) })).filter((one) => one.points.length);
  const frontSeries = Object.entries(front).map(([name, points]) => ({ name, points, big: name === "this schedule" }));
  const calibrate = "moeca calibrate my.models:build --sample my.models:sample \\\n    --budget macs:0.35 --resume kept --out schedule.json\nmoeca explain my.models:build --sample my.models:sample --schedule schedule.json --calibration kept --html report.html";
  const predicted = Object.entries(DATA.schedule.predicted).map(([name, value]) => el("div", {}, el("dt", {}, name), el("dd", {}, digits(value))));
  const most = Math.max(...tried.map((one) => one.psnr_db), 1);
  return [
    !predicted.length && advice("This schedule wasn't calibrated: how far its images are from the uncached ones was not measured. To measure it, and to find a better schedule for the same cost:", calibrate),
    el("div", { class: "plots" },
      frontSeries.length > 0 && el("div", {}, el("h3", {}, "Front: quality against cost"),
        el("p", { class: "soft" }, "PSNR in dB to the uncached samples; further left is cheaper, further up is closer."),
        chart("Front: PSNR in dB against the share of the MACs", plot(frontSeries, { xLabel: "share of the MACs", xFormat: percent })), keyed(frontSeries)),
      tried.length > 0 && el("div", {}, el("h3", {}, "What else was tried for this budget"),
        el("p", { class: "soft" }, "Best PSNR in dB that each family of schedules reached on the calibration's seeds."),
        el("div", { class: "bars" }, tried.map((one, i) => [el("span", {}, one.name), el("i", { class: i ? null : "best", style: `width:${Math.max((one.psnr_db / most) * 100, 0)}%` }), el("span", {}, digits(one.psnr_db))]))),
      driftSeries.length > 0 && el("div", {}, el("h3", {}, "Drift: what a skipped step would cost"),
        el("p", { class: "soft" }, "How far the latent is moved at each step where older outputs stand in for the step's own."),
        chart("Drift by step, logarithmic", plot(driftSeries, { xLabel: "step", log: true, at: 0 })), keyed(driftSeries))),
    predicted.length > 0 && !driftSeries.length && advice("The drift of each step lies in the folder that the calibration kept (--resume). Name it to see the plots:",
      "moeca explain my.models:build --sample my.models:sample --schedule schedule.json --calibration kept --html report.html"),
    predicted.length > 0 && el("details", {}, el("summary", {}, "All that the schedule's file says"), el("div", {}, el("dl", { class: "bars" }, predicted.map((pair) => [...pair.childNodes].map((node) => node).concat(el("span", {})))))),
  ];
}

function imagesSection() {
  if (!DATA.pairs.length) {
    return advice("No images were given. Sample the same prompts and seeds with every step computed and with the schedule, then:",
      'report = moeca.explain(pipe)\nreport.to_html("report.html", uncached=plain.images, cached=images)');
  }
  const figures = DATA.pairs.map((pair, number) => {
    const image = (source, name) => el("span", {}, el("img", { src: source, alt: `Image ${number + 1}, ${name}`, onload: (event) => event.target.classList.toggle("small", event.target.naturalWidth < 96) }), name);
    return el("figure", { class: "pair" }, el("div", {}, image(pair.uncached, "uncached"), image(pair.cached, "cached")), el("figcaption", {}, `pair ${number + 1}`));
  });
  const button = el("button", { type: "button", "aria-pressed": "false", onclick: () => {
    const on = button.getAttribute("aria-pressed") === "false";
    button.setAttribute("aria-pressed", String(on));
    for (const figure of figures) showDifference(figure, on);
  } }, "Show differences, 8 times enlarged");
  return [el("p", {}, button), el("div", { class: "pairs" }, figures)];
}

function showDifference(figure, on) {
  figure.classList.toggle("with-difference", on);
  figure.querySelectorAll(".difference").forEach((node) => node.remove());
  const [left, right] = figure.querySelectorAll("img");
  if (!on) return;
  const [width, height] = [left.naturalWidth, left.naturalHeight];
  const note = (content) => figure.querySelector("div").append(el("span", { class: "difference" }, content, "difference × 8"));
  if (width !== right.naturalWidth || height !== right.naturalHeight) return note("images of different sizes; no ");
  const pixels = (image) => {
    const canvas = el("canvas", { width, height });
    const context = canvas.getContext("2d", { willReadFrequently: true });
    context.drawImage(image, 0, 0);
    return [canvas, context, context.getImageData(0, 0, width, height)];
  };
  const [canvas, context, a] = pixels(left);
  const b = pixels(right)[2];
  for (let i = 0; i < a.data.length; i += 1) if (i % 4 < 3) a.data[i] = Math.min(255, 8 * Math.abs(a.data[i] - b.data[i]));
  context.putImageData(a, 0, 0);
  canvas.classList.toggle("small", width < 96);
  canvas.setAttribute("role", "img");
  canvas.setAttribute("aria-label", "Difference, 8 times enlarged");
  note(canvas);
}

const regionText = (region) => [region.key, region.kind, "block " + region.layer, "layer " + region.layer, region.how, ...region.parameters].join(" ");

function regionsSection() {
  if (!DATA.regions.length) return null;
  const rows = DATA.regions.map((region) => ({ text: regionText(region), cells: [region.key, region.kind, String(region.layer),
    region.shapes.map((shape) => shape.join("×")).join(" "), percent(region.share), amount(region.state_bytes), region.how,
    region.whole_because ? `as a whole: ${region.whole_because}` : "as a whole or in part"] }));
  return table(["region", "kind", "#layer", "shape", "#MACs", "#state", "how", "can be computed"], rows, "Regions");
}

function rejectedSection() {
  if (!DATA.rejected.length) return el("p", {}, "None: nothing that looked like a region was left alone.");
  const rows = DATA.rejected.map((one) => ({ text: [one.node, one.where, one.code, one.reason].join(" "),
    cells: [el("span", {}, one.where || "no source line", one.code && el("br", {}), one.code && el("code", {}, one.code)), one.reason, el("code", {}, one.node)] }));
  return table(["source line", "why it was left alone", "node"], rows, "Rejected candidates");
}

function programsSection() {
  const rows = DATA.variants.map((variant) => ({ text: variant.name, cells: [variant.name, String(variant.rows), percent(variant.share), String(variant.nodes), String(variant.reads), String(variant.writes)] }));
  const levels = { step: "computed once a timestep", invariant: "computed once a trajectory" };
  const hoisted = Object.entries(levels).map(([level, says]) => [says, DATA.hoisted.filter((value) => value.level === level)]).filter((pair) => pair[1].length);
  return [table(["program", "#rows", "#MACs", "#nodes", "#reads", "#writes"], rows, "Programs"),
    hoisted.map(([says, values]) => el("p", { class: "soft" }, `Outside the programs, ${says}: ${count(values.length, "value")}, ${amount(sum(values.map((value) => value.bytes)))}.`))];
}

function passesSection() {
  const { passes, left_out } = DATA.graphs;
  const list = DATA.passes.map((pass) => {
    const nodes = pass.before === pass.after ? count(pass.before, "node") : `${pass.before} to ${pass.after} nodes`;
    const says = [el("b", { class: "mono" }, pass.name), ` ${digits(pass.ms)} ms, ${nodes} `];
    const graphs = passes[pass.name];
    if (!graphs) return el("div", { class: "pass plain", "data-text": pass.name }, says, left_out.includes(pass.name) && el("span", { class: "tag" }, "its graphs are too long for this page: MOECA_DUMP=folder writes them"));
    const body = el("div", {});
    const details = el("details", { class: "pass", "data-text": pass.name, "data-pass": pass.name }, el("summary", {}, says, el("span", { class: "tag" }, "changed the graph"), " ", el("span", { class: "tag found", hidden: "" })), body);
    details.addEventListener("toggle", () => details.open && showGraphs(body, graphs, "changes"));
    return details;
  });
  const kept = Object.keys(passes).length ? "In the order in which they ran. Open one that changed the graph to see it before and after." : "No graphs were kept. explain(model, *inputs, html=...) with the model's inputs keeps them.";
  return [el("p", { class: "soft" }, kept), list];
}
