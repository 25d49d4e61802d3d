"""How a conversation becomes a prompt, and what ends an answer to it: the one object that everything renders through.

`chat` takes the tokenizer's own template; a path is a Jinja file in its place; `plain` is for base models, which have
none:

    [the tokenizer's start token, where it puts one itself]
    [the preamble, and a blank line]
    [a system message, and a blank line]
    Question: the user's words
    Answer: an earlier answer
                                            (a blank line between turns)
    Question: the user's words
    Answer:

An answer in that format ends where the model begins another question ("\nQuestion:"), or at an end token.

A stop string is looked for on the host, in a row that is done: the tokens up to the one that completes it stay in the
row, as an end token does, so the student is trained on how it ended; texts (of chunks, of graded answers) end before
it. A row is sampled to its cap all the same: a string that may cross tokens in many ways is no end token of the
sampler's.
"""

import dataclasses

from omniopd_jax import config
from omniopd_jax.errors import UserError
from omniopd_jax.hf import bounded, renderer, thoughts
from omniopd_jax.hf.tokenizer import ids_of, load_tokenizer

PLAIN_STOPS = ("\nQuestion:",)
NEAR = 8  # tokens before a joint that are decoded with the text behind it
FILE_BYTES = 1_000_000  # of a template or a preamble
PLAIN = """\
{%- for m in messages -%}
{%- if m['role'] == 'user' -%}{{ 'Question: ' + m['content'] + '\\n' }}
{%- elif m['role'] == 'assistant' -%}{{ 'Answer: ' + m['content'] + '\\n\\n' }}
{%- else -%}{{ m['content'] + '\\n\\n' }}{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ 'Answer:' }}{%- endif -%}"""  # the plain format as Jinja, for who serves an export
QUESTION, ANSWER = "Zq7question", "Zq7answer"  # texts that no template writes by itself
ASKED = ({"role": "user", "content": QUESTION},)


@dataclasses.dataclass(frozen=True)
class Template:
    """See the module. `source` is Jinja, None for the plain format; `turn_end_ids` the tokens that end a turn, first
    the one that an answer ends with; `stop_strings` the texts that end an answer. `tokenizer` is None where a server
    has its own.
    """

    tokenizer: object
    source: str | None
    kwargs: dict = dataclasses.field(default_factory=dict)
    preamble: str = ""
    stop_strings: tuple[str, ...] = ()
    turn_end_ids: tuple[int, ...] = ()
    start: str = ""  # the plain format's first text
    what: str = "the chat template"  # for the errors
    lead: str = ""  # what is written between a prompt and an answer: nothing, or a space
    rows: int = 0  # of the model's embedding, which bounds the ids; 0: not known
    date: str = ""  # YYYY-MM-DD: what the template takes for today; "": today

    def render(self, messages) -> str:
        """The prompt as text, up to where the answer begins.

        Raises:
          UserError: the template refuses the conversation, or does not keep within its bounds.
        """
        return self._render(tuple(messages), True)

    def ids(self, texts: list[str]) -> list[list[int]]:
        """The tokens of rendered texts (`tokenizer.ids_of`)."""
        return ids_of(self.tokenizer, texts, self.rows)

    def follow(self, before: list[int], text: str, *, begins: bool) -> list[int]:
        """The tokens of a text that follows the ids `before`, which stay as they are: a joint that would merge stays
        two tokens.

        Some tokenizers write a space in front of a text that begins one. Then the text is tokenized behind a mark,
        whose ids are taken off; whichever way reads back as both, the first that does is taken.

        Args:
          begins: whether it begins the answer, which gets the space that the format writes there (`lead`).
        """
        if begins and text and not text[0].isspace():
            text = self.lead + text
        near = list(before[-NEAR:])
        plain = self.ids([text])[0]
        read = self._text(near) + text
        for ids in (plain, *(self._behind(mark, text) for mark in ("\n", ".", "a"))):
            if ids is not None and self._text(near + ids) == read:
                return ids
        return plain

    def _behind(self, mark: str, text: str) -> list[int] | None:
        """The text's ids behind a mark; None where the two share a token."""
        alone, both = self.ids([mark, mark + text])
        return both[len(alone) :] if both[: len(alone)] == alone else None

    def continued(self, messages, prefix: str) -> str:
        """The prompt and an unfinished answer behind it, as raw text (`thoughts.joined`). Raises `UserError` as
        `render`."""
        return thoughts.joined(self.render(messages), prefix)

    @property
    def identity(self) -> str:
        """A text that differs where the template writes or ends differently: the Jinja text itself where that is
        all."""
        more = (self.preamble, *self.stop_strings)
        return (self.source or "plain") + ("\0" + "\0".join(more) if any(more) else "")

    @property
    def jinja(self) -> str:
        """The template for who serves the model: what it writes without being told the run's settings. A setting that
        is passed is taken."""
        if self.source is None:
            return ("{{- bos_token -}}" if self.start else "") + PLAIN
        given = "".join(
            f"{{%- if {name} is not defined %}}{{%- set {name} = {value!r} %}}{{%- endif %}}\n"
            for name, value in self.kwargs.items()
        )  # transformers drops the line end behind a block
        return given + self.source

    def cut(self, text: str) -> tuple[str, bool]:
        """(the text before the first stop string, whether there was one)."""
        at = min((i for s in self.stop_strings if (i := text.find(s)) >= 0), default=None)
        return (text, False) if at is None else (text[:at], True)

    def stop_row(self, token_ids: list[int]) -> int | None:
        """How many of a row's tokens there are up to the one that completes a stop string; None: there is none."""
        if not self.stop_strings or not self.cut(self._text(token_ids))[1]:
            return None
        low, high = 1, len(token_ids)  # a stop string that is there at n tokens is there at more
        while low < high:
            middle = (low + high) // 2
            low, high = (low, middle) if self.cut(self._text(token_ids[:middle]))[1] else (middle + 1, high)
        return low

    def answer_ids(self, ids: list[int], whole: bool, most: int) -> tuple[list[int], bool]:
        """(an answer as it is trained on: with the end of a turn where it is `whole`, cut at `most`; whether it still
        is)."""
        end = list(self.turn_end_ids[:1]) if whole else []
        return (ids + end)[:most], whole and len(ids) + len(end) <= most

    def read(self, token_ids: list[int]) -> tuple[str, int, bool]:
        """(the answer's text, how many tokens it has, whether a stop string ended it) of a sampled row."""
        n = self.stop_row(token_ids)
        text, _ = self.cut(self._text(token_ids[:n]))
        return text, len(token_ids) if n is None else n, n is not None

    def end_ids(self, found: tuple[int, ...]) -> tuple[tuple[int, ...], str]:
        """(the tokens that end an answer, the one that training uses first, a line on what was added or "").

        Args:
          found: of the model's own files (`tokenizer.end_ids`).
        """
        added = [i for i in self.turn_end_ids if i not in found]
        note = ""
        if added:
            names = ", ".join(f"{self.tokenizer.convert_ids_to_tokens(i)!r} ({i})" for i in added)
            note = (
                f"{self.what} ends a turn with {names}, no end token of the model's own files: added to its end tokens"
            )
        return tuple(dict.fromkeys((*self.turn_end_ids, *found))), note

    def _text(self, token_ids) -> str:
        return self.tokenizer.decode(token_ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)

    def _render(self, messages, generate: bool) -> str:
        if self.source is None:
            return self._plain(messages, generate)
        names = {} if self.tokenizer is None else self.tokenizer.special_tokens_map
        variables = {"messages": list(messages), "add_generation_prompt": generate, "tools": None, "documents": None}
        variables |= {k: v for k, v in names.items() if isinstance(v, (str, list))} | self.kwargs
        if self.preamble:
            variables["preamble"] = self.preamble
        try:
            return renderer.shared.render(self.source, variables, date=self.date)
        except renderer.RenderError as error:
            roles = ", ".join(m["role"] for m in messages)
            raise UserError(f"{self.what} gives no prompt for messages of {roles}: {error}") from None

    def _plain(self, messages, generate: bool) -> str:
        parts = [f"{self.preamble}\n\n"] if self.preamble else []
        for message in messages:
            form = {"user": "Question: {}\n", "assistant": "Answer: {}\n\n"}.get(message["role"], "{}\n\n")
            parts.append(form.format(message["content"]))
        return self.start + "".join(parts) + "Answer:" * generate


def make(
    tokenizer, *, template: str = "chat", kwargs=None, preamble: str = "", stop_strings=(), setting: str = "student",
    kept: str | None = None, date: str = "",
) -> Template:  # fmt: skip
    """The template of a model, tried out: what it can't do is an error here, before weights load.

    Args:
      tokenizer: a transformers tokenizer; None: a server's model whose tokenizer is not here (not with `chat`).
      template: chat | plain | the path of a Jinja file.
      kwargs: passed to a Jinja template, such as `enable_thinking`.
      date: of the texts that write today's (Template).
      preamble: worked examples, or the path of a file that holds them; a Jinja file sees it as `preamble`.
      stop_strings: beside the format's own.
      setting: `student` or `teacher`, whose keys the errors name.
      kept: the text of the Jinja file as a run kept it; None: it is read.

    Raises:
      UserError: no template, or one that raises, ignores the generation prompt, or does not keep within its bounds.
    """
    key, kwargs = f"{setting}.template", dict(kwargs or {})
    if not all(isinstance(s, str) and s for s in stop_strings):
        raise UserError(f"{setting}.stop_strings = {stop_strings!r} must be texts of at least one character")
    preamble = read_preamble(preamble, f"{setting}.preamble")
    what, source = f"{setting}.template = {template!r}", None
    if template == "chat":
        what, source = f"the {setting}'s chat template", _own(tokenizer, setting)
        if preamble:
            raise UserError(
                f"{setting}.preamble is for {key} = 'plain' or a Jinja file, not for a model's chat template"
            )
    elif template == "plain":
        stop_strings = (*PLAIN_STOPS, *stop_strings)
        if kwargs:
            raise UserError(
                f"{setting}.chat_template_kwargs = {kwargs} is for a Jinja template, not for {key} = 'plain'"
            )
    else:
        source = read_template(template, key) if kept is None else kept
        if preamble and "preamble" not in source:
            raise UserError(f"{what} does not use the variable `preamble`, but {setting}.preamble is set")
    made = Template(
        tokenizer, source, kwargs, preamble, tuple(dict.fromkeys(stop_strings)), (), _start(tokenizer), what, date=date
    )
    prompt, whole = made._render(ASKED, True), _answered(made)
    _try_out(made, prompt, whole)
    lead = " " if whole is not None and whole.startswith(f"{prompt} {ANSWER}") else ""
    return dataclasses.replace(made, turn_end_ids=_turn_end(made, whole), lead=lead)


def of_student(cfg, tokenizer, kept: str | None = None) -> Template:
    """The student's, as the config says; `kept` and errors as of `make`."""
    c = cfg.student
    return make(
        tokenizer,
        template=c.template,
        kwargs=c.chat_template_kwargs.to_dict(),
        stop_strings=c.stop_strings,
        kept=kept,
        date=cfg.data.date,
    )


def of_teacher(cfg, tokenizer) -> Template:
    """The teacher's, where prompts are rendered here: in process, or for raw completion. Raises `UserError` as
    `make`."""
    c = cfg.teacher
    return make(
        tokenizer,
        template=c.template,
        kwargs=c.chat_template_kwargs.to_dict(),
        preamble=c.preamble,
        stop_strings=c.stop_strings,
        setting="teacher",
        date=cfg.data.date,
    )


def check_teacher(cfg) -> Template | None:
    """The teacher's template before anything of it is loaded; None where messages go to a service as they are.

    Raises:
      UserError: as `make`; or a format that the service would never see.
    """
    c = cfg.teacher
    own_format = c.template != "chat" or c.preamble or c.stop_strings
    folder = {"local": c.model, "openai": c.tokenizer}.get(c.provider, "")
    if c.provider not in ("local", "openai") and own_format:
        raise UserError(
            "teacher.template, teacher.preamble and teacher.stop_strings are for teachers that continue raw text "
            f"(teacher.provider = 'local' or 'openai'), not for {c.provider!r}"
        )
    if own_format and c.provider == "openai" and c.continuation not in ("auto", "completion"):
        raise UserError(
            "teacher.template, teacher.preamble and teacher.stop_strings are for raw text: set teacher.continuation = "
            f"'completion' (or 'auto'), not {c.continuation!r}"
        )
    if not folder:
        return of_teacher(cfg, None) if own_format and c.provider == "openai" else None
    return of_teacher(
        cfg, load_tokenizer(folder, setting="teacher.model" if c.provider == "local" else "teacher.tokenizer")
    )


def _own(tokenizer, setting: str) -> str:
    """The tokenizer's own template."""
    source = getattr(tokenizer, "chat_template", None)
    if isinstance(source, dict):  # several, by name
        source = source.get("default")
    if not source:
        raise UserError(
            f"the {setting}'s tokenizer has no chat template (chat_template.jinja, or chat_template in "
            "tokenizer_config.json): "
            f"set {setting}.template = 'plain' for a base model, or to a Jinja file, or take the instruct model"
        )
    if len(source) > FILE_BYTES:
        raise UserError(
            f"the {setting}'s chat template has {len(source):,} characters; at most {FILE_BYTES:,} are read"
        )
    return source


def read_template(template: str, key: str) -> str:
    """The text of the Jinja file that a setting names. Raises `UserError` where it is no file that can be read."""
    path = config.existing(template)
    if path is None or not path.is_file():
        raise UserError(f"{key} = {template[:200]!r} is neither 'chat' nor 'plain' nor a file")
    return bounded.read_text(path, FILE_BYTES)


def read_preamble(text: str, key: str) -> str:
    """The text itself, or that of the file it names. Raises `UserError` where it is no file that can be read."""
    path = config.existing(text)
    if path is not None and path.is_file():
        text = bounded.read_text(path, FILE_BYTES)
    elif "\n" not in text and text.endswith((".txt", ".md")):
        raise UserError(f"{key} = {text[:200]!r}: no such file")
    return text.strip("\n")


def _answered(template: Template) -> str | None:
    """A question and its answer as the template writes them; None: it takes no answer, as some do."""
    try:
        return template._render((*ASKED, {"role": "assistant", "content": ANSWER}), False)
    except UserError:
        return None


def _turn_end(template: Template, whole: str | None) -> tuple[int, ...]:
    """The token that the template writes after an answer; where that is none, the tokenizer's end token."""
    tokenizer = template.tokenizer
    if tokenizer is None:
        return ()
    end = () if tokenizer.eos_token_id is None else (int(tokenizer.eos_token_id),)
    if template.source is None or whole is None:
        return end
    after = whole[whole.rfind(ANSWER) + len(ANSWER) :] if ANSWER in whole else ""
    ids = ids_of(tokenizer, [after])[0] if after else []
    marks = {int(i) for i in tokenizer.added_tokens_decoder}
    return next(((int(i),) for i in ids if int(i) in marks), end)


def _try_out(template: Template, prompt: str, whole: str | None) -> None:
    """One question. An answer must begin right after the prompt: of two ways to end it the template knows one.

    Raises:
      UserError: it leaves out a user's message, or ignores the generation prompt.
    """
    if QUESTION not in prompt:
        raise UserError(f"{template.what} leaves the user's words out of the prompt")
    if whole is None or prompt != template._render(ASKED, False):
        return
    if not whole.startswith(prompt) or not whole[len(prompt) :].lstrip().startswith(ANSWER):
        raise UserError(
            f"{template.what} ignores the generation prompt (add_generation_prompt): a prompt would end before the "
            "mark that "
            "begins an answer; use a template that writes it"
        )


def _start(tokenizer) -> str:
    """The start token's text, where the tokenizer begins a text with it."""
    if tokenizer is None or tokenizer.bos_token_id is None:
        return ""
    ids = tokenizer("x")["input_ids"]
    return tokenizer.bos_token if ids and ids[0] == tokenizer.bos_token_id else ""
