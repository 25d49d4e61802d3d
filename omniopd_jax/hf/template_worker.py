"""The process that renders chat templates: run by path (`python -I`), ended by template.py where one takes too long.

A template is code from elsewhere. Jinja's sandbox keeps it from files and from Python's internals, not from a loop
without end or a text of gigabytes; a process of its own with bounded memory does. Reads one JSON object {source,
variables} a line and writes {"text": ...} or {"error": ...} a line. The environment is the one that transformers
renders with.
"""

import datetime
import functools
import json
import resource
import sys

sys.path += sys.argv[1:]  # where the process that starts this one has jinja2 from: isolated mode looks elsewhere

import jinja2
import jinja2.ext
import jinja2.sandbox

MEMORY = 1 << 30  # bytes of address space; jinja2 and a long conversation take 60 MB
LONGEST = 8_000_000  # characters of a rendered prompt


class Generation(jinja2.ext.Extension):
    """`{% generation %}...{% endgeneration %}` marks the assistant's words for training masks; here it writes its
    body."""

    tags = {"generation"}

    def parse(self, parser):
        """The body of the block."""
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def raise_exception(message):
    """What a template calls to refuse a conversation."""
    raise jinja2.exceptions.TemplateError(message)


def to_json(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
    """The filter `tojson` without the escapes that are for HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


@functools.lru_cache(maxsize=8)
def compiled(source: str):
    """The template of a text."""
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = to_json
    environment.globals["raise_exception"] = raise_exception
    return environment.from_string(source)


def render(source: str, variables: dict, date: str = "") -> dict:
    """{"text": ...} or {"error": one line}. `date`: YYYY-MM-DD, what `strftime_now` takes for today; "": today."""
    try:
        now = datetime.datetime.fromisoformat(date) if date else datetime.datetime.now()
        text = compiled(source).render({"strftime_now": now.strftime} | variables)
    except MemoryError:
        compiled.cache_clear()
        return {"error": f"it needs more than {MEMORY >> 20} MiB of memory"}
    except RecursionError:
        return {"error": "it calls itself without end"}
    except Exception as error:
        return {"error": (str(error).strip().splitlines() or [type(error).__name__])[0][:200]}
    if len(text) > LONGEST:
        return {"error": f"it writes {len(text):,} characters; at most {LONGEST:,} are read"}
    return {"text": text}


def main():
    """Answers until the input ends."""
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
    sys.stdout.write("\n")  # ready
    sys.stdout.flush()
    for line in sys.stdin.buffer:
        asked = json.loads(line)
        try:
            answer = json.dumps(render(asked["source"], asked["variables"], asked.get("date", "")))
        except MemoryError:
            answer = json.dumps({"error": f"it needs more than {MEMORY >> 20} MiB of memory"})
        sys.stdout.write(answer + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
