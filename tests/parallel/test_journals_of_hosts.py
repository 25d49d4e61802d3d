"""Hosts that keep journals on disks of their own, over restarts: what was paid is counted, and no text is lost.

The hosts are threads; what they do between the collectives is the run's own code.
"""

import shutil
import threading
import types
from concurrent.futures import ThreadPoolExecutor

import pytest
import tiny

from omniopd_jax.run import checkpoint
from omniopd_jax.teachers.journal import Journal, Totals
from omniopd_jax.teachers.protocol import Continuation

KEY = b"k" * 16


class Pod:
    """A run over restarts. `start(*disks)`: the disk of each rank; one that is new is made."""

    def __init__(self, folder, monkeypatch):
        self.folder, self.disks, self.here = folder, (), threading.local()
        shared = types.SimpleNamespace(
            disks=lambda folder: list(range(len(self.disks))), gather=self.gather, barrier=lambda name: self.gather(name, 0),
            first=lambda name, value: self.gather(name, value)[0],
        )  # fmt: skip
        monkeypatch.setattr(checkpoint, "processes", shared)
        ranks = {"process_count": lambda: len(self.disks), "process_index": lambda: self.here.rank}
        monkeypatch.setattr(checkpoint, "jax", types.SimpleNamespace(**ranks))

    def gather(self, name, value):
        self.values[self.here.rank] = value
        self.meet.wait(60)
        got = list(self.values)
        self.meet.wait(60)
        return got

    def on_all(self, do):
        """do(disk) on every rank at once."""
        count = len(self.disks)
        self.values, self.meet = [None] * count, threading.Barrier(count)

        def one(rank):
            self.here.rank = rank
            return do(self.disks[rank])

        with ThreadPoolExecutor(count) as pool:
            return [future.result() for future in [pool.submit(one, rank) for rank in range(count)]]

    def start(self, *disks):
        self.disks = disks
        self.on_all(lambda disk: checkpoint.restore_journal(self.cfg(disk)))

    def cfg(self, disk):
        c = tiny.recipe("", "", self.folder / "run")
        c.teacher.journal = str(self.folder / disk)
        return c

    def buy(self, disk, usd):
        """A text for so many dollars, which says what it cost."""
        journal = Journal(self.folder / disk, "run")
        call = journal.ask(KEY, 1, 20, usd, Totals())
        text = (KEY, f"{disk} {usd}", 3, Continuation(0, f"for {usd}", "stop"), None)
        journal.settle(call, "ok", usage=(10, 0, 10, usd), results=[text])
        journal.close()

    def save(self, step, *without):
        """A checkpoint's copies of the journals; `without`: disks whose host was killed before it had copied."""

        def copy(disk):
            points = checkpoint.Checkpoints.__new__(checkpoint.Checkpoints)
            points._journals = self.folder / "run" / checkpoint.JOURNALS
            points.disks = list(range(len(self.disks)))
            points._manager = types.SimpleNamespace(all_steps=lambda: [5, 10, 15, 20])
            journal = Journal(self.folder / disk)
            kept = types.SimpleNamespace(copy_to=lambda folder: None if disk in without else journal.copy_to(folder))
            if disk in without:
                self.gather("journal copied", 0)
            else:
                points._copy_journal(kept, step)
            journal.close()

        self.on_all(copy)

    def lose(self, disk):
        shutil.rmtree(self.folder / disk)

    def counted(self):
        return sum(Journal(self.folder / disk).totals().usd for disk in set(self.disks))

    def has(self, bought_on, usd):
        found = [Journal(self.folder / d).get(KEY, f"{bought_on} {usd}", 3, [0]) for d in self.disks]
        return any(f and f[0].text == f"for {usd}" for f in found)


@pytest.fixture
def pod(tmp_path, monkeypatch):
    """Two hosts; 1 dollar was spent on disk a, 10 on b, and both are in the copies of step 5."""
    out = Pod(tmp_path, monkeypatch)
    out.start("a", "b")
    out.buy("a", 1.0)
    out.buy("b", 10.0)
    out.save(5)
    return out


@pytest.mark.parametrize("order", [("a", "b"), ("b", "a")])
def test_kept_disks_count_once_in_whatever_order_they_come(pod, order):
    pod.start(*order)
    assert pod.counted() == 11.0


@pytest.mark.parametrize("order", [("c", "b"), ("b", "c")])
def test_a_disk_that_was_replaced_is_restored_by_one_that_was_not(pod, order):
    pod.lose("a")
    pod.start(*order)
    assert pod.counted() == 11.0 and pod.has("a", 1.0) and pod.has("b", 10.0)


@pytest.mark.parametrize("disks", [("c", "d"), ("c",), ("c", "d", "e")])
def test_all_disks_replaced(pod, disks):
    pod.lose("a")
    pod.lose("b")
    pod.start(*disks)
    assert pod.counted() == 11.0 and pod.has("a", 1.0) and pod.has("b", 10.0)


@pytest.mark.parametrize("buys_alone", [True, False])
def test_a_host_that_is_away_and_comes_back_loses_nothing_that_it_buys(pod, buys_alone):
    """What both disks hold counts twice from then on: a cap is reached early, never late."""
    pod.start("a")
    assert pod.counted() == 11.0
    if buys_alone:
        pod.buy("a", 2.0)
    pod.save(10)
    pod.start("a", "b")
    truth = 13.0 if buys_alone else 11.0
    assert pod.counted() == truth + 10.0
    pod.buy("b", 100.0)
    pod.save(15)
    pod.start("a")
    pod.buy("a", 0.0)  # the first write takes b's over: what a has of it already counts once
    assert pod.counted() == truth + 100.0 and pod.has("b", 100.0) and pod.has("b", 10.0)
    pod.start("a", "b")
    pod.start("b", "a")
    assert pod.counted() >= truth + 100.0


def test_a_run_that_goes_from_host_to_host_and_back_forgets_nothing(pod):
    """A requeue does this: each host keeps its disk, and the run's journal goes on from wherever it was last."""
    pod.start("a")
    pod.buy("a", 0.0)
    truth = 11.0
    for turn, disk in enumerate(("c", "a", "c", "d", "a", "c")):
        pod.save(10 + turn)
        pod.start(disk)
        assert pod.counted() == truth
        pod.buy(disk, 100.0 * 2**turn)
        truth += 100.0 * 2**turn
        assert pod.counted() == truth and pod.has("a", 1.0) and pod.has("b", 10.0)
    for disk, usd in (("c", 100.0), ("a", 200.0), ("c", 400.0), ("d", 800.0), ("a", 1600.0), ("c", 3200.0)):
        assert pod.has(disk, usd)


def test_of_two_hosts_one_goes_on_with_what_its_copy_got_elsewhere(pod):
    pod.start("c", "b")  # c takes what a had
    pod.buy("c", 100.0)
    pod.save(10)
    pod.start("a", "b")
    assert pod.counted() == 111.0 and pod.has("c", 100.0)
    pod.start("b", "a")
    assert pod.counted() == 111.0


def test_what_was_bought_after_the_last_copy_stays_where_the_run_comes_back(pod):
    pod.start("a")
    pod.save(10)
    pod.buy("a", 3.0)  # and killed before the next checkpoint
    pod.start("c")
    assert pod.counted() == 11.0
    pod.buy("c", 100.0)
    pod.save(15)
    pod.start("a")
    assert pod.counted() == 114.0 and pod.has("a", 3.0) and pod.has("c", 100.0)


@pytest.mark.parametrize("damage", ["", "2\n9", "two"])
def test_a_copy_whose_mark_is_damaged_is_no_whole_one(pod, damage):
    pod.buy("a", 3.0)
    pod.save(10)
    (pod.folder / "run" / checkpoint.JOURNALS / "10" / "0" / checkpoint.WHOLE).write_text(damage)
    pod.lose("a")
    pod.lose("b")
    pod.start("c", "d")
    assert pod.counted() == 11.0


def test_a_run_killed_between_two_hosts_copies_goes_back_to_the_copies_that_are_whole(pod):
    pod.buy("a", 3.0)
    pod.save(10, "b")  # b's machine is gone
    pod.lose("b")
    pod.start("a", "c")
    assert pod.counted() == 14.0 and pod.has("b", 10.0)


def test_copies_of_a_version_that_marked_none_are_taken(pod):
    for mark in (pod.folder / "run").rglob(checkpoint.WHOLE):
        mark.unlink()
    pod.lose("a")
    pod.lose("b")
    pod.start("c", "d")
    assert pod.counted() == 11.0
