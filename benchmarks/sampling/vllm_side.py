"""One side of traces.py, by the Python of an environment that has vLLM: reads a request from stdin, prints the times.

The engine alone, in this process: no server, no tokenizer, no text; at most `slots` rows at a time.
"""

import json
import os
import sys
import time

os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"}
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "2")  # GiB


def main():
    """Prints {"wall": [..], "cpu": [..]} as the last line."""
    from vllm import LLM, SamplingParams

    asked = json.load(sys.stdin)
    engine = LLM(
        asked["folder"], skip_tokenizer_init=True, dtype="float32", max_num_seqs=asked["slots"], max_model_len=2048,
        enable_prefix_caching=False, disable_log_stats=True, gpu_memory_utilization=0.4,
    )  # fmt: skip
    prompts = [{"prompt_token_ids": ids} for ids in asked["prompts"]]
    how = [SamplingParams(temperature=1.0, max_tokens=n, ignore_eos=True, detokenize=False) for n in asked["lengths"]]
    engine.generate(prompts[:2], how[:2], use_tqdm=False)  # warms up
    times = {"wall": [], "cpu": []}
    for _ in range(asked["rounds"]):
        wall, cpu = time.perf_counter(), time.process_time()
        out = engine.generate(prompts, how, use_tqdm=False)
        times["wall"].append(round(time.perf_counter() - wall, 4))
        times["cpu"].append(round(time.process_time() - cpu, 4))
        assert [len(one.outputs[0].token_ids) for one in out] == asked["lengths"]
    print(json.dumps(times))


if __name__ == "__main__":
    main()
