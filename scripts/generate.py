"""Writes text with an exported model: `python scripts/generate.py model=RUN/export prompt="def "`; --help lists the options."""

import sys
from pathlib import Path

from flash_ladder.front_door import front_door
from flash_ladder.script_schema import GenerateConfig


def main(cfg: GenerateConfig, output_dir: Path) -> None:
    """Prints the prompt and its continuation as the model writes it; all else goes to stderr."""
    from flash_ladder.export.folder import load_export
    from flash_ladder.machine.decide import pick_backend, pick_device
    from flash_ladder.model.generation import stream

    device = pick_device(cfg.device)
    model, tokenizer, _ = load_export(Path(cfg.model), device=device)
    choice = pick_backend(cfg.attention, model.cfg, device, "32")
    model.backend = choice.backend
    texts = stream(
        model,
        tokenizer,
        cfg.prompt,
        max_new_tokens=cfg.max_new_tokens,
        temperature=cfg.temperature,
        top_k=cfg.top_k,
        seed=cfg.seed,
    )
    print(f"attention: {choice}", file=sys.stderr)
    for text in texts:
        print(text, end="", flush=True)
    print()


if __name__ == "__main__":
    front_door("generate", GenerateConfig, main, Path(__file__).with_name("conf"))
