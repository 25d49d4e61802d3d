"""Grader of the small worlds' problems: the response's final answer, compared as text."""

from collections.abc import Iterable

from omniopd_jax import world
from omniopd_jax.errors import UserError


class WorldGrader:
    """Whether a response ends in the answer. Has nothing to start or to end."""

    extract = staticmethod(world.extract_answer)

    def grade(self, text: str, answer: str) -> bool:
        """Whether `text` gives `answer`."""
        return world.grade(text, answer)

    def grade_all(self, texts: Iterable[str], answers: Iterable[str]) -> list[bool]:
        """`grade` for each text and its answer."""
        return [self.grade(text, answer) for text, answer in zip(texts, answers, strict=True)]

    def check_answer(self, answer) -> None:
        """Raises a UserError unless `answer` is text."""
        if not isinstance(answer, str) or not answer.strip():
            raise UserError(f"an answer of a small world is text, a number; this is {answer!r:.80}")

    def check_machine(self) -> None:
        """Nothing is needed."""

    def close(self) -> None:
        """Nothing to free."""

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()


def make() -> WorldGrader:
    """A WorldGrader."""
    return WorldGrader()
