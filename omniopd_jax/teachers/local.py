"""A Hugging Face folder run in process behind the text protocol: its own tokenizer, text in, text out.

Requests that arrive together are sampled together: the first waits a moment for the rest, prefixes are sorted by
length, and each is prefilled once for its n continuations. Each continuation draws from its own seed, so its text does
not depend on who else is in the batch.
"""

import asyncio
import dataclasses
import functools
import time

import jax
import numpy as np

from omniopd_jax import hf, model, rollout, step
from omniopd_jax.errors import UserError
from omniopd_jax.hf.template import Template, of_teacher
from omniopd_jax.model import attention
from omniopd_jax.parallel import sharding
from omniopd_jax.slots import padded
from omniopd_jax.teachers.protocol import (
    DISTRIBUTION,
    TEXT,
    Continuation,
    ContinuationRequest,
    ContinuationResult,
    Counts,
    Failure,
    Teacher,
    Usage,
    whole_characters,
)

CPU_SLOTS = 256  # continuations decoded at a time on a CPU, whose caches hold no more: 1.3 times as fast
SCORE_ROWS, SCORE_POSITIONS = 128, 1 << 15  # responses scored at once, and their positions with padding: at most


@functools.partial(jax.jit, static_argnums=(3, 4, 5))
def _score(params, token_BL, prompt_length_B, T: int, model_cfg, compute):
    return step.score(
        params, token_BL, prompt_length_B, T, model_cfg=model_cfg, block=1024, micro_batches=1, compute=compute
    )


class LocalTeacher(Teacher):
    """See the module. `foreign_tokenizer` says whether its vocabulary differs from the student's.

    The weights are held once: as the sampler wants them from the first request for text on, else as they were given,
    which is what scoring takes.
    """

    def __init__(self, params, model_cfg, template: Template, *, end_ids, foreign_tokenizer: bool, compute=None):
        self._params, self._prepared = params, None
        self.model_cfg = self._cfg = model_cfg
        self._compute = compute or model.Compute()
        self._how = rollout.How(slots=CPU_SLOTS if sharding.platform(self._compute.mesh) == "cpu" else 0)
        self._template, self._tokenizer = template, template.tokenizer
        self._end_ids = end_ids
        self._counts = Counts()
        self._scoring: list[tuple[list[int], list[int], asyncio.Future]] = []
        self._waiting: list[tuple[ContinuationRequest, asyncio.Future, float]] = []
        self.foreign_tokenizer = foreign_tokenizer

    async def check(self) -> str:
        """One line on the model: it is loaded, so it answers."""
        c = self._cfg
        return f"local teacher: {c.family}, {c.num_layers} layers of {c.hidden_size}, vocabulary {c.vocab_size}"

    async def continue_text(self, request: ContinuationRequest) -> ContinuationResult:
        """Samples the wanted continuations, together with every request that waits at the same moment."""
        future = asyncio.get_running_loop().create_future()
        self._waiting.append((request, future, time.perf_counter()))
        if len(self._waiting) == 1:
            await asyncio.sleep(0)  # every task that is ready now gets its request in
            await asyncio.sleep(0)
            batch, self._waiting = self._waiting, []
            try:
                self._answer(batch)
            except BaseException as error:
                for _, waiting, _ in batch:
                    if not waiting.done():
                        waiting.set_exception(error)
        return await future

    async def score_tokens(self, messages, prompt_ids, token_ids) -> np.ndarray:
        """White-box baseline: log-prob of each of `token_ids` after the prompt, with the student's own tokenizer.

        Raises:
          UserError: the tokenizers differ, so the tokens mean nothing here.
        """
        if self.foreign_tokenizer:
            raise UserError("objective.name = 'opd' needs a teacher with the student's tokenizer")
        if self._params is None:
            raise UserError(
                "a local teacher that has sampled text holds the sampler's weights alone: make one for scores"
            )
        future = asyncio.get_running_loop().create_future()
        since = time.perf_counter()
        self._scoring.append((list(prompt_ids), list(token_ids), future))
        if len(self._scoring) == 1:
            await asyncio.sleep(0)
            await asyncio.sleep(0)
            batch, self._scoring = self._scoring, []
            try:
                self._score(batch)
            except BaseException as error:
                for *_, waiting in batch:
                    if not waiting.done():
                        waiting.set_exception(error)
        logp = await future
        usage = Usage(calls=1, tokens_in=len(prompt_ids) + len(token_ids))
        self._counts.add(ContinuationResult((), (), usage, time.perf_counter() - since))
        return logp

    def metrics(self) -> dict[str, float]:
        """Requests, tokens and seconds since the last call."""
        return self._counts.take()

    async def close(self) -> None:
        """Drops the parameters."""
        self._params = self._prepared = None

    def _score(self, batch) -> None:
        P = rollout.bucket(max(len(p) for p, _, _ in batch))
        T = rollout.bucket(max(len(r) for _, r, _ in batch))
        size = min(SCORE_ROWS, max(1, SCORE_POSITIONS // (P + T)))
        for start in range(0, len(batch), size):
            part = batch[start : start + size]
            unused = min(size, padded(len(part))) - len(part)
            token_BL, _ = rollout.pad_rows([p + r for p, r, _ in part] + [[0]] * unused, P + T)
            length_B = np.array([len(p) for p, _, _ in part] + [1] * unused, np.int32)
            stats = _score(self._params, *jax.device_put((token_BL, length_B)), T, self._cfg, self._compute)
            logp_BT = jax.device_get(stats.logp_BT)
            for (_, response, future), logp in zip(part, logp_BT):
                future.set_result(logp[: len(response)])

    def _answer(self, batch) -> None:
        """Requests of one temperature, top_p and number of continuations are sampled in one go, each up to its own
        length."""
        groups: dict[tuple, list] = {}
        for item in batch:
            r = item[0]
            groups.setdefault((len(r.indices), r.temperature, r.top_p), []).append(item)
        for (n, temperature, top_p), items in groups.items():
            texts = [self._template.continued(r.messages, r.prefix) for r, _, _ in items]
            ids = self._template.ids(texts)
            order = sorted(range(len(items)), key=lambda i: (len(ids[i]), i))
            rows = self._sample([ids[i] for i in order], [items[i][0] for i in order], n, temperature, top_p)
            for k, i in enumerate(order):
                (request, future, since), own = items[i], rows[k * n : (k + 1) * n]
                read = [self._read(ids[i], k, row) for k, row in zip(request.indices, own, strict=True)]
                lost = [c for c in read if not c.text and c.finish == "length"]  # half a character, thoughts alone
                continuations = tuple(c for c in read if c not in lost)
                usage = Usage(calls=1, tokens_in=len(ids[i]), tokens_out=sum(len(row.tokens) for row in own))
                failures = tuple(Failure(c.index, "no continuation: empty at the length limit") for c in lost)
                result = ContinuationResult(continuations, failures, usage, time.perf_counter() - since)
                if not future.done():
                    future.set_result(self._counts.add(result))

    def _sample(self, ids, requests, n: int, temperature: float, top_p: float) -> list[rollout.Ended]:
        """The rows of all requests, n of each. Each draws from its own seed."""
        seeds = [r.seed(i) for r in requests for i in r.indices]
        if self._prepared is None:
            self._prepared, self._params = rollout.prepare(self._params, self._cfg, compute=self._compute), None
        [rows] = rollout.stream(
            self._prepared, self._cfg, ids, rollout.key_data(_base_key(), seeds),
            max_new_tokens=np.repeat([r.max_tokens for r in requests], n), temperature=temperature, top_p=top_p,
            num_samples=n, end_ids=self._end_ids, how=self._how, compute=self._compute,
        )  # fmt: skip
        return rows

    def _read(self, prefix: list[int], index: int, row: rollout.Ended) -> Continuation:
        text, stopped = self._template.cut(self._tail_text(prefix, row.tokens.tolist()))
        finish = "stop" if row.finished or stopped else "length"
        return Continuation(index, whole_characters(text, finish), finish)

    def _tail_text(self, prefix: list[int], tail: list[int]) -> str:
        """What `tail` adds to the text of the last prefix tokens: right also where a token's text depends on its
        left."""
        near = prefix[-8:]
        how = {"skip_special_tokens": True, "clean_up_tokenization_spaces": False}  # as the student's text is made
        return self._tokenizer.decode(near + tail, **how)[len(self._tokenizer.decode(near, **how)) :]


def _base_key():
    return jax.random.key(jax.device_put(np.uint32(0x7EAC4E5)))


def make(cfg, needs: str = TEXT) -> LocalTeacher:
    """Loads `teacher.model`, a Hugging Face folder; its weights only where it will be asked (`needs`).

    Raises:
      UserError: no folder given, or one that can't be loaded.
    """
    if not cfg.teacher.model:
        raise UserError("teacher.provider = 'local' needs teacher.model, a Hugging Face folder")
    tokenizer = hf.load_tokenizer(cfg.teacher.model, setting="teacher.model")
    student = hf.load_tokenizer(cfg.student.path)
    template = of_teacher(cfg, tokenizer)
    end_ids, _ = template.end_ids(hf.end_ids(cfg.teacher.model, tokenizer, setting="teacher.model"))
    if needs == DISTRIBUTION:  # the loop lays the weights out on its own mesh
        params, model_cfg = None, hf.read_config(cfg.teacher.model, setting="teacher.model")
    else:
        params, model_cfg = hf.load(cfg.teacher.model, setting="teacher.model")
    where = {"on": jax.default_backend(), "head_dim": model_cfg.head_dim}
    backend = attention.resolve(cfg.model.attention, cfg.compute_dtype, **where)
    return LocalTeacher(
        params, model_cfg, dataclasses.replace(template, rows=model_cfg.vocab_size), end_ids=end_ids,
        foreign_tokenizer=tokenizer.get_vocab() != student.get_vocab(),
        compute=model.Compute(cfg.compute_dtype, attention=backend),
    )  # fmt: skip
