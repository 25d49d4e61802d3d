"""The tokenizer and the chat template of the small world's models, in the manner of Qwen's."""

from collections.abc import Iterable

from omniopd_jax.errors import UserError

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
SPECIALS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")  # padding, start of a turn, end of a turn

# Words and marks take the space before them along, and so does a digit: one token a digit, none for the space.
_PIECES = r" ?\p{L}+| ?\p{N}| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"


def train_tokenizer(texts: Iterable[str], vocab_size: int):
    """Trains a byte-level BPE tokenizer, digits one by one, in the manner of Qwen's.

    Args:
      texts: prompts and solutions, without template.
      vocab_size: specials and the 256 bytes included.

    Returns:
      A transformers.PreTrainedTokenizerFast with CHAT_TEMPLATE; decode(encode(text)) == text for any text.

    Raises:
      UserError: a vocab_size without room for the bytes.
    """
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    least = 256 + len(SPECIALS)
    if vocab_size < least:
        raise UserError(f"vocab_size = {vocab_size}; allowed: {least} (the bytes and the special tokens) and up")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_PIECES), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIALS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    texts = list(texts)
    # the template's own words are in every prompt
    tokenizer.train_from_iterator([*texts, *["user\n", "assistant\n"] * len(texts)], trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        additional_special_tokens=["<|im_start|>"],
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
    )
