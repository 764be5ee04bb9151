"""What an export contains: the settings of `quietstar_jax.export`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quietstar_jax.errors import ConfigError
from quietstar_jax.methods.thinking import parse_policy
from quietstar_jax.thought_config import MOST_REACH

FORMATS = ("quietstar", "base", "adapter")
DTYPES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}


@dataclass(frozen=True)
class ExportOptions:
    """Format, dtype and shard size of an export, and what it recommends and shows."""

    format: str = "quietstar"  # quietstar | base | adapter
    dtype: str = "float32"  # float32 | bfloat16 | float16
    max_shard_size: str = "5GB"
    think: str = ""  # policy of thinking that generation_config.json recommends; empty = that of the base model, if any
    picture: Path | None = None  # SVG or PNG that the model card shows
    reach: int = 0  # tokens for which generation_config.json recommends to use a thought; 0 = as for `think`

    def __post_init__(self) -> None:
        for name, value, choices in (("format", self.format, FORMATS), ("dtype", self.dtype, tuple(DTYPES))):
            if value not in choices:
                raise ConfigError(f"{name} is {value!r}; it must be one of {', '.join(choices)}.")
        if self.picture and not (self.picture.suffix in (".svg", ".png") and self.picture.is_file()):
            raise ConfigError(
                f"picture is {self.picture}; it must be a .svg or .png file, such as one that report --picture draws."
            )
        if self.think:
            parse_policy(self.think)
        if not 0 <= self.reach <= MOST_REACH:
            raise ConfigError(f"reach is {self.reach}; it must be within 1 .. {MOST_REACH}.")
        given: dict[str, Any] = {"think": self.think, "reach": self.reach}
        for name, value in given.items():
            if value and self.format != "quietstar":
                raise ConfigError(
                    f"{name} is {value!r}, but `format` is {self.format}, which has no thoughts. Omit it."
                )
