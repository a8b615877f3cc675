"""Writes the kernels for Hugging Face's `kernels`: `python scripts/hub_kernel.py out=FOLDER`; --help lists the options."""

from pathlib import Path

from flash_ladder.front_door import front_door
from flash_ladder.script_schema import HubKernelConfig


def main(cfg: HubKernelConfig, output_dir: Path) -> None:
    """Writes the folder."""
    from flash_ladder.export.hub_kernel import write_hub_kernel  # torch is imported once the configuration is known to be good

    write_hub_kernel(cfg)


if __name__ == "__main__":
    front_door("hub_kernel", HubKernelConfig, main, Path(__file__).with_name("conf"))
