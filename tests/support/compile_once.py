"""One compilation of each program in a test process: many tests train the same tiny model again.

A program that is lowered again to the same text, for the same devices and with the same options, gets the executable
that was made for it before. What is traced and lowered, and what is computed, stays as it is.
"""

from __future__ import annotations

import collections
import hashlib
from typing import Any

from jax._src import compiler

MOST = 64  # programs that are kept
compile_each = getattr(compiler, "backend_compile_and_load", None)  # JAX's own function


def install() -> None:
    """Changes the compiler of this process, if this JAX has the function that is meant."""
    compile_one = compile_each
    if compile_one is None:
        return
    kept: collections.OrderedDict[bytes, Any] = collections.OrderedDict()

    def compile_once(backend: Any, module: Any, devices: Any, options: Any, host_callbacks: Any) -> Any:
        if host_callbacks:
            return compile_one(backend, module, devices, options, host_callbacks)
        text = module.operation.get_asm(binary=False, enable_debug_info=False).encode()
        named = f"{id(backend)} {devices}".encode()
        key = hashlib.sha256(b"\0".join((named, options.SerializeAsString(), text))).digest()
        if key not in kept:
            kept[key] = compile_one(backend, module, devices, options, host_callbacks)
            if len(kept) > MOST:
                kept.popitem(last=False)
        kept.move_to_end(key)
        return kept[key]

    compiler.backend_compile_and_load = compile_once
