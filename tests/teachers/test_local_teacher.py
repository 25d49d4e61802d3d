"""The in-process teacher: text in, text out, and nothing of a request depends on who else asks."""

import asyncio

import jax
import numpy as np
import pytest
import tiny

from omniopd_jax import config, hf, model, rollout, teachers
from omniopd_jax.errors import UserError
from omniopd_jax.hf import template
from omniopd_jax.teachers import ContinuationRequest
from omniopd_jax.teachers.local import LocalTeacher

MESSAGES = [
    ({"role": "user", "content": text},)
    for text in ("Add 3 and 4.", "A longer question, with more words in it: 5 - 2?")
]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return tiny.make_folders(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="module")
def make(folders):
    """make(**overrides) -> a LocalTeacher over the tiny teacher's folder."""

    def one(**more):
        c = config.default()
        c.student.path, c.teacher.model = map(str, folders)
        c.update_from_flattened_dict(more)
        return teachers.make(c)

    return one


@pytest.fixture(scope="module")
def teacher(make):
    return make()


def request(who="s0", peak=3, prefix="The sum", n=3, max_tokens=8, messages=MESSAGES[0], **more):
    indices = more.pop("indices", tuple(range(n)))
    return ContinuationRequest(who, peak, messages, prefix, indices, max_tokens, **more)


def ask(teacher, *requests):
    async def run():
        return await asyncio.gather(*(teacher.continue_text(r) for r in requests))

    return asyncio.run(run())


def texts(result):
    return [c.text for c in result.continuations]


def test_a_request_alone_gives_what_it_gives_among_others(teacher):
    """Other prefixes, lengths, and numbers of rows: none of them may show in the text."""
    mine = request()
    others = [request(f"s{i}", prefix="x " * i, messages=MESSAGES[i % 2]) for i in range(1, 12)]
    (alone,) = ask(teacher, mine)
    among = ask(teacher, *others[:5], mine, *others[5:])[5]
    assert texts(among) == texts(alone)
    assert [c.finish for c in among.continuations] == [c.finish for c in alone.continuations]


def test_each_answer_goes_to_the_one_who_asked(teacher):
    """Requests are sorted by length inside: answers must come back in the order of asking."""
    requests = [request(f"s{i}", prefix="word " * (7 * i % 5), messages=MESSAGES[i % 2]) for i in range(6)]
    together = ask(teacher, *requests)
    assert [texts(r) for r in together] == [texts(ask(teacher, r)[0]) for r in requests]
    assert len({tuple(texts(r)) for r in together}) == 6


def test_requests_of_different_kinds_are_answered_in_one_go(teacher):
    requests = [
        request("a", n=2),
        request("b", n=3, max_tokens=5),
        request("c", n=1, temperature=0.7),
        request("d", top_p=0.5),
    ]
    for r, got in zip(requests, ask(teacher, *requests), strict=True):
        assert [c.index for c in got.continuations] == list(r.indices)
        assert texts(got) == texts(ask(teacher, r)[0])


@pytest.mark.parametrize("other", [{"who": "s1"}, {"peak": 4}], ids=["sample", "peak"])
def test_another_seed_gives_another_text(teacher, other):
    base, changed = ask(teacher, request(n=8), request(n=8, **other))
    assert all(a != b for a, b in zip(texts(base), texts(changed)))


def test_an_index_asked_for_alone_is_the_one_of_the_whole_call(teacher):
    """A retry of continuation 2 gives continuation 2, whatever came with it before."""
    whole, one = ask(teacher, request(n=4), request(indices=(2,)))
    assert one.continuations == whole.continuations[2:3]


def test_n_samples_of_a_random_model_are_all_different(teacher):
    (got,) = ask(teacher, request(n=16))
    assert len(set(texts(got))) == 16


@pytest.mark.parametrize("max_tokens", [1, 5, 8, 11])
def test_length_is_bounded_in_its_own_tokens(teacher, max_tokens):
    (got,) = ask(teacher, request(n=6, max_tokens=max_tokens))
    assert got.usage.tokens_out <= 6 * max_tokens
    cut = [c for c in got.continuations if c.finish == "length"]
    assert cut, "a random model does not end at once every time"
    assert got.usage.calls == 1
    assert got.latency_s > 0
    assert not got.failures


def test_usage_counts_the_rendered_prompt(teacher):
    tok = tiny.tokenizer()
    (got,) = ask(teacher, request(prefix="The sum"))
    assert got.usage.tokens_in == len(
        tok(template.make(tok).render(MESSAGES[0]) + "The sum", add_special_tokens=False)["input_ids"]
    )


# --- a teacher that says what we tell it to
# -----------------------------------------------------------------------------


def script(tok, text: str, *, end: bool):
    """A teacher whose every continuation is `text`: after each token the next one has all the mass.

    The layers write nothing, so the next token depends on the last one alone: `text` must not repeat a token.
    """
    prompt = tok(template.make(tok).render(MESSAGES[0]), add_special_tokens=False)["input_ids"]
    chain = [prompt[-1], *tok(text, add_special_tokens=False)["input_ids"], *([tok.eos_token_id] if end else [])]
    assert len(set(chain)) == len(chain), "a token repeats"
    V = len(tok)
    cfg = model.ModelConfig("llama", V, V, 4, 1, 1, 1, 4, tied=False, norm_eps=1e-12)
    params = tiny.init(jax.random.key(0), cfg)
    for name in ("o", "down"):
        params["layers"][name] = params["layers"][name] * 0
    table = np.zeros((V, V), np.float32)
    for a, b in zip(chain, chain[1:]):
        table[a, b] = 60.0
    params |= {"embed": jax.numpy.eye(V), "head": jax.numpy.asarray(table) / V**0.5}
    return LocalTeacher(params, cfg, template.make(tok), end_ids=(tok.eos_token_id,), foreign_tokenizer=False), len(
        chain
    ) - 1


@pytest.mark.parametrize("text", [" so7", "so 7", "\tx y", "é 日😀", " a\t"], ids=repr)
def test_the_text_is_exactly_the_tail(text):
    """Leading spaces, line breaks and characters of many bytes are kept; nothing of the prompt comes along."""
    teacher, length = script(tiny.tokenizer(), text, end=False)
    (got,) = ask(teacher, request(prefix="", n=2, max_tokens=length))
    assert texts(got) == [text, text]
    assert [c.finish for c in got.continuations] == ["length", "length"]


def test_half_a_character_at_the_limit_is_no_continuation():
    """As of a service, which lowers n; an empty text would count as one that does not agree."""
    teacher, length = script(tiny.tokenizer(), "日", end=False)
    assert length > 1
    (got,) = ask(teacher, request(prefix="", n=2, max_tokens=1))
    assert got.continuations == () and [f.index for f in got.failures] == [0, 1]


def test_an_end_token_stops_and_is_no_text():
    teacher, length = script(tiny.tokenizer(), " so7", end=True)
    (got,) = ask(teacher, request(prefix="", n=1, max_tokens=length + 6))
    assert got.continuations == (teachers.Continuation(0, " so7", "stop"),)
    assert got.usage.tokens_out == length


def test_an_end_token_as_the_last_allowed_one_is_a_stop():
    teacher, length = script(tiny.tokenizer(), " so7", end=True)
    at_the_cap, cut = ask(
        teacher, request(prefix="", n=1, max_tokens=length), request(prefix="", n=1, max_tokens=length - 1)
    )
    assert at_the_cap.continuations[0].finish == "stop"
    assert cut.continuations[0].finish == "length"


def test_half_a_character_at_the_cap_is_left_out_and_nothing_else():
    tok = tiny.tokenizer()
    pieces = tok("a😀", add_special_tokens=False)["input_ids"]
    teacher, length = script(tok, "a😀", end=False)
    (got,) = ask(teacher, request(prefix="", n=1, max_tokens=length - 1))
    assert tok.decode(pieces[:-1]) == "a\ufffd" and texts(got) == ["a"]


def test_the_students_prefix_is_what_the_teacher_continues():
    """The text so far is appended raw: the token after it is the one that follows its own last token."""
    teacher, _ = script(tiny.tokenizer(), " so7", end=True)
    (got,) = ask(teacher, request(prefix=" so", n=1, max_tokens=6))
    assert texts(got) == ["7"]


@pytest.mark.parametrize("settings", [{}, {"enable_thinking": False}])
def test_the_answer_so_far_is_an_unfinished_turn_of_the_teachers_template(folders, tmp_path, monkeypatch, settings):
    """What is tokenized: the prompt by the teacher's template and settings, then the prefix; nothing ends the turn."""
    params, cfg = hf.load(folders[1])
    tok = hf.load_tokenizer(folders[1])
    tok.chat_template += "{% if enable_thinking is false %}{{ '<think></think>' }}{% endif %}"
    hf.save(tmp_path / "t", params, cfg, tok, dtype="float32")
    c = config.default()
    c.student.path, c.teacher.model = str(folders[0]), str(tmp_path / "t")
    c.student.chat_template_kwargs.enable_thinking = not settings  # must not reach the teacher
    c.teacher.chat_template_kwargs.update(settings)
    teacher, seen = teachers.make(c), []
    real = teacher._sample
    monkeypatch.setattr(teacher, "_sample", lambda ids, *rest: seen.extend(ids) or real(ids, *rest))
    ask(teacher, request(prefix="The sum"))
    text = tok.decode(seen[0])
    prompt = f"<|im_start|>user\n{MESSAGES[0][0]['content']}<|im_end|>\n<|im_start|>assistant\n"
    assert text == prompt + ("<think></think>" if settings else "") + "The sum"
    if not settings:  # as transformers itself renders an unfinished turn
        turns = [*MESSAGES[0], {"role": "assistant", "content": "The sum"}]
        assert text == tok.apply_chat_template(turns, tokenize=False, continue_final_message=True)


# --- making one
# ---------------------------------------------------------------------------------------------------------


def test_its_own_tokenizer_is_told_from_a_foreign_one(folders, make, tmp_path):
    assert make().foreign_tokenizer is False
    tok = tiny.tokenizer(tiny.VOCAB - 20)
    params, cfg = tiny.random_model(len(tok), 1)
    hf.save(tmp_path / "foreign", params, cfg, tok)
    foreign = make(**{"teacher.model": str(tmp_path / "foreign")})
    assert foreign.foreign_tokenizer is True
    (got,) = ask(foreign, request())
    assert len(got.continuations) == 3


def test_end_ids_come_from_the_teachers_own_folder(folders, make, tmp_path):
    """A generation_config.json with another end token: the teacher must stop there too."""
    params, cfg = hf.load(folders[1])
    tok = hf.load_tokenizer(folders[1])
    often = int(np.argmax(np.bincount(tok("The answer is 7. The answer is", add_special_tokens=False)["input_ids"])))
    hf.save(
        tmp_path / "t", params, cfg, tok, dtype="float32", generation_config={"eos_token_id": [tok.eos_token_id, often]}
    )
    got = make(**{"teacher.model": str(tmp_path / "t")})
    assert set(got._end_ids) == {tok.eos_token_id, often}


def test_check_says_what_answers(teacher):
    assert "qwen3" in asyncio.run(teacher.check())


@pytest.mark.parametrize("path", ["", "/no/such/folder"])
def test_no_folder_is_one_line_that_names_the_setting(make, path):
    with pytest.raises(UserError, match=r"teacher\.model") as caught:
        make(**{"teacher.model": path})
    assert "\n" not in str(caught.value)


def test_continuations_follow_the_models_own_distribution():
    """First tokens of 4,000 continuations against the softmax of the model's logits (chi-square by hand, 4 sigma)."""
    tok = tiny.tokenizer()
    params, cfg = tiny.random_model(len(tok), 5, sharpness=60.0)
    teacher = LocalTeacher(params, cfg, template.make(tok), end_ids=(), foreign_tokenizer=False)
    got = ask(teacher, *(request(f"s{i}", n=100, max_tokens=1) for i in range(40)))
    ids = tok(template.make(tok).render(MESSAGES[0]) + "The sum", add_special_tokens=False)["input_ids"]
    token_BL = np.array([ids], np.int32)
    p_V = np.asarray(jax.nn.softmax(model.logits(params, cfg, model.hidden(params, cfg, token_BL))[0, -1]), np.float64)
    text_p = {}
    for v, p in enumerate(p_V):
        piece = tok.decode([v], skip_special_tokens=True)
        text_p[piece] = text_p.get(piece, 0) + p
    drawn = [t for r in got for t in texts(r)]
    for piece, p in sorted(text_p.items(), key=lambda kv: -kv[1])[:8]:
        share = drawn.count(piece) / len(drawn)
        assert abs(share - p) < 4 * (p * (1 - p) / len(drawn)) ** 0.5 + 1e-9, piece


def test_rollout_buckets_do_not_change_a_text(teacher):
    """The same request beside one so long that the padded width grows."""
    mine, long = request(), request("s9", prefix="word " * 60)
    assert rollout.bucket(200, 64) > rollout.bucket(40, 64)
    assert texts(ask(teacher, mine, long)[0]) == texts(ask(teacher, mine)[0])
