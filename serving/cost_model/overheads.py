"""What the continuous engine spends beside the passes that the cost model knows. Free of torch."""

from dataclasses import asdict, dataclass, fields
from typing import Any

from serving.cost_model.model import Profile

SMALLEST_CLASS = 64  # tokens of the smallest length class


def length_class(tokens: int) -> int:
    """The smallest length class that holds so many tokens, as serving.engines.arena has them."""
    return max(SMALLEST_CLASS, 1 << (tokens - 1).bit_length())


@dataclass(frozen=True)
class EngineOverheads:
    """Seconds, each at least 0; serving.engines.overheads measures them.

    Attributes:
        class_s: of a pass, for each length class with decoding rows after the first: its attention
            is a call of its own in every layer.
        move_s, move_token_s: of a row that moves to a larger class, and for each of its tokens.
        step_s: of an engine's step, however many passes it has: an arrival, an end or a full
            reservation interrupts the passes, and the scheduler plans.
        admit_s: of an admission, beside its prompt's tokens.
    Raises:
        ValueError: one is not a number of at least 0.
    """

    class_s: float = 0.0
    move_s: float = 0.0
    move_token_s: float = 0.0
    step_s: float = 0.0
    admit_s: float = 0.0

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            is_number = isinstance(value, int | float) and not isinstance(value, bool)
            if not is_number or not 0 <= value < float("inf"):
                raise ValueError(
                    f"overheads: {field.name} must be a number of at least 0, got {value!r}"
                )

    @classmethod
    def of(cls, profile: Profile) -> "EngineOverheads | None":
        """Those measured with a profile; None where it has none."""
        values = profile.made.get("overheads")
        if values is None:
            return None
        try:
            return cls(**values)
        except TypeError as error:
            raise ValueError(f"profile {profile.name!r}: overheads: {error}") from None

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)
