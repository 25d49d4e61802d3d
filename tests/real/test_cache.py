"""The prefixes of one answer find each other in a real server's prefix cache, and the saving is counted."""

import asyncio
import json
import sqlite3

import pytest
import real_kit
from teacher_kit import teacher_of

pytestmark = pytest.mark.real
BLOCK, PREFIXES, STEP = 32, 6, 70  # tokens of a block of the server's cache; prefixes of one answer, tokens apart


def nested(real, name: str):
    """Cuts of one long answer, none of whose blocks another test has sent: their first words are their own."""
    messages = ({"role": "user", "content": f"{name}. Count from one to three hundred, in words."},)
    words = real.ids(" ".join(f"{name} {i}," for i in range(400)))
    return [
        real_kit.Cut(name, messages, real.tokenizer.decode(words[: STEP * (i + 1)]).rstrip()) for i in range(PREFIXES)
    ]


def asked_together(c, requests):
    """(results, the teacher's metrics, what the journal's calls say was cached)."""

    async def go():
        async with teacher_of(c) as teacher:
            results = await asyncio.gather(*(teacher.continue_text(r) for r in requests))
            return results, teacher.metrics()

    results, metrics = asyncio.run(go())
    with sqlite3.connect(f"file:{c.run_dir}/journal/journal.sqlite?mode=ro", uri=True) as journal:
        calls = journal.execute("select tokens_in, tokens_cached from calls where status = 'ok'").fetchall()
    return results, metrics, calls


@pytest.mark.parametrize("order", ["ascending", "free"])
def test_nested_prefixes_share_blocks(real, vllm, tmp_path, order, record_property):
    cuts = nested(real, f"The {order} otter")
    c = real_kit.cfg(vllm, tmp_path / order, **{
        "teacher.tokenizer": str(real_kit.student()), "teacher.continuation": "completion",
        "teacher.prefix_order": order, "teacher.replay": "prefer",
    })  # fmt: skip
    results, metrics, calls = asked_together(c, [cut.request(1, 4) for cut in cuts])
    ids = [real.continued(cut) for cut in cuts]
    assert [r.usage.tokens_in for r in results] == [len(i) for i in ids]
    cached = [r.usage.tokens_cached for r in results]
    record_property("cached", json.dumps({"order": order, "tokens": [len(i) for i in ids], "cached": cached}))
    assert metrics["teacher/tokens_cached"] == sum(cached) == sum(call[1] for call in calls)
    assert metrics["teacher/cache_hit_rate"] == pytest.approx(sum(cached) / sum(map(len, ids)))
    assert all(n % BLOCK == 0 for n in cached)
    if order == "ascending":  # each finds every whole block that the one before had in common with it
        for before, now, n in zip(ids, ids[1:], cached[1:]):
            common = next((k for k, (a, b) in enumerate(zip(before, now)) if a != b), len(before))
            assert n >= common // BLOCK * BLOCK, (n, common)
    else:
        assert all(n <= len(i) for n, i in zip(cached, ids))
