"""Whether a recipe fits a slice: its passes compiled as the run would compile them, and what the compiler says of
each."""

import dataclasses
import functools
import time

import jax
import jax.numpy as jnp

from omniopd_jax import context, cuts, model, objective, rollout, solutions, step, vocab
from omniopd_jax.errors import UserError
from omniopd_jax.model import attention, lora
from omniopd_jax.parallel import packing, sharding
from omniopd_jax.run import batching, flops, hlo, preflight, setup
from omniopd_jax.run.fit_sampler import Sampler, local_bytes
from omniopd_jax.run.topologies import devices, model_config

PASSES = ("prefill", "start", "decode", "evaluate", "teacher", "score", "update")
NOT_FIT = 3  # exit code
MIB = 2.0**20


@dataclasses.dataclass
class Pass:
    """What the compiler said of one pass, in bytes a chip. `resident` is what the run holds beside the pass's
    arguments."""

    name: str
    seconds: float
    problem: str = ""
    arguments: float = 0.0
    outputs: float = 0.0
    aliased: float = 0.0
    donated: float = 0.0
    temporaries: float = 0.0
    peak: float = 0.0
    resident: float = 0.0
    collectives: list = dataclasses.field(default_factory=list)
    compute_s: float = 0.0
    traffic_s: float = 0.0

    @property
    def total(self) -> float:
        """Peak of the whole run while this pass is at work."""
        return self.peak + self.resident

    def fits(self, chip: flops.Chip) -> bool:
        """Whether a run with it has the memory."""
        return not self.problem and self.total <= chip.room * chip.memory


class Plan:
    """A recipe on a mesh: abstract arguments of each pass, and the sizes that the report needs."""

    def __init__(self, cfg, mesh):
        self.cfg, self.mesh = setup.frozen(cfg), mesh
        how = {"packed": cfg.packing.length > 0, "on": sharding.platform(mesh)}
        self.model_cfg = model_config(cfg.student.path)
        how["head_dim"] = self.model_cfg.head_dim
        kernel = attention.resolve(cfg.model.attention, cfg.compute_dtype, **how)
        self.compute = model.Compute(cfg.compute_dtype, cfg.model.remat, kernel, mesh, lora.scale(cfg.lora))
        asks, local = objective.of(cfg).asks, cfg.teacher.provider == "local"
        self.teacher_cfg = model_config(cfg.teacher.model) if local and asks & {"logp", "distribution"} else None
        whole = self.teacher_cfg if "distribution" in asks else None  # laid out on the mesh; else on one device
        self.steps = step.make_steps(self.model_cfg, self.cfg, compute=self.compute, teacher_cfg=whole)
        self.teacher = (
            None
            if whole is None
            else _laid(
                jax.tree.map(
                    lambda p: jax.ShapeDtypeStruct(p.shape, jnp.float32), model.table(whole), is_leaf=model.is_param
                ),
                model.param_shardings(whole, mesh),
            )
        )
        self.state = _laid(step.abstract_state(self.model_cfg, self.cfg), self.steps.state_shardings)
        self.reference = step.abstract_reference(self.model_cfg, self.cfg, mesh)
        self.policy = step.policy(self.state.params, self.reference, self.cfg)
        self.rows = cfg.prompts_per_step * cfg.num_generations
        self.scored = self.rows // cfg.rollout.parts  # rows scored at a time
        self.P, self.T = rollout.bucket(cfg.max_prompt_length), rollout.bucket(cfg.max_completion_length)
        self.samplers = self._samplers(cfg)
        preflight.check_rows(mesh, cfg)

    def _samplers(self, cfg) -> dict[str, Sampler]:
        """By pass: the student's decode loop, its evaluation's where that takes other sizes, the larger prefill of the
        two and what follows it, and a teacher in process, which runs on one device."""
        longest = cfg.max_prompt_length, cfg.max_completion_length
        how = rollout.How(cfg.rollout.slots, cfg.rollout.cache_gib or room_gib(self.mesh), 0, cfg.rollout.cache_dtype)
        out = {"decode": Sampler(self.model_cfg, self.compute, how, self.rows, cfg.prompts_per_step, *longest)}
        out["prefill"] = out["decode"]
        if cfg.eval.num_prompts:
            one = Sampler(self.model_cfg, self.compute, how, cfg.eval.num_prompts, cfg.eval.num_prompts, *longest)
            if (one.slots, one.pages) != (out["decode"].slots, out["decode"].pages):
                out["evaluate"] = one
            if one.entries > out["prefill"].entries:
                out["prefill"] = one
        out["start"] = out["prefill"]
        if (
            cfg.teacher.provider == "local"
            and cfg.teacher.model
            and solutions.bought(cfg).keys() & {"continuations", "solutions", "prefixes"}
        ):
            device = sharding.make_mesh({"data": 1, "fsdp": 1, "tp": 1}, devices=self.mesh.devices.flatten()[:1])
            teacher_cfg = model_config(cfg.teacher.model)
            where = {"on": sharding.platform(device), "head_dim": teacher_cfg.head_dim}
            kernel = attention.resolve(cfg.model.attention, cfg.compute_dtype, **where)
            compute = model.Compute(cfg.compute_dtype, attention=kernel, mesh=device)
            how = rollout.How(cache_gib=room_gib(device))
            asked, rows, most = self._asked(cfg)
            out["teacher"] = Sampler(teacher_cfg, compute, how, rows, asked, sum(longest), most)
        return out

    def _asked(self, cfg) -> tuple[int, int, int]:
        """(prefixes, texts, tokens of one at most) that a teacher in process is asked for at a time: the kind of
        question that takes most."""
        kinds, wants = [], solutions.bought(cfg)
        if "continuations" in wants:
            prefixes = self.scored * cfg.audit.num_chunks  # of a part
            kinds.append((prefixes, prefixes * cfg.audit.num_continuations, cfg.audit.chunk_tokens))
        if "prefixes" in wants:
            kinds.append((*(self.scored * cfg.continuation.cuts,) * 2, cuts.most_tokens(cfg)))
        if "solutions" in wants:
            each = cfg.prompts_per_step
            kinds.append((each, each * wants["solutions"], cfg.max_completion_length))
        return max(kinds, key=lambda kind: kind[1] * (cfg.max_prompt_length + cfg.max_completion_length + kind[2]))

    def passes(self, names) -> list[str]:
        """Those of `names` that this recipe has."""
        return [n for n in names if n in self.samplers or n not in ("evaluate", "teacher")]

    @property
    def sampler(self) -> Sampler:
        """The student's."""
        return self.samplers["decode"]

    def sizes(self) -> dict[str, float]:
        """Bytes a chip of what the run always holds, and of the decode cache at its longest."""
        return {
            "parameters": local_bytes(self.state.params), "optimizer": local_bytes(self.state.opt_state),
            "reference": local_bytes(self.reference), "average": local_bytes(self.state.average),
            "cache": self.sampler.cache_bytes(), "teacher": self.teacher_bytes(),
        }  # fmt: skip

    def teacher_bytes(self) -> float:
        """Of a teacher in process, on the device that holds most of it: in the dtype that it samples in, a white-box
        one in float32, whole where it gives log-probs."""
        if self.teacher_cfg is None:
            return local_bytes(self.samplers["teacher"].params()) if "teacher" in self.samplers else 0.0
        return 4.0 * model.num_params(self.teacher_cfg) if self.teacher is None else local_bytes(self.teacher)

    def row(self, *shape, dtype=jnp.float32, rows: int = 0):
        """An abstract array with the batch's rows in front, or `rows`."""
        return jax.ShapeDtypeStruct((rows or self.rows, *shape), dtype, sharding=sharding.rows(self.mesh))

    def tokens(self, rows: int, P: int = 0, T: int = 0):
        """token_BL of `rows` rows of P + T tokens, or what packing makes of them where each is as long as it may be."""
        if not self.cfg.packing.length:
            return self.row((P or self.P) + (T or self.T), dtype=jnp.int32, rows=rows)
        P = P or self.cfg.max_prompt_length
        longest = P + (T or self.cfg.max_completion_length)
        packed = packing.make(
            [[0] * longest] * rows, [P] * rows, most=max(self.cfg.packing.length, longest),
            shards=list(range(sharding.row_shards(self.mesh))), micro_batches=batching.micro_batches(self.cfg, rows),
        )  # fmt: skip
        return jax.tree.map(lambda a: self.row(*a.shape[1:], dtype=a.dtype, rows=len(a)), packed)

    def batch(self) -> objective.Batch:
        """The global batch at the longest lengths."""
        own, batches = objective.of(self.cfg), []
        if own.cut is None:
            stale = {"old_logp_BT": self.row(self.T)} if self.cfg.max_staleness else {}
            if stale:
                stale["ratio_BM"] = self.row(self.cfg.audit.num_chunks)
            reward = self.row() if objective.needs_reward(self.cfg) else None
            logp = self.row(self.T) if "logp" in own.asks else None
            behind = self.context_rows() if own.scorer else None
            batches.append(
                self.batch_of(
                    self.rows, self.P, self.T, advantage_B=reward, teacher_logp_BT=logp, context=behind, **stale
                )
            )
        most = rollout.bucket(cuts.most_tokens(self.cfg))
        for group in objective.row_groups(self.cfg)[len(batches) :]:
            behind = objective.of(group[0][1]).samples  # a prefix of the student's
            rows = self.rows * self.cfg.continuation.cuts if behind else self.rows
            batches.append(self.batch_of(rows, self.P + (self.T if behind else 0), most))
        return batches[0].replace(more=tuple(batches[1:]))

    def batch_of(self, rows: int, P: int = 0, T: int = 0, **arrays) -> objective.Batch:
        """So many rows of P + T tokens."""
        M, i32 = self.cfg.audit.num_chunks, jnp.int32
        tokens = self.tokens(rows, P, T)
        packed = tokens if self.cfg.packing.length else None
        one = functools.partial(self.row, rows=rows)
        return objective.Batch(
            None if packed else tokens, one(dtype=i32), one(dtype=i32), one(M, dtype=i32), one(M), one(M, dtype=i32),
            packed=packed, width=T or self.T, **arrays,
        )  # fmt: skip

    def context_rows(self) -> context.ContextRows:
        """The responses behind privileged prompts at their longest."""
        tokens = self.tokens(self.rows, rollout.bucket(context.most_tokens(self.cfg)), self.T)
        packed = tokens if self.cfg.packing.length else None
        return context.ContextRows(None if packed else tokens, self.row(dtype=jnp.int32), self.row(), packed)

    def lower(self, name: str):
        """The pass, lowered: (lowered, bytes a chip donated, bytes a chip that the run holds beside the arguments)."""
        s = self.state
        state, reference = local_bytes(s), self.sizes()["reference"]
        if name == "score":
            rows = functools.partial(self.row, rows=self.scored, dtype=jnp.int32)
            lowered = self.steps.score_step.lower(self.policy, self.tokens(self.scored), rows(), self.T)
            beside = state + reference + self.teacher_bytes() - local_bytes(self.policy)
            cache = self.sampler.cache_bytes() if self.cfg.rollout.parts > 1 else 0.0  # the rest are being decoded
            return lowered, 0.0, beside + local_bytes(self.sampler.params()) + cache
        if name == "update":
            scored = objective.needs_scores(self.cfg)
            scored = scored and objective.of(self.cfg).cut is None
            stats = vocab.TokenStats(self.row(self.T), self.row(self.T)) if scored else None
            lowered = self.steps.train_step.lower(s, self.reference, self.batch(), stats, self.teacher)
            return lowered, state, self.teacher_bytes() if self.teacher is None else 0.0  # else among the arguments
        sampler = self.samplers.get(name, self.sampler)
        lowered, donated = sampler.lower(name if name in ("prefill", "start") else "decode")
        beside = state + reference + (0.0 if name == "teacher" else self.teacher_bytes())
        if name == "prefill":
            beside += local_bytes(sampler.state()[1])  # the slots of rows that are being decoded
        if name in ("start", "teacher"):  # the one takes no parameters, the other its own
            beside += local_bytes(self.sampler.params())
        return lowered, donated, beside + (self.sampler.cache_bytes() if name == "teacher" else 0.0)

    def work(self, name: str) -> tuple[float, float]:
        """(FLOPs, bytes of memory read) a chip of one run of the pass; decode: of one token a row at the full
        length."""
        if name not in ("score", "update"):
            sampler = self.samplers.get(name, self.sampler)
            return sampler.work(name if name in ("prefill", "start") else "decode")
        rows = self.rows if name == "update" else self.scored
        n, lengths, heads = self.mesh.size, [self.P + self.T] * rows, [self.T] * rows
        if name == "score":
            return flops.forward(self.model_cfg, lengths, heads) / n, local_bytes(self.policy)
        count = flops.update(
            self.model_cfg, lengths, heads, anchored=bool(self.cfg.anchor.kl_coef), frozen=bool(self.cfg.lora.rank)
        )
        return count / n, 3 * local_bytes(self.state) * self.cfg.micro_batches


def room_gib(mesh) -> float:
    """GiB of cache on each device where a recipe does not say: as `rollout.default_cache_gib` finds on the device
    itself."""
    platform = sharding.platform(mesh)
    chip = flops.chip(mesh.devices.flat[0]) if platform != "cpu" else None
    return rollout.CPU_CACHE_GIB if chip is None else chip.room * chip.memory / 3 / 2**30


def compile_pass(plan: Plan, name: str, chip: flops.Chip) -> Pass:
    """Compiles one pass and reads what the compiler found."""
    start = time.perf_counter()
    lowered, donated, resident = plan.lower(name)
    out = Pass(name, 0.0, donated=donated, resident=max(0.0, resident))
    try:
        compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        out.problem = next(
            (li.strip() for li in str(error).splitlines() if "Ran out of memory" in li), str(error).splitlines()[0]
        )[:200]
        out.seconds = time.perf_counter() - start
        return out
    m = compiled.memory_analysis()
    out.arguments, out.outputs, out.aliased = (
        float(m.argument_size_in_bytes),
        float(m.output_size_in_bytes),
        float(m.alias_size_in_bytes),
    )
    out.temporaries = float(m.temp_size_in_bytes)
    out.peak = max(float(m.peak_memory_in_bytes), out.arguments + out.outputs - out.aliased + out.temporaries)
    out.collectives = hlo.collectives(compiled.as_text())
    work, moved = plan.work(name)
    out.compute_s = max(work / chip.flops, moved / chip.bandwidth)
    out.traffic_s = sum(c.moved * c.times for c in out.collectives) / chip.links
    out.seconds = time.perf_counter() - start
    return out


def head_in_loops(plan: Plan, done: list[Pass]) -> list[tuple[str, hlo.Collective]]:
    """Collectives inside loops over an array with the vocabulary for an axis and the head's other sizes: the head's
    size.

    A chip's part counts too: the vocabulary over tp, the width over fsdp.
    """
    V, D = plan.model_cfg.vocab_size, plan.model_cfg.hidden_size
    vocab = {V, V // plan.mesh.shape["tp"]}
    width = {D, D // plan.mesh.shape["fsdp"]}
    return [(p.name, c) for p in done for c in p.collectives if c.loops and vocab & set(c.dims) and width & set(c.dims)]


def check(cfg, topology: str, names=PASSES, say=print) -> tuple[Plan, list[Pass], bool]:
    """Compiles the passes for one topology and prints the report. Returns (plan, passes, whether all fits)."""
    mesh = sharding.make_mesh(cfg.mesh, devices=devices(topology))
    chip = flops.CHIPS[topology.split(":")[0]]
    plan = Plan(cfg, mesh)
    sizes = plan.sizes()
    one = plan.sampler
    say(
        f"\n{cfg.student.path} on {topology}: {mesh.size} devices, mesh {dict(mesh.shape)}; "
        f"{model.num_params(plan.model_cfg):,} parameters; {plan.rows} rows of {plan.P} + {plan.T} tokens, "
        f"{one.slots} slots with {one.pages * rollout.PAGE / one.slots:,.0f} positions each, "
        f"micro_batches {cfg.micro_batches}, remat {cfg.model.remat}"
    )
    say(
        "a chip, MiB: " + ", ".join(f"{k} {v / MIB:,.0f}" for k, v in sizes.items()) + f"; HBM {chip.memory / MIB:,.0f}"
    )
    done, chosen = [], plan.passes(names)
    if not chosen:
        raise UserError(f"--passes names none that this recipe has: {', '.join(plan.passes(PASSES))}")
    for name in chosen:
        done.append(compile_pass(plan, name, chip))
        for line in lines(done[-1], chip, sizes["cache"]):
            say(line)
    for name, c in head_in_loops(plan, done):
        say(f"warning: {name}: {c.kind} of {list(c.dims)}, the head's size, in {c.loops} loop(s)")
    return plan, done, all(p.fits(chip) for p in done)


def lines(p: Pass, chip: flops.Chip, cache: float) -> list[str]:
    """The report on one pass."""
    if p.problem:
        return [f"{p.name:<7} DOES NOT FIT: {p.problem}  (compiled {p.seconds:.0f} s)"]
    verdict = "fits" if p.fits(chip) else "DOES NOT FIT"
    out = [
        f"{p.name:<7} {verdict}: arguments {p.arguments / MIB:,.0f}, temporaries {p.temporaries / MIB:,.0f}, peak of "
        "the "
        f"pass {p.peak / MIB:,.0f}, held beside it {p.resident / MIB:,.0f}, together {p.total / MIB:,.0f} MiB of "
        f"{chip.memory / MIB:,.0f} ({p.total / chip.memory:.0%})  (compiled in {p.seconds:.0f} s)"
    ]
    if p.donated:
        out.append(f"        donated {p.donated / MIB:,.1f} MiB, aliased {p.aliased / MIB:,.1f} MiB")
    if p.name == "decode":
        out.append(f"        temporaries are {p.temporaries / cache:.1%} of the cache")
    kinds: dict[tuple, list] = {}
    for c in p.collectives:
        kinds.setdefault((c.kind, c.loops > 0), []).append(c)
    for (kind, inside), group in sorted(kinds.items()):
        moved, largest = sum(c.moved * c.times for c in group) / MIB, max(c.bytes for c in group) / MIB
        out.append(
            f"        {kind:<19} {'inside' if inside else 'outside'} loops: {len(group):>3} in the text, "
            f"{sum(c.times for c in group):>6} runs, {moved:,.1f} MiB sent, largest {largest:,.1f} MiB"
        )
    each = " a token" if p.name == "decode" else ""
    if p.collectives:
        moved = sum(c.moved * c.times for c in p.collectives) / MIB
        out.append(f"        a chip sends {moved:,.1f} MiB{each or ' a step'}")
    out.append(
        f"        estimated{each}: compute or memory {1e3 * p.compute_s:,.2f} ms, collectives {1e3 * p.traffic_s:,.2f} "
        "ms"
    )
    return out


def knobs(cfg, mesh):
    """(what, changed recipe) in the order in which they cost least: each builds on the ones before."""
    cfg = cfg.copy_and_resolve_references()
    if cfg.model.remat != "full":
        cfg.model.remat = "full"
        yield "model.remat=full", cfg
    shards = sharding.row_shards(mesh)
    if mesh.shape["data"] > 1:
        cfg.mesh.data, cfg.mesh.fsdp = 1, -1
        yield "mesh.data=1, mesh.fsdp=-1", cfg
        shards = mesh.size // mesh.shape["tp"]
    rows = cfg.prompts_per_step * cfg.num_generations
    slots = cfg.rollout.slots or rows
    while slots % (2 * shards) == 0 and slots > 8 * shards:
        slots //= 2
        cfg.rollout.slots = slots
        yield f"rollout.slots={slots}", cfg
    samples = objective.of(cfg).samples
    while samples and cfg.rollout.parts < 8 and rows % (2 * cfg.rollout.parts * shards * cfg.micro_batches) == 0:
        cfg.rollout.parts *= 2
        yield f"rollout.parts={cfg.rollout.parts}", cfg
    most = rows // (shards * cfg.rollout.parts)
    while cfg.micro_batches * 2 <= most and most % (cfg.micro_batches * 2) == 0:
        cfg.micro_batches *= 2
        yield f"micro_batches={cfg.micro_batches}", cfg
    if cfg.anchor.kl_coef and not cfg.lora.rank:  # with adapters the reference is the base, which every pass needs
        if cfg.anchor.ref_dtype != "bfloat16":
            cfg.anchor.ref_dtype = "bfloat16"
            yield "anchor.ref_dtype=bfloat16", cfg
        if not cfg.anchor.ref_offload:
            cfg.anchor.ref_offload = True
            yield "anchor.ref_offload=True", cfg
    kv_heads = model_config(cfg.student.path).num_kv_heads
    tp = mesh.shape["tp"] * 2
    while tp <= min(kv_heads, mesh.size):
        cfg.mesh.tp, cfg.mesh.fsdp = tp, -1
        yield f"mesh.tp={tp}, mesh.fsdp=-1", cfg
        tp *= 2


def suggest(cfg, topology: str, plan: Plan, names) -> None:
    """Tries the knobs in order until everything fits, and prints which ones it took."""
    taken = []
    for what, changed in knobs(cfg, plan.mesh):
        taken.append(what)
        print(f"\nsuggest: trying {', '.join(taken)}", flush=True)
        try:
            _, done, fits = check(changed, topology, names)
        except UserError as error:
            print(f"suggest: {what}: {error}")
            continue
        if fits:
            last = dict(w.split("=") for t in taken for w in t.split(", "))  # a knob turned twice: where it ended
            print(f"\nsuggest: it fits with {' '.join(f'--config.{k}={v}' for k, v in last.items())}")
            return
    print("\nsuggest: nothing here makes it fit: take a larger slice, shorter responses or fewer rows")


def _laid(tree, shardings):
    return jax.tree.map(lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s), tree, shardings)
