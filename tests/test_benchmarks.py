"""Benchmarks whose figures are in docs/results and that no other test runs: what they keep, and that they still run."""

import contextlib
import importlib
import json

import numpy as np
import pytest

from benchmarks import sides
from benchmarks.overlap import __main__ as overlap
from benchmarks.packing import __main__ as packing
from benchmarks.real import modes


@pytest.mark.parametrize("name", ["gpu", "memory", "sampling", "update", "vocab"])
def test_a_benchmark_names_what_is_there(name):
    importlib.import_module(f"benchmarks.{name}.__main__")


def test_equal_values_share_the_mean_of_their_places():
    """Else the order in which audits happen to stand makes agreement of what is tied, in both modes alike."""
    assert modes.ranked(np.array([0.0, 3.0, 0.0, 1.0, 0.0])).tolist() == [1.5, 4.5, 1.5, 3.5, 1.5]
    pair = np.array([[0.0] * 8 + [1.0, 2.0], [0.0] * 8 + [2.0, 1.0]])
    ours = np.corrcoef([modes.ranked(v) for v in pair])[0, 1]
    assert ours == pytest.approx(0.9753, abs=1e-4)  # scipy.stats.spearmanr


def test_modes_keeps_one_line_an_audit(monkeypatch, tmp_path):
    audits = [{"prefix_end": f"so {i}", "prefix_characters": 4, "question": "?", "grade": True} for i in range(3)]
    (tmp_path / "audits.jsonl").write_text("".join(json.dumps(a) + "\n" for a in audits))
    kept = []
    monkeypatch.setattr(modes.sys, "argv", ["modes", str(tmp_path), "--audits=3"])
    monkeypatch.setattr(modes.server, "vllm", lambda *_, **how: contextlib.nullcontext(type("", (), {"url": ""})))
    monkeypatch.setattr(modes.prepare, "student", lambda: "")
    monkeypatch.setattr(modes.hf, "load_tokenizer", lambda path: None)
    monkeypatch.setattr(modes, "make_template", lambda tokenizer: None)
    monkeypatch.setattr(modes, "asked", lambda url, model, template, audit, seed: {"prefix": audit["prefix_end"]})
    monkeypatch.setattr(sides, "append", lambda name, line: kept.append((name, line)))
    monkeypatch.setattr(sides, "write_page", lambda *_: None)
    monkeypatch.setattr(modes, "tables", lambda: "")
    assert modes.main() == 0
    assert kept == [("real_modes", {"prefix": f"so {i}"}) for i in range(3)]


def test_packing_counts_the_positions_of_both_layouts():
    rows, prompt_B, length_B = packing.responses(6, 64)
    T, by_layout = packing.batches(rows, prompt_B, length_B, most=160)
    found = packing.positions(by_layout, T)
    assert found["unpacked"] == 6 * T and length_B.sum() <= found["packed"] < found["unpacked"]


@pytest.mark.slow
def test_overlap_takes_a_step_of_the_loop(tmp_path):
    case = overlap.Case(1.0, "ascending", 1, scale=1000.0)
    overlap.measure(case, 1, str(tmp_path))
    assert case.seconds > 0 and overlap.bound(case, 1) > 0
