"""The names that other people's scripts may call, each called as docs/design promises; and new parts added by one
line."""

import asyncio
import dataclasses
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from omniopd_jax import (
    aot,
    config,
    evaluate,
    export,
    graders,
    hf,
    main,
    model,
    objective,
    report,
    rollout,
    scheduler,
    similarity,
    teachers,
    train,
    vocab,
)
from omniopd_jax.data import benchmarks
from omniopd_jax.graders import small_world
from omniopd_jax.hf import config as hf_config
from omniopd_jax.parallel import sharding
from omniopd_jax.teachers import ContinuationRequest, Provider
from omniopd_jax.teachers.simulated import SimulatedTeacher

B, T, D, V = 2, 6, 16, 38


def test_scheduler_and_objective(make_cfg):
    entropy_BT = jnp.asarray(np.random.default_rng(0).random((B, 20)), jnp.float32)
    peak_BM = scheduler.entropy_peaks(entropy_BT, jnp.array([20, 3]), num_chunks=2, chunk_tokens=4)
    assert peak_BM.dtype == jnp.int32 and peak_BM.shape == (B, 2)
    assert (peak_BM[1] == -1).all() and (peak_BM[0, 0] < peak_BM[0, 1])
    assert float(objective.smoothed_target(2.0, 3, jnp.log(0.5), alpha=1.0)) == pytest.approx(2.5 / 4)
    batch = objective.Batch(
        jnp.zeros((B, 20), jnp.int32), jnp.zeros(B, jnp.int32), jnp.array([20, 3]), peak_BM, jnp.ones((B, 2)),
        jnp.full((B, 2), 4), advantage_B=jnp.ones(B), teacher_logp_BT=jnp.zeros((B, 20)),
    )  # fmt: skip
    for name in objective.OBJECTIVES:
        cfg = make_cfg(**{"objective.name": name})
        weight_BT, mask_BT = objective.OBJECTIVES[name](-jnp.ones((B, 20)), batch, cfg)
        assert weight_BT.shape == mask_BT.shape == (B, 20)


def test_similarity():
    c = config.default()
    values = similarity.make(c)(["abc", "", "x"], ["abd", "", ""])
    assert values.dtype == np.float32 and values.tolist() == pytest.approx([2 / 3, 1.0, 0.0])


def test_vocabulary():
    rng = np.random.default_rng(0)
    hidden, head = (jnp.asarray(rng.normal(size=s), jnp.float32) for s in ((B, T, D), (D, V)))
    target = jnp.asarray(rng.integers(0, V, (B, T)))
    stats = vocab.token_stats(hidden, head, target, block=4)
    want = jax.nn.log_softmax(jnp.einsum("btd,dv->btv", hidden, head))
    np.testing.assert_allclose(stats.logp_BT, jnp.take_along_axis(want, target[..., None], -1)[..., 0], rtol=1e-4)
    np.testing.assert_allclose(stats.entropy_BT, -(jnp.exp(want) * want).sum(-1), rtol=1e-4)
    ones = jnp.ones((B, T))
    loss, aux = vocab.weighted_nll_and_kl(hidden, head, hidden, head, target, ones, ones, beta=0.5, block=4)
    assert float(loss) == pytest.approx(-float(stats.logp_BT.sum()), rel=1e-4)
    np.testing.assert_allclose(aux.kl_BT, 0, atol=1e-5)


def test_model_and_sampler(params, model_cfg):
    token_BL = jnp.ones((B, 5), jnp.int32)
    hidden_BLD = model.hidden(params, model_cfg, token_BL)
    assert model.logits(params, model_cfg, hidden_BLD).shape == (B, 5, V)
    out = rollout.sample(
        params, model_cfg, token_BL, jnp.array([5, 3]), rollout.row_keys(jax.random.key(0), np.arange(2 * B)),
        max_new_tokens=4, temperature=1.0, top_p=0.9, top_k=5, num_samples=2, end_ids=(1,),
    )  # fmt: skip
    assert out.token_BT.shape[0] == 2 * B and (out.length_B <= 4).all()


def test_folders(tmp_path):
    student, _ = tiny.make_folders(tmp_path)
    params, model_cfg = hf.load(student)
    hf.save(tmp_path / "copy", params, model_cfg, hf.load_tokenizer(student), dtype="float32")
    again, _ = hf.load(tmp_path / "copy", mesh=None, dtype="float32")
    assert tiny.same(params, again)


def test_teachers(tmp_path):
    (tmp_path / "t.json").write_text('{"texts": ["a b", "c"], "probs": [0.5, 0.5]}')
    c = config.default()
    c.teacher.provider, c.teacher.model = "simulated", str(tmp_path / "t.json")
    request = ContinuationRequest("id", 3, ({"role": "user", "content": "?"},), "so", (0, 1), 8)
    result = asyncio.run(teachers.make(c).continue_text(request))
    assert [x.index for x in result.continuations] == [0, 1] and not result.failures
    assert inspect.iscoroutinefunction(teachers.Teacher.score_tokens)


@pytest.mark.parametrize("command", [main, evaluate, export, aot, report], ids=lambda m: m.__name__)
def test_commands_have_a_main(command):
    assert callable(command.main)


class Mine(small_world.WorldGrader):
    def grade(self, text, answer):
        return True


def test_an_objective_a_similarity_a_teacher_and_a_grader_are_added_by_a_line_each(tmp_path, monkeypatch):
    """As docs/architecture.md says: the loop asks the new teacher at the peaks of the new objective, and so on."""
    real = sharding.make_mesh
    monkeypatch.setattr(sharding, "make_mesh", lambda sizes, devices=None: real(sizes, jax.devices()[:1]))
    own = objective.Objective(
        lambda logp, batch, cfg: tuple(2 * a for a in objective.omniopd(logp, batch, cfg)), asks="continuations",
        chunks=True, reads_logp=True,
    )  # fmt: skip
    asked = []

    class Counting(SimulatedTeacher):
        async def continue_text(self, request):
            asked.append(request.peak)
            return await super().continue_text(request)

    monkeypatch.setitem(objective.OBJECTIVES, "mine", own)
    monkeypatch.setitem(similarity.SIMILARITIES, "mine", lambda cfg: lambda a, b: np.full(len(a), 0.25, np.float32))
    monkeypatch.setitem(teachers.TEACHERS, "mine", Provider(lambda cfg: Counting(["one", "two"], [0.5, 0.5])))
    monkeypatch.setitem(graders.GRADERS, "mine", Mine)
    student, teacher = tiny.make_folders(tmp_path)
    c = tiny.recipe(student, teacher, tmp_path / "run", **{
        "objective.name": "mine", "audit.similarity": "mine", "teacher.provider": "mine", "reward.grader": "mine",
        "reward.coef": 0.5, "num_steps": 1,
    })  # fmt: skip
    assert train.train(c)["exit_code"] == 0
    (row,) = tiny.lines(tmp_path / "run" / "metrics.jsonl")
    assert len(asked) == row["audit/chunks"] + row["audit/dropped"] > 0
    assert row["audit/k_sem_mean"] == pytest.approx(0.25 * c.audit.num_continuations)
    assert row["reward/mean"] == 1


def test_a_benchmark_is_added_by_a_line(tmp_path, monkeypatch):
    """With a grader of one's own, and rows of one's own fields."""
    monkeypatch.setitem(graders.GRADERS, "mine", Mine)
    monkeypatch.setitem(benchmarks.SUITES, "mine", benchmarks.Source("me/mine", problem="q", answer="a", grader="mine"))
    (tmp_path / "rows.jsonl").write_text('{"id": 7, "q": "3 + 4?", "a": "7"}\n')
    suite = benchmarks.load(f"mine={tmp_path}/rows.jsonl", suffix="Think.")
    (prompt,) = suite.prompts
    assert (prompt.id, prompt.answer, suite.grader) == ("7", "7", "mine") and "3 + 4?" in str(prompt.messages)
    assert suite.extract("The answer is 7.") == "7"


def test_a_model_family_whose_equations_are_there_is_added_by_two_lines(tmp_path, monkeypatch):
    """Read, computed and exported as itself."""
    monkeypatch.setitem(hf_config.ARCHITECTURES, "MineForCausalLM", "mine")
    monkeypatch.setitem(hf_config.MODEL_TYPES, "mine", ("mine",))
    tokenizer = tiny.tokenizer()
    params, cfg = tiny.random_model(len(tokenizer), 3)
    params["layers"] = {k: v for k, v in params["layers"].items() if k not in ("q_norm", "k_norm")}
    mine = dataclasses.replace(cfg, family="mine", qk_norm=False)
    hf.save(tmp_path / "a", params, mine, tokenizer, dtype="float32")
    assert '"MineForCausalLM"' in (tmp_path / "a" / "config.json").read_text()
    again, read = hf.load(tmp_path / "a")
    assert read == mine and tiny.same(params, again)
