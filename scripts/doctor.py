"""Says what this machine can do and which attention it takes: `python scripts/doctor.py`; --help lists the options."""

from pathlib import Path

from flash_ladder.front_door import front_door
from flash_ladder.script_schema import DoctorConfig


def main(cfg: DoctorConfig, output_dir: Path) -> None:
    """Prints the report; writes it as JSON where asked to."""
    from flash_ladder.machine.doctor import doctor  # torch is imported once the configuration is known to be good

    doctor(cfg)


if __name__ == "__main__":
    front_door("doctor", DoctorConfig, main, Path(__file__).with_name("conf"))
