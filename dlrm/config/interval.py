"""How often something is done, as a user says it. No torch here."""

import re

from dlrm.errors import ConfigError

_FORM = re.compile(r"[1-9]\d{0,14}|(?=.*[1-9])\d{1,9}(\.\d+)?m|never")


class Interval(str):
    """500 (training steps), 30m (minutes) or never. It is the text that the user gave, and so config.json has it.

    Raises:
        ConfigError: if the text is none of these.
    """

    def __new__(cls, text: str) -> "Interval":  # noqa: PYI034 - typing.Self is of Python 3.11
        if not _FORM.fullmatch(text):
            raise ConfigError(
                f"--checkpoint_every {text[:40]}: expected steps, as in 500, minutes, as in 30m, or never"
            )
        return super().__new__(cls, text)

    @property
    def steps(self) -> int | None:
        """Training steps; None if it is not told in steps."""
        return int(self) if self.isdigit() else None

    @property
    def seconds(self) -> float | None:
        """Seconds; None if it is not told in minutes."""
        return 60 * float(self.removesuffix("m")) if self.endswith("m") else None

    @property
    def is_never(self) -> bool:
        """Whether it never happens."""
        return self == "never"
