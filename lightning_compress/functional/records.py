"""The bytes of small records: numbers, texts and lists of names, read back without trust.

Numbers are little-endian base 128: seven bits a byte, the highest bit set in all but the last. A name is written with
its numbers as differences: names of layers count up, so that many become the same text.
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Iterable
from typing import Any

MAX_TEXT = 64 << 20  # bytes of a JSON text
MAX_DEPTH = 32
MAX_MARKS = 1 << 22  # commas, quotes and opening brackets: they bound what parsing allocates
_LONGEST = 10  # bytes of a number
_STEPS = 6  # a number that is up to so much above the one before becomes one control character
_ESCAPE = "\x08"
_PIECES = re.compile(r"([0-9]+)")


def uint(value: int) -> bytes:
    r"""A number >= 0.

    Args:
        value: 0 to 2^70 - 1.

    Returns:
        One byte for each seven bits.

    Raises:
        ValueError: it is larger.

    Examples:
        >>> uint(5), uint(300)
        (b'\x05', b'\xac\x02')
    """
    if value >> 7 * _LONGEST:
        raise ValueError(f"{value} takes more than {_LONGEST} bytes")
    digits = bytearray()
    while value > 127:
        digits.append(value & 127 | 128)
        value >>= 7
    return bytes([*digits, value])


def sint(value: int) -> bytes:
    """A number of any sign: 0, -1, 1, -2, ... as 0, 1, 2, 3, ...

    Args:
        value: -2^69 to 2^69 - 1.

    Returns:
        As ``uint``.
    """
    return uint(2 * value if value >= 0 else -2 * value - 1)


def text(value: str) -> bytes:
    """A text in UTF-8, with its length.

    Args:
        value: any text.

    Returns:
        Length and text.
    """
    data = value.encode()
    return uint(len(data)) + data


def names(values: Iterable[str]) -> bytes:
    r"""A list of names.

    Every whole number in a name that is 0 to 5 more than the last one at its place (after the same text; 0 at first)
    becomes one of the characters 1 to 6; a control character of the name gets the character 8 in front.

    Args:
        values: names without the character 0.

    Returns:
        Length and text, each name followed by the character 0.

    Raises:
        ValueError: a name with the character 0.

    Examples:
        >>> names(["conv1.weight", "conv1.bias", "conv2.weight"])
        b'%conv\x02.weight\x00conv\x01.bias\x00conv\x02.weight\x00'
    """
    last: dict[str, int] = {}
    out = []
    for name in values:
        if "\0" in name:
            raise ValueError(f"the name {name!r} holds the character 0")
        before = ""
        for piece in _PIECES.split(name):
            if _counts(piece):
                number = int(piece)
                step = number - last.get(before, 0)
                out.append(chr(1 + step) if 0 <= step < _STEPS else piece)
                last[before] = number
            else:
                out.append(re.sub(r"[\x01-\x08]", lambda m: _ESCAPE + m[0], piece))
            before += piece
        out.append("\0")
    return text("".join(out))


class Cursor:
    """Reads what the functions above wrote; ValueError wherever that is not possible.

    Args:
        data: untrusted bytes.

    Examples:
        >>> cursor = Cursor(uint(300) + text("fc") + names(["a1", "a2"]))
        >>> cursor.uint(), cursor.text(), cursor.names(), cursor.left
        (300, 'fc', ['a1', 'a2'], 0)
    """

    def __init__(self, data: bytes) -> None:
        self._data, self._at = data, 0

    @property
    def left(self) -> int:
        """Bytes not read yet."""
        return len(self._data) - self._at

    def take(self, length: int) -> bytes:
        """The next so many bytes."""
        if length > self.left:
            raise ValueError(f"the header ends {length - self.left} bytes too early")
        self._at += length
        return self._data[self._at - length : self._at]

    def uint(self) -> int:
        """Inverse of ``uint``."""
        if self._at < len(self._data) and self._data[self._at] < 128:  # most are short
            self._at += 1
            return self._data[self._at - 1]
        value = 0
        for place in range(_LONGEST):
            (digit,) = self.take(1)
            value |= (digit & 127) << 7 * place
            if digit < 128:
                return value
        raise ValueError(f"the header holds a number of more than {_LONGEST} bytes")

    def sint(self) -> int:
        """Inverse of ``sint``."""
        value = self.uint()
        return -(value >> 1) - 1 if value & 1 else value >> 1

    def text(self) -> str:
        """Inverse of ``text``."""
        return self.take(self.uint()).decode()

    def json(self, empty: Any = None) -> Any:
        """A JSON value from a text; an empty text is this one."""
        data = self.take(self.uint())
        return parse(data) if data else empty

    def names(self) -> list[str]:
        """Inverse of ``names``."""
        coded = self.text()
        found: list[str] = []
        last: dict[str, int] = {}
        for entry in coded.split("\0")[:-1]:
            found.append(_name(entry, last))
        if coded and not coded.endswith("\0"):
            raise ValueError("the list of names is cut off")
        return found


def _name(entry: str, last: dict[str, int]) -> str:
    before = ""
    for piece in re.split(r"([0-9]+|\x08.|[\x01-\x06])", entry, flags=re.DOTALL):
        if len(piece) == 1 and "\x01" <= piece <= "\x06":
            last[before] = last.get(before, 0) + ord(piece) - 1
            before += str(last[before])
            continue
        if _counts(piece):
            last[before] = int(piece)
        before += piece.removeprefix(_ESCAPE)
    return before


def _counts(piece: str) -> bool:
    """Whether a piece of a name is a whole number that comes back as it was written."""
    return re.fullmatch(r"0|[1-9][0-9]{0,8}", piece) is not None


def dump(value: Any) -> str:
    """JSON in its shortest form.

    Args:
        value: what JSON can say.

    Returns:
        One line, keys sorted.

    Raises:
        ValueError: NaN or infinity, or more than a reader takes.
        TypeError: no JSON value.

    Examples:
        >>> dump({"b": [1, None], "a": "ü"})
        '{"a":"ü","b":[1,null]}'
    """
    options: dict[str, Any] = {"sort_keys": True, "separators": (",", ":"), "ensure_ascii": False}
    written = json.dumps(value, allow_nan=False, **options)
    _check(written.encode())
    return written


def parse(data: bytes) -> Any:
    """JSON from untrusted bytes.

    Args:
        data: UTF-8.

    Returns:
        The value.

    Raises:
        ValueError: no JSON; too long, too deep or too many values; NaN or infinity.

    Examples:
        >>> parse(b'[1, {"a": null}]')
        [1, {'a': None}]
    """
    _check(data)
    return json.loads(data.decode("utf-8"), parse_constant=_no_constant)


def _check(data: bytes) -> None:
    """Bounds on what parsing may cost: size, number of values, depth."""
    marks = sum(map(data.count, (b",", b'"', b"[", b"{")))
    if len(data) > MAX_TEXT or marks > MAX_MARKS:
        raise ValueError(f"a text of {len(data)} bytes, {marks} marks; allowed are {MAX_TEXT}, {MAX_MARKS}")
    bare = re.sub(rb'"(?:[^"\\]++|\\.)*+"', b"", data, flags=re.DOTALL)  # brackets in strings do not count
    steps = (1 if bracket in b"[{" else -1 for bracket in re.findall(rb"[][{}]", bare))
    depth = max(itertools.accumulate(steps), default=0)
    if depth > MAX_DEPTH:
        raise ValueError(f"the header nests {depth} deep; allowed are {MAX_DEPTH}")


def _no_constant(name: str) -> None:
    raise ValueError(f"the header holds {name}, which is no JSON")
