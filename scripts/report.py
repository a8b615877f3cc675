"""Reports on the runs below a folder: `python scripts/report.py runs=outputs/DATE/TIME`; --help lists the options."""

from pathlib import Path

from flash_ladder.front_door import front_door
from flash_ladder.script_schema import ReportConfig


def main(cfg: ReportConfig, output_dir: Path) -> None:
    """Prints the table; writes sweep.csv, sweep.json, the pictures and report.html."""
    from flash_ladder.sweep.report import report

    report(Path(cfg.runs or ""), None if cfg.out is None else Path(cfg.out), cfg.baseline)


if __name__ == "__main__":
    front_door("report", ReportConfig, main, Path(__file__).with_name("conf"))
