"""The base of the studies on the embedded corpus: half the sequences and fewer steps with thoughts.

A study consists of dozens of runs.
"""

import ml_collections

from quietstar_jax.configs import embedded_corpus


def get_config() -> ml_collections.ConfigDict:
    """8 instead of 16 sequences in the phases with thoughts, 50 steps of REINFORCE."""
    config = embedded_corpus.get_config()
    config.workdir = "runs/embedded_corpus_small"
    _, opening, thoughts = config.phases
    opening.batch_size = thoughts.batch_size = 8
    thoughts.steps = 50
    return config
