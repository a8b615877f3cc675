"""The attention kernels without the recipe: torch and triton are enough.

python examples/attention_alone.py             the backend that suits this machine
python examples/attention_alone.py flash_v2    any backend by name; without a GPU a Triton rung runs in the interpreter
"""

import sys

import torch

from flash_ladder.kernels import attention, choose


def main(backend: str) -> None:
    """Runs grouped, causal attention with a window on `backend`, and compares output and gradients with eager attention's."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.float16 if device.type == "cuda" else torch.float32  # float16: also Turing's tensor cores have it
    print(choose(device, dtype, 64, backend=backend, features=frozenset({"is_causal", "window_size"})))

    torch.manual_seed(0)
    query = torch.randn(1, 4, 96, 64, device=device, dtype=dtype, requires_grad=True)  # [B, Hq, S, D]
    key, value = (torch.randn(1, 2, 96, 64, device=device, dtype=dtype, requires_grad=True) for _ in range(2))  # [B, Hkv, S, D]
    inputs = {"query": query, "key": key, "value": value}

    results = []
    for name in (backend, "eager"):
        output = attention(query, key, value, is_causal=True, window_size=32, backend=name)
        results.append([output, *torch.autograd.grad(output.square().sum(), inputs.values())])
    for what, ours, eager in zip(("output", *(f"gradient of {name}" for name in inputs)), *results, strict=True):
        print(f"{what:17}  largest difference to eager {(ours - eager).abs().max().item():.1e}")


if __name__ == "__main__":
    try:
        main(sys.argv[1] if len(sys.argv) > 1 else "auto")
    except ValueError as error:
        sys.exit(f"error: {error}")
