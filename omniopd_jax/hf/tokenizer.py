"""A folder's tokenizer and the tokens that end an answer."""

import re

from omniopd_jax.errors import UserError
from omniopd_jax.hf import bounded, hub
from omniopd_jax.model import ModelConfig


def load_tokenizer(folder, *, setting: str = "student.path"):
    """The folder's transformers tokenizer; whether it has a chat template, `template.make` asks.

    Raises:
      UserError: no tokenizer files, or files that transformers cannot read.
    """
    folder = hub.resolve(folder, setting=setting)
    if not any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer.model", "tokenizer_config.json")):
        raise UserError(f"{setting}: {folder} holds no tokenizer (tokenizer.json, tokenizer_config.json)")
    from transformers import AutoTokenizer

    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        if (folder / name).is_file() and (folder / name).stat().st_size > bounded.JSON_BYTES:
            raise UserError(f"{setting}: {folder / name} is larger than {bounded.JSON_BYTES:,} bytes")
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as e:  # transformers raises what the parser of the day raises
        raise UserError(f"{setting}: transformers cannot read the tokenizer in {folder}: {bounded.line(e)}") from e
    return tokenizer


def end_ids(folder, tokenizer=None, *, setting: str = "student.path") -> tuple[int, ...]:
    """Tokens that end an answer: of generation_config.json, config.json (its text_config too) and the tokenizer,
    ascending, each once.

    Raises:
      UserError: a file whose eos_token_id is no token id and no list of them.
    """
    folder = hub.resolve(folder, setting=setting)
    found = set() if tokenizer is None or tokenizer.eos_token_id is None else {int(tokenizer.eos_token_id)}
    for name in ("generation_config.json", "config.json"):
        said = bounded.read_json(folder / name) if (folder / name).is_file() else {}
        text = said.get("text_config")
        for value in (part.get("eos_token_id") for part in (said, text) if isinstance(part, dict)):
            ids = value if isinstance(value, list) else [] if value is None else [value]
            if not all(type(i) is int and i >= 0 for i in ids):
                raise UserError(f"{folder / name}: eos_token_id = {str(value)[:60]} is no token id and no list of them")
            found |= set(ids)
    return tuple(sorted(found))


def check_fits(tokenizer, model_cfg: ModelConfig, longest: int, *, setting: str = "student.path") -> None:
    """Every id that the tokenizer gives has a row in the embedding, and the longest text has a position.

    A special token that no template writes may be without a row: all Gemma 3 share the tokenizer of those that see, and
    a text that spells the mark of an image is read as letters (`ids_of`).

    Args:
      longest: tokens of a row at most.

    Raises:
      UserError: one line on which of the two is not so.
    """
    special = {int(i): t.special for i, t in tokenizer.added_tokens_decoder.items()}
    written = str(tokenizer.chat_template or "")
    beyond = [(t, i) for t, i in tokenizer.get_vocab().items() if i >= model_cfg.vocab_size]
    ends = (tokenizer.eos_token, tokenizer.bos_token, tokenizer.pad_token)
    wanted = [(t, i) for t, i in beyond if not special.get(i) or t in written or t in ends]
    if wanted:
        token, top = max(wanted, key=lambda item: item[1])
        raise UserError(
            f"{setting}: the tokenizer's token {token!r} has the id {top}, the model's embedding has "
            f"{model_cfg.vocab_size} "
            "rows (vocab_size): take the tokenizer that belongs to the model"
        )
    if longest > (most := positions(model_cfg)):
        raise UserError(
            f"{setting}: the model has {most:,} positions (max_position_embeddings), max_prompt_length + "
            "max_completion_length, with what the objective adds (continuation.max_tokens, context.max_prompt_length), "
            f"= {longest:,}: lower one of them"
        )


def ids_of(tokenizer, texts: list[str], rows: int = 0) -> list[list[int]]:
    """The tokens of texts that have their special tokens already.

    Args:
      rows: of the model's embedding; a special token beyond them is read as its letters. 0: not known.

    Raises:
      UserError: a token beyond them that is no special one.
    """
    ids = tokenizer(texts, add_special_tokens=False)["input_ids"]
    for k, own in enumerate(ids):
        if rows and max(own, default=0) >= rows:
            marks = [str(t) for i, t in tokenizer.added_tokens_decoder.items() if int(i) >= rows]
            parts = [p for p in re.split(f"({'|'.join(map(re.escape, marks))})", texts[k]) if p]
            how = [{"split_special_tokens": True} if part in marks else {} for part in parts]
            pieces = (tokenizer(p, add_special_tokens=False, **more)["input_ids"] for p, more in zip(parts, how))
            ids[k] = sum(pieces, [])
            if max(ids[k]) >= rows:
                raise UserError(f"the tokenizer gives the id {max(ids[k])}, the model's embedding has {rows} rows")
    return ids


def positions(model_cfg: ModelConfig) -> int:
    """The longest text of a model. Linear and YaRN scaling stretch the positions that it was trained with; the files of
    Llama 3 and Gemma 3 count the stretched ones already.
    """
    scaling = dict(model_cfg.rope_scaling)
    own = model_cfg.max_positions
    if scaling.get("rope_type") == "linear" and model_cfg.family != "gemma3":
        return int(own * scaling["factor"])
    if scaling.get("rope_type") == "yarn":
        return max(own, int(scaling["original_max_position_embeddings"] * scaling["factor"]))
    return own
