"""Evaluates an exported model: `python scripts/evaluate.py model=RUN/export attention=eager`; --help lists the options."""

from pathlib import Path

from flash_ladder.front_door import front_door
from flash_ladder.script_schema import EvaluateConfig


def main(cfg: EvaluateConfig, output_dir: Path) -> int:
    """Exits with 1 where the model does not evaluate as it did when it was exported."""
    from flash_ladder.export.evaluate import evaluate_export  # torch is imported once the configuration is known to be good

    return evaluate_export(cfg)


if __name__ == "__main__":
    front_door("evaluate", EvaluateConfig, main, Path(__file__).with_name("conf"))
