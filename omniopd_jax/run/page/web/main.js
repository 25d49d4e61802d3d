// The page: header, verdict, health, curves, agreement, audits, evaluation answers, settings.

let Data = null;
const currentRun = () => Data.runs[Math.min(Data.runs.length - 1, Number(State.run) || 0)];
const section = (id, title, ...children) => el("section", { id, "aria-labelledby": id + "-title" }, el("h2", { id: id + "-title" }, title), children);

function applyTheme() {
  const dark = State.theme === "dark" || (State.theme === "auto" && matchMedia("(prefers-color-scheme: dark)").matches);
  document.documentElement.dataset.theme = dark ? "dark" : "light";
}

function header() {
  const sections = [["verdict", "Verdict"], ["health", "Health"], ["curves", "Curves"], ["agreement", "Agreement"], ["audits", "Audits"], ["answers", "Answers"], ["settings", "Settings"]];
  const jump = (id) => (e) => { e.preventDefault(); const to = document.getElementById(id); to.scrollIntoView(); to.setAttribute("tabindex", "-1"); to.focus({ preventScroll: true }); };
  return [el("p", { class: "brand" }, "omniopd report"),
    el("nav", { "aria-label": "Sections" }, el("ul", {}, sections.map(([id, title]) => el("li", {}, el("a", { href: "#" + id, on: { click: jump(id) } }, title))))),
    el("div", { class: "controls" },
      Data.runs.length > 1 && choice("Run", "run", Data.runs.map((r, i) => [i, r.label]), { audit: "", step: "" }),
      choice("Theme", "theme", [["auto", "as the system"], ["light", "light"], ["dark", "dark"]]))];
}

function verdictSection() {
  return section("verdict", "Verdict", el("div", { class: "cards" }, Data.runs.map((run) => el("div", { class: "card" },
    el("h3", {}, el("bdi", {}, run.label)), el("p", { class: "headline" }, run.verdict.headline),
    el("dl", { class: "facts" }, run.verdict.facts.map(([name, value]) => el("div", {}, el("dt", {}, name), el("dd", {}, value)))),
    run.notes.length ? el("ul", { class: "notes" }, run.notes.map((n) => el("li", {}, n))) : null))),
    el("p", { class: "hint" }, `Made ${Data.made}. A call is one request to the teacher; one call may bring several continuations.`));
}

function healthSection() {
  const many = Data.runs.length > 1, found = Data.runs.flatMap((run) => run.health.map((f) => [run, f]));
  const cards = found.map(([run, f]) => el("li", { class: "finding " + (f.now ? "now" : "past") },
    el("h3", {}, many && [el("bdi", {}, run.label), ": "], f.check.replaceAll("_", " "), el("span", { class: "badge" }, f.now ? "warns now" : "warned earlier")),
    el("p", {}, f.saw + "."),
    el("p", {}, el("b", {}, "Why it matters: "), f.why + "."), el("p", {}, el("b", {}, "What to turn: "), f.turn + "."),
    el("p", { class: "hint" }, `Steps ${f.first} to ${f.last}, ${f.steps} of ${run.curves.x.step.length}.`)));
  const steps = Data.runs.some((run) => run.curves.x.step.length);
  return section("health", "Health", cards.length ? el("ul", { class: "findings" }, cards) : el("p", { class: "fine" }, steps ? "No check warned at any step." : "Nothing to check yet."));
}

function curvesSection(run) {
  const shown = CHARTS.map(([title, unit, keys]) => metricChart(Data.runs, title, unit, keys)).filter(Boolean);
  const own = run.curves.x.step.length ? [phaseChart(run), costChart(run)].filter(Boolean) : [];
  return section("curves", "Curves", el("div", { class: "filters" }, choice("Against", "x", AXES)),
    el("div", { class: "grid" }, shown, own.length && Data.runs.length > 1 ? null : own),
    own.length && Data.runs.length > 1 ? [el("h3", {}, "Of ", el("bdi", {}, run.label), " alone"), el("div", { class: "grid" }, own)] : null,
    valuesTable(run));
}

/** All metrics as a table, made when it is opened. */
function valuesTable(run) {
  const place = el("div", { class: "scroll", tabindex: "0", role: "region", "aria-label": "All metrics by step" });
  const details = el("details", { on: { toggle: () => {
    if (!details.open || place.firstChild) return;
    const names = Object.keys(run.curves.series);
    place.append(el("table", {}, el("thead", {}, el("tr", {}, el("th", { scope: "col" }, "step"), names.map((n) => el("th", { scope: "col" }, n)))),
      el("tbody", {}, run.curves.x.step.map((s, i) => el("tr", {}, el("th", { scope: "row" }, s), names.map((n) => el("td", {}, number(run.curves.series[n][i]))))))));
  } } }, el("summary", {}, "All metrics as a table"), place);
  return details;
}

function agreementSection(run) {
  const a = run.agreement, words = a.chance ? `Mean similarity ${number(a.own_mean)}; with another prompt's continuations ${number(a.chance_mean)} (${a.source}). Where the two look alike, the teacher's answer says nothing about this chunk.` : "";
  return section("agreement", "Agreement", el("p", { class: "lead" }, words), el("div", { class: "grid two" }, agreementCharts(run)));
}

function answersSection(run) {
  const steps = [...new Set(run.evaluations.map((e) => e.step))], before = new Map(), after = new Map();
  for (const e of run.evaluations) (e.step === steps[0] ? before : after).set(e.prompt_id, e);
  if (!run.evaluations.length) return section("answers", "Evaluation answers", el("p", {}, "This run kept no answers of an evaluation."));
  const kinds = { "": ["all", () => true], gained: ["wrong, then right", (b, e) => !b.correct && e && e.correct], lost: ["right, then wrong", (b, e) => b.correct && e && !e.correct], wrong: ["wrong at the end", (b, e) => !(e || b).correct] };
  const rows = [...before.values()].filter((b) => (kinds[State.answers] || kinds[""])[1](b, after.get(b.prompt_id)));
  const mark = (e) => (e ? gradeMark(e.correct) : "\u2013");
  const list = el("ol", { class: "answers" }), text = (i) => (i >= 0 ? run.texts[i] : "");
  const show = (from) => {
    for (const b of rows.slice(from, from + 50)) {
      const e = after.get(b.prompt_id);
      list.append(el("li", {}, el("details", {}, el("summary", {}, el("bdi", { class: "text" }, shorten(text(b.question), 140)), " ", mark(b), e ? [" \u2192 ", mark(e)] : null),
        el("p", {}, el("b", {}, "right answer: "), el("bdi", {}, text(b.answer))),
        el("p", {}, el("b", {}, `step ${b.step}: `), el("bdi", { class: "text" }, text(b.text))), e && el("p", {}, el("b", {}, `step ${e.step}: `), el("bdi", { class: "text" }, text(e.text))))));
    }
    if (rows.length > from + 50) more.hidden = false; else more.hidden = true;
  };
  const more = el("button", { type: "button", on: { click: () => show(list.children.length) } }, "Show 50 more");
  show(0);
  return section("answers", "Evaluation answers", el("p", { class: "lead" }, `The same prompts after ${steps[0]} and after ${steps[steps.length - 1]} updates.` + (run.left_out["evaluation answers"] ? ` ${run.left_out["evaluation answers"].toLocaleString("en")} answers are not on this page.` : "")),
    el("div", { class: "filters" }, choice("Show", "answers", Object.entries(kinds).map(([key, [label]]) => [key, label]))),
    el("p", { class: "count", role: "status" }, plural(rows.length, "prompt")), list, more);
}

function settingsSection(run) {
  const table = (columns, rows, label) => el("div", { class: "scroll", tabindex: "0", role: "region", "aria-label": label }, el("table", {},
    el("thead", {}, el("tr", {}, columns.map((c) => el("th", { scope: "col" }, el("bdi", {}, c))))),
    el("tbody", {}, rows.map(([key, ...values]) => el("tr", {}, el("th", { scope: "row" }, key), values.map((v) => el("td", {}, el("bdi", {}, v === null || v === undefined ? "\u2013" : v))))))));
  const left = Object.entries(run.left_out).map(([what, n]) => `${n.toLocaleString("en")} ${what}`).join(", ");
  return section("settings", "Settings",
    Data.differ.length ? [el("h3", {}, "Settings that differ"), table(["key", ...Data.runs.map((r) => r.label)], Data.differ, "Settings that differ")] : null,
    el("details", {}, el("summary", {}, `All settings of ${visible(run.label)}`), table(["key", "value"], Object.entries(run.config), "All settings")),
    el("p", { class: "hint" }, left ? `Not on this page: ${left}. ${Data.rule}` : `All records of the run are on this page. ${Data.rule}`));
}

/** Draws the whole page anew: at the start, and when the run, the axis or the theme changes. */
function render() {
  applyTheme();
  drawn.length = 0;
  const run = currentRun(), place = scrollY;
  Browser.open = null;
  fill(document.getElementById("top"), header());
  fill(document.getElementById("main"), verdictSection(), healthSection(), curvesSection(run), agreementSection(run),
    browserSection(run), answersSection(run), settingsSection(run));
  updateBrowser(run);
  drawAll();
  scrollTo(0, place);
}

function prepare(data) {
  const names = data.runs.map((r) => r.name);
  for (const run of data.runs) {
    run.label = names.filter((n) => n === run.name).length > 1 ? run.folder : run.name;
    run.unpriced = run.verdict.facts.some(([name, value]) => name === "teacher cost" && value === "unknown");
    const all = run.completions.flatMap((c) => c.entropy).filter((h) => h > 0).sort((a, b) => a - b);
    run.entropyScale = Math.max(0.05, all.length ? all[Math.floor(0.99 * (all.length - 1))] : 1);
  }
}

/** With --watch: asks whether the run has written, and loads the page again, its state kept in the URL. */
function watch() {
  let typed = 0; // when: whoever types or chooses is not disturbed for some seconds
  for (const kind of ["input", "keydown", "pointerdown"]) addEventListener(kind, () => { typed = Date.now(); }, true);
  setInterval(async () => {
    try {
      const now = await (await fetch("/stamp")).text();
      if (now !== Data.watch && Date.now() - typed > 5000) location.reload();
    } catch { /* the server has gone; the page stays as it is */ }
  }, 3000);
}

async function start() {
  try {
    Data = await readData();
  } catch (error) {
    document.getElementById("loading").textContent = "This page's data could not be read: " + error;
    return;
  }
  prepare(Data);
  readState();
  listeners.push((changed) => {
    if (["run", "x", "theme", "answers"].some((key) => changed.has(key))) return renderKeepingFocus();
    if (changed.size === 1 && changed.has("audit")) return updateDetail();
    updateBrowser(currentRun());
  });
  try {
    render();
  } catch (error) {
    document.getElementById("loading").textContent = "This page could not be drawn: " + error;
    throw error;
  }
  if (!State.audit && currentRun().audits.length) State.audit = "";
  document.addEventListener("keydown", pageKeys);
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", render);
  addEventListener("hashchange", () => { readState(); render(); });
  let waiting = 0, width = innerWidth;
  addEventListener("resize", () => { if (innerWidth !== width) { width = innerWidth; clearTimeout(waiting); waiting = setTimeout(drawAll, 150); } });
  if (Data.watch) watch();
  document.documentElement.dataset.ready = String(Math.round(performance.now()));
}

function renderKeepingFocus() {
  const name = document.activeElement && document.activeElement.name;
  render();
  const again = name && document.querySelector(`[name="${CSS.escape(name)}"]`);
  if (again) again.focus();
}

start();
