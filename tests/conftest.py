"""Set-up for all tests: 8 fake CPU devices, a compile cache on disk, strict rank promotion, and a tiny model."""

import os
import pathlib

REPO = pathlib.Path(__file__).resolve().parent.parent

# Before jax is imported, and in the environment, so that child processes of the tests see it too.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(REPO / ".cache" / "jax_tests"))
# the suite compiles more than it computes: 2.4 times as fast
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")
os.environ["PYTHONPATH"] = os.pathsep.join(
    [str(REPO), str(REPO / "tests" / "support"), os.environ.get("PYTHONPATH", "")]
)
# fusions by the older emitter: a third of the compile time; small programs in one piece: a tenth of what is left
# (tiny.XLA_FLAGS, for child processes, has both too)
for flag in (
    "--xla_force_host_platform_device_count=8", "--xla_cpu_use_fusion_emitters=false",
    "--xla_cpu_parallel_codegen_split_count=1",
):  # fmt: skip
    if flag.split("=")[0] not in os.environ.get("XLA_FLAGS", ""):
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {flag}".strip()

import hypothesis  # noqa: E402
import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import pytest  # noqa: E402
import tiny  # noqa: E402
from ml_collections import FrozenConfigDict  # noqa: E402

from omniopd_jax import config, model  # noqa: E402

jax.config.update("jax_numpy_rank_promotion", "raise")
hypothesis.settings.register_profile("repo", deadline=None, derandomize=True, database=None)
hypothesis.settings.load_profile("repo")


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """(the student's folder, the teacher's) of a tiny run."""
    return tiny.make_folders(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="session")
def runner():
    """One process that has imported everything and forks a run for each request; all files share it."""
    import teacher_runs  # here: most tests need no checkpoint library

    runner = teacher_runs.Runner()
    yield runner
    runner.close()


@pytest.fixture(scope="session")
def model_cfg() -> model.ModelConfig:
    """A Qwen3 of two layers; every axis is even, so that it fits a mesh of (2, 2, 2)."""
    return model.ModelConfig(
        family="qwen3",
        vocab_size=38,
        hidden_size=16,
        intermediate_size=24,
        num_layers=2,
        num_heads=4,
        num_kv_heads=2,
        head_dim=8,
        qk_norm=True,
        tied=True,
    )


@pytest.fixture(scope="session")
def params(model_cfg) -> dict:
    """Float32 parameters with logits of standard deviation about 2 and norms that are not all one."""

    @jax.jit
    def make():
        params = model.init(jax.random.key(1), model_cfg)
        params["embed"] = params["embed"] * 25.0
        for i, name in enumerate(("attn_norm", "mlp_norm", "q_norm", "k_norm")):
            leaf = params["layers"][name]
            params["layers"][name] = leaf + 0.3 * jax.random.normal(jax.random.key(10 + i), leaf.shape)
        return params

    return make()


@pytest.fixture(scope="session")
def ref_params(params) -> dict:
    """The same model a little way off: what a frozen reference is to a student that has moved."""

    @jax.jit
    def moved(params):
        leaves, tree = jax.tree.flatten(params)
        keys = jax.random.split(jax.random.key(2), len(leaves))
        return tree.unflatten([a + 0.1 * jax.random.normal(k, a.shape) for a, k in zip(leaves, keys)])

    return moved(params)


@pytest.fixture(scope="session")
def make_cfg():
    """make_cfg(**{"prior.alpha": 0.5}) -> the defaults with small sizes and these keys set, hashable."""

    def make(**overrides) -> FrozenConfigDict:
        c = config.default()
        small = {
            "audit.num_chunks": 3, "audit.chunk_tokens": 4, "audit.num_continuations": 4, "vocab_block": 8,
            "max_completion_length": 20, "model.remat": "none",
        }  # fmt: skip
        c.update_from_flattened_dict(small | overrides)
        return FrozenConfigDict(c)

    return make


@pytest.fixture(scope="session")
def lookup():
    """A model whose next-token distribution depends on the last token alone: lookup(table_VV) -> (cfg, params).

    The layers write nothing to the residual stream, an embedding is a unit vector, so the logits after token i are row
    i of the table.
    """

    def make(table_VV):
        V = table_VV.shape[0]
        cfg = model.ModelConfig(
            family="llama", vocab_size=V, hidden_size=V, intermediate_size=4, num_layers=1, num_heads=1, num_kv_heads=1,
            head_dim=4, tied=False, norm_eps=1e-12,
        )  # fmt: skip
        params = jax.jit(model.init, static_argnums=1)(jax.random.key(0), cfg)
        for name in ("o", "down"):
            params["layers"][name] = jnp.zeros_like(params["layers"][name])
        # rms_norm(unit vector) = unit vector * sqrt(V)
        return cfg, params | {"embed": jnp.eye(V), "head": jnp.asarray(table_VV, jnp.float32) / V**0.5}

    return make
