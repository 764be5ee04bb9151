"""Pre-trains a small decoder on the embedded corpus, then trains it to think. No download; minutes on two cores."""

import ml_collections

from quietstar_jax.configs import embedded_corpus


def get_config() -> ml_collections.ConfigDict:
    """`configs/embedded_corpus.py` with half the text, and with fewer thoughts in training, which weigh less."""
    config = embedded_corpus.get_config()
    config.workdir = "runs/quickstart"
    config.thought.positions = "random"
    config.thought.position_fraction = 0.25
    config.optimizer.b2 = 0.99
    pretrain, opening, thoughts = config.phases
    pretrain.batch_size = 32
    opening.num_thoughts = 2
    thoughts.policy_weight = 30.0
    return config
