"""The training state: updated by every training step, and stored in checkpoints."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax

OBJECTIVE = "objective"


class TrainState(NamedTuple):
    """Everything that changes from step to step.

    Attributes:
      step: scalar int32, number of optimizer steps done, over all phases.
      params: float32 master weights by dotted path: those that may learn.
      opt_state: optimizer state of `make_optimizer`.
      entropy_bonus: scalar float32, adapted to hold `ThoughtConfig.entropy_target`; None before the first phase that
        trains thoughts, and where it is constant.
      reference: `params` when the first phase that trains thoughts began, except the mixing head and the gate, on which
        thoughts do not depend; None before, and where no setting compares with them.
      frozen: the weights that adapters freeze, by dotted path; not in checkpoints. Empty without adapters.
    """

    step: jax.Array
    params: dict[str, jax.Array]
    opt_state: Any
    entropy_bonus: jax.Array | None = None
    reference: dict[str, jax.Array] | None = None
    frozen: dict[str, jax.Array] = {}  # noqa: RUF012 - never modified

    @property
    def weights(self) -> dict[str, jax.Array]:
        """All weights of the model by dotted path."""
        return self.params | self.frozen

    @property
    def objective(self) -> dict[str, Any]:
        """The item `OBJECTIVE` of a checkpoint: `entropy_bonus` and `reference`, unless they are None."""
        fields = {"entropy_bonus": self.entropy_bonus, "reference": self.reference}
        return {name: value for name, value in fields.items() if value is not None}
