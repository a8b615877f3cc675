"""Trains a GPT: `python train.py attention=flash_v2`; --help lists the choices."""

from pathlib import Path

from flash_ladder.front_door import front_door
from flash_ladder.schema import Config


def main(cfg: Config, run_dir: Path) -> None:
    """Trains what the configuration asks for; results go to `run_dir`."""
    if cfg.slurm.submit:
        from hydra.core.hydra_config import HydraConfig

        from flash_ladder.training.slurm import submit

        return submit(cfg, run_dir, list(HydraConfig.get().overrides.task))
    from flash_ladder.training.run import train  # torch and Lightning are imported once the configuration is known to be good

    train(cfg, run_dir)


if __name__ == "__main__":
    front_door("train", Config, main)
