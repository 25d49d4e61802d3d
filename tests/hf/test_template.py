"""Prompts as the model's template writes them, what ends an answer, and templates that are hostile or broken."""

import dataclasses
import resource
import time
from concurrent.futures import Future

import hf_fixtures
import numpy as np
import pytest
import tiny
from tokenizers.processors import TemplateProcessing

from omniopd_jax import audit, config, context, experience, hf, rollout, solutions
from omniopd_jax.data import prompts as data
from omniopd_jax.errors import UserError
from omniopd_jax.hf import renderer, template
from omniopd_jax.hf import tokenizer as tokens
from omniopd_jax.run import host, objectives
from omniopd_jax.teachers import Continuation, ContinuationRequest
from omniopd_jax.teachers.local import LocalTeacher
from omniopd_jax.teachers.simulated import SimulatedTeacher
from omniopd_jax.teachers.wire.openai import OpenAIClient

USER = [{"role": "user", "content": "1 + 1?"}]
TALK = [{"role": "system", "content": "Be brief."}, *USER, {"role": "assistant", "content": "2"}, *USER]
LLAMA3 = (
    "{{- bos_token }}{% for m in messages %}{{- '<|im_start|>' + m['role'] + '\n\n' + m['content'] | trim + "
    "'<|im_end|>' }}"
    "{% endfor %}{% if add_generation_prompt %}{{- '<|im_start|>assistant\n\n' }}{% endif %}"
)
MISTRAL = (  # the answer follows the user's turn at once: no generation prompt to ignore
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]"
    "{% elif m.role == 'assistant' %} {{ m.content }}{{ eos_token }}{% else %}{{ raise_exception('Only user and "
    "assistant') }}"
    "{% endif %}{% endfor %}"
)
QWEN3 = (  # loops with break, namespaces, generation blocks, tojson, kwargs
    "{%- set ns = namespace(last=0) %}{%- for m in messages %}{%- if m.role == 'user' %}{%- set ns.last = loop.index0 "
    "%}"
    "{%- endif %}{%- endfor %}{%- for m in messages %}{{- '<|im_start|>' + m.role + '\n' }}{% generation %}{{ "
    "m.content }}"
    "{% endgeneration %}{{- '<|im_end|>\n' }}{%- if loop.index0 > 50 %}{%- break %}{%- endif %}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}"
    "{%- if enable_thinking is defined and not enable_thinking %}{{- '<think>\n\n</think>\n\n' }}{%- endif %}"
    "{%- endif %}{{ {'a': 'é<'} | tojson if tools else '' }}"
)


def tokenizer(source=None):
    tok = hf_fixtures.tokenizer()
    tok.bos_token = "<|im_start|>"
    if source is not None:
        tok.chat_template = source
    return tok


# --- what it writes
# -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("source", [None, LLAMA3, QWEN3], ids=["chatml", "llama3", "qwen3"])
@pytest.mark.parametrize("kwargs", [{}, {"enable_thinking": False}], ids=["", "no thinking"])
def test_the_text_is_the_one_that_transformers_writes(source, kwargs):
    tok = tokenizer(source)
    for messages in (USER, TALK):
        wanted = tok.apply_chat_template(messages, tokenize=False, add_generation_prompt=True, **kwargs)
        assert template.make(tok, kwargs=kwargs).render(messages) == wanted


def test_the_plain_format_is_as_it_is_written_down():
    plain = template.make(hf_fixtures.tokenizer(), template="plain", preamble="Question: 2 + 2?\nAnswer: 4\n")
    assert plain.render(TALK) == (
        "Question: 2 + 2?\nAnswer: 4\n\nBe brief.\n\nQuestion: 1 + 1?\nAnswer: 2\n\nQuestion: 1 + 1?\nAnswer:"
    )
    assert plain.stop_strings == ("\nQuestion:",)
    assert plain.turn_end_ids == (hf_fixtures.tokenizer().eos_token_id,)


def test_the_plain_format_begins_with_the_start_token_where_the_tokenizer_does():
    from tokenizers import processors

    tok = tokenizer()
    assert not template.make(tok, template="plain").render(USER).startswith("<|im_start|>")
    tok.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<|im_start|> $A", special_tokens=[("<|im_start|>", 1)]
    )
    assert template.make(tok, template="plain").render(USER).startswith("<|im_start|>Question: 1 + 1?")


def test_a_jinja_file_takes_the_place_of_the_tokenizers_own(tmp_path):
    file = tmp_path / "t.jinja"
    file.write_text(
        "{{ preamble }}Q: {{ messages[-1].content }}\nA:{% if not add_generation_prompt %} Zq7answer{% endif %}"
    )
    (tmp_path / "shots.txt").write_text("\nQ: 3?\nA: 3\n\n")
    made = template.make(
        tokenizer(), template=str(file), preamble=str(tmp_path / "shots.txt"), stop_strings=("\nQ:",), setting="teacher"
    )
    assert made.render(USER) == "Q: 3?\nA: 3Q: 1 + 1?\nA:"
    assert made.cut("4\nQ: 5?") == ("4", True)
    file.write_text("{{ messages[0].content }}")
    with pytest.raises(UserError, match="does not use the variable `preamble`"):
        template.make(tokenizer(), template=str(file), preamble="x", setting="teacher")


@pytest.mark.parametrize("how", ["chat", "plain"])
def test_a_prompt_has_exactly_one_start_token(how, monkeypatch):
    """Gemma's template writes <bos>, and its tokenizer puts one in front of every text: the student's prompts and the
    evaluation's, the local teacher's, and a served teacher's, whose server adds its own."""
    tok = hf_fixtures.tokenizer()
    tok.add_special_tokens({"bos_token": "<bos>"})
    tok.chat_template = "{{ bos_token }}" + tok.chat_template
    tok._tokenizer.post_processor = TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", tok.bos_token_id)])
    assert tok("x")["input_ids"][0] == tok.bos_token_id
    made = template.make(tok, template=how)
    cfg = config.default()
    (prompt,) = data.encode(data.Prompts([data.Prompt("p", tuple(USER), "2")]), made, cfg).prompts
    seen = [list(prompt.token_ids)]
    teacher = LocalTeacher(None, None, made, end_ids=(), foreign_tokenizer=False, compute=None)

    def sample(ids, requests, n, *_):
        seen.extend(ids)
        none = np.zeros(0)
        return [rollout.Ended(k, none.astype(int), none, none, True) for k in range(len(ids) * n)]

    monkeypatch.setattr(teacher, "_sample", sample)
    request = ContinuationRequest("s", 0, tuple(USER), "It is", (0,), 4)
    teacher._answer([(request, Future(), 0.0)])
    client = OpenAIClient(cfg)
    client.raw, client.tokenizer, client.template = True, tok, made
    seen.append(tok(client.render(USER))["input_ids"])  # as the server will
    assert len(seen) == 3
    for ids in seen:
        assert ids[0] == tok.bos_token_id and ids.count(tok.bos_token_id) == 1


# --- what ends an answer
# ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("source", "end"), [(None, "<|im_end|>"), (LLAMA3, "<|im_end|>"), (MISTRAL, "<|pad|>")])
def test_the_turn_end_is_what_the_template_writes_after_an_answer(source, end):
    """Not the smallest end token of the list, which is <|endoftext|> for every Qwen3."""
    tok = tokenizer(source)
    tok.eos_token = "<|pad|>"
    made = template.make(tok)
    assert made.turn_end_ids == (tok.convert_tokens_to_ids(end),)
    ids, note = made.end_ids((0, 7))
    assert ids[0] == made.turn_end_ids[0] and set(ids) == {0, 7, ids[0]}
    added = end == "<|im_end|>"
    assert (note == "") != added
    if added:  # a base student under a chat template: said, and added
        assert "'<|im_end|>' (2), no end token of the model's own files: added" in note
    assert made.end_ids((0, 2))[1] == ""


def test_stop_strings_end_a_row_at_the_token_that_completes_them():
    tok = tiny.tokenizer()
    made = template.make(tok, template="plain", stop_strings=("stop here",))
    ids = tok("It is 12.\n\nQuestion: 3 + 4?", add_special_tokens=False)["input_ids"]
    text, n, stopped = made.read(ids)
    assert (text, stopped) == ("It is 12.\n", True)
    assert "\nQuestion:" in tok.decode(ids[:n]) and "\nQuestion:" not in tok.decode(ids[: n - 1])
    assert made.read(ids[: n - 1]) == (tok.decode(ids[: n - 1]), n - 1, False)
    assert made.cut("a stop here b\nQuestion:") == ("a ", True)
    assert template.make(tok).read(ids)[1:] == (len(ids), False), "a chat template has no stop strings of its own"


def test_an_answer_may_end_by_an_end_token_and_hold_no_stop_string():
    tok = tiny.tokenizer()
    ids = [*tok("It is 12.", add_special_tokens=False)["input_ids"], tok.eos_token_id]
    assert template.make(tok, template="plain").read(ids) == ("It is 12.", len(ids), False)


def test_a_solution_ends_with_the_turn_end_and_not_with_the_smallest_end_token():
    """sft: the student learns to end its turn as the template does (Qwen3 has <|endoftext|>, a smaller id, as well)."""
    tok = tokenizer()
    tok.eos_token = "<|pad|>"  # 0; the template ends turns with <|im_end|>, 2
    made = template.make(tok)
    prompt = data.Prompt("p", tuple(USER), solution="It is 2.")
    cfg = config.default()

    class Ends(SimulatedTeacher):
        async def continue_text(self, request):
            got = await super().continue_text(request)
            ended = [dataclasses.replace(c, finish="stop" if c.index == 0 else "length") for c in got.continuations]
            return dataclasses.replace(got, continuations=tuple(ended))

    words, thread = tok("It is 2.", add_special_tokens=False)["input_ids"], host.AsyncThread()
    try:
        audits = solutions.plan([prompt], 2, cfg)
        experience.wait([thread.submit(audit.ask(Ends(["It is 2."]), audits))], host.StopFlag())
    finally:
        thread.close()
    found = solutions.texts([dataclasses.replace(prompt, solution=None)], audits)
    assert solutions.rows([prompt], found, 2, made, 99) == ([[*words, 2], words], [True, False]), "one cut has no end"
    given = solutions.texts([prompt], [])
    assert solutions.rows([prompt], given, 1, made, 99) == ([[*words, 2]], [True])
    assert solutions.rows([prompt], given, 1, made, 2) == ([words[:2]], [False])


# --- refused before weights load
# ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("", "no chat template.*set student.template = 'plain' for a base model"),
        (
            "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}",
            "ignores the generation",
        ),
        ("{{ raise_exception('no thanks') }}", "gives no prompt for messages of user: no thanks"),
        ("{{ messages[0].content.nothing.at.all }}", "gives no prompt"),
        ("{% if %}", "gives no prompt for messages of user: Expected an expression"),
        ("hello", "leaves the user's words out"),
        ("{{ messages.append(1) }}", "gives no prompt"),
        ("{{ ''.__class__.__mro__ }}{{ messages[0].content }}", "gives no prompt"),
        ("{% include '/etc/passwd' %}", "gives no prompt"),
        ("x" * 2_000_000, "2,000,000 characters; at most"),
    ],
)
def test_a_template_that_cannot_be_meant_is_one_line(source, said):
    with pytest.raises(UserError, match=said) as caught:
        template.make(tokenizer(source))
    assert "\n" not in str(caught.value)


def test_a_template_without_a_generation_prompt_may_need_none():
    assert template.make(tokenizer(MISTRAL)).render(USER) == "<|im_start|>[INST] 1 + 1? [/INST]"


def test_a_role_that_the_template_refuses_names_the_prompt():
    """The student's when its prompts are rendered, the teacher's before its weights are read."""
    made = template.make(tokenizer(MISTRAL))
    prompts = data.Prompts([data.Prompt("p0", tuple(USER)), data.Prompt("p1", tuple(TALK))])
    for check in (lambda: data.encode(prompts, made, config.default()), lambda: data.check_rendering(made, prompts)):
        with pytest.raises(UserError, match="prompt 'p1': .* messages of system, user, .*: Only user and assistant"):
            check()
    data.check_rendering(None, prompts)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"template": "plane"}, "student.template = 'plane' is neither 'chat' nor 'plain' nor a file"),
        ({"template": "plain", "kwargs": {"enable_thinking": False}}, "chat_template_kwargs = .* not for"),
        ({"preamble": "x"}, "student.preamble is for student.template = 'plain' or a Jinja file"),
        ({"template": "plain", "preamble": "/no/such/shots.txt"}, "student.preamble = .*: no such file"),
        ({"stop_strings": ("",)}, "student.stop_strings"),
    ],
)
def test_settings_that_do_not_go_together(settings, said):
    with pytest.raises(UserError, match=said):
        template.make(tokenizer(), **settings)


def test_which_teachers_take_a_format_of_ours(tmp_path):
    c = config.default()
    c.teacher.template = "plain"
    for provider in ("anthropic", "gemini", "simulated"):
        c.teacher.provider = provider
        with pytest.raises(UserError, match=f"teachers that continue raw text .* not for '{provider}'"):
            template.check_teacher(c)
    c.teacher.provider = "openai"  # the server has the tokenizer
    assert template.check_teacher(c).render(USER) == "Question: 1 + 1?\nAnswer:"
    c.teacher.continuation = "continue_final_message"
    with pytest.raises(UserError, match="are for raw text: set teacher.continuation"):
        template.check_teacher(c)  # the server would write its own format
    c.teacher.template, c.teacher.continuation = "chat", "auto"
    assert template.check_teacher(c) is None
    hf_fixtures.tokenizer().save_pretrained(tmp_path)
    c.teacher.tokenizer = str(tmp_path)
    assert template.check_teacher(c).render(USER).endswith("<|im_start|>assistant\n")


def test_a_tokenizer_past_the_embedding_and_positions_too_few():
    tok, (_, cfg) = tiny.tokenizer(), tiny.random_model(tiny.VOCAB, 0)
    tokens.check_fits(tok, cfg, 256)
    with pytest.raises(UserError, match=r"256 positions .* = 257: lower one"):
        tokens.check_fits(tok, cfg, 257)
    tok.add_tokens(["<|new|>"])
    with pytest.raises(
        UserError, match=rf"token '<\|new\|>' has the id {tiny.VOCAB}, the model's embedding has {tiny.VOCAB}"
    ):
        tokens.check_fits(tok, cfg, 10)


def test_a_special_token_past_the_embedding_is_read_as_its_letters():
    """Every Gemma 3 has the tokenizer of those that see: the mark of an image has no row in a model of text alone."""
    tok, (_, cfg) = tiny.tokenizer(), tiny.random_model(tiny.VOCAB, 0)
    tok.add_special_tokens({"additional_special_tokens": ["<image_soft_token>"]})
    tokens.check_fits(tok, cfg, 10)
    text = "<|im_start|>is <image_soft_token> 4<|im_end|>"
    with_row, without = (
        template.Template(tok, None, rows=rows).ids([text, "4"]) for rows in (tiny.VOCAB + 1, tiny.VOCAB)
    )
    assert max(with_row[0]) == tiny.VOCAB and max(without[0]) < tiny.VOCAB and tok.decode(without[0]) == text
    marks = tok.convert_tokens_to_ids(["<|im_start|>", "<|im_end|>"])
    assert [without[0][0], without[0][-1]] == marks, "the other special tokens stay what they are"
    assert with_row[1] == without[1]
    tok.chat_template = "{{ messages[0].content }}<image_soft_token>"  # one that prompts are written with is refused
    with pytest.raises(UserError, match="token '<image_soft_token>' has the id"):
        tokens.check_fits(tok, cfg, 10)


def test_an_answer_begins_as_the_format_writes_one():
    tok = tiny.tokenizer()
    before = tok("Question: 1 + 3?\nAnswer:")["input_ids"]
    plain, chat = template.make(tok, template="plain"), template.make(hf_fixtures.tokenizer())
    assert (plain.lead, chat.lead) == (" ", "")
    for text, written in (
        ("It is 4.", " It is 4."),
        (" It is 4.", " It is 4."),
        ("\nIt is 4.", "\nIt is 4."),
        ("", ""),
    ):
        assert tok.decode(plain.follow(before, text, begins=True)) == written
        assert tok.decode(plain.follow(before, text, begins=False)) == text
    prompt = data.Prompt("a", ({"role": "user", "content": "1 + 3?"},), "4", "It is 4.", token_ids=tuple(before))
    [row], _ = solutions.rows([prompt], [{0: Continuation(0, "It is 4.", "length")}], 1, plain, 99)
    assert tok.decode(row) == " It is 4."


def test_the_longest_row_counts_what_the_teacher_adds_and_what_a_scorer_is_shown():
    c = config.default()
    c.update_from_flattened_dict({"max_prompt_length": 64, "max_completion_length": 128, "continuation.max_tokens": 32})
    of = {}
    for name in ("omniopd", "sft", "continuation", "context"):
        c.objective.name = name
        of[name] = objectives.longest_row(c), objectives.longest_row(c, teacher=True)
    shown = context.most_tokens(c) + 128
    assert shown > 224
    assert of == {"omniopd": (192, 192), "sft": (192, 192), "continuation": (224, 224), "context": (shown, 192)}
    c.objective.mix = {"continuation": 1.0, "context": 1.0}
    assert objectives.longest_row(c) == shown
    c.objective.mix, c.objective.name, c.continuation.max_tokens = {}, "sft", 300
    assert objectives.longest_row(c) == 364, "solutions that a file brings may be longer than an answer"
    c.packing.length = 363
    with pytest.raises(UserError, match="packing.length = 363"):
        objectives.check(c)


@pytest.mark.parametrize(
    ("scaling", "most"),
    [
        ({}, 256),
        ({"rope_type": "linear", "factor": 4.0}, 1024),
        ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128}, 512),
        ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}, 256),
        ({"rope_type": "llama3", "factor": 32.0, "original_max_position_embeddings": 64}, 256),
    ],
)
def test_positions_of_scaled_models(scaling, most):
    _, cfg = tiny.random_model(tiny.VOCAB, 0)
    assert tokens.positions(dataclasses.replace(cfg, rope_scaling=tuple(scaling.items()))) == most


def test_end_tokens_that_are_none(tmp_path):
    hf.save(tmp_path / "m", *tiny.random_model(tiny.VOCAB, 0))
    (tmp_path / "m" / "generation_config.json").write_text('{"eos_token_id": ["</s>"]}')
    with pytest.raises(UserError, match="generation_config.json: eos_token_id = .* is no token id"):
        hf.end_ids(tmp_path / "m")


# --- bounds
# -------------------------------------------------------------------------------------------------------------

LOOP = "{% for a in range(99999) %}{% for b in range(99999) %}{% for c in range(99999) %}{% endfor %}{% endfor %}{% endfor %}"


@pytest.mark.parametrize(
    ("source", "said"),
    [
        (LOOP, "takes more than 1 s"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "calls itself without end|takes more than"),
        (
            "{% set ns = namespace(x='a' * 9999) %}{% for i in range(40) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}{{ "
            "ns.x }}",
            "needs more than 1024 MiB|takes more than",
        ),
        ("{{ 'a' * 99999999999 }}", "needs more than 1024 MiB|ended"),
        ("{% for i in range(99999) %}{{ 'a' * 1000 }}{% endfor %}", "writes 99,999,000 characters"),
        ("{{ ('%99999999999d' % 1) }}", "gives no prompt"),
        ("{{ [1] * 9999999999 }}", "needs more than|gives no prompt"),
        ("{% for a in range(9999999999) %}{% endfor %}", "Range too big"),
    ],
    ids=["loops", "recursion", "doubling", "length", "much", "width", "list", "range"],
)
def test_a_template_is_rendered_within_bounds(source, said, monkeypatch):
    """Of time and memory; and the next one is rendered as if nothing had been."""
    template.make(tokenizer())  # the worker runs
    monkeypatch.setattr(renderer, "SECONDS", 1.0)
    begun = time.perf_counter()
    with pytest.raises(UserError, match=said) as caught:
        template.make(tokenizer(source))
    assert "\n" not in str(caught.value) and time.perf_counter() - begun < 20
    monkeypatch.setattr(renderer, "SECONDS", 30.0)
    assert template.make(tokenizer()).render(USER).endswith("assistant\n")
    assert resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss < 2_500_000  # kB, of any child so far


def test_a_date_is_the_run_s_and_the_worker_has_the_packages_of_whoever_starts_it(monkeypatch):
    own, asked = renderer.Renderer(), "{{ strftime_now('%d %b %Y') }}"
    assert own.render(asked, {}, date="2026-02-03") == "03 Feb 2026"
    assert own.render(asked, {}) == time.strftime("%d %b %Y")
    own.close()
    monkeypatch.setattr(renderer, "_places", list)
    monkeypatch.setattr(renderer.sys, "executable", "/usr/bin/env")  # a Python that can't be: what it said is told
    with pytest.raises(renderer.RenderError, match="ended: .*env"):
        own.render(asked, {})
    own.close()
    c = config.default()
    c.data.date = "2026-02-03"
    tok = hf_fixtures.tokenizer()
    tok.chat_template = "{{ strftime_now('%Y') }} {% for m in messages %}{{ m.content }}{% endfor %}" + (
        "{% if add_generation_prompt %}:{% endif %}"
    )
    assert template.of_student(c, tok).render(USER) == "2026 1 + 1?:"


@pytest.mark.parametrize("role", ["critic", "developer"])
def test_a_message_that_the_template_leaves_out_is_named(role):
    made = template.make(hf_fixtures.tokenizer())
    c = config.default()
    known = data.Prompt("a", ({"role": "user", "content": "1 +\n 1?"},))
    assert data.encode(data.Prompts([known]), made, c).prompts[0].token_ids
    tok = hf_fixtures.tokenizer()
    tok.chat_template = (
        "{% for m in messages %}{% if m.role == 'user' %}{{ m.content }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}:{% endif %}"
    )
    tok.chat_template = tok.chat_template.replace("{{ m.content }}", "{{ m.content | tojson }}")
    changed = data.Prompt("c", ({"role": "user", "content": "1\n+ 1?"},))  # as Llama 3 writes a tool's words
    assert data.encode(data.Prompts([changed]), template.make(tok), c).prompts[0].token_ids
    lost = data.Prompt("b", ({"role": role, "content": "Be brief."}, {"role": "user", "content": "1 + 1?"}))
    with pytest.raises(UserError, match=rf"prompt 'b': .* leaves the message of role '{role}' out"):
        data.encode(data.Prompts([known, lost]), template.make(tok), c)


def test_a_text_that_can_be_no_path_is_a_text():
    tok, long = hf_fixtures.tokenizer(), "1 + 1 = 2. " * 60
    assert template.make(tok, template="plain", preamble=long).render(USER).startswith("1 + 1 = 2. ")
    for name in ("{{ messages[0].content }}" * 30, "~nobody/x.jinja", "\0"):
        with pytest.raises(UserError, match="neither 'chat' nor 'plain' nor a file"):
            template.make(tok, template=name)
    for name in ("a" * 300, "~nobody/model"):
        with pytest.raises(UserError):
            hf.resolve(name)


def test_one_worker_renders_for_all_and_is_ended(monkeypatch):
    own = renderer.Renderer()
    assert [own.render("{{ x }}é😀", {"x": str(i)}) for i in range(3)] == ["0é😀", "1é😀", "2é😀"]
    process = own._process
    assert own.render("{{ x }}", {"x": "y" * 3_000_000}) == "y" * 3_000_000, "longer than a pipe holds"
    assert own._process is process
    process.kill()
    process.wait()
    assert own.render("again", {}) == "again"
    process = own._process
    own.close()
    assert process.poll() is not None
