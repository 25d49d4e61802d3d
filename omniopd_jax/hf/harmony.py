"""gpt-oss's harmony format, as far as an answer needs it: thoughts and answer are messages in channels of their own.

Its prompt ends in `<|start|>assistant`, and the model begins by naming a channel: `analysis` for thoughts, `final` for
the answer. A student's text knows no channels, so that raw completion would go on in none. Here `<think>` becomes the
first and what follows it the second, and back.
"""

BEGINS = "<|start|>assistant"  # the end of a prompt
ANALYSIS, FINAL = "<|channel|>analysis<|message|>", "<|channel|>final<|message|>"
END, RETURN = "<|end|>", "<|return|>"  # of a message, of an answer


def written(prefix: str, opens: str, closes: str) -> str:
    """What comes after a prompt of the format: the channel, and the unfinished answer in it.

    An answer without thoughts, an empty one too, is put in the final channel: the model then writes no thoughts first.

    Args:
      opens, closes: the marks around a student's thoughts.
    """
    body = prefix.lstrip()
    if not body.startswith(opens):
        return FINAL + prefix
    thoughts, mark, answer = body.removeprefix(opens).partition(closes)
    if not mark:
        return ANALYSIS + thoughts.lstrip("\n")
    return ANALYSIS + thoughts.strip("\n") + END + BEGINS + FINAL + answer.lstrip("\n")


def thinking(prefix: str, opens: str, closes: str) -> bool:
    """Whether an unfinished answer is inside its thoughts, so that it goes on in the analysis channel."""
    return prefix.lstrip().startswith(opens) and closes not in prefix


def read(text: str, closes: str, *, thinking: bool) -> tuple[str, bool]:
    """(a continuation in a student's form, whether the answer ended in it) of what the model wrote, marks included."""
    if not thinking:
        body, ended, _ = text.replace(END, RETURN).partition(RETURN)
        return body, bool(ended)
    thoughts, over, rest = text.partition(END)
    if not over:
        return thoughts.partition(RETURN)[0], RETURN in thoughts
    body, ended, _ = rest.partition(FINAL)[2].partition(RETURN)
    return f"{thoughts}\n{closes}\n\n{body}", bool(ended)
