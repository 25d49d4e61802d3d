"""Real servers and the real model, each made once for all tests here (`make test-real`)."""

import json
import os

import pytest
import real_kit

from benchmarks.real import server

os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")  # GiB: 23,000 tokens of this model


@pytest.fixture(scope="session")
def real():
    """The student in process."""
    assert real_kit.student().exists(), "python -m benchmarks.real.prepare makes the model and the server"
    return real_kit.Real(real_kit.student())


@pytest.fixture(scope="session")
def cuts(real):
    """Its own answers cut at peaks, and some cuts by hand."""
    return real.cuts() + real_kit.by_hand()


@pytest.fixture(scope="session")
def vllm():
    """URL of vLLM with the student's model, in blocks of 32 tokens; VLLM_URL names one that runs already."""
    if url := os.environ.get("VLLM_URL"):
        yield url
        return
    with server.vllm(real_kit.student(), "--block-size", "32", log="vllm-tests.log", threads=1) as made:
        yield made.url


@pytest.fixture(scope="session")
def samples(tmp_path_factory):
    """The student's folder with a generation_config.json that samples: `transformers serve` goes by it."""
    folder = tmp_path_factory.mktemp("samples") / "smollm2"
    folder.mkdir()
    for file in real_kit.student().iterdir():
        (folder / file.name).symlink_to(file)
    config = json.loads((folder / "generation_config.json").read_text())
    (folder / "generation_config.json").unlink()
    (folder / "generation_config.json").write_text(json.dumps(config | {"do_sample": True, "top_k": 0}))
    return folder


@pytest.fixture(scope="session")
def transformers(samples):
    """URL of `transformers serve`; the model's name is the folder `samples`."""
    with server.serve_transformers(samples, "--dtype", "float32") as made:
        yield made.url


@pytest.fixture(scope="session")
def greedy(real, cuts):
    """{name of a cut: (tokens up to it, the model's own 16 greedy tokens behind it)}."""
    return dict(zip([cut.name for cut in cuts], real.greedy([real.continued(cut) for cut in cuts], 16)))
