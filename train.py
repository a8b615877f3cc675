"""Trains a GPT: `python train.py attention=flash_v2`; --help lists the choices."""

from __future__ import annotations

from typing import TYPE_CHECKING

from flash_ladder import stopping

if TYPE_CHECKING:
    from pathlib import Path

    from flash_ladder.schema import Config


def main(cfg: Config, run_dir: Path) -> float | None:
    """Trains what the configuration asks for; results go to `run_dir`. Returns the validation loss, in nats per token."""
    if cfg.slurm.submit:
        from hydra.core.hydra_config import HydraConfig

        from flash_ladder.overrides import as_typed
        from flash_ladder.training.slurm import submit

        submit(cfg, run_dir, [as_typed(override) for override in HydraConfig.get().overrides.task])
        return None
    from flash_ladder.front_door import hydra_notes
    from flash_ladder.training.run import train  # torch and Lightning are imported once the configuration is known to be good

    return train(cfg, run_dir, hydra_notes(cfg))


if __name__ == "__main__":
    stopping.ends_at_once()  # while Python reads what follows, which takes a second

    from flash_ladder.processes import end_with_parent

    end_with_parent(True)

    from flash_ladder.front_door import front_door
    from flash_ladder.schema import Config
    from flash_ladder.sweep import launcher

    launcher.register()
    front_door("train", Config, main)
