"""Which part of a response is the program: found by its lines alone, since Python's own parser can be crashed by a
text.

A block says Python or says nothing; the program is the last block that defines what is asked, where several do the one
that says Python. What cannot be decided by lines is left to the sandbox: `candidates` are tried there in order, and the
first that compiles is the program. All of it runs in the process that trains, so it takes time linear in the text.
"""

import itertools
import re
import textwrap

PYTHON = ("python", "python3", "py", "py3", "python2", "ipython", "sage")
_OPEN = re.compile(r"([ \t]*(?:>[ \t]?)*)(`{3,}+|~{3,}+)([^`\n]*)")
_LANGUAGE = re.compile(r"(\w++)[ \t]++(.+)")  # before the source in a block of one line
_READS = re.compile(r"\binput\s*\(|\bstdin\b|\bopen\s*\(\s*0|/dev/stdin|\bfileinput\b")
_WRITES = re.compile(r"\bprint\s*\(|\bstdout\b|\bos\.write\b")
_CODE = re.compile(r"^(?:from\s+[\w.]+\s+import\b|import\s+\w|def\s+\w+\s*\(|class\s+\w+\s*[:(]|@\w)", re.MULTILINE)

_LAST = re.compile(
    r"[ \t]+\S|[)\]}]|(?:import|from|def|class|if|for|while|print)\b.*[:)\w]$|\w[\w.\[\]]*[ \t]*[-+*/]?="
    r"|\w[\w.]*\(.*\)$"
)
_TAGS = re.compile(r"(?m)^[ \t]*(?:\[BEGIN\]|\[DONE\]|</?(?:answer|code|solution|program)>)[ \t]*$\n?")


def after_thinking(text: str) -> str:
    """What follows the last </think>; the whole text where nothing does."""
    rest = text.rpartition("</think>")[2]
    return rest if rest.strip() else text


def blocks(text: str) -> list[tuple[str, str]]:
    """(language, source) of each fenced block: ``` or ~~~, perhaps indented, quoted, unclosed, or closed at a line's
    end."""
    found, lines, fence = [], [], None
    language = margin = behind = ""
    for line in text.splitlines():
        opened = _OPEN.fullmatch(line)
        if fence is None:
            if one := _one_line(line):
                found.append(one)
            elif opened:
                margin, fence, language, lines, behind = opened[1], opened[2], _language(opened[3]), [], ""
            elif behind := _behind_prose(line):
                margin, fence, language, lines = "", "```", behind, []
            continue
        if margin and ">" in margin and line.lstrip().startswith(">"):
            line = re.sub(r"^[ \t]*(?:>[ \t]?)+", "", line)
            opened = _OPEN.fullmatch(line)
        mark = opened and opened[2][0] == fence[0] and len(opened[2]) >= len(fence)
        if mark or (line.rstrip().endswith(fence) and not opened):
            if not mark:
                lines.append(line.rstrip()[: -len(fence)].rstrip("`~"))
            if not (behind and mark and opened[3].strip()):  # a fence behind prose or a comment is one if it is closed
                found.append((language, _source(lines)))
            fence = None
            if mark and opened[3].strip():  # a block that was not closed before the next
                margin, fence, language, lines, behind = opened[1], opened[2], _language(opened[3]), [], ""
        else:
            lines.append(line)
    if fence is not None and not behind:
        found.append((language, _source(lines)))
    return found


def _one_line(line: str) -> tuple[str, str] | None:
    """(language, source) of ```python x = 1```; None for any other line."""
    line = line.strip(" \t")
    source = line.strip("`").strip(" \t")
    if not (source and line.startswith("```") and line.endswith("```")) or "`" in source:
        return None
    named = _LANGUAGE.fullmatch(source)
    return (named[1].lower(), named[2] + "\n") if named else ("", source + "\n")


def _behind_prose(line: str) -> str:
    """The language that a fence names at the end of a line of prose, if that is Python: `Here it is: ```python`."""
    prose, _, rest = line.partition("```")
    named = rest.lstrip("`").strip().lower()
    return named if prose.strip() and "`" not in prose and named in PYTHON else ""


def _language(info: str) -> str:
    """The language that a fence names."""
    words = re.split(r"[\s,:{}.]+", info.strip().lower().strip("{.}"))
    return words[0] if words else ""


def _source(lines) -> str:
    return textwrap.dedent("\n".join(lines)) + "\n"


def defines(source: str, name: str) -> bool:
    """Whether a line at the left edge of `source` defines `name`."""
    name = re.escape(name)
    return bool(
        re.search(rf"(?m)^(?:(?:async[ \t]+)?def|class)[ \t]+{name}\b|^{name}[ \t]*(?::[^=\n]+)?=(?!=)", source)
    )


def extract_program(text: str, asked: tuple[str, ...] = ()) -> str:
    """The program in a model's response.

    Args:
      text: the response, or a program alone.
      asked: names that the program is to define; () for one that reads stdin.
    """
    text = _TAGS.sub("", after_thinking(text))
    choices = [b for b in blocks(text) if b[0] in PYTHON or not b[0]]
    if not choices or any(defines(text.partition("```")[0].partition("~~~")[0], name) for name in asked):
        return text  # no block, or the code starts before the first fence, which is within the program

    def rank(block):
        language, source = block
        if asked:
            return sum(defines(source, name) for name in asked), language in PYTHON, bool(source.strip())
        works = 2 * bool(_READS.search(source)) + bool(_WRITES.search(source))
        return bool(works), language in PYTHON, works

    best = max(map(rank, choices))
    return [b for b in choices if rank(b) == best][-1][1]


def candidates(text: str, asked: tuple[str, ...] = (), prompt: str = "") -> list[str]:
    """What a response may mean as a program, the likeliest first: the first that compiles is graded.

    Args:
      text: the response, or a program alone.
      asked: names that the program is to define.
      prompt: the start of the program, which the response goes on from or repeats.
    """
    program = extract_program(text, asked)
    out = [program]
    if program != text and _CODE.match(text.lstrip()):  # no chat: what looks like a fence is in a string
        out.insert(0, text)
    if prompt or "Solution" in asked:
        out = _completions(program, asked, prompt) + out
    at = _CODE.search(program)
    if at and at.start():  # prose before a program without a fence
        out.append(program[at.start() :])
    if at:  # prose after it
        lines = program[at.start() :].splitlines()
        while lines and not _LAST.match(lines[-1]):
            lines.pop()
        out.append("\n".join(lines) + "\n")
    if prompt and (body := _body_alone(text)):
        fenced = blocks(text)
        apart = fenced and not any(defines(source, name) for _, source in fenced for name in asked)
        out.insert(0 if apart else len(out), prompt.rstrip() + "\n" + body)
    for cut in (text.partition("```")[0], _last_whole(program)):  # a fence closes what none opened; a statement cut off
        if any(defines(cut, name) for name in asked):
            out += _completions(cut, asked, prompt) + [cut] if prompt else [cut]
    return list(dict.fromkeys(out))


def _body_alone(text: str) -> str:
    """The body that a text begins with, where the prompt left off, up to the next line at the left edge: base models
    write on until they are cut off, and the benchmarks stop them there; "" where there is none."""
    lines = list(itertools.dropwhile(lambda line: not line.strip(), text.splitlines()))
    if not lines or not lines[0][0].isspace() or _OPEN.fullmatch(lines[0]):
        return ""
    inside = list(itertools.takewhile(lambda line: not line.strip() or line[0].isspace() or line[0] == "#", lines))
    says = any(line.strip() not in ("", "pass") and line.strip()[0] != "#" for line in inside)
    return "\n".join(inside) + "\n" if says else ""


def _last_whole(program: str) -> str:
    """A program without its last statement at the left edge, which may be cut off; "" where no other is left."""
    lines = program.rstrip().splitlines()
    at = max((i for i, line in enumerate(lines) if line[:1].strip() and line[0] not in "#)]}"), default=0)
    while at and lines[at - 1].startswith("@"):
        at -= 1
    return "\n".join(lines[:at]) + "\n" if at else ""


def _completions(program, asked, prompt):
    """The whole program, a function alone or a body alone, put together with the prompt."""
    lines = program.rstrip().splitlines()
    lines = list(itertools.dropwhile(lambda line: not line.strip(), lines))
    if not lines:
        return [prompt + "\n"]
    body = "\n".join(lines) + "\n"
    if any(defines(body, name) for name in asked):
        return [f"{prompt}\n{body}"] if "Solution" not in asked else []
    out = []
    if "Solution" in asked:
        method = re.search(r"(?m)^([ \t]*)def[ \t]+(\w+)[ \t]*\(([ \t\n]*self\b)?", body)
        if method:
            inside = textwrap.indent(textwrap.dedent(body), "    ")
            if method[3]:
                out.append(f"class Solution:\n{inside}")
            else:
                wanted = re.findall(r"def[ \t]+(\w+)", prompt)[-1:] or [method[2]]
                out.append(f"{textwrap.dedent(body)}\nclass Solution:\n    {wanted[0]} = staticmethod({wanted[0]})\n")
    head = prompt.rstrip() + "\n"
    margin = re.findall(r"(?m)^([ \t]*)(?:async[ \t]+)?def\b", prompt)[-1:] or [""]
    margin = margin[0] + "    "
    whole = head + textwrap.indent(textwrap.dedent(body), margin)
    first = head + margin + body.lstrip()
    if lines[0][:1].isspace():
        return [*out, head + body, whole, first]
    later = [line for line in lines[1:] if line.strip()]
    return [*out, *((first, whole) if later and all(line[0].isspace() for line in later) else (whole, first))]
