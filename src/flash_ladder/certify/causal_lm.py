"""A causal language model of transformers: loaded, run with one attention or another, and run in float64.

transformers is optional and imported here alone, in functions.
"""

from __future__ import annotations

import copy
import inspect
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from flash_ladder.errors import UserError, first_line, nearest
from flash_ladder.kernels import Unsupported, choose
from flash_ladder.kernels.generations import describe
from flash_ladder.kernels.jit import installed
from flash_ladder.names import BACKENDS, is_kernel

INSTALL = "pip install 'transformers>=5.24,<6'"
TRUSTED = "eager"  # transformers' own attention, written out; what every model's authors mean
OURS = ("auto", *(name for name in BACKENDS if is_kernel(name)))  # the other names are transformers'


class InFloat64(TorchFunctionMode):
    """Whoever asks torch for float32 gets float64.

    The models of transformers compute norms, rotary angles and the softmax in float32, whatever dtype their weights have.
    """

    def __torch_function__(self, func: Callable, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        if func is torch.Tensor.float:
            func = cast("Callable", torch.Tensor.double)
        args = tuple(torch.float64 if x is torch.float32 else x for x in args)
        return func(*args, **{k: torch.float64 if x is torch.float32 else x for k, x in (kwargs or {}).items()})


@dataclass
class CausalLM:
    """A model with its tokenizer, and a float64 copy of its weights."""

    name: str
    model: Any
    exact_model: Any  # the copy, with eager attention
    tokenizer: Any

    @property
    def device(self) -> torch.device:
        return self.model.device

    @property
    def dtype(self) -> torch.dtype:
        return self.model.dtype

    @property
    def longest(self) -> int | None:
        """The model's limit on positions; None where its configuration names none."""
        return getattr(self.model.config.get_text_config(), "max_position_embeddings", None)

    def encode(self, text: str) -> list[int]:
        """Token ids, with nothing put before or after. Raises UserError for ids that the model does not have."""
        ids = self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        rows = self.model.get_input_embeddings().num_embeddings
        if ids and max(ids) >= rows:
            raise UserError(
                f"model={self.name}: its tokenizer gives token {max(ids)}, and the model has {rows}; they do not belong together"
            )
        return ids

    @torch.no_grad()
    def logits(self, implementation: Implementation, tokens: Tensor) -> Tensor:
        """The logits [B, S, V] of tokens int64 [B, S], in the model's dtype. Raises UserError where it cannot run here."""
        return self._run(implementation, tokens, use_cache=False).logits

    @torch.no_grad()
    def exact_logits(self, tokens: Tensor) -> Tensor:
        """The float64 logits [B, S, V] of the float64 copy, on the model's device."""
        try:
            with InFloat64():
                logits = self.exact_model(tokens.to(self.exact_model.device), use_cache=False).logits
        except torch.OutOfMemoryError:
            raise too_large("the float64 forward", tokens) from None
        except (RuntimeError, NotImplementedError) as error:
            raise UserError(f"model={self.name} cannot run in float64: {first_line(error)}") from error
        return logits.to(self.device)

    @torch.no_grad()
    def continuation(self, implementation: Implementation, prompt: Tensor) -> Iterator[int]:
        """The greedy tokens after prompt int64 [1, S], one by one through a cache, without end."""
        takes = inspect.signature(self.model.forward).parameters
        name = "cache" if "cache" in takes else "past_key_values"  # as transformers called it before 5.24, and older models do
        tokens, cache = prompt, None
        while True:
            output = self._run(implementation, tokens, **{name: cache}, use_cache=True)
            cache, tokens = output[name], output.logits[:, -1:].argmax(-1)
            yield int(tokens)

    def _run(self, implementation: Implementation, tokens: Tensor, **options: Any) -> Any:
        """The model's output. Raises UserError."""
        label, key = implementation.label, implementation.key
        try:
            self.model.set_attn_implementation(key)
            if self.model.config._attn_implementation != key:
                raise ValueError(f"transformers runs {self.model.config._attn_implementation} in its place")
            return self.model(tokens, **options)
        except torch.OutOfMemoryError:
            raise too_large(f"{label} attention", tokens) from None
        except (ValueError, ImportError, NotImplementedError, RuntimeError) as error:
            raise UserError(f"{label} attention cannot run this model here: {first_line(error)}") from error


def too_large(what: str, tokens: Tensor) -> UserError:
    """For a forward pass over tokens [B, S] that ran out of memory."""
    n = tokens.shape[1]
    return UserError(
        f"{what} does not fit in the GPU's memory with {n} tokens; a smaller seq_len or tokens= needs less, device=cpu none of it"
    )


# ---- loading ----


def load(name: str, dtype: str, device: torch.device) -> CausalLM:
    """A model by the name of its folder or of its repository on the Hugging Face hub, in eval mode, and its float64 copy.

    dtype: float32, bfloat16, float16; auto: as its weights are stored. The copy lies on a GPU too where it takes less than half of
    what is free, else on the CPU. Raises UserError.
    """
    if installed("transformers") is None:
        raise UserError(f"certify runs models of transformers, which is not installed: {INSTALL}")
    import transformers

    transformers.logging.set_verbosity_error()  # what it warns of is checked here
    folder = Path(name)
    if folder.is_dir() and not (folder / "config.json").is_file():
        raise UserError(f"model={name} has no config.json; name a folder that save_pretrained wrote")
    if not folder.is_dir() and not re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", name):
        raise UserError(f"model={name} does not exist; name a folder that save_pretrained wrote, or OWNER/NAME on the hub")
    try:
        options: dict[str, Any] = {"attn_implementation": TRUSTED, "output_loading_info": True}
        wanted = dtype if dtype == "auto" else getattr(torch, dtype)
        loaded: Any = transformers.AutoModelForCausalLM.from_pretrained(name, dtype=wanted, **options)
        model, info = loaded
        tokenizer = transformers.AutoTokenizer.from_pretrained(name)
    except Exception as error:  # transformers, huggingface_hub, safetensors and tokenizers have errors of their own
        raise UserError(f"model={name} cannot be loaded as a causal language model: {first_line(error)}") from error
    random = sorted({*info["missing_keys"], *(str(key) for key in info["mismatched_keys"])})
    if random:
        raise UserError(f"model={name} lacks weights of a {type(model).__name__} ({random[0]}), which would be random numbers")
    try:
        exact = copy.deepcopy(model.eval())
        model = model.to(device)
        exact = in_float64(exact.to(reference_device(model)))
    except torch.OutOfMemoryError:
        raise UserError(f"model={name} does not fit in the GPU's memory; device=cpu takes the machine's memory") from None
    except ValueError as error:  # quantised weights
        raise UserError(f"model={name} cannot be made a float64 model: {first_line(error)}") from error
    return CausalLM(name, model, exact, tokenizer)


def in_float64(model: Any) -> Any:
    """Makes a model float64, in place, and returns it."""
    if hasattr(model, "set_experts_implementation"):
        model.set_experts_implementation("eager")  # a mixture's grouped products take no float64
    return model.double()


def reference_device(model: Any) -> torch.device:
    """Where the float64 copy lies: beside the model where that leaves half of the GPU's free memory for its activations."""
    if model.device.type != "cuda":
        return model.device
    needed = 8 * sum(p.numel() for p in model.parameters())
    return model.device if 2 * needed < torch.cuda.mem_get_info(model.device)[0] else torch.device("cpu")


# ---- implementations ----


@dataclass(frozen=True)
class Implementation:
    """An implementation of attention."""

    label: str  # what the user called it
    key: str  # its name in transformers
    reason: str = ""


def implementation(key: str, name: str, model: Any) -> Implementation:
    """What a=NAME or b=NAME (`key` says which) means for this model.

    Ours are auto and the rungs, through the door; the others are transformers' (eager, sdpa, ...) and whatever else is registered
    there. Raises UserError for a name that is neither, and for auto where nothing can run.
    """
    from transformers import AttentionInterface

    from flash_ladder.kernels.doors.transformers import register

    if name not in OURS:
        theirs = [TRUSTED, *(one for one in AttentionInterface().valid_keys() if not one.startswith("paged"))]
        if name not in theirs:
            raise UserError(f"{key}={name} is not a choice ({', '.join((*OURS, *theirs))}){nearest(name, (*OURS, *theirs))}")
        return Implementation(name, name)
    config = model.config.get_text_config()
    if not hasattr(config, "num_attention_heads"):
        raise UserError(f"{key}={name}: a {type(model).__name__} has no attention heads, so there is nothing to certify")
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    try:
        choice = choose(model.device, model.dtype, head_dim, backend=name)
        # Not by its own name: transformers takes what has "flash" in it for a package.
        registered = "ladder" if name == "auto" else f"ladder_{name.removeprefix('flash_')}"
        register(registered, backend=name)
    except Unsupported as error:
        raise UserError(f"{key}={name}: {error}") from None
    except ImportError as error:
        raise UserError(f"{key}={name}: {error}; {INSTALL}") from None
    # A layer with a window, sinks or the like may get another rung, which auto decides call by call.
    return Implementation(name, registered, f"plain causal layers run {choice}" if name == "auto" else choice.reason)


def describe_reference(lm: CausalLM) -> str:
    """What the float64 reference is, in words."""
    return f"eager attention in float64, on the same weights ({describe(lm.exact_model.device)})"
