"""One model behind vLLM and in process: first tokens' frequencies, log-probs of given tokens, a run of `opd`."""

import asyncio
import json
import subprocess
import sys

import numpy as np
import pytest
import real_kit
from teacher_kit import ask, cfg_for, teacher_of, texts

from omniopd_jax import teachers

pytestmark = pytest.mark.real
DRAWS = 200


def frequencies_fit(real, ids, drawn: list[str]) -> None:
    """Every first text that is expected ten times or more, and the rest together, within 4 standard errors."""
    logits = real.logits(ids)[-1].astype(np.float64)
    p = np.exp(logits - logits.max())
    p /= p.sum()
    likely = np.flatnonzero(p * DRAWS >= 10)
    named = {}
    for token in likely:
        text = real.adds(ids, [int(token)])
        named[text] = named.get(text, 0.0) + p[token]
    assert named and len(drawn) == DRAWS
    counts = {text: drawn.count(text) for text in named}
    counts[None], named[None] = DRAWS - sum(counts.values()), max(1 - sum(named.values()), 1e-3)
    for text, share in named.items():
        error = np.sqrt(share * (1 - share) / DRAWS)
        assert abs(counts[text] / DRAWS - share) <= 4 * error, (text, counts[text] / DRAWS, share)


def local_cfg(tmp_path):
    return cfg_for("", "openai", tmp_path, **{
        "teacher.provider": "local", "teacher.model": str(real_kit.student()), "student.path": str(real_kit.student()),
        "teacher.continuation": "auto",
    })  # fmt: skip


def test_first_tokens_come_as_often_as_the_model_says(real, vllm, cuts, tmp_path):
    some = [cut for cut in cuts if cut.prefix == cut.prefix.rstrip()][:6]
    requests = [cut.request(DRAWS, 1) for cut in some]
    c = real_kit.cfg(
        vllm, tmp_path, **{"teacher.tokenizer": str(real_kit.student()), "teacher.continuation": "completion"}
    )
    for cut, served, own in zip(some, ask(c, *requests), ask(local_cfg(tmp_path), *requests)):
        for result in (served, own):
            drawn = texts(result) + ["no text of its own"] * len(result.failures)  # part of a character
            frequencies_fit(real, real.continued(cut), drawn)


@pytest.mark.parametrize("way", ["prompt_logprobs", "echo"])
def test_scores_are_those_in_process_token_by_token(real, vllm, tmp_path, way):
    messages = real_kit.problems(4)
    prompts = [real.ids(real.template.render(m)) for m in messages]
    answers = real.sample(prompts, 48, temperature=1.0, seed=3)
    c = real_kit.cfg(vllm, tmp_path, **{
        "objective.name": "opd", "teacher.tokenizer": str(real_kit.student()), "teacher.continuation": "auto",
    })  # fmt: skip

    async def scored(teacher):
        if teacher.report is None and hasattr(teacher, "client"):
            await teacher.check()
            assert teacher.mode == "prompt_logprobs"
            teacher.mode = way
        return await asyncio.gather(*(teacher.score_tokens(*row) for row in zip(messages, prompts, answers)))

    async def both():
        local = local_cfg(tmp_path)
        async with teacher_of(c) as remote:
            served = await scored(remote)
        own = await scored(teachers.make(local, teachers.LOGP))
        return served, own

    for served, own, answer in zip(*asyncio.run(both()), answers):
        assert len(served) == len(own) == len(answer)
        assert np.abs(served - own).max() <= 1e-3


def test_the_recipe_opd_remote_runs(vllm, tmp_path):
    """The teacher is the student itself, so its log-probs are the student's own: nothing to learn in the first step."""
    settings = {
        "run_dir": tmp_path / "run", "student.path": real_kit.student(), "teacher.tokenizer": real_kit.student(),
        "teacher.model": "teacher", "teacher.base_url": vllm, "data.source": "jsonl", "data.name": "",
        "data.path": ".cache/real/data/train.jsonl", "num_steps": 2, "prompts_per_step": 2, "num_generations": 1,
        "max_prompt_length": 96, "max_completion_length": 32, "eval.num_prompts": 0, "micro_batches": 1,
        "log.tensorboard": False, "compute_dtype": "float32", "teacher.timeout_s": 300.0, "rollout.parts": 1,
        "rollout.cache_gib": 0.0,
    }  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-m", "omniopd_jax.main", "--config=configs/opd.py:remote"]
        + [f"--config.{k}={v}" for k, v in settings.items()],
        env=real_kit.environment(), capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, (done.stdout[-3000:], done.stderr[-3000:])
    steps = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert len(steps) == 2 and "by prompt_logprobs" in done.stdout + done.stderr
    assert all(np.isfinite(m["loss"]) for m in steps)
    assert abs(steps[0]["loss"]) < 1e-3 and steps[0]["teacher/calls"] == 2, steps[0]
