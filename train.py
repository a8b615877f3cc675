"""Trains a GPT: `python train.py attention=flash_v2`; --help lists the choices."""

from pathlib import Path

from flash_ladder.front_door import front_door, hydra_notes
from flash_ladder.overrides import as_typed
from flash_ladder.schema import Config
from flash_ladder.sweep import launcher


def main(cfg: Config, run_dir: Path) -> float | None:
    """Trains what the configuration asks for; results go to `run_dir`. Returns the validation loss, in nats per token."""
    if cfg.slurm.submit:
        from hydra.core.hydra_config import HydraConfig

        from flash_ladder.training.slurm import submit

        submit(cfg, run_dir, [as_typed(override) for override in HydraConfig.get().overrides.task])
        return None
    from flash_ladder.training.run import train  # torch and Lightning are imported once the configuration is known to be good

    return train(cfg, run_dir, hydra_notes(cfg))


if __name__ == "__main__":
    launcher.register()
    front_door("train", Config, main)
