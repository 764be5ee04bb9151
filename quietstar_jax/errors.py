"""Errors that a user can mend. Command lines print their message and exit with status 2."""


class UserError(Exception):
    """Something outside the program is wrong; the message says what, where, and what to do."""


class ConfigError(UserError):
    """A setting is unknown, of the wrong type, or impossible."""


class DataError(UserError):
    """A text source or tokenizer is missing, broken or does not fit the model."""


class CheckpointError(UserError):
    """A checkpoint is missing, incomplete, or does not fit the configuration."""


class DivergedError(UserError):
    """The loss became NaN or infinite."""
