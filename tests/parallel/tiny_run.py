"""A configuration file for runs of several processes: seconds of work, every kind of phase."""

from pathlib import Path

import ml_collections

from tests.training.tiny import tiny_config_dict


def get_config() -> ml_collections.ConfigDict:
    config = tiny_config_dict(Path("must/be/set"))
    config.distributed.update(start_seconds=120, heartbeat_seconds=20)
    return config
