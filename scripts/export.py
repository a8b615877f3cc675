"""Exports a run and evaluates it again: `python scripts/export.py run=outputs/DATE/TIME`; --help lists the options."""

from pathlib import Path

from flash_ladder.front_door import front_door
from flash_ladder.script_schema import ExportConfig


def main(cfg: ExportConfig, output_dir: Path) -> int:
    """Exits with 1 where the exported model is not the trained one to rounding."""
    from flash_ladder.export.export import export_run  # torch is imported once the configuration is known to be good

    return export_run(cfg)


if __name__ == "__main__":
    front_door("export", ExportConfig, main, Path(__file__).with_name("conf"))
