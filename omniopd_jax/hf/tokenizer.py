"""A folder's tokenizer and the tokens that end an answer."""

from omniopd_jax.errors import UserError
from omniopd_jax.hf import bounded, hub


def load_tokenizer(folder, *, setting: str = "student.path"):
    """The folder's transformers tokenizer, which must have a chat template.

    Raises:
      UserError: no tokenizer files, files that transformers cannot read, or no chat template.
    """
    folder = hub.resolve(folder, setting=setting)
    if not any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer.model", "tokenizer_config.json")):
        raise UserError(f"{setting}: {folder} holds no tokenizer (tokenizer.json, tokenizer_config.json)")
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as e:  # transformers raises what the parser of the day raises
        raise UserError(f"{setting}: transformers cannot read the tokenizer in {folder}: {bounded.line(e)}") from e
    if not tokenizer.chat_template:
        raise UserError(
            f"{setting}: the tokenizer in {folder} has no chat template (chat_template.jinja, or chat_template in "
            "tokenizer_config.json); take the instruct model's folder or add one"
        )
    return tokenizer


def end_ids(folder, tokenizer=None, *, setting: str = "student.path") -> tuple[int, ...]:
    """Tokens that end an answer: of generation_config.json, config.json and the tokenizer, ascending, each once."""
    folder = hub.resolve(folder, setting=setting)
    found = set() if tokenizer is None or tokenizer.eos_token_id is None else {int(tokenizer.eos_token_id)}
    for name in ("generation_config.json", "config.json"):
        ids = bounded.read_json(folder / name).get("eos_token_id") if (folder / name).is_file() else None
        found |= set(ids if isinstance(ids, list) else [] if ids is None else [ids])
    return tuple(sorted(found))
