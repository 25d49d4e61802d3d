"""Real weights, in float32, against transformers: logits, greedy tokens, one update, the export."""

import json
import subprocess
import sys

import jax
import numpy as np
import pytest
import real_kit
import torch
import transformers
from teacher_kit import ask, texts

from benchmarks.real import server
from omniopd_jax import hf

pytestmark = pytest.mark.real
SIZES = {  # of a run that makes one update: seconds
    "num_steps": 1, "prompts_per_step": 2, "num_generations": 1, "max_completion_length": 48, "audit.num_chunks": 1,
    "audit.num_continuations": 2, "audit.min_continuations": 1, "eval.num_prompts": 0, "log.tensorboard": False,
}  # fmt: skip


def theirs(folder):
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def prompts(real):
    return [real.ids(real.template.render(messages)) for messages in real_kit.problems(20)]


@pytest.fixture(scope="module")
def reference():
    return theirs(real_kit.student())


def test_logits_of_20_prompts_are_transformers(real, reference, prompts):
    for ids in prompts:
        with torch.no_grad():
            want = reference(torch.tensor([ids])).logits[0].numpy()
        got = real.logits(ids)
        assert np.abs(got - want).max() <= 1e-3
        assert (got.argmax(-1) == want.argmax(-1)).all()


def their_greedy(reference, ids, new):
    with torch.no_grad():
        out = reference.generate(
            torch.tensor([ids]), attention_mask=torch.ones(1, len(ids), dtype=torch.long), do_sample=False,
            max_new_tokens=new,
        )  # fmt: skip
    return out[0, len(ids) :].tolist()


def same_tokens(real, ids, ours, other) -> int:
    """How many tokens are equal, up to the first that is chosen between logits within APART."""
    for t, (a, b) in enumerate(zip(ours, other)):
        if a != b:
            gap = real.gaps(ids, ours)[t]
            assert gap < real_kit.APART, f"token {t}: {a} and {b}, top two {gap:.4f} apart"
            return t
    assert len(ours) == len(other)
    return len(ours)


def test_64_greedy_tokens_are_transformers(real, reference, prompts):
    pairs = real.greedy(prompts[:8], 64)
    same = [same_tokens(real, ids, tail, their_greedy(reference, ids, 64)) for ids, tail in pairs]
    assert sum(same) > 0.9 * sum(len(tail) for _, tail in pairs)


def command(name, *args):
    done = subprocess.run(
        [sys.executable, "-m", f"omniopd_jax.{name}", *map(str, args)], env=real_kit.environment(), capture_output=True,
        text=True,
    )  # fmt: skip
    assert done.returncode == 0, (done.stdout[-2000:], done.stderr[-3000:])
    return done


@pytest.fixture(scope="module", params=["full", "lora"])
def exported(request, vllm, tmp_path_factory):
    """(folder, its run): one update of all parameters, or of adapters that were then merged, from vLLM's texts."""
    made = tmp_path_factory.mktemp(request.param)
    rank, rate = {"full": (0, 1e-4), "lora": (8, 1e-3)}[request.param]
    settings = SIZES | {
        "run_dir": made / "run", "teacher.base_url": vllm, "lora.rank": rank, "lora.alpha": 2.0 * rank or 1.0,
        "optimizer.learning_rate": rate,
    }  # fmt: skip
    command("main", "--config=configs/smollm2.py", *(f"--config.{k}={v}" for k, v in settings.items()))
    command("export", f"--checkpoint={made / 'run'}", f"--out={made / 'out'}")
    return made / "out", made / "run"


def test_an_update_is_learned_exported_and_read_alike_by_transformers_and_vllm(real, exported, prompts, tmp_path):
    folder, run = exported
    [metrics] = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert np.isfinite(metrics["loss"]) and metrics["grad_norm"] > 0
    changed, base = (hf.load(f)[0] for f in (folder, real_kit.student()))
    moved = jax.tree.map(lambda a, b: float(abs(a - b).max()), changed, base)
    assert max(jax.tree.leaves(moved["layers"])) > 1e-5, "the update did not reach the export"
    ours, other = real_kit.Real(folder), theirs(folder)
    pairs = ours.greedy(prompts[:4], 32)
    for ids, tail in pairs:
        same_tokens(ours, ids, tail, their_greedy(other, ids, 32))
    del other
    with server.vllm(folder, "--block-size", "32", log="vllm-export.log", threads=1) as made:
        c = real_kit.cfg(made.url, tmp_path, **{"teacher.tokenizer": str(folder), "teacher.continuation": "completion"})
        asked = [real_kit.Cut(f"prompt {i}", m, "") for i, m in enumerate(real_kit.problems(4))]
        got = ask(c, *(cut.request(1, 32, temperature=0.0) for cut in asked))
    for (ids, tail), result in zip(pairs, got):
        ours.assert_greedy(texts(result)[0], ids, tail)
