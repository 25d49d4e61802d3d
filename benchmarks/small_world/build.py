"""Makes the small worlds' checkpoints: `make checkpoints`, four of them in omniopd_jax/world/checkpoints. By hand:

    python -m benchmarks.small_world.build --out=omniopd_jax/world/checkpoints --world=slips --role=student

A tokenizer, a base student trained on a corpus that mixes right and wrong strategies, and a larger teacher trained on a
clean one; Qwen3 architecture, real Hugging Face folders, by the project's own step with the `sft` objective. Everything
follows from the seed. A student takes 7 minutes of one core, a teacher 15; style's teacher goes on from forks' teacher,
for twice that. All worlds have the tokenizer of forks, so that they can share models: the teacher of slips would learn
the corpus of forks' teacher, text by text, and the student of style that of forks' student
(benchmarks.small_world.CHECKPOINTS).
"""

import dataclasses
import json
import pathlib
import time

import jax
import numpy as np
from absl import flags
from ml_collections import FrozenConfigDict

from omniopd_jax import config, graders, hf, model, objective, rollout, step, world
from omniopd_jax.data import prompts as data
from omniopd_jax.errors import one_of
from omniopd_jax.evaluation import sampling
from omniopd_jax.hf import template
from omniopd_jax.parallel import sharding
from omniopd_jax.run import cli, logging

PROMPT, COMPLETION, ROWS = 40, 48, 64
VOCAB = 560


@dataclasses.dataclass(frozen=True)
class Role:
    """Size of a model and length of its training."""

    hidden_size: int
    intermediate_size: int
    num_layers: int
    steps: int
    texts: int
    learning_rate: float


ROLES = {
    "student": Role(96, 256, 3, 800, 60_000, 3e-3),
    "teacher": Role(128, 320, 4, 1200, 120_000, 3e-3),
}


def model_config(role: Role, vocab_size: int) -> model.ModelConfig:
    """Qwen3 architecture, tied head, head width 16."""
    heads = role.hidden_size // 16
    return model.ModelConfig(
        "qwen3", vocab_size, role.hidden_size, role.intermediate_size, role.num_layers, heads, heads // 2, 16,
        rope_theta=10_000.0, qk_norm=True, tied=True, max_positions=512,
    )  # fmt: skip


def sft_config(role: Role, steps: int) -> FrozenConfigDict:
    """The run's config for the SFT objective."""
    c = config.default()
    c.objective.name, c.objective.normalizer = "sft", "separate_means"
    c.anchor.kl_coef = 0.0
    c.audit.num_chunks = 1
    c.num_steps, c.prompts_per_step, c.num_generations = steps, ROWS, 1
    c.max_prompt_length, c.max_completion_length = PROMPT, COMPLETION
    c.vocab_block = 4096
    o = c.optimizer
    o.learning_rate, o.schedule, o.warmup_steps, o.weight_decay, o.b2 = role.learning_rate, "cosine", 50, 0.01, 0.98
    return FrozenConfigDict(c)


def encode_corpus(tokenizer, pairs) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(prompt, solution) texts -> token_BL, prompt_length_B, length_B, the end token included."""
    chat = template.make(tokenizer)
    prompts = [chat.render([{"role": "user", "content": p}]) for p, _ in pairs]
    ids = tokenizer(prompts, add_special_tokens=False)["input_ids"]
    ends = tokenizer([s + tokenizer.eos_token for _, s in pairs], add_special_tokens=False)["input_ids"]
    rows = [a + b for a, b in zip(ids, ends, strict=True)]
    token_BL, _ = rollout.pad_rows(rows, -(-max(map(len, rows)) // 4) * 4)
    return token_BL, np.array(list(map(len, ids)), np.int32), np.array(list(map(len, ends)), np.int32)


def train(model_cfg, cfg, corpus, seed: int, start: dict | None = None, log=logging.say) -> dict:
    """SFT from `start`, or from scratch; returns float32 parameters on the host."""
    token_BL, prompt_length_B, length_B = corpus
    mesh = sharding.make_mesh({"data": 1, "fsdp": -1, "tp": 1}, jax.devices()[:1])
    steps = step.make_steps(model_cfg, cfg, compute=model.Compute(mesh=mesh))
    params = model.init(jax.random.key(seed), model_cfg) if start is None else start
    state = step.create_state(params, cfg, steps, jax.random.key(seed))
    ref = jax.tree.map(lambda a: a + 0, state.params)
    zeros = jax.numpy.zeros((ROWS, -(-int(length_B.max()) // 4) * 4))
    stats = step.vocab.TokenStats(zeros, zeros)
    started = time.time()
    for i in range(cfg.num_steps):
        pick = data.batch_indices(seed, i, ROWS, len(token_BL))
        none = np.full((ROWS, 1), -1, np.int32)
        batch = objective.Batch(
            token_BL[pick], prompt_length_B[pick], length_B[pick], none, np.zeros((ROWS, 1), np.float32), 0 * none
        )
        state, values, _ = steps.train_step(state, ref, sharding.put_rows(batch, mesh), stats, None)
        if i % 50 == 49:
            log(f"  step {i + 1}/{cfg.num_steps}  loss {float(values['loss']):.4f}  {time.time() - started:.0f} s")
    return jax.device_get(state.params)


def build(role_name: str, world_name: str, seed: int, out: pathlib.Path, tokenizer, steps: int, start: str) -> float:
    """Trains one role, from scratch or from the folder `start`, saves it, returns its greedy accuracy on the test
    split."""
    role = ROLES[role_name]
    model_cfg = model_config(role, VOCAB)
    cfg = sft_config(role, steps or role.steps)
    pairs = world.corpus(world_name, role_name, role.texts, seed)
    size = f"{model.num_params(model_cfg):,} parameters, {len(pairs):,} texts, {cfg.num_steps} updates"
    print(f"{world_name}/{role_name}: {size}", flush=True)
    params = train(model_cfg, cfg, encode_corpus(tokenizer, pairs), seed, hf.load(start)[0] if start else None)
    folder = out / world_name / role_name
    (folder / "build.json").unlink(missing_ok=True)  # the packaged folders have no export's mark
    hf.save(folder, params, model_cfg, tokenizer, dtype="bfloat16")
    params, model_cfg = hf.load(folder)  # what was saved is what is measured: bf16 rounding included
    accuracy = greedy_accuracy(params, model_cfg, tokenizer, world_name)
    card = {"world": world_name, "role": role_name, "seed": seed, "updates": cfg.num_steps, "test_accuracy": accuracy}
    card |= {"start": start} if start else {}
    (folder / "build.json").write_text(json.dumps(card) + "\n")
    print(f"{world_name}/{role_name}: greedy accuracy on the test split {accuracy:.1%}", flush=True)
    return accuracy


def greedy_accuracy(params, model_cfg, tokenizer, world_name: str, split="test", count=512) -> float:
    """Greedy accuracy on the first `count` problems of a split."""
    c = config.default()
    c.data.name, c.max_prompt_length = world_name, 64
    loaded = data.load(c, source="world", split=split, path="", count=count)
    chat = template.make(tokenizer)
    prompts = data.encode(loaded, chat, c).prompts
    return sampling.greedy(
        params,
        model_cfg,
        prompts,
        chat,
        (tokenizer.eos_token_id,),
        grader=graders.shared("world"),
        max_new_tokens=COMPLETION,
    ).accuracy


def main(_):
    """Builds the folders that the flags name."""
    given = flags.FLAGS.flag_values_dict()
    name, only, seed = (given[key] for key in ("world", "role", "seed"))
    one_of(name, world.WORLDS, "--world")
    one_of(only, (*ROLES, "both"), "--role")
    cli.setup_jax()
    texts = [t for role in ROLES for pair in world.corpus("forks", role, 4000, seed) for t in pair]  # of every world
    tokenizer = world.train_tokenizer(texts, VOCAB)
    for role in ROLES if only == "both" else (only,):
        build(role, name, seed, pathlib.Path(given["out"]), tokenizer, given["steps"], given["start"])


def _define_flags() -> None:
    flags.DEFINE_string("out", None, "folder for <world>/student and <world>/teacher", required=True)
    flags.DEFINE_string("world", "forks", "forks | slips | style")
    flags.DEFINE_string("role", "both", "student | teacher | both")
    flags.DEFINE_integer("seed", 0, "of corpus, init and order")
    flags.DEFINE_integer("steps", 0, "SFT updates; 0 = the role's own")
    flags.DEFINE_string("start", "", "go on from this folder's weights")


if __name__ == "__main__":
    _define_flags()  # here, not on import: the tests import this file
    cli.run(main)
