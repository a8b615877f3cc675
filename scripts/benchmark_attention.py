"""Measures the rungs beside other people's attention: `python scripts/benchmark_attention.py`; --help lists the options."""

from pathlib import Path

from flash_ladder.front_door import front_door
from flash_ladder.script_schema import BenchmarkConfig


def main(cfg: BenchmarkConfig, output_dir: Path) -> None:
    """Prints the tables; writes figures and pictures where asked to."""
    from flash_ladder.benchmark.grid import benchmark  # torch is imported once the configuration is known to be good

    benchmark(cfg)


if __name__ == "__main__":
    front_door("benchmark_attention", BenchmarkConfig, main, Path(__file__).with_name("conf"))
