"""Command line: `python -m quietstar_jax.aot --config configs/mistral_7b_openwebmath.py --topology v5e:8x8`.

Compiles the real train step, or the decoder, for devices that need not be here, and says whether it fits, what it sends
and how long it takes at best. Needs neither weights nor tokenizer nor network. Status 1: it does not fit.
"""

from __future__ import annotations

import json
import sys
from typing import Any

from absl import app, flags

from quietstar_jax.config import Config, MeshConfig
from quietstar_jax.errors import ConfigError, run_command
from quietstar_jax.planning.plan import PROGRAMS, plan
from quietstar_jax.planning.programs import plan_mesh, planned_for
from quietstar_jax.planning.search import SIZES, candidates, search
from quietstar_jax.planning.table import format_plan, format_search
from quietstar_jax.planning.targets import Target, compile_only, find_target
from quietstar_jax.train import given_config, parse

_TOPOLOGY = flags.DEFINE_string(
    "topology", None, "v5e:4x4, v5p:2x2x4*2 (two slices), gpu:h100x8, cpu:8 ...", required=True
)
_PROGRAM = flags.DEFINE_enum("program", "train", list(PROGRAMS), "What to compile.")
_PHASE = flags.DEFINE_string("phase", "", "Whose step; the one that costs most unless told otherwise.")
_SEARCH = flags.DEFINE_bool("search", False, "Try mesh shapes and chunk sizes, and rank those that fit.")
_TRIES = flags.DEFINE_integer("tries", 6, "How many of them to compile.", lower_bound=1)
_JSON = flags.DEFINE_bool("json", False, "One JSON object on the last line instead of a table.")


def main(argv: list[str]) -> int:
    """Compiles, then prints the plan."""
    if len(argv) > 1:
        raise app.UsageError(f"Unknown arguments: {' '.join(argv[1:])}. Settings are given as --config.NAME=VALUE.")
    compile_only()
    target = find_target(_TOPOLOGY.value)
    config = planned_for(given_config(), target)
    result: dict[str, Any]
    if _SEARCH.value:
        plans = search(config, target, _PHASE.value, tries=_TRIES.value, say=lambda line: print(line, file=sys.stderr))
        fits, text = plans[0]["fits"], format_search(plans) + "\n\n" + format_plan(plans[0])
        result = {"plans": plans}
    else:
        result = plan(_suited(config, target), target, _PROGRAM.value, _PHASE.value)
        fits, text = result["fits"], format_plan(result)
    print(json.dumps(result) if _JSON.value else text)
    return 0 if fits else 1


def _suited(config: Config, target: Target) -> Config:
    """The configuration; where it says nothing of the mesh and the default does not suit, with the best guess."""
    if config.mesh != MeshConfig():
        return config
    try:
        plan_mesh(config, target)
    except ConfigError:
        most = config.thought.chunk_megabytes
        configs = candidates(config, target, _PHASE.value)[0].configs
        guess = next((guess for guess in configs if guess.thought.chunk_megabytes <= most), configs[-1])
        said = [f"--config.mesh.{name}={getattr(guess.mesh, name)}" for name in (*SIZES, "dcn_data", "dcn_fsdp")]
        said.append(f"--config.thought.chunk_megabytes={guess.thought.chunk_megabytes}")
        print(f"The default mesh does not suit {target.name}. This is for {' '.join(said)}", file=sys.stderr)
        return guess
    return config


if __name__ == "__main__":
    run_command(lambda: app.run(main, flags_parser=parse))
