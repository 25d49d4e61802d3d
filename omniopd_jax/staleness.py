"""`max_staleness = 1`: the teacher answers step t while step t + 1 is sampled, by the policy before update t.

What was sampled ahead is kept beside the checkpoint, for the policy that drew it is gone at a resume.
"""

import concurrent.futures
import os
import pathlib
import zipfile
from collections.abc import Callable

import jax
import numpy as np

from omniopd_jax import experience
from omniopd_jax.errors import UserError
from omniopd_jax.experience import Group, Responses, Scores
from omniopd_jax.parallel import processes

FOLDER = "ahead"  # <run_dir>/ahead/<step>.<rank>.npz


class Ahead:
    """The steps that were begun and not finished: (group, N) by step."""

    def __init__(self):
        self._begun: dict[int, tuple[Group, int]] = {}

    def take(self, t: int, last: int, staleness: int, begin: Callable[[int], tuple[Group, int]]) -> tuple[Group, int]:
        """Step t as it was begun; before that, begins every step up to t + staleness (and at most `last`) that is not
        yet."""
        for s in range(t, min(t + staleness, last) + 1):
            if s not in self._begun:
                self._begun[s] = begin(s)
        return self._begun.pop(t)

    def drain(self, seconds: float) -> None:
        """Waits for the calls under way: they are paid for, and the resumed run finds them in the journal."""
        futures = [asked.future for group, _ in self._begun.values() for asked in group.asked]
        concurrent.futures.wait(futures, timeout=seconds)

    def save(self, run_dir, t: int, keep: int) -> None:
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
            )  # fmt: skip
        os.replace(path.with_suffix(".tmp"), path)
        own = [f for f in folder.glob(f"*.{jax.process_index()}.npz") if f.name.split(".")[0].isdigit()]
        own.sort(key=lambda f: int(f.name.split(".")[0]))
        for old in own[: -keep - 1]:  # one more: the newest checkpoint may not be whole yet
            old.unlink()

    def load(self, run_dir, t: int, drawn: experience.Drawn, ask) -> None:
        """Takes up step t as it was sampled before a resume and asks again, which the journal answers.

        Without the file (the run had another staleness) the step is sampled anew, by the policy at hand.

        Args:
          drawn: step t's prompts. ask: (responses, peak_BM, N) -> list[Asked].
        """
        path = pathlib.Path(run_dir) / FOLDER / f"{t}.{jax.process_index()}.npz"
        if not all(processes.gather("ahead", path.is_file())):
            return
        try:
            with np.load(path) as f:
                got, N = dict(f), int(f["N"])
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
            what = str(error).splitlines()[0][:100] if str(error) else type(error).__name__
            raise UserError(
                f"{path} is damaged ({what}): remove it to sample step {t} anew, by the policy at hand"
            ) from None
        G = len(drawn.sample_ids[0])
        rows, ids = [p for p in drawn.prompts for _ in range(G)], sum(drawn.sample_ids, [])
        tokens = [row.tolist() for row in np.split(got["token_X"], np.cumsum(got["length_B"])[:-1])]
        responses = Responses(rows, ids, tokens, got["finished_B"], got.get("sampled_logp_BT"))
        scores = Scores(got["logp_BT"], got["entropy_BT"], None, None)
        self._begun[t] = Group(responses, scores, got["peak_BM"], ask(responses, got["peak_BM"], N)), N
