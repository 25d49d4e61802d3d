"""One self-contained HTML file about one or several runs: verdict, curves, health checks, an audit browser.

Whatever comes from a run (texts, names, settings) enters the page as compressed JSON and is shown by `textContent`
alone; a content security policy lets nothing run but the page's own script, known by its hash.
"""

import base64
import hashlib
import html
import importlib.resources
import json
import math
import re
import time
import zlib

from omniopd_jax.run.page import choose, figures
from omniopd_jax.run.page.read import Folder, stamp

__all__ = ["Folder", "build", "stamp"]

MAX_BYTES = 5_000_000  # of the file
AUDITS, COMPLETIONS, ANSWERS = 2_000, 400, 1_000  # on the page, all runs together
SCRIPTS = ("uplot.iife.min.js", "base.js", "charts.js", "align.js", "browser.js", "main.js")
STYLES = ("uplot.min.css", "style.css")


def build(folders: list[Folder], phi_of=None, *, watch: str = "") -> str:
    """The page's HTML, at most MAX_BYTES long where the curves alone allow it.

    Args:
      phi_of: config {dotted key: value} -> similarity function or None, for runs that kept no agreement by chance.
      watch: a stamp; the page asks its server for the present one, and loads itself again where it is another.
    """
    fixed = [_figures(f, phi_of) for f in folders]
    keep = 1.0
    while True:
        sizes = (max(1, int(n * keep / len(folders))) for n in (AUDITS, COMPLETIONS, ANSWERS))
        limits = dict(zip(("audits", "completions", "evaluations"), sizes))
        data = {
            "made": time.strftime("%Y-%m-%d %H:%M"), "watch": watch, "rule": choose.RULE, "differ": differing(folders),
            "runs": [run | _records(folder, limits) for run, folder in zip(fixed, folders)],
        }  # fmt: skip
        page = _page(data, folders, watch)
        if len(page) <= MAX_BYTES or keep < 0.02:
            return page
        keep *= 0.9 * MAX_BYTES / len(page)


def differing(folders: list[Folder]) -> list[list]:
    """[key, a value a run] of the settings that the runs do not share."""
    keys = dict.fromkeys(k for f in folders for k in f.config)
    rows = [[k, *(f.config.get(k) for f in folders)] for k in keys]
    return [row for row in rows if len(folders) > 1 and any(v != row[1] for v in row[2:])]


def _figures(folder: Folder, phi_of) -> dict:
    found = figures.findings(folder)
    chance_kept = any(a.get("chance") for a in folder.audits)
    phi = None if phi_of is None or chance_kept else phi_of(folder.config)
    return {
        "name": folder.name, "folder": str(folder.path), "state": folder.state(), "notes": folder.notes,
        "objective": folder.objective, "config": folder.config, "health": found,
        "verdict": figures.verdict(folder, found), "curves": figures.curves(folder),
        "agreement": figures.agreement(folder, phi),
    }  # fmt: skip


def _records(folder: Folder, limits: dict) -> dict:
    chosen = choose.Chosen(folder, **limits)
    return {
        "texts": chosen.texts, "audits": chosen.audits, "completions": chosen.completions,
        "evaluations": chosen.evaluations, "left_out": chosen.left_out,
    }  # fmt: skip


def _page(data: dict, folders: list[Folder], watch: str) -> str:
    script = "\n".join(_file(name) for name in SCRIPTS)
    style = "\n".join(_file(name) for name in STYLES)
    packed = base64.b64encode(zlib.compress(_json(data).encode(), 6)).decode()
    title = "omniopd: " + ", ".join(f.name for f in folders)[:200]
    policy = (
        f"default-src 'none'; script-src '{_hash(script)}'; style-src '{_hash(style)}'; img-src data:; "
        f"connect-src {chr(39)}{'self' if watch else 'none'}{chr(39)}; base-uri 'none'; form-action 'none'"
    )
    parts = {
        "POLICY": policy, "TITLE": html.escape(title.encode("utf-8", "replace").decode()), "STYLE": style,
        "DATA": packed, "SCRIPT": script,
    }  # fmt: skip
    return re.sub("@([A-Z]+)@", lambda found: parts[found[1]], _file("page.html"))


def _json(data) -> str:
    """JSON as browsers read it: what is no number becomes null."""
    try:
        return json.dumps(data, allow_nan=False)
    except ValueError:
        return json.dumps(_finite(data), allow_nan=False)


def _finite(data):
    if isinstance(data, dict):
        return {k: _finite(v) for k, v in data.items()}
    if isinstance(data, (list, tuple)):
        return [_finite(v) for v in data]
    return None if isinstance(data, float) and not math.isfinite(data) else data


def _hash(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def _file(name: str) -> str:
    return (importlib.resources.files(__package__) / "web" / name).read_text(encoding="utf-8")
