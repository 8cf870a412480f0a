// Puts the page together, and answers the slider, the search and the keyboard.
const state = { step: 0, lines: new Set(), found: {} };

const SECTIONS = [
  ["step", "What the step does", stepSection],
  ["schedule", "Schedule", scheduleSection],
  ["time", "Milliseconds of each step", timeSection],
  ["quality", "Quality", qualitySection],
  ["images", "Images", imagesSection],
  ["regions", "Regions", regionsSection],
  ["rejected", "Rejected candidates", rejectedSection],
  ["programs", "Programs", programsSection],
  ["passes", "Passes", passesSection],
];

function build() {
  const { model, schedule, steps } = DATA;
  byId("title").textContent = model.model || "A model";
  document.title = `${model.model || "model"}: moeca report`;
  const madeBy = schedule.made_by || "a schedule";
  const granularity = `granularity ${schedule.granularity}`;
  byId("subtitle").textContent = schedule.granularity && !madeBy.includes(granularity) ? `${madeBy}, ${granularity}` : madeBy;
  const shares = steps.map((_, step) => variantOf(step)).filter(Boolean).map((variant) => variant.share);
  const quality = schedule.predicted.psnr_db_holdout ?? schedule.predicted.psnr_db;
  const facts = [
    model.total_macs > 0 && ["MACs of a call", digits(model.total_macs / 1e9) + " G"],
    shares.length && ["share of the MACs that runs", percent(mean(shares))],
    quality !== undefined && ["PSNR to uncached, as calibrated", digits(quality) + " dB"],
    ["regions", String(DATA.regions.length)],
    ["rejected candidates", String(DATA.rejected.length)],
    ["programs", String(DATA.variants.length)],
    ["state of a stream", amount(model.state_bytes)],
    model.graphs !== 1 && ["graphs", String(model.graphs)],
  ];
  byId("facts").append(...facts.filter(Boolean).map(([name, value]) => el("div", {}, el("dt", {}, name), el("dd", {}, value))));
  if (schedule.output_weights) byId("facts").after(el("p", { class: "soft" }, schedule.output_weights.line));
  if (model.breaks) byId("facts").after(el("pre", { class: "told" }, model.breaks));
  for (const [id, title, make] of SECTIONS) {
    const content = make();
    if (content === null) continue;
    byId("main").append(el("section", { id, "aria-labelledby": id + "-title" }, el("h2", { id: id + "-title" }, title), content));
    byId("sections").append(el("li", {}, el("a", { href: "#" + id }, title)));
  }
  byId("main").append(el("p", { class: "soft" }, `Fingerprint ${model.fingerprint}; ${count(model.nodes, "node")}; timestep input ${model.timestep || "not found"}, latent input ${model.latent || "not found"}. Keys: left and right for the step, / for the search.`));
}

function go(step) {
  state.step = Math.min(Math.max(step, 0), DATA.steps.length - 1);
  const slider = byId("slider");
  slider.value = state.step;
  slider.setAttribute("aria-valuetext", `step ${state.step} of ${DATA.steps.length}`);
  byId("where").textContent = `${state.step} / ${DATA.steps.length - 1}`;
  if (byId("told")) {
    byId("told").replaceChildren(...stepText());
    paintMap();
  }
  for (const redraw of charts) redraw();
  markRegions();
}

// "step 17" in the search moves the slider; the other words filter what is shown, and all of them have to be there.
// Words that only make a sentence of it are left aside: "which experts are skipped at step 17?"
const STEP = /\bsteps?\s*(\d+)\b/i;
const FILLERS = new Set("which what where who are is was were be at in on of the a an do does did all any and there show me".split(" "));
// Words for what a step does with a region, and how the page says it.
const STATES = [[/^skip/, "skipped"], [/^forecast/, "forecast"], [/^reus/, "reused"], [/^part(ial|ially|ly)?$/, "computed in part"], [/^comput/, "computed"]];
const stateOf = (word) => (STATES.find(([written]) => written.test(word)) || [])[1];

function find() {
  const step = askedStep();
  const { words, matches } = wanted();
  state.lines = new Set();
  if (words.length) DATA.graphs.lines.forEach((line, number) => matches(line) && state.lines.add(number));
  state.found = { "rejected candidate": 0, pass: 0 };
  for (const row of document.querySelectorAll("#rejected tbody tr")) {
    row.hidden = !matches(row.dataset.text);
    state.found["rejected candidate"] += !row.hidden;
  }
  for (const pass of document.querySelectorAll(".pass")) state.found.pass += searchPass(pass, words, matches);
  if (step !== null && step < DATA.steps.length) go(step);
  else markRegions();
}

function askedStep() {
  const step = byId("search").value.match(STEP);
  return step ? Number(step[1]) : null;
}

function wanted() {
  const written = byId("search").value.replace(STEP, " ").toLowerCase().split(/[\s?,;]+/).filter(Boolean);
  const words = written.filter((word) => !FILLERS.has(word));
  return { words, matches: (text) => words.every((word) => text.toLowerCase().includes(word)) };
}

// What a region does is searched too, so this is asked again at each step. Where the step does with no region what was
// asked, the regions that were meant stay as they are, and a sentence says what the step does with them.
function markRegions() {
  const { words } = wanted();
  const rows = document.querySelectorAll("#regions tbody tr");
  const has = (region, word) => regionText(region).toLowerCase().includes(word);
  const does = DATA.regions.map((region, column) => doing(actionOf(state.step, column), region));
  const hits = DATA.regions.map((region, column) => words.every((word) => has(region, word) || does[column].includes(stateOf(word) || word)));
  const meant = DATA.regions.map((region) => words.every((word) => stateOf(word) || has(region, word)));
  const n = sum(hits.map(Number));
  DATA.regions.forEach((_, column) => {
    const shown = n ? hits[column] : meant[column];
    byId("region-" + column).classList.toggle("hit", hits[column] && words.length > 0);
    byId("region-" + column).classList.toggle("dim", !shown);
    rows[column].hidden = !shown;
  });
  const isNone = !n && words.some(stateOf) && meant.includes(true);
  byId("hits").textContent = isNone ? none(words, does, meant) : hitText(words, n);
}

function hitText(words, n) {
  const asked = askedStep();
  if (asked !== null && asked >= DATA.steps.length) return `there is no step ${asked}: the last one shown is ${DATA.steps.length - 1}`;
  if (!words.length) return asked === null ? "" : `step ${asked}`;
  const plural = (noun, n) => `${n} ${n === 1 ? noun : noun === "pass" ? "passes" : noun + "s"}`;
  return Object.entries({ region: n, ...state.found }).map(([noun, n]) => plural(noun, n)).join(", ");
}

// "no experts are skipped at step 17: everything is computed"
function none(words, does, meant) {
  const nouns = words.filter((word) => !stateOf(word)).join(" ") || "region";
  const asked = [...new Set(words.map(stateOf).filter(Boolean))].join(" and ");
  const instead = [...new Set(does.filter((_, column) => meant[column]))].map((says) => (says === UNKNOWN.name || says === PAST.name ? says : `they are ${says}`)).join("; ");
  const all = does.every((says) => says === "computed") ? "everything is computed" : instead;
  return `no ${nouns} ${nouns.endsWith("s") ? "are" : "is"} ${asked} at step ${state.step}: ${all}`;
}

// Whether a pass has the words in its name or its graphs; an opened one is drawn again, with the lines marked.
function searchPass(details, words, matches) {
  const graphs = DATA.graphs.passes[details.dataset.pass];
  const lines = graphs && words.length ? graphs.flatMap((text) => DATA.graphs.texts[text]).filter((line) => state.lines.has(line)) : [];
  const tag = details.querySelector(".found");
  if (tag) {
    tag.hidden = !lines.length;
    tag.textContent = count(new Set(lines).size, "line") + " found";
    if (details.open) showGraphs(details.querySelector("div"), graphs, "changes");
  }
  details.hidden = !(matches(details.dataset.text) || lines.length);
  return !details.hidden;
}

function showFirstHit() {
  const hit = document.querySelector(".region.hit, #rejected tbody tr:not([hidden]), .pass:not([hidden])");
  if (hit) hit.scrollIntoView({ block: "center" });
}

function listen() {
  const slider = byId("slider");
  slider.max = DATA.steps.length - 1;
  slider.addEventListener("input", () => go(Number(slider.value)));
  byId("previous").addEventListener("click", () => go(state.step - 1));
  byId("next").addEventListener("click", () => go(state.step + 1));
  byId("search").addEventListener("input", find);
  byId("search").addEventListener("keydown", (event) => event.key === "Enter" && showFirstHit());
  document.addEventListener("keydown", (event) => {
    if (event.target.closest("input, button, summary, .scroll, .graph") || event.ctrlKey || event.metaKey || event.altKey) return;
    if (event.key === "/") event.preventDefault(), byId("search").focus();
    if (event.key === "ArrowLeft") go(state.step - 1);
    if (event.key === "ArrowRight") go(state.step + 1);
  });
  let width = 0;
  new ResizeObserver(() => {
    if (document.body.clientWidth !== width) for (const redraw of charts) redraw();
    width = document.body.clientWidth;
  }).observe(document.body);
}

build();
listen();
const asked = location.hash.match(/^#step=(\d+)$/);
go(asked ? Number(asked[1]) : 0);
