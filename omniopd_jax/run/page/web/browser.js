// The audit browser: a list to sort and filter, an answer with its tokens shaded by entropy, continuations on a click.

const PAGE = 100; // audits that the list shows at first, and more on request
const SORTS = {
  step: ["step", (a) => a.step], agreement: ["agreement (k_sem / n)", (a) => a.n ? a.k_sem / a.n : -1],
  entropy: ["entropy at the peak", (a) => a.entropy], length: ["response length", (a) => a.response_tokens],
  place: ["place in the response", (a) => a.peak], pi_hat: ["pi_hat", (a) => a.pi_hat], weight: ["weight", (a) => a.weight],
  latency: ["latency", (a) => a.latency_s], cost: ["cost", (a) => a.cost_usd],
};
const Browser = { run: null, shown: [], limit: PAGE, open: null, list: null, detail: null, count: null };

const auditId = (a) => a.step + "." + a.sample_id + "." + a.peak;
const isRight = (grade) => (grade === undefined || grade === null ? null : Number(grade) > 0);
const gradeWord = (grade) => ({ true: "right", false: "wrong", null: "not graded" })[isRight(grade)];
const gradeMark = (grade) => el("span", { class: "grade " + gradeWord(grade).replace(" ", "-") }, { right: "\u2713 ", wrong: "\u2717 ", "not graded": "" }[gradeWord(grade)] + gradeWord(grade));

function inRange(value, from, to) {
  if (from !== "" && !(value >= Number(from))) return false;
  return to === "" || value <= Number(to);
}

/** The run's audits that pass the filters, in order. */
function selectAudits(run) {
  const words = State.search.toLowerCase(), text = (i) => (i >= 0 ? run.texts[i] : "");
  const found = run.audits.filter((a) =>
    (State.step === "" || a.step === Number(State.step)) &&
    (State.grade === "" || gradeWord(a.grade) === State.grade) &&
    (State.kept === "" || String(a.kept !== false) === State.kept) &&
    inRange(a.n ? a.k_sem / a.n : NaN, State.agreementFrom, State.agreementTo) &&
    inRange(a.entropy, State.entropyFrom, State.entropyTo) &&
    inRange(a.response_tokens, State.lengthFrom, State.lengthTo) &&
    (!words || (a.prompt_id + "\n" + text(a.question ?? -1) + "\n" + text(a.chunk)).toLowerCase().includes(words)));
  const value = (SORTS[State.sort] || SORTS.step)[1], sign = State.order === "down" ? -1 : 1;
  const key = (a) => { const v = value(a); return Number.isFinite(v) ? v : Infinity * sign; };
  return found.map((a, i) => [key(a), i, a]).sort((p, q) => (p[0] === q[0] ? p[1] - q[1] : sign * (p[0] - q[0]))).map((p) => p[2]);
}

function browserSection(run) {
  const steps = [...new Set(run.audits.map((a) => a.step))];
  Browser.list = el("ol", { class: "audits", "aria-label": "Audits", on: { keydown: listKeys } });
  Browser.detail = el("article", { class: "detail", id: "detail", tabindex: "-1", "aria-label": "The chosen audit" });
  Browser.count = el("p", { class: "count", role: "status" });
  const order = el("button", { type: "button", class: "order", on: { click: () => setState({ order: State.order === "up" ? "down" : "up" }) } });
  Browser.order = order;
  const range = (title, from, to) => el("fieldset", {}, el("legend", {}, title), field("from", from, "number", "short"), field("to", to, "number", "short"));
  const wide = ["agreementFrom", "agreementTo", "entropyFrom", "entropyTo", "lengthFrom", "lengthTo"].some((k) => State[k] !== "");
  const form = el("form", { class: "filters", role: "search", "aria-label": "Filter audits", on: { submit: (e) => e.preventDefault() } },
    choice("Step", "step", [["", "all"], ...steps.map((s) => [s, s])]),
    choice("Answer", "grade", [["", "all"], ["right", "right"], ["wrong", "wrong"], ["not graded", "not graded"]]),
    choice("Audit", "kept", [["", "all"], ["true", "kept"], ["false", "dropped"]]),
    choice("Sort by", "sort", Object.entries(SORTS).map(([key, [label]]) => [key, label])), order,
    field("Prompt or text", "search", "search"),
    el("details", { open: wide }, el("summary", {}, "More filters"),
      range("Agreement, 0 to 1", "agreementFrom", "agreementTo"), range("Entropy, nats", "entropyFrom", "entropyTo"), range("Response, tokens", "lengthFrom", "lengthTo"),
      el("button", { type: "button", on: { click: clearFilters } }, "Clear all filters")));
  const left = run.left_out.audits ? ` ${plural(run.left_out.audits, "audit")} of the run ${run.left_out.audits === 1 ? "is" : "are"} not on this page.` : "";
  return el("section", { id: "audits", "aria-labelledby": "audits-title" },
    el("h2", { id: "audits-title" }, "Audits"),
    el("p", { class: "lead" }, "Each audit is one chunk of the student's answer and what the teacher wrote in its place. Keys: ", el("kbd", {}, "j"), " and ", el("kbd", {}, "k"), " open the next and the previous one, ", el("kbd", {}, "["), " and ", el("kbd", {}, "]"), " change the step, ", el("kbd", {}, "/"), " goes to the search." + left),
    form, Browser.count, el("div", { class: "browser" }, el("div", { class: "pane" }, Browser.list), Browser.detail));
}

function clearFilters() {
  const cleared = {};
  for (const key of ["step", "search", "grade", "kept", "agreementFrom", "agreementTo", "entropyFrom", "entropyTo", "lengthFrom", "lengthTo"]) cleared[key] = "";
  setState(cleared);
  for (const input of document.querySelectorAll(".filters input, .filters select")) if (input.name in cleared) input.value = "";
}

/** Fills the list anew, and the detail where another audit is meant. */
function updateBrowser(run, keepLimit) {
  if (Browser.run !== run || !keepLimit) Browser.limit = PAGE;
  Browser.run = run;
  Browser.shown = selectAudits(run);
  Browser.order.textContent = State.order === "up" ? "\u2191 rising" : "\u2193 falling";
  Browser.count.textContent = plural(Browser.shown.length, "audit") + (Browser.shown.length < run.audits.length ? ` of ${run.audits.length.toLocaleString("en")}` : "");
  const at = Browser.shown.findIndex((a) => auditId(a) === State.audit);
  if (at >= Browser.limit) Browser.limit = at + PAGE;
  const rows = Browser.shown.slice(0, Browser.limit).map((a) => el("li", {}, rowOf(run, a)));
  const more = Browser.shown.length - rows.length;
  if (more > 0) rows.push(el("li", {}, el("button", { type: "button", class: "more", on: { click: () => { Browser.limit += PAGE; updateBrowser(run, true); } } }, `Show more (${more.toLocaleString("en")} left)`)));
  fill(Browser.list, rows);
  updateDetail();
}

function rowOf(run, a) {
  const id = auditId(a), share = a.n ? a.k_sem / a.n : NaN;
  return el("button", { type: "button", class: "audit", "data-id": id, on: { click: () => openAudit(id, false) } },
    el("span", { class: "where" }, `step ${a.step} \u00b7 token ${a.peak}`, a.kept === false && " \u00b7 dropped"),
    el("bdi", { class: "text" }, shorten(run.texts[a.chunk], 90) || "(empty)"),
    el("span", { class: "figures" }, el("span", { class: "meter", style: { "--share": Number.isFinite(share) ? share : 0 } }),
      ` ${number(a.k_sem, 2)} of ${a.n} \u00b7 pi_hat ${number(a.pi_hat, 2)} `, a.grade !== undefined && gradeMark(a.grade)));
}

const shorten = (text, most) => { const flat = text.replace(/\s+/g, " "); return flat.length > most ? flat.slice(0, most) + "\u2026" : flat; };

function openAudit(id, focus) {
  setState({ audit: id });
  const row = [...Browser.list.querySelectorAll(".audit")].find((b) => b.dataset.id === id);
  if (row && focus) { row.focus(); row.scrollIntoView({ block: "nearest" }); }
  if (!focus && matchMedia("(max-width: 60rem)").matches) Browser.detail.scrollIntoView({ block: "start" });
}

function markOpen() {
  const a = openOne(Browser.run), id = a && auditId(a);
  for (const b of Browser.list.querySelectorAll(".audit")) {
    if (b.dataset.id === id) b.setAttribute("aria-current", "true");
    else b.removeAttribute("aria-current");
  }
}

/** Opens the audit that lies `by` places from the open one. */
function moveAudit(by) {
  if (!Browser.shown.length) return;
  const at = Browser.shown.indexOf(Browser.open);
  const next = Math.min(Browser.shown.length - 1, Math.max(0, at < 0 ? 0 : at + by));
  if (next >= Browser.limit) { Browser.limit = next + PAGE; updateBrowser(Browser.run, true); }
  openAudit(auditId(Browser.shown[next]), true);
}

function moveStep(by) {
  const steps = [...new Set(Browser.run.audits.map((a) => a.step))];
  if (!steps.length) return;
  const at = State.step === "" ? (by > 0 ? -1 : steps.length) : steps.indexOf(Number(State.step));
  const next = steps[Math.min(steps.length - 1, Math.max(0, at + by))];
  setState({ step: next });
  document.querySelector(".filters select[name=step]").value = String(next);
}

function listKeys(event) {
  const by = { ArrowDown: 1, ArrowUp: -1 }[event.key];
  if (!by) return;
  const rows = [...Browser.list.querySelectorAll("button")];
  const next = rows[Math.min(rows.length - 1, Math.max(0, rows.indexOf(document.activeElement) + by))];
  if (next) { next.focus(); next.scrollIntoView({ block: "nearest" }); }
  event.preventDefault();
}

function pageKeys(event) {
  if (event.ctrlKey || event.metaKey || event.altKey || /^(INPUT|SELECT|TEXTAREA)$/.test(event.target.tagName)) return;
  const act = { j: () => moveAudit(1), k: () => moveAudit(-1), "]": () => moveStep(1), "[": () => moveStep(-1),
    "/": () => document.querySelector(".filters input[name=search]").focus() }[event.key];
  if (act && Browser.run) { event.preventDefault(); act(); }
}

// --- the chosen audit

/** The audit that the URL names; without one the first of the list whose whole response is here. */
function openOne(run) {
  if (State.audit) return run.audits.find((one) => auditId(one) === State.audit);
  return Browser.shown.find((a) => a.whole >= 0) || Browser.shown[0];
}

function updateDetail() {
  markOpen();
  const run = Browser.run, a = openOne(run);
  if (Browser.open === a && a) return;
  Browser.open = a;
  if (!a) { fill(Browser.detail, el("p", { class: "empty" }, run.audits.length ? "Choose an audit from the list." : "This run has no audits.")); return; }
  const text = (i) => (i === undefined || i < 0 ? null : run.texts[i]);
  const whole = a.whole >= 0 ? run.completions[a.whole] : null;
  fill(Browser.detail,
    el("h3", {}, `Step ${a.step}, token ${a.peak}` + (a.response_tokens ? ` of ${a.response_tokens}` : "") + (a.response === undefined ? "" : `, response ${a.response + 1}`)),
    el("p", { class: "prompt" }, a.prompt_id),
    text(a.question) !== null && [el("h4", {}, "Question"), el("bdi", { class: "text" }, text(a.question))],
    el("h4", {}, "The student's answer ", gradeMark(a.grade)),
    text(a.answer) !== null && el("p", { class: "right-answer" }, "right answer: ", el("bdi", {}, text(a.answer))),
    whole ? answerOf(run, whole, a) : excerptOf(run, a),
    el("h4", {}, "This chunk"), factsOf(run, a),
    el("h4", {}, plural(a.continuations.length, "continuation") + " of the teacher, aligned with the chunk"),
    a.failures ? el("p", {}, plural(a.failures, "continuation") + " never arrived.") : null,
    continuationsOf(run, a));
}

function excerptOf(run, a) {
  const before = a.prefix_end >= 0 && a.prefix_end !== undefined ? run.texts[a.prefix_end] : "";
  const cut = a.prefix_characters > before.length;
  return [el("p", { class: "answer" }, cut && "\u2026", el("bdi", {}, before), el("span", { class: "chunk chosen" }, run.texts[a.chunk])),
    el("p", { class: "hint" }, a.prefix_end === undefined ? "This run kept only the chunk, not what comes before it." : "Only the end of what comes before the chunk was kept for this response.")];
}

/** The whole answer: each token shaded by its entropy, chunks outlined at their peaks. */
function answerOf(run, whole, a) {
  const starts = new Map(whole.chunks.map((c) => [c.peak, c])), parts = [];
  for (let t = 0; t < whole.pieces.length;) {
    const chunk = starts.get(t);
    const end = chunk ? Math.min(whole.pieces.length, t + whole.chunk_tokens) : t + 1;
    const tokens = [];
    for (; t < end; t++) if (whole.pieces[t] !== "") tokens.push(token(run, whole, t));
    parts.push(chunk ? chunkOf(run, whole, chunk, tokens, a) : tokens);
  }
  const notes = [];
  if (whole.hidden_tokens) notes.push(`${plural(whole.hidden_tokens, "more token")} not shown.`);
  if (whole.finished === false) notes.push("Cut at the length cap.");
  return [el("p", { class: "answer", dir: "auto" }, parts),
    el("p", { class: "hint" }, el("span", { class: "scale" }), ` entropy 0 to ${number(run.entropyScale)} nats; outlined: audited chunks, each starts at its peak. `, notes.join(" "))];
}

function token(run, whole, t) {
  const h = whole.entropy[t], level = Math.min(9, Math.round(9 * Math.sqrt(Math.max(0, h) / run.entropyScale)));
  return el("span", { class: "t h" + level, title: `token ${t}: ${number(h, 2)} nats` }, whole.pieces[t]);
}

function chunkOf(run, whole, chunk, tokens, a) {
  const audit = run.audits.find((one) => one.whole === a.whole && one.peak === chunk.peak);
  const chosen = audit === a, told = `chunk at token ${chunk.peak}, k_sem ${number(chunk.k_sem, 2)} of ${chunk.n}, weight ${number(chunk.weight, 3)}`;
  const sign = chunk.kept === false ? "dropped" : chunk.weight > 0 ? "up" : chunk.weight < 0 ? "down" : "still";
  if (!audit) return el("span", { class: "chunk " + sign, title: told + "; its continuations are not on this page" }, tokens);
  const go = () => openAudit(auditId(audit), false);
  return el("span", {
    class: `chunk ${sign}${chosen ? " chosen" : ""}`, role: "button", tabindex: "0", title: told, "aria-pressed": String(chosen),
    on: { click: go, keydown: (e) => { if (e.key === "Enter" || e.key === " ") { e.preventDefault(); go(); Browser.detail.focus(); } } },
  }, tokens);
}

function factsOf(run, a) {
  const rows = [
    ["k_sem", `${number(a.k_sem, 2)} of ${a.n}`], ["pi_hat", number(a.pi_hat, 3)], ["pi_bar", number(a.pi_bar, 3)], ["weight", number(a.weight, 3)],
    ["entropy at the peak", number(a.entropy, 2) + " nats"], ["latency", number(a.latency_s, 2) + " s"],
    ["cost", a.cost_usd ? "$" + Number(a.cost_usd.toPrecision(3)) : run.unpriced ? "unknown" : "$0"],
    a.prefix_perplexity !== undefined && ["prefix's perplexity", number(a.prefix_perplexity, 2)],
    a.chance && ["similarity by chance", number(a.chance.reduce((s, v) => s + v, 0) / a.chance.length, 2)],
    ["counts", a.kept === false ? "no: too few continuations, or too stale" : "yes"],
  ];
  return el("dl", { class: "facts" }, rows.filter(Boolean).map(([name, value]) => el("div", {}, el("dt", {}, name), el("dd", {}, value))));
}

function continuationsOf(run, a) {
  const student = run.texts[a.chunk], columns = Math.max(24, Math.floor((Browser.detail.clientWidth - 48) / 8.5));
  const groups = new Map();
  a.continuations.forEach((text, i) => { if (!groups.has(text)) groups.set(text, []); groups.get(text).push(i); });
  return el("ol", { class: "continuations" }, [...groups].map(([text, places]) => {
    const similarity = a.similarity[places[0]], teacher = run.texts[text];
    const who = "No. " + places.map((i) => i + 1).join(", ");
    return el("li", {}, el("p", { class: "who" }, who, el("b", {}, ` similarity ${number(similarity, 2)}`), teacher === student && " \u00b7 the same text"),
      el("p", { class: "only-spoken" }, teacher),
      el("div", { class: "aligned", "aria-hidden": "true" }, teacher === student ? el("p", { class: "same-text" }, teacher) : alignedBlocks(student, teacher, columns)));
  }));
}
