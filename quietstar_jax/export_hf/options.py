"""What an export contains: the settings of `quietstar_jax.export`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from quietstar_jax.errors import ConfigError
from quietstar_jax.methods.thinking import parse_policy

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
            if self.format != "quietstar":
                raise ConfigError(
                    f"think is {self.think!r}, but `format` is {self.format}, which has no thoughts. Omit it."
                )
