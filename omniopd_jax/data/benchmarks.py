"""Benchmarks by name: where each is on the hub, its fields, its grader and what the prompt asks for.

A benchmark is one line in SUITES and, where its rows are not plain `problem` and `answer`, one function here. Names and
fields were read off public code that uses them; the hub itself was out of reach here, so no set has been downloaded.

What `load` takes: a name of SUITES; NAME=FILE, local rows with the benchmark's own fields or the names that other
copies of it use; FILE, rows with a problem and an answer (PROBLEM, ANSWER), and optional `id`, `choices` and `grader`
(default: math); world:WORLD:SPLIT, the small world; rg:DATASET[:SEED], a procedural set of reasoning-gym. A FILE ends
in .jsonl or .json, perhaps with .gz.
"""

import base64
import dataclasses
import gzip
import io
import json
import pathlib
import pickle
import re
import string
import zlib
from collections.abc import Callable

from omniopd_jax import config, graders, world
from omniopd_jax.data import prompts as data
from omniopd_jax.data.prompts import Prompt
from omniopd_jax.errors import UserError, one_of
from omniopd_jax.graders import code_tests, gym
from omniopd_jax.hf import bounded

BOXED = r"Please reason step by step, and put your final answer within \boxed{}."
FUNCTION = "Write the whole function, with the imports that it needs, in one ```python block."
STDIN = "Write a Python program that reads stdin and writes stdout, in one ```python block."
METHOD = "Complete the class, with the imports that it needs, in one ```python block:"
LIVECODEBENCH = [f"test{n}.jsonl" for n in ("", 2, 3, 4, 5, 6)]  # the releases; the set's loading script no longer runs


PROBLEM = ("problem", "question", "prompt", "Problem", "Question", "query", "text")  # in the order of preference
ANSWER = ("answer", "final_answer", "Answer", "expected_answer", "ground_truth", "gold", "target")
CHOICES = ("choices", "options", "Choices", "Options")
ENDINGS = (".jsonl", ".json", ".jsonl.gz", ".json.gz")
_LETTERED = re.compile(r"\s*\(?[A-Z][).:]")


@dataclasses.dataclass(frozen=True)
class Suite:
    """A benchmark, ready to be answered.

    Attributes:
      name: as tables say it; of a file its stem, or the benchmark's where NAME=FILE.jsonl says which.
      prompts: each with an answer, in the benchmark's order, ids unique.
      grader: a key of `graders.GRADERS`.
      extract: text -> the answer in it, for majority votes and logs; None where answers can't be compared as text.
    """

    name: str
    prompts: list[Prompt]
    grader: str
    extract: Callable[[str], str | None] | None


@dataclasses.dataclass(frozen=True)
class Source:
    """Where a benchmark is stored and what its fields are called; `read`: (text, answer) of a row of another form."""

    hub: str
    split: str = "test"
    subset: str | None = None
    problem: str = "problem"
    answer: str = "answer"
    id: str | None = "id"
    grader: str = "math"
    suffix: str | None = None  # the benchmark's own instruction; None: `eval.suffix`
    read: Callable[[dict], tuple[str, str]] | None = None
    files: tuple[str, ...] = ()  # read as JSON Lines, where the hub's own loader can't


def _field(row: dict, *names: str):
    """The first of these fields that a row has; raises KeyError where it has none."""
    found = next((value for name in names if (value := data.field(row, name)) is not None), None)
    if found is None:
        raise KeyError(" or ".join(map(repr, names)))
    return found


def _problem(row: dict, *first: str) -> str:
    """A row's problem, with its choices where it has any that do not stand in it behind their letters."""
    text, choices = _field(row, *first, *PROBLEM), _choices(row)
    if isinstance(text, bool) or not isinstance(text, (str, int, float)):
        raise ValueError(f"a problem is text, not {json.dumps(text, default=str):.60}")
    text = str(text)
    lines = [c if _LETTERED.match(c) else f"({letter}) {c}" for letter, c in choices.items()]
    shown = all(_shown(letter, c.strip(), text) for letter, c in choices.items())
    return text if shown else "\n".join([text.strip(), "", *lines])


def _shown(letter: str, choice: str, text: str) -> bool:
    """Whether a choice stands in a text behind its letter: a number alone may be in the text for another reason."""
    if _LETTERED.match(choice):
        return choice in text
    return re.search(rf"(?<!\w){re.escape(letter)}\W{{1,4}}{re.escape(choice)}", text) is not None


def _choices(row: dict) -> dict[str, str]:
    """letter -> choice of a row; {} where it has none."""
    choices = next((row[name] for name in CHOICES if row.get(name)), None)
    if isinstance(choices, dict) and isinstance(choices.get("text"), list):  # {"label": [...], "text": [...]}
        return dict(zip(map(str, choices.get("label") or string.ascii_uppercase), map(str, choices["text"])))
    if isinstance(choices, dict):
        return {str(k): str(v) for k, v in choices.items()}
    if isinstance(choices, list):
        return dict(zip(string.ascii_uppercase, map(str, choices)))
    if choices is not None:
        raise ValueError(f"choices must be a list or an object, not {type(choices).__name__}")
    return {}


def _answer(row: dict, *first: str) -> str:
    """A row's answer: text, a number, a list of them, the number of a choice, or what a solution boxes."""
    try:
        answer = _field(row, *first, *ANSWER)
    except KeyError:
        answer = gym.last_boxed(str(row.get("solution") or ""))
        if answer is None:
            raise
    if isinstance(answer, int) and not isinstance(answer, bool) and (choices := _choices(row)):
        if not 0 <= answer < len(choices):  # -1 is how some sets say that they keep it to themselves
            raise IndexError(f"answer {answer} is none of the choices 0 to {len(choices) - 1}")
        return list(choices)[answer]
    if isinstance(answer, str) and (choices := _choices(row)) and answer not in choices:
        letters = [letter for letter, text in choices.items() if text.strip() == answer.strip()]
        if len(letters) == 1 and letters[0] in string.ascii_uppercase:  # asked by its letter: either is right
            return f"({letters[0]}) {answer.strip()}"
    if isinstance(answer, list):
        return ", ".join(map(str, answer))
    if isinstance(answer, (bool, dict)):
        raise ValueError(f"an answer is text or a number, not {json.dumps(answer):.60}")
    return answer if isinstance(answer, str) else json.dumps(answer)


def _gsm8k(row):
    return _problem(row, "question"), _answer(row).split("####")[-1].strip().replace(",", "")


def _olympiad(row):
    """`final_answer` is a list with one string, which may hold several answers."""
    context = (row.get("context") or "").strip()
    return f"{context}\n{_problem(row, 'question')}".strip(), _answer(row, "final_answer")


def _humaneval(row):
    text = f"Complete this function:\n\n```python\n{row['prompt'].rstrip()}\n```"
    return text, json.dumps({"asserts": row["test"], "entry_point": row["entry_point"], "prompt": row["prompt"]})


def _mbpp(row):
    """The sanitized set, and the original one, with `text` and code that sets the tests up."""
    tests = "\n".join(row["test_list"])
    text = f"{_field(row, 'prompt', 'text')}\n\nYour code should pass these tests:\n\n```python\n{tests}\n```"
    before = [*(row.get("test_imports") or []), row.get("test_setup_code") or ""]
    answer = {"asserts": [part for part in before if part.strip()] + list(row["test_list"])}
    headers = re.findall(r"(?m)^def[ \t]+(\w+)[ \t]*\([^()]*\)[^:\n]*:", row.get("code") or "")
    header = next((h for h in headers if re.search(rf"\b{h}\s*\(", tests)), None)
    if header:  # so that a body alone has a function to be the body of
        answer["prompt"] = re.search(rf"(?m)^def[ \t]+{header}[ \t]*\([^()]*\)[^:\n]*:", row["code"])[0] + "\n"
    return text, json.dumps(answer)


def _livecodebench(row):
    """Standard input, or calls of a method of `Solution`: arguments one a line, as JSON."""
    cases = _cases(row["public_test_cases"]) + _cases(row.get("private_test_cases") or "[]")
    if cases[0]["testtype"] == "stdin":
        tests = [{"stdin": c["input"], "stdout": c["output"]} for c in cases]
        return f"{row['question_content']}\n\n{STDIN}", json.dumps(tests)
    metadata = row["metadata"] if isinstance(row["metadata"], dict) else json.loads(row["metadata"])
    name, starter = metadata["func_name"], row.get("starter_code") or ""
    text = f"{row['question_content']}\n\n{METHOD}\n\n```python\n{starter.rstrip()}\n```"
    with code_tests.long_integers():
        asserts = [f"assert Solution().{name}({_arguments(c['input'])}) == {json.loads(c['output'])!r}" for c in cases]
    return text, json.dumps({"asserts": asserts, "prompt": starter})


def _arguments(lines: str) -> str:
    """Arguments, one per line as JSON, as Python."""
    return ", ".join(repr(json.loads(line)) for line in lines.splitlines() if line.strip())


def _cases(cases) -> list[dict]:
    """Test cases as a list, or as text in either of the set's forms."""
    return cases if isinstance(cases, list) else _private(cases)


def _private(text: str) -> list[dict]:
    """Private tests: JSON, or JSON in a pickle in zlib in base64."""
    try:
        return json.loads(text)
    except ValueError:
        return json.loads(_StringOnly(io.BytesIO(zlib.decompress(base64.b64decode(text)))).load())


class _StringOnly(pickle.Unpickler):
    """A pickle from the hub may hold a string and nothing that runs."""

    def find_class(self, module, name):
        raise UserError(f"the pickled tests name {module}.{name}: refused")


BROKEN = (  # what a row that is none raises where it is read
    KeyError, IndexError, TypeError, ValueError, AttributeError, EOFError, RecursionError, zlib.error,
    pickle.UnpicklingError,
)  # fmt: skip
SUITES = {
    "math500": Source("HuggingFaceH4/MATH-500", id="unique_id"),
    "aime24": Source("HuggingFaceH4/aime_2024", "train"),
    "aime25": Source("math-ai/aime25"),
    "amc23": Source("math-ai/amc23", problem="question"),
    # text only, English
    "olympiadbench": Source("Hothan/OlympiadBench", "train", "OE_TO_maths_en_COMP", read=_olympiad),
    "gsm8k": Source("openai/gsm8k", subset="main", id=None, read=_gsm8k),
    "humaneval": Source("openai/openai_humaneval", id="task_id", grader="code", suffix=FUNCTION, read=_humaneval),
    "mbpp": Source(
        "google-research-datasets/mbpp", subset="sanitized", id="task_id", grader="code", suffix=FUNCTION, read=_mbpp
    ),
    "livecodebench": Source(
        "livecodebench/code_generation_lite", id="question_id", grader="code", suffix="", read=_livecodebench,
        files=tuple(LIVECODEBENCH),
    ),
}  # fmt: skip


def load(name: str, limit: int = 0, suffix: str = "") -> Suite:
    """The benchmark of that name (see the module), its first `limit` problems; 0 = all (world: 512, rg: 200).

    `suffix` is put behind each problem (`eval.suffix`), but for programs, whose instruction is part of the benchmark.

    Raises:
      UserError: unknown name, unreachable hub, or a row that lacks a field.
    """
    kind, _, rest = name.partition(":")
    if kind == "world":
        return _world(name, *rest.partition(":")[::2], limit, suffix)
    if kind == "rg":
        return _gym(name, *rest.partition(":")[::2], limit, suffix)
    known, _, path = ("", "", name) if config.existing(name) else name.rpartition("=")
    if path.endswith(ENDINGS):
        rows = _lines(pathlib.Path(path))
        if known:
            return _suite(known, SUITES[one_of(known, SUITES, "--benchmarks")], rows, limit, suffix)
        return _plain(pathlib.Path(path.removesuffix(".gz")).stem, rows, limit, suffix)
    if name not in SUITES:
        forms = "FILE.jsonl, FILE.json, FILE.jsonl.gz, NAME=FILE.jsonl, world:forks:test, rg:gsm_symbolic"
        raise UserError(f"--benchmarks = {name!r} is unknown; choose among: {', '.join(SUITES)}; or {forms}")
    source = SUITES[name]
    return _suite(name, source, _hub_files(name, source) if source.files else _hub(name, source), limit, suffix)


def load_sets(cfg, template) -> tuple[Suite, ...]:
    """The sets of `eval.sets`, their first `eval.num_prompts` problems rendered where there is a template.

    Raises:
      UserError: an unknown set, a bad row, a problem that is too long (`eval.overlong`), or two of one name.
    """
    sets = [load(name, cfg.eval.num_prompts, cfg.eval.suffix) for name in cfg.eval.sets]
    names = [s.name for s in sets]
    if len(set(names)) < len(names):
        twice = next(n for n in names if names.count(n) > 1)
        raise UserError(f"eval.sets = {tuple(cfg.eval.sets)}: two sets are called {twice!r}, as its metrics would be")
    if template is None:
        return tuple(sets)
    encoded = [data.encode(data.Prompts(s.prompts), template, cfg, overlong="eval.overlong").prompts for s in sets]
    return tuple(dataclasses.replace(s, prompts=p) for s, p in zip(sets, encoded, strict=True))


def _hub(name, source):
    advice = f"check the network, or give its rows: --benchmarks={name}=FILE.jsonl"
    return data.load_hub(source.hub, source.split, subset=source.subset, setting=f"benchmark {name}", advice=advice)


def _hub_files(name, source):
    """Rows of the repository's own JSON Lines files, file by file."""
    import huggingface_hub

    try:
        huggingface_hub.HfApi().dataset_info(source.hub, timeout=5)
    except Exception as error:  # the transports' errors share no base class
        raise UserError(
            f"benchmark {name} = {source.hub!r} can't be had from the hub: {bounded.line(error)}; "
            f"check the network, or give its rows: --benchmarks={name}=FILE.jsonl"
        ) from error
    for file in source.files:
        try:
            path = huggingface_hub.hf_hub_download(source.hub, file, repo_type="dataset")
        except Exception as error:
            raise UserError(f"benchmark {name}: {file} can't be had from the hub: {bounded.line(error)}") from error
        yield from _lines(pathlib.Path(path))


def _lines(path: pathlib.Path):
    """Objects of a file: one per line, or a .json file's one list, perhaps under `data`, `rows` or `examples`."""
    if not path.is_file():
        raise UserError(f"--benchmarks: {path} is not a file")
    try:
        raw = path.read_bytes()
        text = (gzip.decompress(raw) if path.suffix == ".gz" else raw).decode("utf-8-sig")
    except (OSError, EOFError, UnicodeDecodeError, zlib.error) as error:
        raise UserError(f"{path} can't be read: {error}") from error
    if path.name.removesuffix(".gz").endswith(".json"):
        try:
            whole = json.loads(text)
        except ValueError:
            whole = None  # JSON Lines by another name
        except RecursionError as error:
            raise UserError(f"{path}: JSON that is nested too deep to be read") from error
        if isinstance(whole, dict):
            whole = next(
                (whole[k] for k in ("data", "rows", "examples", "test") if isinstance(whole.get(k), list)), [whole]
            )
        if whole is not None:
            for number, row in enumerate(whole if isinstance(whole, list) else [whole]):
                if not isinstance(row, dict):
                    raise UserError(f"{path}, entry {number}: not a JSON object")
                yield row
            return
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise UserError(f"{path}, line {number}: not a JSON object ({error})") from error
            if not isinstance(row, dict):
                raise UserError(f"{path}, line {number}: not a JSON object")
            yield row


def _suite(name, source: Source, rows, limit, suffix) -> Suite:
    suffix = suffix if source.suffix is None else source.suffix
    prompts = []
    for number, row in enumerate(rows):
        if limit and number == limit:
            break
        try:
            text, answer = (
                source.read(row) if source.read else (_problem(row, source.problem), _answer(row, source.answer))
            )
        except BROKEN as error:
            raise UserError(
                f"benchmark {name}, row {number}: {type(error).__name__} {error}; it has {sorted(row)}"
            ) from error
        own = row.get(source.id) if source.id else None
        prompts.append(_prompt(f"{number:05d}" if own is None else str(own), str(text), suffix, str(answer)))
    return _checked(Suite(name, prompts, source.grader, graders.make(source.grader).extract))


def _plain(name, rows, limit, suffix) -> Suite:
    """Rows of anybody's file, one grader for all of them."""
    prompts, grader, check = [], None, None
    allowed = [g for g in graders.GRADERS if g != "code_unsafe"]  # no file lets its programs run as the user
    for number, row in enumerate(rows):
        if limit and number == limit:
            break
        try:
            text, answer = _problem(row), _own_answer(row)
        except BROKEN as error:
            raise UserError(
                f"{name}, row {number}: {error}: needs `problem` ({', '.join(PROBLEM[1:])}) and `answer` "
                f"({', '.join(ANSWER[1:])}); it has {sorted(row)}"
            ) from error
        if grader not in (None, row.get("grader", "math")):
            raise UserError(f"{name}, row {number}: grader {row.get('grader', 'math')!r} after {grader!r}: one a file")
        grader = one_of(row.get("grader", "math"), allowed, f"{name}, row {number}: grader")
        try:
            check = check or graders.make(grader).check_answer
            check(answer)
        except UserError as error:
            raise UserError(f"{name}, row {number}: {error}") from error
        own = f"{number:05d}" if row.get("id") is None else str(row["id"])
        prompts.append(_prompt(own, text, suffix, answer))
    return _checked(Suite(name, prompts, grader, graders.make(grader or "math").extract))


def _own_answer(row: dict) -> str:
    """The answer of a row of anybody's file; tests of a program stay an object, as JSON."""
    if row.get("grader", "math") == "code":
        answer = _field(row, "answer", "tests")
        return answer if isinstance(answer, str) else json.dumps(answer)
    return _answer(row)


def _world(name, which, split, limit, suffix) -> Suite:
    problems = world.problems(which, split or "test", limit or 512)
    return Suite(
        name, [_prompt(p.id, p.prompt, suffix, p.answer) for p in problems], "world", graders.make("world").extract
    )


def _gym(name, which, seed, limit, suffix) -> Suite:
    if seed and not seed.isdecimal():
        raise UserError(f"--benchmarks = {name!r}: the seed must be a whole number, as in rg:gsm_symbolic:7")
    seed, size = int(seed or 0), limit or 200
    entries = gym.dataset(which, seed, size)
    ids = [f"{which}:{seed}:{size}:{i}" for i in range(size)]
    prompts = [_prompt(i, entries[n]["question"], suffix, i) for n, i in enumerate(ids)]
    return Suite(name, prompts, "reasoning_gym", gym.GymGrader.extract)


def _prompt(own: str, text: str, suffix: str, answer: str) -> Prompt:
    content = f"{text.strip()}\n\n{suffix}" if suffix else text
    return Prompt(own, ({"role": "user", "content": content},), answer)


def _checked(suite: Suite) -> Suite:
    if not suite.prompts:
        raise UserError(f"benchmark {suite.name} is empty")
    ids = [p.id for p in suite.prompts]
    for p in suite.prompts:
        data.check_text([p.id, p.messages, p.answer], f"benchmark {suite.name}, problem {p.id!r}")
    if len(set(ids)) < len(ids):
        twice = next(i for i in ids if ids.count(i) > 1)
        raise UserError(f"benchmark {suite.name}: id {twice!r} comes more than once")
    return suite
