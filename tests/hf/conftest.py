"""What the tests of Hugging Face folders share."""

import pytest
from hf_params import BASE, random_params

from omniopd_jax import hf


@pytest.fixture
def folder(tmp_path):
    """A small tied Qwen3 on disk, one file, float32."""
    hf.save(tmp_path / "m", random_params(BASE), BASE, dtype="float32")
    return tmp_path / "m"
