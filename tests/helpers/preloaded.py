"""What the commands import, imported once for all that `tests.helpers.commands` starts."""

import flash_ladder.kernels  # noqa: F401  # without a GPU our kernels come before Lightning
from flash_ladder.export import evaluate, export  # noqa: F401
from flash_ladder.model import generation  # noqa: F401
from flash_ladder.training import run  # noqa: F401
