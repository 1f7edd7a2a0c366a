# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""Bencoding (BEP 3): how a torrent is written. What is read is foreign, so depth and number of its values are bounded.

Texts are bytes here; the keys of a dictionary stand in the order of their bytes.
"""

from typing import Any

DEEPEST = 8
"""Lists and dictionaries within each other. A torrent of one file has five."""

MOST_VALUES = 256
"""Values in all. A torrent of one file has about 20; the hashes of all its pieces are one."""

LONGEST_NUMBER = 20
"""Characters of a number."""

END = b"e"


def encoded(value: Any) -> bytes:
    """The bytes of an int, of bytes, or of a list or dictionary of these."""
    match value:
        case int():
            return b"i%de" % value
        case bytes():
            return b"%d:%b" % (len(value), value)
        case list():
            return b"l" + b"".join(map(encoded, value)) + END
        case dict():
            pairs = sorted(value.items())
            return b"d" + b"".join(encoded(key) + encoded(one) for key, one in pairs) + END
    raise TypeError(f"{type(value).__name__} cannot be bencoded")


def decoded(data: bytes) -> Any:
    """The value that is all of these bytes. Raises ValueError."""
    reader = _Reader(data)
    value = reader.value(0)
    if reader.at != len(data):
        raise ValueError("something stands behind its end")
    return value


class _Reader:
    def __init__(self, data: bytes) -> None:
        self._data = data
        self._values = 0
        self.at = 0
        """The offset of what is read next."""

    def value(self, depth: int) -> Any:
        """The value that begins here."""
        self._values += 1
        if depth > DEEPEST or self._values > MOST_VALUES:
            raise ValueError("it holds more than a torrent of one file does")
        match self._data[self.at : self.at + 1]:
            case b"i":
                self.at += 1
                return self._number(END)
            case b"l":
                return self._list(depth)
            case b"d":
                return self._dictionary(depth)
        return self._text()

    def _is_end(self) -> bool:
        if self._data[self.at : self.at + 1] != END:
            return False
        self.at += 1
        return True

    def _list(self, depth: int) -> list[Any]:
        self.at += 1
        found = []
        while not self._is_end():
            found.append(self.value(depth + 1))
        return found

    def _dictionary(self, depth: int) -> dict[bytes, Any]:
        self.at += 1
        found: dict[bytes, Any] = {}
        last: bytes | None = None
        while not self._is_end():
            key = self._text()
            if last is not None and key <= last:
                raise ValueError("its keys are not in order")
            found[key] = self.value(depth + 1)
            last = key
        return found

    def _text(self) -> bytes:
        length = self._number(b":")
        if not 0 <= length <= len(self._data) - self.at:
            raise ValueError("it is cut off")
        self.at += length
        return self._data[self.at - length : self.at]

    def _number(self, end: bytes) -> int:
        stop = self._data.find(end, self.at, self.at + LONGEST_NUMBER + 1)
        digits = self._data[self.at : stop] if stop >= 0 else b""
        plain = digits.removeprefix(b"-")
        if not plain.isdigit() or (plain[:1] == b"0" and digits != b"0"):
            raise ValueError("a number is expected, or it is cut off")
        self.at = stop + 1
        return int(digits)
