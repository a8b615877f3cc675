"""Certifies a transformers model's attention: `python scripts/certify.py model=FOLDER_OR_NAME`; --help lists the options."""

from pathlib import Path

from flash_ladder.front_door import front_door
from flash_ladder.script_schema import CertifyConfig


def main(cfg: CertifyConfig, output_dir: Path) -> int:
    """Exits with 1 where the two implementations differ by more than rounding."""
    from flash_ladder.certify.command import certify_model  # torch is imported once the configuration is known to be good

    return certify_model(cfg)


if __name__ == "__main__":
    front_door("certify", CertifyConfig, main, Path(__file__).with_name("conf"))
