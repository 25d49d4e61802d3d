"""The real model's grid: methods, budgets, the order in which cells are run, and what each run is measured by."""

import dataclasses
import pathlib

from benchmarks import sides
from benchmarks.equal_cost import cells as small
from benchmarks.grid import command, page
from benchmarks.grid import runs as g
from benchmarks.grid.runs import Cell, Grid, Method
from benchmarks.real import prepare, server
from benchmarks.real_model import forgetting
from configs import smollm2
from omniopd_jax import hf
from omniopd_jax.teachers import probe
from omniopd_jax.teachers.prices import listed_price

VERDICT = probe.verdict
SAMPLES = 4  # answers that a line keeps: to the first problems of the test split
VLLM = ("--dtype", "bfloat16")  # 5 s for the texts of a step that take 10 in float32
FACTS = pathlib.Path(__file__).with_name("facts.jsonl")
LOCAL = {"teacher.provider": "local", "teacher.model": str(prepare.ROOT / "teacher"), "teacher.tokenizer": ""}
CUT = small.CUT | {"continuation.max_tokens": 96, "continuation.cut": "peak"}
CONTEXT = small.CONTEXT | {"num_generations": 1}
GROUP = {"objective.name": "grpo", "num_generations": 4}
OMNI = 3_333  # of a step of OmniOPD with 4 prompts

METHODS = {
    "sft": Method("cross-entropy on the teacher's whole solutions", small.MEAN | {"objective.name": "sft"}, 25, OMNI,
                  texts=2),
    "cont_peak": Method("continuation, cut at the highest entropy", CUT, 15, OMNI),
    "context": Method("context: the frozen student with a solution scores, forward KL", CONTEXT, 36, OMNI),
    "omni": Method("OmniOPD as published: no baseline", {"objective.advantage": "none"}, 4, OMNI, texts=4),
    "omni_baseline": Method("OmniOPD with the batch's mean as baseline", {}, 4, OMNI, texts=4),
    "omni_m1": Method("OmniOPD with the baseline, one chunk a response (M = 1)", {"audit.num_chunks": 1}, 14, OMNI,
                      texts=4, like="omni_baseline"),
    "omni_m1_loose": Method("the same with a quarter of the anchor, as it covers four times what is audited",
                            {"audit.num_chunks": 1, "anchor.kl_coef": 0.025}, 14, OMNI, texts=4, like="omni_baseline"),
    "opd": Method("white box: reverse KL by the sampled token", LOCAL | {"objective.name": "opd"} | small.NO_ANCHOR, 4,
                  OMNI, buys=False),
    "grpo": Method("no teacher: a right answer is worth 1, 2 prompts x 4", GROUP | small.NO_ANCHOR, 2, OMNI,
                   buys=False),
    "constant": Method("control: no teacher, weight 1 on the same chunks", {"objective.name": "constant"}, 4, OMNI,
                       buys=False, like="omni"),
}  # fmt: skip
LATER = "omni_m1_loose"  # added with `omni_m1` seen: one seed
ADDED = ("omni_m1", LATER)  # to the plan's eight methods: their second halves and seeds come last
FOREIGN = ("sft", "cont_peak", "omni_baseline")  # what is run with the foreign teacher
LONG_UPDATES = 60
LONG = {
    f"long_{name}": dataclasses.replace(
        METHODS[name], about=f"{LONG_UPDATES} updates: {METHODS[name].about}", like=name, updates=LONG_UPDATES
    )
    for name in ("omni", "opd")
}
BY_INSTRUCTION = {"omni_instruct": dataclasses.replace(
    METHODS["omni_baseline"], about="omni_baseline, its teacher asked by instruction: equal updates, not equal tokens",
    overrides={"teacher.continuation": "instruct"}, like="omni_baseline", updates=30)}  # fmt: skip
# the teacher: the student after fine-tuning, Gemma-3-270M after the same, or as it is, with worked examples
WORLDS = ("teacher", "gemma3_tuned", "gemma3")
VARIANTS = {"gemma3_tuned": "gemma_tuned", "gemma3": "gemma"}  # of configs/smollm2.py
TITLES = ("## The fine-tuned teacher", "## A foreign teacher that knows the task: Gemma-3-270M, fine-tuned",
          "## A foreign teacher that does not: Gemma-3-270M with worked examples")  # fmt: skip


def recipe(world: str, method: Method, seed: int):
    """configs/smollm2.py with a teacher, a method's settings and its number of prompts."""
    cfg = smollm2.get_config(VARIANTS.get(world))
    cfg.update_from_flattened_dict(method.overrides)
    cfg.data.fields.solution = ""  # the teacher's are bought
    cfg.seed, cfg.prompts_per_step = seed, method.prompts
    cfg.micro_batches = g.micro_batches(cfg.prompts_per_step * cfg.num_generations)
    cfg.optimizer.schedule, cfg.optimizer.warmup_steps = "constant", 0  # a smaller budget is a prefix of a larger one
    swept = (world, seed) == (GRID.swept_in, GRID.sweep_seed) and not method.like
    cfg.eval.sets = (str(prepare.ROOT / "data" / "validation.jsonl"),) * swept + (str(FACTS),)
    if method.updates == LONG_UPDATES:
        cfg.eval.every = 20
    cfg.log.tensorboard, cfg.log.completions_per_step = False, 0
    return cfg


class Served:
    """vLLM with the teacher that was asked for last, started when it is needed; a `with` ends it."""

    def __init__(self):
        self._server, self._world = None, ""

    def settings(self, cell: Cell) -> dict:
        """The address, for a method that asks a text teacher."""
        prepare.student()
        prepare.data()
        # the probe refuses this teacher by instruction, rightly: what 30 updates of it come to is asked all the same
        probe.verdict = (lambda text, mode: "unclear") if cell.method in BY_INSTRUCTION else VERDICT
        if not GRID.methods[cell.method].buys:
            prepare.teacher()
            return {}
        if cell.world != self._world:
            self.__exit__()
            prepare.server_environment()
            self._server = server.vllm(prepare.TEACHERS[cell.world](), *VLLM, name=cell.world, seqs=128)
            self._server.start()
            self._world = cell.world
        return {"teacher.base_url": self._server.url}

    def __enter__(self) -> "Served":
        return self

    def __exit__(self, *_) -> None:
        if self._server:
            self._server.stop()
        self._server, self._world = None, ""


SERVED = Served()


def measured(folder: pathlib.Path, cfg, updates: int) -> dict:
    """What else a line says of the student after so many updates: answers that were cut or have no number, the facts
    that are known, perplexity of ordinary text, and the first answers."""
    tokenizer = hf.load_tokenizer(cfg.student.path)
    answers, steps = (g.read(folder / name) for name in ("evaluations.jsonl", "metrics.jsonl"))
    answers = [r for r in answers if r["step"] == updates][-cfg.eval.num_prompts :]
    texts = [r["text"] for r in answers]
    lengths = [len(tokenizer(text, add_special_tokens=False)["input_ids"]) for text in texts]
    facts = {r["eval/updates"]: r["eval/accuracy/facts"] for r in steps if "eval/accuracy/facts" in r}
    return {
        "cut": round(sum(n >= cfg.max_completion_length - 1 for n in lengths) / len(texts), 4),
        "no_number": round(sum(not any(c.isdigit() for c in text) for text in texts) / len(texts), 4),
        "length": round(sum(lengths) / len(texts), 1),
        "facts": round(facts[updates], 4),
        "perplexity": forgetting.perplexity(folder, updates),
        "samples": [[r["question"], r["answer"], r["text"]] for r in answers[:SAMPLES]],
    }


def plan(grid: Grid, lines: list[dict]) -> list[Cell]:
    """Every cell in the order of docs/results/real_model.md."""
    order = ("omni_baseline", "sft", "cont_peak", "omni", "opd", "grpo", "context", "constant", "omni_m1")
    out = []
    for m in order:  # so that what is there first is whole
        out += [] if METHODS[m].like else g.sweep(grid, m)
        out += [Cell("teacher", m, b, 0) for b in grid.budgets]
    out += [Cell("teacher", m, 1.0, 0) for m in BY_INSTRUCTION]
    out += [Cell("gemma3_tuned", m, b, 0) for m in FOREIGN for b in grid.budgets]
    out += [Cell("teacher", m, b, 1) for m in order if m not in ADDED for b in grid.budgets]
    out += [Cell("teacher", m, 1.0, 0) for m in LONG]
    # behind this line a cell may stay without a run
    out += [Cell("teacher", LATER, b, 0) for b in grid.budgets]
    out += [Cell("gemma3", m, b, 0) for m in FOREIGN for b in budgets("gemma3")]
    out += [Cell("teacher", "omni_m1", b, 1) for b in grid.budgets]
    return out + [Cell("gemma3_tuned", m, b, 1) for m in FOREIGN for b in grid.budgets]


def budgets(world: str) -> tuple[float, ...]:
    """What a world is run to."""
    return GRID.budgets[:1] if world == "gemma3" else GRID.budgets


def body(grid: Grid, lines: list[dict]) -> str:
    """The page's tables."""
    out = [command.progress(grid, lines)]
    for world, title in zip(WORLDS, TITLES, strict=True):
        methods, upto = (tuple(METHODS) if world == "teacher" else FOREIGN), budgets(world)
        out += [title, f"The student before: {page.base(grid, world, lines)}.",
                page.accuracy_table(grid, world, methods, lines, upto),
                page.difference_table(grid, world, methods, page.BEFORE, lines, upto),
                *(page.difference_table(grid, world, [m for m in methods if m not in ("sft", base)], base, lines, upto)
                  for base in ("sft", "cont_peak", *(["constant"] if "constant" in methods else []))),
                f"What budget {upto[-1]:g} bought:", page.bought_table(grid, world, methods, lines, upto[-1]),
                f"Before and after budget {upto[-1]:g} (means over seeds):",
                kept_table(grid, world, methods, lines, upto[-1])]  # fmt: skip
    both = ["omni_baseline", *BY_INSTRUCTION]
    out += ["## By instruction", page.accuracy_table(grid, "teacher", both, lines, [1.0]),
            page.difference_table(grid, "teacher", both[1:], both[0], lines, [1.0]),
            page.bought_table(grid, "teacher", both, lines, 1.0)]  # fmt: skip
    out += [f"## {LONG_UPDATES} updates", long_table(grid, lines)]
    about = f"Greedy answers to the first {SAMPLES} problems of the test split, whatever they are (seed 0, budget 1)."
    out += ["## Samples before and after", about, samples(grid, lines)]
    out += ["## The sweep (validation split)",
            page.sweep_table(grid, [m for m in METHODS if not METHODS[m].like], lines)]  # fmt: skip
    return "\n\n".join(out)


def kept_table(grid: Grid, world: str, methods, lines, budget: float) -> str:
    """How answers look, and what is forgotten."""
    head = ["method", "cut at the cap, %", "without a number, %", "length, tokens", "facts known, %", "perplexity"]
    rows = []
    for m in methods:
        got = list(page.found(grid, world, m, budget, lines).values())
        if not got:
            rows.append((m, page.NOT_RUN, *[""] * 4))
            continue
        cells = []
        for key, scale in (("cut", 100), ("no_number", 100), ("length", 1), ("facts", 100), ("perplexity", 1)):
            before, after = (scale * sum(r[key][i] for r in got) / len(got) for i in (0, 1))
            cells.append(f"{before:.1f}, {after:.1f}")
        rows.append((m, *cells))
    return sides.table(head, rows)


def samples(grid: Grid, lines) -> str:
    """The kept answers, problem by problem."""
    got = {m: page.found(grid, "teacher", m, 1.0, lines).get(0) for m in METHODS}
    got = {m: line["samples"] for m, line in got.items() if line}
    if not got:
        return page.NOT_RUN
    out = []
    for i, (question, answer, before) in enumerate(next(iter(got.values()))[0]):
        told = {"before": before} | {m: after[i][2] for m, (_, after) in got.items()}
        out.append(f"**{question}** ({answer})\n")
        out += [f"- {m}: {' '.join(text.split())}" for m, text in told.items()] + [""]
    return "\n".join(out)


def long_table(grid: Grid, lines) -> str:
    """Accuracy along the longer runs."""
    marks = range(20, LONG_UPDATES + 1, 20)
    rows = []
    for m in LONG:
        got = list(page.found(grid, "teacher", m, 1.0, lines).values())
        if not got:
            rows.append((m, page.NOT_RUN, *[""] * (len(marks) + 4)))
        for line in got:
            at = {p["updates"]: p for p in line["curve"]}
            last = [page.mean_of([at[LONG_UPDATES]], k, ".3f") for k in ("repeated", "entropy", "kl")]
            rows.append((m, line["seed"], *(f"{100 * at[n]['accuracy']:.1f}" for n in marks), *last,
                         f"{max(p['zlib_most'] for p in line['curve']):.1f}"))  # fmt: skip
    head = ["run", "seed", *(f"after {n}, %" for n in marks), "repeated 4-grams", "entropy", "KL to the base", "zlib"]
    return sides.table(head, rows)


GRID = Grid(
    "real_model", WORLDS, METHODS | LONG | BY_INSTRUCTION, recipe, unit=100_000, budgets=(0.5, 1.0), swept=(0.5, 1.0),
    rates=(1e-3, 3e-4), swept_in="teacher", price=listed_price("claude-haiku-4-5"), plan=plan, body=body,
    at_run=SERVED.settings, measured=measured, one_student=True, beside="validation", sweep_seed=0,
)  # fmt: skip
