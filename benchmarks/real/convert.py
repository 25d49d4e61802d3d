"""A GGUF file -> a Hugging Face folder in bfloat16. Run by prepare.py with the server's interpreter, which has torch,
transformers and gguf; it imports nothing of this project.

    PYTHON benchmarks/real/convert.py GGUF_FILE FOLDER
"""

import pathlib
import sys

import torch
import transformers

DROPPED = ("quantization_config", "_name_or_path")


def main(source: pathlib.Path, out: pathlib.Path) -> None:
    """Reads the weights (dequantised by transformers) and saves model, tokenizer and configs in `out`."""
    where = {"pretrained_model_name_or_path": str(source.parent), "gguf_file": source.name}
    read = transformers.AutoModelForCausalLM.from_pretrained(**where, dtype=torch.float32)
    fields = {k: v for k, v in read.config.to_dict().items() if k not in DROPPED}
    model = type(read)(type(read.config)(**fields))  # a new one: a model read from GGUF refuses to be saved
    model.load_state_dict(read.state_dict())
    model.tie_weights()
    model.to(torch.bfloat16).save_pretrained(out)
    transformers.AutoTokenizer.from_pretrained(**where).save_pretrained(out)


if __name__ == "__main__":
    main(pathlib.Path(sys.argv[1]), pathlib.Path(sys.argv[2]))
