"""The page's figures: verdict, curves against four axes, histograms, findings by step."""

import math

from omniopd_jax.run import estimate, health
from omniopd_jax.teachers import wire

BINS = 20


def curves(folder) -> dict:
    """{"x": {axis: values}, "series": {metric: values or None}} by step; axes are cumulative at a step's end."""
    rows, cfg = folder.rows, folder.config
    per = (cfg.get("prompts_per_step") or 0) * (cfg.get("num_generations") or 0)
    added = {
        # with `sft` the responses are the teacher's, and nothing is sampled
        "student_tokens": [
            (_number(r.get("completions/mean_length")) or 0) * per if "time/rollout" in r else 0 for r in rows
        ],
        "teacher_tokens": [sum(_number(r.get(f"teacher/tokens_{k}")) or 0 for k in ("in", "out")) for r in rows],
        "usd": [_number(r.get("teacher/cost_usd")) or 0 for r in rows],
    }
    x = {"step": [r["step"] for r in rows]}
    for name, values in added.items():
        total, x[name] = 0.0, []
        for value in values:
            total += value
            x[name].append(round(total, 6))
    keys = dict.fromkeys(k for r in rows for k in r if k != "step" and _number(r[k]) is not None)
    series = {key: [_number(r.get(key)) for r in rows] for key in keys}
    anchor = [_anchor_part(r, folder) for r in rows]
    if any(a is not None for a in anchor):
        series["loss/anchor"] = anchor
        series["loss/chunks"] = [None if a is None or "loss" not in r else r["loss"] - a for a, r in zip(anchor, rows)]
    spread = [math.sqrt(v) if v is not None and v >= 0 else None for v in series.get("audit/pi_hat_var", [])]
    if spread:
        series["audit/pi_hat_spread"] = spread
    return {"x": x, "series": {k: [_short(v) for v in values] for k, values in series.items()}}


def _anchor_part(row: dict, folder) -> float | None:
    """What the anchor adds to the loss: kl_coef times the KL, divided as the config says; None where that can't be
    told."""
    cfg = folder.config
    if len(folder.parts) != 1 or any(o is None or o.cut or "prefixes" in o.asks for o in folder.parts.values()):
        return None  # a mix weighs several anchors; of texts by the teacher no metric says how long they are
    kl, coef = _number(row.get("anchor/kl_ref_to_student_exact")), cfg.get("anchor.kl_coef")
    length, share = _number(row.get("completions/mean_length")), _number(row.get("audit/token_fraction"))
    if kl is None or coef is None or length is None or not cfg.get("max_completion_length"):
        return None
    if cfg.get("objective.normalizer") == "separate_means":
        return coef * kl
    unaudited = 1.0 if cfg.get("anchor.scope") == "all" or share is None else 1 - share
    return coef * kl * unaudited * length / cfg["max_completion_length"]


def findings(folder) -> list[dict]:
    """Each check that tripped: first and last step, how many steps, whether it still does, and its words at the end."""
    rows = folder.rows
    by_step: list[dict[int, list]] = [{}, {}]
    for group, records in zip(by_step, (folder.audits, folder.completions)):
        for record in records:
            group.setdefault(record["step"], []).append(record)
    out, texts = {}, [_comparable(a) for a in folder.audits]
    folder_ok, history = all(texts), health.History()
    for i, row in enumerate(rows):
        history.add(row)
        recent = range(row["step"] - health.WINDOW + 1, row["step"] + 1)
        audits, completions = ([r for step in recent for r in group.get(step, ())] for group in by_step)
        audits = audits if folder_ok else [a for a in audits if _comparable(a)]
        for f in health.check(rows[: i + 1], audits, completions, folder.config, history=history):
            known = out.setdefault(f.check, {"check": f.check, "first": row["step"], "steps": 0})
            known |= {"last": row["step"], "steps": known["steps"] + 1, "saw": f.saw, "why": f.why, "turn": f.turn}
    for f in out.values():
        f["now"] = f["last"] == rows[-1]["step"]
    return sorted(out.values(), key=lambda f: (not f["now"], f["first"]))


def _comparable(a: dict) -> bool:
    return all(k in a for k in ("kept", "pi_hat"))


def verdict(folder, found: list[dict]) -> dict:
    """{"headline": text, "facts": [[label, value], ...]}: before and after, interval, cost, time, what the checks
    say."""
    points = health.evaluations(folder.rows)
    before, after = folder.summary.get("accuracy_before"), folder.summary.get("accuracy_after")
    if before is None and points and points[0][0] == 0:
        before = points[0][1]
    if after is None and points and points[-1][0] > 0:
        after = points[-1][1]
    n, facts = health.evaluated(folder.rows) or 0, []
    headline = f"{folder.objective}: {folder.state()}"
    if before is not None:
        facts.append(["accuracy before", f"{before:.1%}"])
    if after is not None:
        facts.append(["accuracy after" if folder.summary else f"accuracy at step {points[-1][0]}", f"{after:.1%}"])
    if before is not None and after is not None:
        newest = None if folder.summary.get("accuracy_after") is not None else points[-1][0]
        gain, (half, sure) = 100 * (after - before), _half_width(folder, before, after, n, newest)
        told = f"{gain:+.1f} points" + (f" ± {half:.1f}" if half is not None else "")
        facts.append(["change (95% interval)", told])
        word = ("better" if gain > 0 else "worse") if sure else "no change beyond noise"
        headline = f"{folder.objective}: {before:.1%} to {after:.1%}, {word}; {folder.state()}"
    state, usd = _cost(folder)
    facts.append(["teacher cost", "none" if state == estimate.FREE else estimate.dollars(usd, state)])
    facts.append(["teacher calls", f"{_total(folder, 'teacher/calls'):,.0f}"])
    tokens = [_total(folder, f"teacher/tokens_{k}") for k in ("in", "out")]
    facts.append(["teacher tokens in / out", f"{tokens[0]:,.0f} / {tokens[1]:,.0f}"])
    facts.append(["time", _duration(_total(folder, "time/step"))])
    now = [f["check"] for f in found if f["now"]]
    facts.append(["health", f"{len(now)} of {len(health.CHECKS)} checks warn" if now else "no check warns"])
    return {"headline": headline, "facts": facts}


def _total(folder, key: str) -> float:
    """Over the steps; of a run that has ended by its summary, which also has what no step counted (a kill, a probe)."""
    steps = sum(_number(r.get(key)) or 0 for r in folder.rows)
    return max(steps, _number((folder.summary or {}).get(key)) or 0)


def _half_width(folder, before: float, after: float, n: int, last: int | None) -> tuple[float | None, bool]:
    """(half of the 95% interval of the change, in points; whether it is sure); paired by prompt where both evaluations'
    answers were kept, and then sure by the exact test of McNemar.

    `last`: updates before the later of the two; None: the newest that was kept.
    """
    steps = sorted({e["step"] for e in folder.evaluations})
    if last is not None:  # of a run that goes on, the next one's answers may be there before its metrics
        steps = [s for s in steps if s <= last]
    if len(steps) > 1:
        ends = ([e for e in folder.evaluations if e["step"] == s] for s in (steps[0], steps[-1]))
        first, last = ({e["prompt_id"]: e["correct"] for e in answers} for answers in ends)
        both = [(first[p], last[p]) for p in first.keys() & last.keys()]
        if len(both) == n:
            won, lost = sum(b and not a for a, b in both), sum(a and not b for a, b in both)
            # Wald's interval with half a pair more either way (Agresti and Min, 2005): never of no width
            half = 196 * math.sqrt(won + lost + 1 - (won - lost) ** 2 / (n + 2)) / (n + 2)
            return half, _differs(won, lost)
    if not n:
        return None, False
    shares = ((accuracy * n + 1) / (n + 2) for accuracy in (before, after))  # Agresti and Caffo (2000)
    half = 196 * math.sqrt(sum(p * (1 - p) for p in shares) / (n + 2))
    return half, 100 * abs(after - before) > half


def _differs(won: int, lost: int) -> bool:
    """Whether McNemar's test calls so many pairs either way different at 5%: exact, or by the normal law for many."""
    n, fewer = won + lost, min(won, lost)
    if n > 1000:
        return (n - 2 * fewer - 1) / math.sqrt(n) > 1.96
    return 2 * sum(math.comb(n, k) for k in range(fewer + 1)) / 2**n < 0.05


def _cost(folder) -> tuple[str, float]:
    """(the state of the price, dollars): FREE where nobody who takes money was asked."""
    usd = _total(folder, "teacher/cost_usd")
    c, known = folder.config, [r["teacher/price_known"] for r in folder.rows if "teacher/price_known" in r]
    asked = any(own is None or own.asks for own in folder.parts.values())
    if not (known or usd) and (not asked or c.get("teacher.provider") not in (None, *estimate.CLIENTS)):
        return estimate.FREE, usd
    paid = asked and c.get("teacher.provider") in estimate.CLIENTS
    if known:
        paid = not known[-1]
    elif paid:
        own = wire.own_server(c.get("teacher.base_url") or "https://a.service")
        paid = not (usd or own or c.get("teacher.price_input", -1) >= 0)
    return (estimate.UNKNOWN if paid and not usd else estimate.KNOWN), usd


def histogram(values: list[float]) -> list[float]:
    """Shares in BINS equal bins of [0, 1]; the last one holds 1."""
    out = [0] * BINS
    for v in values:
        out[min(BINS - 1, max(0, int(v * BINS)))] += 1
    return [round(c / len(values), 5) for c in out] if values else out


def agreement(folder, phi) -> dict:
    """Histograms of similarity: own continuations, another prompt's, chunks of right and of wrong answers.

    Args:
      phi: of the run's similarity, to compute chance where the run kept none; None: leave it out.
    """
    kept = [a for a in folder.audits if a["similarity"]]
    own = [s for a in kept for s in a["similarity"]]
    by_chance = [s for a in kept for s in a.get("chance") or ()]
    source = "recorded by the run"
    if not by_chance and phi is not None and kept:
        by_chance, source = _chance(kept, phi), "computed for this page"
    out = {"own": histogram(own), "own_mean": _mean(own), "own_count": len(own)}
    if by_chance:
        out |= {"chance": histogram(by_chance), "chance_mean": _mean(by_chance), "chance_count": len(by_chance)}
        out["source"] = source
    graded = [
        (a["k_sem"] / a["n"], bool(a["grade"] > 0)) for a in kept if a.get("n") and _number(a.get("grade")) is not None
    ]
    if graded:
        for name, wanted in (("right", True), ("wrong", False)):
            values = [k for k, grade in graded if grade == wanted]
            out |= {name: histogram(values), f"{name}_mean": _mean(values), f"{name}_count": len(values)}
    return out


def _chance(audits: list[dict], phi) -> list[float]:
    """Similarity of chunks with continuations of another prompt of the same step, at most 2,000."""
    steps: dict[int, list] = {}
    for a in audits:
        steps.setdefault(a["step"], []).append(a)
    own, others, each = [], [], max(1, 2000 // len(steps))
    for group in steps.values():
        for i, a in enumerate(group[:each]):
            other = group[(i + len(group) // 2) % len(group)]
            if other.get("prompt_id") != a.get("prompt_id") and other["continuations"]:
                own.append(a["chunk"])
                others.append(other["continuations"][0])
    return [float(v) for v in phi(own, others)] if own else []


def _mean(values: list[float]) -> float | None:
    return round(sum(values) / len(values), 4) if values else None


def _duration(seconds: float) -> str:
    hours, rest = divmod(int(seconds), 3600)
    return f"{hours} h {rest // 60} min" if hours else f"{rest // 60} min {rest % 60} s"


def _number(value) -> float | None:
    if isinstance(value, bool):
        return float(value)
    return value if isinstance(value, (int, float)) and math.isfinite(value) else None


def _short(value: float | None):
    return None if value is None else float(f"{value:.6g}")
