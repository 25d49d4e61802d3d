"""The same by transformers and torch: logits in float32 and float64, and one update by torch.optim."""

import contextlib
import dataclasses

import numpy as np
import torch
import transformers

from omniopd_jax.hf import safetensors


def token_ids(folder: str, texts) -> list[list[int]]:
    """By the folder's own tokenizer, start token included."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    return [tokenizer(text)["input_ids"] for text in texts]


def _load(folder: str, attention: str):
    how = {"dtype": torch.float32, "attn_implementation": attention}
    return transformers.AutoModelForCausalLM.from_pretrained(folder, **how).eval()


def logits(folder: str, ids, how: str) -> list[np.ndarray]:
    """[L, V] of each text. `how`: sdpa | eager, in float32; float64: eager, all products and norms in float64, with the
    model's own float32 angles of RoPE."""
    loaded = _load(folder, "eager" if how == "float64" else how)
    with _in_float64(loaded) if how == "float64" else contextlib.nullcontext(), torch.no_grad():
        return [loaded(torch.tensor([row])).logits[0].numpy() for row in ids]


@contextlib.contextmanager
def _in_float64(loaded):
    """Casts to float32 that transformers writes into a layer become casts to float64."""
    rotary, to_float, softmax = loaded.model.rotary_emb, torch.Tensor.float, torch.nn.functional.softmax
    angles = rotary.forward

    def rounded(x, *args, **kwargs):
        torch.Tensor.float = to_float
        try:
            return tuple(a.double() for a in angles(x.float(), *args, **kwargs))
        finally:
            torch.Tensor.float = torch.Tensor.double

    loaded.double()
    for name, buffer in rotary.named_buffers():
        setattr(rotary, name, to_float(buffer))
    rotary.forward = rounded
    torch.Tensor.float = torch.Tensor.double
    torch.nn.functional.softmax = lambda a, dim=-1, dtype=None, **_: softmax(a, dim=dim, dtype=torch.float64)
    try:
        yield
    finally:
        torch.Tensor.float, torch.nn.functional.softmax = to_float, softmax


@dataclasses.dataclass
class Update:
    """Of one step by torch; `before` and `after` are every tensor by its name in the file."""

    loss: float
    grad_norm: float
    before: dict
    after: dict

    def gaps(self, params: dict, table: dict) -> dict[str, float]:
        """{leaf: |our move - torch's| over |torch's|}, moves being after minus before."""
        out = {}
        for name, p, leaf in _leaves(table, params):
            ours = np.asarray(leaf)
            wrong = moved = 0.0
            for at, tensor in safetensors.named(p):
                want = safetensors.laid_out(self.after[tensor], p)
                wrong += float(np.square(ours[at] - want, dtype=np.float64).sum())
                moved += float(np.square(want - safetensors.laid_out(self.before[tensor], p), dtype=np.float64).sum())
            out[name] = (wrong / moved) ** 0.5
        return out


def _leaves(table: dict, params: dict, path: str = ""):
    for name, p in table.items():
        if isinstance(p, dict):
            yield from _leaves(p, params[name], f"{path}{name}.")
        else:
            yield f"{path}{name}", p, params[name]


def update(folder: str, rows, weight, cfg, rate: float) -> Update:
    """One AdamW step on -sum weight logp; the anchor's KL to the model itself has neither value nor gradient here."""
    student, o = _load(folder, "eager"), cfg.optimizer
    tensors = dict(student.named_parameters())
    before = {name: p.detach().numpy().copy() for name, p in tensors.items()}
    assert not o.weight_decay
    optimizer = torch.optim.AdamW(tensors.values(), lr=rate, betas=(o.b1, o.b2), eps=o.eps, weight_decay=0.0)
    width = weight.shape[1]
    loss = 0.0
    for token, start, row in zip(rows.token_BL, rows.prompt_length_B, weight):  # a row at a time: less memory
        ids = torch.tensor(token[None, : start + width]).long()
        logp = torch.log_softmax(student(ids).logits[0, start - 1 : start + width - 1], -1)
        part = -(torch.tensor(row) * logp.gather(-1, ids[0, start:, None])[:, 0]).sum()
        part.backward()
        loss += part.item()
    norm = torch.nn.utils.clip_grad_norm_(tensors.values(), o.max_grad_norm)
    optimizer.step()
    return Update(loss, float(norm), before, {name: p.detach().numpy() for name, p in tensors.items()})
