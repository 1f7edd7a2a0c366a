# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""How much one export gets beside others, where there is not enough for all."""

from array import array

LEAST, MOST, USUAL = 1, 10_000, 100


class Weight:
    """Of one export, whatever connections it has. Of two that both have requests waiting, one with twice the weight has
    twice as many carried out.
    """

    def __init__(self, value: int = USUAL) -> None:
        self.turns = array("d", (0.0, 0.0, 0.0))
        """For the compiled core (`Wait.has_quota`): the weight; what the export may use up in the round that is under
        way, and was not used in those before; and the number of the round in which it last got something.
        """
        self.value = value

    @property
    def value(self) -> int:
        """From LEAST to MOST."""
        return int(self.turns[0])

    @value.setter
    def value(self, value: int) -> None:
        if not LEAST <= value <= MOST:
            raise ValueError(f"{value} is no weight: {LEAST} to {MOST}")
        self.turns[0] = value
