"""`max_staleness = 1`: the teacher answers step t while step t + 1 is sampled, by the policy before update t.

What was sampled ahead is kept beside the checkpoint, for the policy that drew it is gone at a resume.
"""

import concurrent.futures
import dataclasses
import os
import pathlib
import time
import zipfile
from collections.abc import Callable

import jax
import numpy as np

from omniopd_jax import experience
from omniopd_jax.errors import UserError
from omniopd_jax.experience import Group, Responses, Scores
from omniopd_jax.parallel import processes
from omniopd_jax.run import logging

FOLDER = "ahead"  # <run_dir>/ahead/<step>.<rank>.npz


class Ahead:
    """The steps that were begun and not finished: (group, N) by step."""

    def __init__(self):
        self._begun: dict[int, tuple[Group, int]] = {}

    def take(self, t: int, last: int, staleness: int, begin: Callable[[int], tuple[Group, int]]) -> tuple[Group, int]:
        """Step t as it was begun; before that, begins every step up to t + staleness (and at most `last`) that is not
        yet. With staleness step t stays here until the next is taken: it may be cut off, and is then saved as it was
        sampled."""
        self._begun = {s: begun for s, begun in self._begun.items() if s >= t}
        for s in range(t, min(t + staleness, last) + 1):
            if s not in self._begun:
                self._begun[s] = begin(s)
        return self._begun[t] if staleness else self._begun.pop(t)

    def drain(self, seconds: float) -> bool:
        """Waits for the calls under way: they are paid for, and the resumed run finds them in the journal. Returns
        whether there were any, in any process. All must call."""
        futures = [asked.future for group, _ in self._begun.values() for asked in group.asked]
        _, waited = concurrent.futures.wait(futures, timeout=0)
        concurrent.futures.wait(waited, timeout=seconds)
        return any(processes.gather("calls at the end", bool(waited)))

    def save(self, run_dir, t: int, keep: int, chunk_tokens: int = 0) -> None:
        """Writes step t's responses beside the checkpoint of step t; files of checkpoints that are gone are removed."""
        if t not in self._begun:
            return
        (group, N), folder = self._begun[t], pathlib.Path(run_dir) / FOLDER
        r, scores = group.responses, group.scores
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"{t}.{jax.process_index()}.npz"
        with path.with_suffix(".tmp").open("wb") as file:
            np.savez(
                file, token_X=np.concatenate([np.array(row, np.int32) for row in r.tokens]),
                length_B=list(map(len, r.tokens)), finished_B=r.finished_B, logp_BT=scores.logp_BT,
                entropy_BT=scores.entropy_BT, peak_BM=group.peak_BM, sampled_logp_BT=r.sampled_logp_BT, N=N,
                id_B=np.array(r.sample_ids), saved_ns=time.time_ns(), chunk_tokens=chunk_tokens,
            )  # fmt: skip
        os.replace(path.with_suffix(".tmp"), path)
        own = [f for f in folder.glob(f"*.{jax.process_index()}.npz") if f.name.split(".")[0].isdigit()]
        own.sort(key=lambda f: int(f.name.split(".")[0]))
        for old in own[: -keep - 1]:  # one more: the newest checkpoint may not be whole yet
            old.unlink()

    def load(self, run_dir, t: int, drawn: experience.Drawn, ask, sizes: tuple[int, int] | None = None) -> None:
        """Takes up step t as it was sampled before a resume and asks again, which the journal answers.

        Without the files (the run had another staleness, other hosts' disks are gone), or where chunks have another
        size now, the step is sampled anew, by the policy at hand.

        Args:
          drawn: step t's prompts. ask: (responses, peak_BM, N) -> list[Asked]. sizes: (C, most M) of the run now.
        """
        ids = sum(drawn.sample_ids, [])
        saved = Saved.of(pathlib.Path(run_dir) / FOLDER, t, ids)
        if saved is not None and sizes is not None and not saved.fits(*sizes):
            saved = None
        here = processes.gather("ahead", saved is not None)
        if saved is None or not all(here):
            if any(here) and jax.process_index() == 0:
                logging.say(f"what was sampled ahead for step {t} is not here for all processes: it is sampled anew")
            return
        tokens, N, G, peak_BM = saved.tokens, saved.N, len(drawn.sample_ids[0]), saved.peak_BM
        if sizes is not None:  # more chunks than then: the further ones were not chosen
            peak_BM = np.pad(peak_BM, ((0, 0), (0, sizes[1] - peak_BM.shape[1])), constant_values=-1)
        rows = [p for p in drawn.prompts for _ in range(G)]
        responses = Responses(rows, ids, tokens, saved.finished_B, saved.sampled_logp_BT)
        scores = Scores(saved.logp_BT, saved.entropy_BT, None, None)
        self._begun[t] = Group(responses, scores, peak_BM, ask(responses, peak_BM, N)), N


@dataclasses.dataclass(frozen=True)
class Saved:
    """A step's responses as they were saved, one row per sample id that was asked for."""

    tokens: list[list[int]]
    finished_B: np.ndarray
    logp_BT: np.ndarray
    entropy_BT: np.ndarray
    peak_BM: np.ndarray
    sampled_logp_BT: np.ndarray | None
    N: int
    chunk_tokens: frozenset[int]

    def fits(self, chunk_tokens: int, num_chunks: int) -> bool:
        """Whether its chunks are of the size that the run has now; older versions did not say."""
        return self.chunk_tokens <= {0, chunk_tokens} and self.peak_BM.shape[1] <= num_chunks

    @classmethod
    def of(cls, folder: pathlib.Path, t: int, ids: list[str]) -> "Saved | None":
        """Rows found by their sample ids, whichever process saved them; None: some are not here.

        A run may go on with another number of processes: then its rows are in files of several, which must all be here.

        Raises:
          UserError: a file is damaged.
        """
        found: dict[str, tuple[dict, int]] = {}
        files = (path for path in folder.glob(f"{t}.*.npz") if path.name.split(".")[1].isdigit())
        parts = [got for got in (_read(path, t) for path in files) if "id_B" in got]  # else of a version without
        for got in sorted(parts, key=lambda got: int(got["saved_ns"])):
            found |= {name: (got, row) for row, name in enumerate(got["id_B"].tolist())}
        if not ids or any(name not in found for name in ids):
            return None
        picked = [found[name] for name in ids]

        def rows(key):
            width = max(got[key].shape[1] for got, _ in picked)
            return np.stack([np.pad(got[key][row], (0, width - got[key].shape[1])) for got, row in picked])

        return cls(
            [got["tokens"][row] for got, row in picked], np.array([got["finished_B"][row] for got, row in picked]),
            rows("logp_BT"), rows("entropy_BT"), np.stack([got["peak_BM"][row] for got, row in picked]),
            rows("sampled_logp_BT") if all("sampled_logp_BT" in got for got, _ in picked) else None,
            min(int(got["N"]) for got, _ in picked),
            frozenset(int(got.get("chunk_tokens", 0)) for got, _ in picked),
        )  # fmt: skip


def _read(path: pathlib.Path, t: int) -> dict:
    try:
        with np.load(path) as f:
            got = dict(f)
        got["tokens"] = [row.tolist() for row in np.split(got["token_X"], np.cumsum(got["length_B"])[:-1])]
        if len(got.get("id_B", got["tokens"])) != len(got["tokens"]):
            raise ValueError("as many ids as rows are needed")
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        what = str(error).splitlines()[0][:100] if str(error) else type(error).__name__
        raise UserError(
            f"{path} is damaged ({what}): remove it to sample step {t} anew, by the policy at hand"
        ) from None
    return got
