"""What a measurement is asked to do: the settings of `quietstar_jax.evaluate`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

from quietstar_jax.config import ComputeDtype, PrefixAttention
from quietstar_jax.data_config import TextDocuments
from quietstar_jax.errors import ConfigError
from quietstar_jax.evals.tasks import DIRECT, SPANS, TASKS, TEXT, VOTING, find_task
from quietstar_jax.methods.thinking import NEVER, ThinkPolicy, choose_policy
from quietstar_jax.settings import Choices, is_pattern, one_of
from quietstar_jax.thought_config import CONTROLS, Perturbation

if TYPE_CHECKING:
    from quietstar_jax.inference.load_model import LoadedModel

REPLACEMENTS = tuple(name for name in CONTROLS if name != "none")
REPLACEMENT = Annotated[str, Choices(dict.fromkeys(REPLACEMENTS))]
MODES = ("auto", "on", "off", "both")


@dataclass(frozen=True)
class Options:
    """What to measure; the fields are those of the command line (see `evaluate.py`), 0 = the default given there."""

    checkpoint: str
    task: str
    data: str
    thoughts: str = "auto"
    think: str | None = None
    step: int | None = None
    revision: str = ""
    dtype: ComputeDtype = "float32"
    prefix_attention: PrefixAttention = "auto"
    thought_length: int = 0
    batch_size: int = 16
    limit: int = 0
    max_length: int = 0
    seed: int = 0
    fields: tuple[str, ...] = ()
    answer_key: str = "auto"
    text_key: str = "text"
    text_documents: TextDocuments = "file"
    window: int = 0
    context: int = 0
    top: int = 10
    perturb: str = ""
    control: str = ""
    exclude: str = ""
    reach: int = 0  # tokens for which a thought is used; 0 = as the model says
    think_front: bool = False
    samples: int = 0
    temperature: float = 0.7
    max_tokens: int = 384
    records: str = ""
    against: str = ""
    quiet: bool = False

    def check(self) -> None:
        """Raises ConfigError for impossible values, before anything is loaded."""
        from quietstar_jax.inference.sampling import TEMPERATURES, is_temperature

        find_task(self.task)
        if self.thoughts not in MODES:
            raise ConfigError(f"thoughts is {self.thoughts!r}; it must be one of {', '.join(MODES)}.")
        policy = policy_of(self.thoughts, self.think)
        positive = ("batch_size", "max_tokens")
        from_zero = "reach", "samples", "thought_length", "limit", "max_length", "seed", "window", "context", "top"
        for name in (*positive, *from_zero):
            if getattr(self, name) < (name in positive):
                raise ConfigError(f"{name} is {getattr(self, name)}; it must be {int(name in positive)} or more.")
        if not is_temperature(self.temperature):
            raise ConfigError(f"temperature is {self.temperature}; it must be {TEMPERATURES}.")
        if self.perturb:
            if problems := one_of("perturb", self.perturb, Perturbation):
                raise ConfigError(f"{problems[0]}.")
            if find_task(self.task).kind != TEXT:
                raise ConfigError(
                    f"perturb is {self.perturb!r}, but `task` is {self.task}; it must be language_modeling."
                )
        if self.control:
            if problems := one_of("control", self.control, REPLACEMENT):
                raise ConfigError(f"{problems[0]}.")
            if find_task(self.task).kind == VOTING:
                raise ConfigError(f"control is {self.control!r}, but `task` is {self.task}, which generates text.")
        if self.exclude:
            if not is_pattern(self.exclude):
                raise ConfigError(f"exclude is {self.exclude!r}; it must be a regular expression.")
            if find_task(self.task).kind != SPANS:
                raise ConfigError(f"exclude is {self.exclude!r}, but `task` is {self.task}; it must be spans.")
        if self.against and find_task(self.task).kind != SPANS:
            raise ConfigError(f"against is {self.against!r}, but `task` is {self.task}; it must be spans.")
        if self.think_front:
            others = {"think": self.think, "samples": self.samples, "reach": self.reach if self.reach > 1 else 0}
            for name, value in others.items():
                if value:
                    raise ConfigError(
                        f"{name} is {value!r}, but `think_front` compares all policies, with one greedy thought at "
                        f"every position, used for one token. Omit one of them."
                    )
            if find_task(self.task).kind not in (DIRECT, TEXT):
                tasks = ", ".join(name for name, task in TASKS.items() if task.kind in (DIRECT, TEXT))
                raise ConfigError(
                    f"think_front is set, but `task` is {self.task}; it must be one of {tasks}. Measure single "
                    "policies with `think`."
                )
        for name, value in self._of_thoughts().items():
            if policy == NEVER:
                off = f"`think` is {self.think}" if self.think else "`thoughts` is off"
                raise ConfigError(
                    f"{name} is {value!r}, but {off}, so there are no thoughts. Set `thoughts` to on or both, or omit "
                    f"`{name}`."
                )

    def _of_thoughts(self) -> dict[str, Any]:
        """The given options that need thoughts, by name."""
        samples = self.samples if find_task(self.task).kind == TEXT else 0
        options = {
            "perturb": self.perturb,
            "control": self.control,
            "reach": self.reach if self.reach > 1 else 0,
            "samples": samples,
            "think_front": self.think_front,
        }
        return {name: value for name, value in options.items() if value}

    def check_thoughts(self, model: LoadedModel, modes: tuple[str, ...]) -> None:
        """Raises ConfigError if an option needs thoughts, and the measurement has none."""
        for name, value in self._of_thoughts().items():
            if "with_thoughts" not in modes:
                why = "thinks only with `think`" if model.can_think else "cannot think (its thoughts have 0 tokens)"
                raise ConfigError(
                    f"{name} is {value!r}, but {model.path} {why}. Give a run or an export that was trained with "
                    f"thoughts, or omit `{name}`."
                )


def policy_of(thoughts: str, think: str | None, default: str = "always") -> ThinkPolicy:
    """Returns the policy of thinking that `thoughts`, one of `MODES`, and `think` (None = `default`) select."""
    return choose_policy({"on": True, "both": True, "off": False}.get(thoughts), think, default)
