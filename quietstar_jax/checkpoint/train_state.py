"""What a step of training changes, and a checkpoint stores."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax


class TrainState(NamedTuple):
    """Everything that changes from step to step.

    Attributes:
      step: scalar int32, optimizer steps done in all phases.
      params: float32 master weights under their dotted paths.
      opt_state: of `make_optimizer`.
    """

    step: jax.Array
    params: dict[str, jax.Array]
    opt_state: Any
