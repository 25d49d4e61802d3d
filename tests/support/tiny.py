"""A tiny random student and teacher as Hugging Face folders, a recipe over them, and the main command for tests."""

import dataclasses
import functools
import json
import os
import pathlib
import shutil
import subprocess
import sys
import tempfile

import jax
import numpy as np

from omniopd_jax import config, hf, model, world
from omniopd_jax.parallel import sharding

REPO = pathlib.Path(__file__).resolve().parents[2]
PYTHON = sys.executable
TRAINED = REPO / "omniopd_jax" / "world" / "checkpoints" / "forks"
VOCAB = 320
# of child processes: one device, and a third of the compile time
XLA_FLAGS = "--xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1"
init = jax.jit(model.init, static_argnums=1)  # one program; leaf by leaf it would be dozens


def tokenizer(vocab_size: int = VOCAB, count: int = 60):
    """A byte-level BPE tokenizer of the small world's texts."""
    return world.train_tokenizer([t for pair in world.corpus("forks", "student", count, 0) for t in pair], vocab_size)


def random_model(vocab_size: int, seed: int, *, sharpness: float = 12.0):
    """(params, ModelConfig): a Qwen3 of two layers, its logits scaled until it prefers some tokens to others."""
    cfg = model.ModelConfig(
        "qwen3", vocab_size, 32, 64, 2, 4, 2, 8, rope_theta=10_000.0, qk_norm=True, tied=True, max_positions=256
    )
    params = init(jax.random.key(seed), cfg)
    return params | {"embed": params["embed"] * sharpness}, cfg


@functools.cache
def _made() -> tempfile.TemporaryDirectory:
    """`student` and `teacher`, made once in a process."""
    made, tok = tempfile.TemporaryDirectory(prefix="tiny-models-"), tokenizer()
    for name, seed in (("student", 3), ("teacher", 7)):
        params, cfg = random_model(len(tok), seed)
        hf.save(pathlib.Path(made.name) / name, params, cfg, tok, dtype="float32")
    return made


def make_folders(folder) -> tuple[pathlib.Path, pathlib.Path]:
    """Writes `student` and `teacher` under `folder`, one tokenizer, different random weights."""
    names = ("student", "teacher")
    return tuple(pathlib.Path(shutil.copytree(f"{_made().name}/{n}", pathlib.Path(folder) / n)) for n in names)


def overrides(student, teacher, run_dir) -> dict:
    """A recipe of seconds: dotted key -> value."""
    return {
        "run_dir": str(run_dir), "num_steps": 2, "prompts_per_step": 4, "num_generations": 2, "max_prompt_length": 160,
        "max_completion_length": 24, "vocab_block": 512, "model.remat": "none", "student.path": str(student),
        "teacher.model": str(teacher), "data.name": "forks", "data.num_prompts": 24, "audit.num_chunks": 2,
        "audit.chunk_tokens": 5, "audit.num_continuations": 3, "optimizer.learning_rate": 1e-3, "checkpoint.every": 2,
        "log.tensorboard": False, "eval.num_prompts": 0,
    }  # fmt: skip


def recipe(student, teacher, run_dir, **more):
    """The same as a ConfigDict; `more` are dotted keys."""
    c = config.default()
    c.update_from_flattened_dict(overrides(student, teacher, run_dir) | more)
    return c


def on_one_device(patch):
    """The tests' eight fake devices cost compile time: a mesh takes the first one, unless a test names others. Returns
    the real `make_mesh`."""
    real = sharding.make_mesh
    patch.setattr(sharding, "make_mesh", lambda sizes, devices=None: real(sizes, devices or jax.devices()[:1]))
    return real


def arguments(values: dict) -> list[str]:
    """{dotted key: value} as --config arguments of configs/tiny.py."""
    return ["--config=configs/tiny.py", *(f"--config.{k}={v}" for k, v in values.items())]


def environment(**more) -> dict:
    """One CPU device, the tests' compile cache, no network worth waiting for."""
    env = dict(os.environ, PYTHONPATH=str(REPO), JAX_PLATFORMS="cpu", XLA_FLAGS=XLA_FLAGS) | more
    env.setdefault("JAX_COMPILATION_CACHE_DIR", str(REPO / ".cache" / "jax_tests"))
    return env


def start(args: list[str], **env) -> subprocess.Popen:
    """`python -m omniopd_jax.main ARGS` in the repository's root, its output piped as text."""
    return subprocess.Popen(
        [PYTHON, "-m", "omniopd_jax.main", *args], cwd=REPO, env=environment(**env), text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Ended:
    """What a command left: exit code and text."""

    code: int
    out: str
    err: str

    @property
    def errors(self) -> list[str]:
        """Lines of stderr that are the command's own words."""
        return [line for line in self.err.splitlines() if line.startswith("error:")]


# `python -m omniopd_jax.main` as a person runs it, in a process forked after the imports: no four seconds for JAX again.
# No device is touched before the fork.
FORK = """
import json, os, runpy, signal, sys, traceback
def fork(args, out, err, env={}, limit=0):
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        signal.alarm(limit)
        for number, name in ((1, out), (2, err)):
            os.dup2(os.open(name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
        for name, value in env.items():
            os.environ.pop(name, None) if value is None else os.environ.update({name: value})
        sys.argv = ["main.py", *args]
        runpy.run_module("omniopd_jax.main", run_name="__main__", alter_sys=True)
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 0 if end.code is None else 1
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush(), sys.stderr.flush()
        os._exit(code)
def code_of(pid):
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
"""
_COMMANDS = """
import ml_collections.config_flags, datasets, huggingface_hub, jinja2, rapidfuzz.process, transformers
from transformers import AutoTokenizer, PreTrainedTokenizerFast
import omniopd_jax.teachers.local, omniopd_jax.teachers.wire.openai
import omniopd_jax.train
folder, limit = sys.argv[1], int(sys.argv[2])
for i, args in enumerate(json.load(open(f"{folder}/cases.json"))):
    code = code_of(fork(args, f"{folder}/{i}.out", f"{folder}/{i}.err", limit=limit))
    with open(f"{folder}/{i}.code", "w") as f:
        f.write(str(code))
"""


def commands(cases: list[list[str]], limit: int = 30) -> list[Ended]:
    """Runs the main command once a case, at most `limit` seconds each, in processes forked after the imports."""
    with tempfile.TemporaryDirectory() as folder:
        pathlib.Path(folder, "cases.json").write_text(json.dumps(cases))
        args = [PYTHON, "-c", FORK + _COMMANDS, folder, str(limit)]
        done = subprocess.run(args, cwd=REPO, env=environment(), capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        read = [
            [pathlib.Path(folder, f"{i}.{end}").read_text() for end in ("code", "out", "err")]
            for i in range(len(cases))
        ]
    return [Ended(int(code), out, err) for code, out, err in read]


def lines(path) -> list[dict]:
    """The records of a JSON Lines file."""
    return [json.loads(line) for line in pathlib.Path(path).read_text(encoding="utf-8").split("\n") if line]


def same(a, b) -> bool:
    """Two trees of arrays are equal to the last bit."""
    a, b = (jax.tree.leaves_with_path(jax.device_get(t)) for t in (a, b))
    return len(a) == len(b) and all(
        ka == kb and np.array_equal(np.asarray(x).view(np.uint8), np.asarray(y).view(np.uint8))
        for (ka, x), (kb, y) in zip(a, b)
    )
