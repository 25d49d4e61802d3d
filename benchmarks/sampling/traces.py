"""Useful tokens a second where responses have a long tail of lengths: slots against the longest row.

Two committed traces of lengths (lengths.json): `plain`, log-normal with a mean of a sixth of the cap, as answers
without thinking; `thinking`, a mean of half the cap and a fifth of the rows at it; and `equal`, all at the cap. Each
side writes just these lengths: the old sampler and `generate` take batches of `slots` rows and run each to its longest
(what a row has past its own length counts for nothing), slots and continuous batching are given each row's own. Rows
are 8 times the slots.
"""

import json
import pathlib
import subprocess
import tempfile

import numpy as np

from benchmarks import checkpoint, sides

PROMPT = 32
CASES = (
    {"V": 32_768, "slots": 64, "cap": 256}, {"V": 151_936, "slots": 16, "cap": 64},
    {"V": 32_768, "slots": 16, "cap": 256},  # for the sides that take minutes with 64
)  # fmt: skip
BARS = {"plain": 4.0, "thinking": 1.5, "equal": 0.95}
VLLM = "vllm"  # a side of its own process (vllm_side.py)
FILE = pathlib.Path(__file__).with_name("lengths.json")


def lengths(trace: str, rows: int, cap: int) -> np.ndarray:
    """The first `rows` lengths of a trace, from shares of the cap."""
    if trace == "equal":
        return np.full(rows, cap)
    share = np.array(json.loads(FILE.read_text())[trace][:rows])
    return np.clip(np.round(share * cap), 1, cap).astype(int)


def draw_traces(rows: int = 512) -> None:
    """Writes the traces (seed 5): what the committed file was made by."""
    rng = np.random.default_rng(5)
    plain = np.minimum(np.exp(rng.normal(np.log(1 / 6) - 0.5, 1.0, rows)), 1.0)
    thinking = rng.uniform(0.05, 0.7, rows)
    thinking[rng.random(rows) < 0.2] = 1.0
    FILE.write_text(json.dumps({"plain": plain.round(4).tolist(), "thinking": thinking.round(4).tolist()}))


def measure(case: dict, trace: str, rounds: int, names: list[str], python: str = "") -> dict:
    """Times the sides in turn; returns the result line.

    Args:
      names: the sides beside slots. python: of an environment that has vLLM.
    """
    import jax
    import torch

    from benchmarks.sampling import longest_row
    from omniopd_jax import hf, rollout

    V, slots, cap = case["V"], case["slots"], case["cap"]
    rows = 8 * slots
    length = lengths(trace, rows, cap)
    with tempfile.TemporaryDirectory() as folder:
        theirs = checkpoint.make(folder, V)
        params, cfg = hf.load(folder)
    prompt = np.random.default_rng(0).integers(0, V, (rows, PROMPT)).astype(np.int32)
    keys = rollout.row_keys(jax.random.key(0), np.arange(rows))
    numbers, spent = rollout.key_data(jax.random.key(0), np.arange(rows)), rollout.Spent()
    drawing = {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0}

    def batches():
        return [slice(i, i + slots) for i in range(0, rows, slots)]

    def new():
        nonlocal spent
        spent, prepared = rollout.Spent(), rollout.prepare(params, cfg)
        stream = rollout.stream(
            prepared, cfg, prompt.tolist(), numbers, max_new_tokens=length, how=rollout.How(slots=slots), spent=spent
        )
        assert sum(len(row.tokens) for part in stream for row in part) == length.sum()

    def old():
        prepared = rollout.prepare(params, cfg)
        for own in batches():
            arrays = jax.device_put((prompt[own], np.full(slots, PROMPT, np.int32)))
            out = longest_row.sample(prepared, cfg, *arrays, keys[own], max_new_tokens=int(length[own].max()))
            jax.block_until_ready(out)

    def generate():
        for own in batches():
            ids = torch.tensor(prompt[own], dtype=torch.long)
            with torch.no_grad():
                theirs.generate(
                    ids, attention_mask=torch.ones_like(ids), max_new_tokens=int(length[own].max()), **drawing
                )

    def continuous():
        from transformers import GenerationConfig

        config = GenerationConfig(max_new_tokens=cap, eos_token_id=-1, pad_token_id=0, **drawing)
        with theirs.continuous_batching_context_manager(generation_config=config) as manager:
            for b in range(rows):
                manager.add_request(prompt[b].tolist(), request_id=str(b), max_new_tokens=int(length[b]))
            done = 0
            while done < rows:
                if (got := manager.get_result(timeout=60)) is not None and got.is_finished():
                    done += 1

    all_sides = {"slots": new, "longest row": old, "generate": generate, "continuous batching": continuous}
    new()  # compiles
    if "longest row" in names:
        old()  # a shape each
    own = [name for name in ("slots", *names) if name != VLLM]
    times = sides.alternate({name: all_sides[name] for name in own}, rounds)
    if VLLM in names:
        request = {"prompts": prompt.tolist(), "lengths": length.tolist(), "slots": slots, "rounds": rounds}
        with tempfile.TemporaryDirectory() as folder:
            checkpoint.make(folder, V)
            request["folder"] = folder
            script = pathlib.Path(__file__).with_name("vllm_side.py")
            done = subprocess.run(
                [python, script], input=json.dumps(request), stdout=subprocess.PIPE, text=True, check=True
            )
        times[VLLM] = json.loads(done.stdout.splitlines()[-1])
    return case | {
        "trace": trace, "rows": rows, "tokens": int(length.sum()), "seed": 0, "times": times,
        "share": round(spent.tokens / spent.slot_steps, 4), "turns": spent.turns,
    }  # fmt: skip


def run(rounds: int, case: int, traces: list[str], names: list[str], python: str = "") -> None:
    """Runs what is missing, a line each in docs/results/sampling_traces.jsonl."""
    done = {
        (line["V"], line["slots"], line["trace"], *list(line["times"])[1:]) for line in sides.read("sampling_traces")
    }
    for i, one in enumerate(CASES):
        for trace in traces:
            if case in (-1, i) and (one["V"], one["slots"], trace, *names) not in done:
                sides.append("sampling_traces", measure(one, trace, rounds, names, python))


def table() -> str:
    """Medians over the rounds."""
    rows = []
    for line in sides.read("sampling_traces"):
        own = sides.median(line["times"]["slots"]["wall"])
        for name, took in line["times"].items():
            wall, cpu = sides.median(took["wall"]), sides.median(took["cpu"])
            mine = name == "slots"
            rows.append((
                f"{line['V']:,}", line["trace"], f"{line['rows']} in {line['slots']}", name, len(took["wall"]),
                f"{wall:.1f}", f"{cpu:.1f}", f"{line['tokens'] / wall:,.0f}", "" if mine else f"{wall / own:.2f}",
                BARS[line["trace"]] if name == "longest row" else "", f"{line['share']:.1%}" if mine else "",
            ))  # fmt: skip
    head = ["V", "lengths", "rows", "side", "rounds", "wall s", "CPU s", "useful tokens/s", "slots are faster", "bar",
            "useful slot-steps"]  # fmt: skip
    return sides.table(head, rows)
