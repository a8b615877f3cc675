"""Finds the fastest tiles of flash_v2's kernels on this GPU: `python scripts/tune_tiles.py`; --help lists the options."""

from pathlib import Path

from flash_ladder.front_door import front_door
from flash_ladder.script_schema import TuneConfig


def main(cfg: TuneConfig, output_dir: Path) -> None:
    """Prints the ranking and the rows; writes the rows where asked to."""
    from flash_ladder.benchmark.tune_tiles import tune  # torch is imported once the configuration is known to be good

    tune(cfg)


if __name__ == "__main__":
    front_door("tune_tiles", TuneConfig, main, Path(__file__).with_name("conf"))
