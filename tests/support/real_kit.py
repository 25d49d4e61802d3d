"""What the tests on the real model share: it in process, its answers cut at peaks, settings for its servers."""

import dataclasses
import functools
import json
import os

import jax
import numpy as np
from teacher_kit import cfg_for

from benchmarks.real import prepare
from omniopd_jax import audit, hf, model, rollout, scheduler, step
from omniopd_jax.hf.template import make as make_template
from omniopd_jax.teachers import ContinuationRequest
from omniopd_jax.teachers.wire import after_prefix

APART = 1e-3  # logits: where the top two are closer, either token is greedy
C, LONGEST = 8, 320  # tokens of a chunk; of everything that is put through the model here
MARKS = ("<|im_start|>", "<|im_end|>", "<|endoftext|>")


def student():
    """The folder of SmolLM2-135M-Instruct."""
    return prepare.ROOT.absolute() / "smollm2"


def problems(count: int) -> list[tuple[dict, ...]]:
    """Messages of the first `count` test problems."""
    lines = (prepare.ROOT / "data" / "test.jsonl").read_text().splitlines()[:count]
    return [({"role": "user", "content": json.loads(line)["prompt"]},) for line in lines]


@dataclasses.dataclass(frozen=True)
class Cut:
    """An unfinished answer: the conversation, and the student's text so far."""

    name: str
    messages: tuple[dict, ...]
    prefix: str

    def request(self, n: int, max_tokens: int, *, temperature: float = 1.0, who: str = "") -> ContinuationRequest:
        """Asks for n continuations."""
        peak = len(self.prefix)
        return ContinuationRequest(
            who or self.name, peak, self.messages, self.prefix, tuple(range(n)), max_tokens, temperature
        )


class Real:
    """A folder's model in process, in float32."""

    def __init__(self, folder):
        self.params, self.cfg = hf.load(folder)
        self.tokenizer = hf.load_tokenizer(folder)
        self.template = make_template(self.tokenizer)
        self.end_ids, _ = self.template.end_ids(hf.end_ids(folder, self.tokenizer))
        self.decoder = audit.Decoder(self.tokenizer)

    @functools.cached_property
    def prepared(self):
        """The weights as the sampler wants them."""
        return rollout.prepare(self.params, self.cfg, compute=model.Compute())

    def ids(self, text: str) -> list[int]:
        """Tokens of a rendered text."""
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]

    def continued(self, cut: Cut) -> list[int]:
        """Tokens of the prompt and the unfinished answer behind it."""
        return self.ids(self.template.continued(cut.messages, cut.prefix))

    def logits(self, ids: list[int]) -> np.ndarray:
        """[len(ids), V]; every call is one program."""
        assert len(ids) <= LONGEST, len(ids)
        token_BL = np.zeros((1, LONGEST), np.int32)
        token_BL[0, : len(ids)] = ids
        return np.asarray(_logits(self.params, self.cfg, token_BL)[0, : len(ids)])

    def sample(self, prompts: list[list[int]], new: int, *, temperature: float, seed: int = 0) -> list[list[int]]:
        """Tokens behind each prompt, an end token included."""
        keys = rollout.key_data(jax.random.key(seed), range(len(prompts)))
        how = {"max_new_tokens": new, "temperature": temperature, "end_ids": self.end_ids}
        [rows] = rollout.stream(self.prepared, self.cfg, prompts, keys, compute=model.Compute(), **how)
        return [row.tokens.tolist() for row in sorted(rows, key=lambda row: row.row)]

    def gaps(self, ids: list[int], tail: list[int]) -> np.ndarray:
        """How far the top two logits are apart where each token of `tail` was chosen."""
        top = np.sort(self.logits(ids + tail)[len(ids) - 1 : -1], axis=-1)
        return top[:, -1] - top[:, -2]

    def adds(self, ids: list[int], tail: list[int]) -> str:
        """The text that `tail` adds to the text of `ids`, special tokens left out."""
        near = ids[-8:]
        whole, before = (self.tokenizer.decode(part, skip_special_tokens=True) for part in (near + tail, near))
        assert whole.startswith(before)
        return whole[len(before) :]

    def greedy(self, prompts: list[list[int]], new: int) -> list[tuple[list[int], list[int]]]:
        """(prompt, the model's own greedy tokens behind it) of each."""
        return list(zip(prompts, self.sample(prompts, new, temperature=0.0)))

    def assert_greedy(self, text: str, ids: list[int], tail: list[int], sent: str = "", space: str = "") -> int:
        """`text` is the text of `tail`, or leaves it where the top two logits are within APART.

        `sent`, `space`: the prefix as a chat server gets it, and the whitespace that is held back from it.
        Returns how many tokens were the same.
        """

        def upto(k):
            return after_prefix(self.adds(ids, tail[:k]), sent, space)

        if text == upto(len(tail)):
            return len(tail)
        same = next(k for k in range(len(tail)) if not text.startswith(upto(k + 1).rstrip("\ufffd")))
        gap = self.gaps(ids, tail)[same]
        assert gap < APART, f"{text!r} is not {upto(len(tail))!r}: token {same}, top two {gap:.4f} apart"
        return same

    def cuts(self, answers: int = 6) -> list[Cut]:
        """The student's own answers to real problems, cut at their two entropy peaks each."""
        messages = problems(answers)
        prompts = [self.ids(self.template.render(m)) for m in messages]
        tokens = self.sample(prompts, 64, temperature=1.0)
        T, P = 64, rollout.bucket(max(map(len, prompts)))
        token_BL, _ = rollout.pad_rows([p + t for p, t in zip(prompts, tokens)], P + T)
        start_B, length_B = (np.array(list(map(len, rows)), np.int32) for rows in (prompts, tokens))
        stats = _score(self.params, token_BL, start_B, T, self.cfg)
        eligible_BT = audit.eligible_positions(self.decoder, tokens, T, C)
        peak_BM = scheduler.entropy_peaks(
            stats.entropy_BT, length_B, num_chunks=2, chunk_tokens=C, eligible_BT=eligible_BT
        )
        return [
            Cut(f"answer {b} at {peak}", m, self.decoder.chunk(row, int(peak), C)[0])
            for b, (m, row, peaks) in enumerate(zip(messages, tokens, np.asarray(peak_BM)))
            for peak in peaks
            if peak >= 0
        ]


def by_hand() -> list[Cut]:
    """Cuts that a sampled answer need not have: a first chunk, white space at the end, a word, an open thought."""
    [messages] = problems(1)
    texts = {
        "a first chunk": "",
        "after a space": "Maria has 3 bags with 2 ",
        "after a blank line": "Let's count the apples.\n\n",
        "inside a word": "Maria has 3 bags with 2 apples each, which is 6 app",
        "inside a number": "She now has 3 x 2 + 8 = 1",
        "inside a thought": "<think>\nThere are 3 bags and each of them",
    }
    return [Cut(name, messages, text) for name, text in texts.items()]


def cfg(url: str, folder, **more):
    """A recipe for a real server: patient, with what tests of continuing share. `more`: dotted keys."""
    settings = {
        "student.path": str(student()), "teacher.model": "teacher", "teacher.timeout_s": 300.0,
        "teacher.deadline_s": 600.0, "teacher.replay": "off",
    }  # fmt: skip
    return cfg_for(url, "openai", folder, **(settings | more))


def environment() -> dict:
    """Of a whole run on the real model: products are worth optimising there."""
    off = {"JAX_DISABLE_MOST_OPTIMIZATIONS", "XLA_FLAGS"}
    return {k: v for k, v in os.environ.items() if k not in off} | {"PYTHONPATH": os.getcwd()}


@functools.partial(jax.jit, static_argnums=1)
def _logits(params, model_cfg, token_BL):
    return model.logits(params, model_cfg, model.hidden(params, model_cfg, token_BL))


@functools.partial(jax.jit, static_argnums=(3, 4))
def _score(params, token_BL, start_B, T, model_cfg):
    return step.score(params, token_BL, start_B, T, model_cfg=model_cfg, block=64, micro_batches=1)
