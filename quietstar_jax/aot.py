"""Command line: `python -m quietstar_jax.aot --config configs/mistral_7b_openwebmath.py --topology v5e:8x8`.

Compiles the real train step, or the decoder, for devices that need not be attached, and reports whether it fits in
memory, what the devices communicate and the shortest time it needs. Requires no weights, tokenizer or network. Exit
status 1: it does not fit.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from quietstar_jax.command_line import CommandParser, add_config_flags, add_flags, integer_from, parse_with_config
from quietstar_jax.config import Config, MeshConfig
from quietstar_jax.errors import ConfigError, run_command
from quietstar_jax.planning import PROGRAMS

if TYPE_CHECKING:
    from quietstar_jax.planning.targets import Target


def main(arguments: Sequence[str]) -> int:
    """Compiles the program and prints the plan; returns 1 if it does not fit."""
    parser = make_parser()
    args, config = parse_with_config(parser, arguments)
    from quietstar_jax.planning.plan import plan
    from quietstar_jax.planning.programs import planned_for
    from quietstar_jax.planning.search import search
    from quietstar_jax.planning.table import format_plan, format_search
    from quietstar_jax.planning.targets import compile_only, find_target

    compile_only()
    result: dict[str, Any]
    with parser.naming_flags():
        target = find_target(args.topology)
        config = planned_for(config, target)
        if args.search:
            plans = search(config, target, args.phase, tries=args.tries, log=lambda line: print(line, file=sys.stderr))
            fits, text = plans[0]["fits"], format_search(plans) + "\n\n" + format_plan(plans[0])
            result = {"plans": plans}
        else:
            result = plan(_suited(config, target, args.phase), target, args.program, args.phase)
            fits, text = result["fits"], format_plan(result)
    print(json.dumps(result) if args.json else text)
    return 0 if fits else 1


def make_parser() -> CommandParser:
    """Returns the parser of this command."""
    parser = CommandParser(
        "aot",
        "--config configs/mistral_7b_openwebmath.py --topology v5e:8x8 --search --tries 1",
    )  # fmt: skip
    add = parser.add_argument
    add("--topology", required=True, metavar="NAME", help="v5e:4x4, v5p:2x2x4*2 (two slices), gpu:h100x8, cpu:8 ...")
    add_config_flags(parser)
    add("--program", choices=PROGRAMS, default="train", help="program to compile (default: %(default)s)")
    add("--phase", default="", metavar="NAME", help="phase whose step is compiled (default: the most expensive one)")
    add("--search", action="store_true", help="try mesh shapes and chunk sizes, and rank those that fit")
    add("--tries", type=integer_from(1), default=6, metavar="N", help="how many of them to compile (default: 6)")
    add_flags(parser, "--json")
    return parser


def _suited(config: Config, target: Target, phase: str) -> Config:
    """Returns the configuration; a default mesh that does not suit the target is replaced by the best guess."""
    from quietstar_jax.planning.programs import plan_mesh
    from quietstar_jax.planning.search import SIZES, candidates

    if config.mesh != MeshConfig():
        return config
    try:
        plan_mesh(config, target)
    except ConfigError:
        most = config.thought.chunk_megabytes
        configs = candidates(config, target, phase)[0].configs
        guess = next((guess for guess in configs if guess.thought.chunk_megabytes <= most), configs[-1])
        flags = [f"--config.mesh.{name}={getattr(guess.mesh, name)}" for name in (*SIZES, "dcn_data", "dcn_fsdp")]
        flags.append(f"--config.thought.chunk_megabytes={guess.thought.chunk_megabytes}")
        print(f"The default mesh does not suit {target.name}. The plan is for {' '.join(flags)}", file=sys.stderr)
        return guess
    return config


if __name__ == "__main__":
    run_command(lambda: main(sys.argv[1:]))
