"""The hub, asked once: where it does not answer within seconds, libraries are kept from retrying for a minute."""

import contextlib
import sys


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
