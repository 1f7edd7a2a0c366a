"""What Forebay tells an operator when something cannot be done."""


class ForebayError(Exception):
    """A request that cannot be met. The text is one line: what is wrong and what to do about it."""


class InUseError(ForebayError):
    """An image that somebody else has: it may be free later. `holder` says who that is, for programs."""

    def __init__(self, text: str, holder: dict[str, object]) -> None:
        super().__init__(text)
        self.holder = holder


class ConfigError(ForebayError):
    """A configuration that was refused. The text has one line for each fault.

    `faults` holds the lines on their own.
    """

    def __init__(self, faults: list[str]) -> None:
        super().__init__("\n".join(faults))
        self.faults = faults
