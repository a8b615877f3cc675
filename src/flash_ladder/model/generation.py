"""Sampling from a model: the prompt fills the KV cache, then one token at a time."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from flash_ladder.data.tokenizer import Tokenizer
from flash_ladder.errors import UserError, at_least
from flash_ladder.memory import must_fit
from flash_ladder.model.gpt import GPT, KVCache

PREFILL = 512  # prompt tokens per forward pass; this bounds the memory of logits and scores


def generate(
    model: GPT,
    tokenizer: Tokenizer,
    prompt: str,
    *,
    max_new_tokens: int = 200,
    temperature: float = 0.8,
    top_k: int | None = 50,
    seed: int = 0,
) -> str:
    """The prompt and what the model writes after it; arguments and errors as in `stream`."""
    return "".join(stream(model, tokenizer, prompt, max_new_tokens=max_new_tokens, temperature=temperature, top_k=top_k, seed=seed))


def stream(
    model: GPT,
    tokenizer: Tokenizer,
    prompt: str,
    *,
    max_new_tokens: int = 200,
    temperature: float = 0.8,
    top_k: int | None = 50,
    seed: int = 0,
) -> Iterator[str]:
    """Yields the prompt, then pieces of text as the model writes them, until the document ends or `max_new_tokens` are there.

    temperature: 0 always takes the likeliest token. top_k: sample among that many of the likeliest tokens; None for all.
    seed: the same seed and logits give the same text on every device. An empty prompt begins a new document.
    A character whose bytes lie in several tokens is yielded when it is complete; bytes that are no UTF-8 become U+FFFD.
    A space that ends the prompt is left to the model, whose first token must then begin with a space. In training text a space is
    part of the token of the next word, so that a word hardly ever follows a token that is a space alone.
    Raises UserError for arguments out of range, and for a text longer than a learned position table or than memory allows.
    """
    at_least(0, max_new_tokens=max_new_tokens, temperature=temperature)
    at_least(1, top_k=top_k)
    first = tokenizer.starting_with(" ") if len(prompt) > 1 and prompt.endswith(" ") else []
    held = " " if len(first) > 1 else ""  # where tokens are single bytes, a space is a token like any other
    ids = tokenizer.encode(prompt.removesuffix(held)) or [tokenizer.eos_id]
    room = model.cfg.max_seq_len - len(ids)
    if model.cfg.position == "learned" and max_new_tokens > room:
        raise UserError(
            f"a prompt of {len(ids)} tokens and max_new_tokens={max_new_tokens} pass the model's {model.cfg.max_seq_len} learned "
            f"positions; {f'max_new_tokens={room}' if room >= 0 else 'a shorter prompt'} would fit"
        )
    needed = KVCache.bytes_of(model.cfg, max_len=len(ids) + max_new_tokens, dtype=cache_dtype(model))
    device = model.embedding.weight.device
    where = (torch.cuda.mem_get_info(device)[0], "the GPU's free memory is") if device.type == "cuda" else ()
    must_fit(f"max_new_tokens={max_new_tokens}: the keys and values", needed, "fewer would fit", *where)
    tokens = _sample(model, tokenizer, ids, first if held else None, max_new_tokens, temperature, top_k, seed)
    return _text(prompt, held, tokenizer, tokens)


@torch.inference_mode()
def _sample(
    model: GPT,
    tokenizer: Tokenizer,
    ids: list[int],
    first: list[int] | None,
    max_new_tokens: int,
    temperature: float,
    top_k: int | None,
    seed: int,
) -> Iterator[int]:
    """Yields the tokens that follow `ids`, up to the end of the document; the first of them is one of `first`, if given."""
    weight = model.embedding.weight
    cache = KVCache(model.cfg, max_len=len(ids) + max_new_tokens, device=weight.device, dtype=cache_dtype(model))
    generator = torch.Generator().manual_seed(seed)

    pieces = torch.tensor([ids], device=weight.device).split(PREFILL, dim=1)
    for _ in range(max_new_tokens):
        for piece in pieces:
            # Calls forward itself: a compiled model would compile again for every length.
            logits = model.forward(piece, cache=cache)
        # The model's vocabulary is padded; ids past the tokenizer's vocabulary have no text.
        choices = logits[0, -1, : tokenizer.vocab_size].float().cpu()
        if first is not None:
            choices = torch.full_like(choices, -torch.inf).index_copy(0, torch.tensor(first), choices[first])
            first = None
        token = _pick(choices, temperature, top_k, generator)
        if token == tokenizer.eos_id:
            return
        yield token
        pieces = [torch.tensor([[token]], device=weight.device)]


def cache_dtype(model: GPT) -> torch.dtype:
    """The dtype that attention runs in: autocast's, or the weights'."""
    weight = model.embedding.weight
    autocast = torch.is_autocast_enabled(weight.device.type)
    return torch.get_autocast_dtype(weight.device.type) if autocast else weight.dtype


def _pick(logits: Tensor, temperature: float, top_k: int | None, generator: torch.Generator) -> int:
    """One token from logits [V] on the CPU."""
    if temperature == 0:
        return int(logits.argmax())
    if top_k is not None:
        logits, likeliest = logits.topk(min(top_k, len(logits)))
    apart = (logits - logits.max()).double() / temperature  # no temperature makes the largest overflow, or float32 lose it
    chosen = torch.multinomial(torch.softmax(apart.float(), -1), 1, generator=generator)
    return int(chosen if top_k is None else likeliest[chosen])


def _text(prompt: str, held: str, tokenizer: Tokenizer, tokens: Iterator[int]) -> Iterator[str]:
    """Yields the prompt, then the tokens' text: each piece as soon as no later byte can change it.

    `held` is the end of the prompt that the first token writes again.
    """
    yield prompt
    pending: list[int] = []  # tokens since the last clean end of a character
    shown = len(held)  # characters of their text that were yielded
    for token in tokens:
        pending.append(token)
        text = tokenizer.decode(pending)
        clean = not text.endswith("\ufffd")
        settled = text if clean else text[:-1]  # only a character at the very end can still be completed
        if len(settled) > shown:
            yield settled[shown:]
        pending, shown = ([], 0) if clean else (pending, len(settled))
    if pending and len(rest := tokenizer.decode(pending)) > shown:
        yield rest[shown:]
