"""Hugging Face names: a local folder, or the hub, asked once: where it does not answer within seconds, libraries are
kept from retrying for a minute.
"""

import contextlib
import fnmatch
import sys
from pathlib import Path

from omniopd_jax import config
from omniopd_jax.errors import UserError
from omniopd_jax.hf import bounded

PACKAGE = Path(__file__).resolve().parents[1]
LICENCES = ("LICENSE*", "LICENCE*", "NOTICE*", "COPYING*", "USE_POLICY*")
READ = ("*.safetensors", "*.json", "*.jinja", "*.txt", "tokenizer.model")
HUB_FILES = (*READ, *LICENCES)


@contextlib.contextmanager
def offline_unless_reachable(name: str, repo_type: str):
    """Inside, only the local cache is asked, unless the hub answers now.

    Args:
      name: of the repository.
      repo_type: model | dataset.
    """
    import huggingface_hub

    modules = [huggingface_hub.constants] + [m.config for m in [sys.modules.get("datasets")] if m]
    before = [m.HF_HUB_OFFLINE for m in modules]
    try:
        huggingface_hub.HfApi().repo_info(name, repo_type=repo_type, timeout=5)
    except huggingface_hub.errors.HfHubHTTPError:
        pass  # it answered: let the loader say what is wrong with the name
    except Exception:  # the transports' errors share no base class
        for m in modules:
            m.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        for m, value in zip(modules, before, strict=True):
            m.HF_HUB_OFFLINE = value


def local(name) -> Path | None:
    """The file or folder of this machine that has this name; None where there is none, as for a hub name."""
    packaged = config.existing(PACKAGE.parent / name)  # omniopd_jax/world/checkpoints/...: found from any folder
    return packaged if packaged and str(name).startswith(f"{PACKAGE.name}/") else config.existing(name)


def licence_alone(name: str) -> bool:
    """Whether a file is there for an export to take along, and read for nothing else."""
    return any(fnmatch.fnmatchcase(name, n) for n in LICENCES) and not any(fnmatch.fnmatchcase(name, n) for n in READ)


def resolve(folder, *, setting: str = "student.path", files=HUB_FILES) -> Path:
    """The local folder of a path or hub name; a hub name is downloaded once (`files`: glob patterns).

    Raises:
      UserError: no such folder, or a hub that cannot be reached (within seconds) and no cached copy.
    """
    name = str(folder)
    if not name:
        raise UserError(f"{setting} is empty: set it to a Hugging Face folder")
    path = local(name)
    if path is not None and path.is_dir():
        return path
    if path is not None:
        raise UserError(f"{setting} = {name!r} is a file; give the folder that holds config.json and model.safetensors")
    if name.count("/") > 1 or name[0] in "/.~" or name.endswith("/"):
        raise UserError(f"{setting} = {name[:300]!r}: no such folder")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, allow_patterns=list(files), etag_timeout=5))
    except Exception as e:  # the client's own, httpx's and the file system's errors alike
        raise UserError(
            f"{setting} = {name!r} is no folder here, and as a hub name it cannot be had ({bounded.line(e)}); "
            f"set {setting} to a local folder"
        ) from e
