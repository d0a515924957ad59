"""A tolerant reader of the JSON-like values that language models write.

It takes what `json` refuses and a reader still understands: single quotes, unescaped quotes inside a string
('the dog's collar'), trailing commas, Python's True/False/None, and anything behind the value. It runs nothing, its
depth and the length of a number are bounded, and its time is linear in the text.
"""

from __future__ import annotations

import re

MAX_DEPTH = 8
MAX_NUMBER = 40  # characters

_SPACE = re.compile(r"\s*+")
_NUMBER = re.compile(r"[+-]?(?:\d++(?:\.\d*+)?|\.\d++)(?:[eE][+-]?\d++)?", re.ASCII)
_WORD = re.compile(r"true|True|false|False|null|None")
_WORDS = {"true": True, "True": True, "false": False, "False": False, "null": None, "None": None}
_PLAIN = {'"': re.compile(r'[^"\\]*+'), "'": re.compile(r"[^'\\]*+")}
# A quote ends its string only where a value may end, so that an apostrophe inside a word does not.
_AFTER_STRING = re.compile(r"\s*+(?:[,:\]}]|\Z)")
_UNICODE_ESCAPE = re.compile(r"u([0-9a-fA-F]{4})")
_ESCAPES = {"n": "\n", "t": "\t", "r": "\r", "b": "\b", "f": "\f", "\n": ""}


def read_value(text: str, start: int = 0) -> object:
    """The value that begins at text[start]: dict, list, str, int, float, bool or None. ValueError if there is none."""
    return _value(text, _skip(text, start), 0)[0]


def _value(text: str, i: int, depth: int) -> tuple[object, int]:
    if depth > MAX_DEPTH:
        raise ValueError("nested too deeply")
    opening = text[i : i + 1]
    if opening == "[":
        return _list(text, i + 1, depth)
    if opening == "{":
        return _dict(text, i + 1, depth)
    if opening and opening in _PLAIN:
        return _string(text, i)
    if word := _WORD.match(text, i):
        return _WORDS[word.group()], word.end()
    if (number := _NUMBER.match(text, i)) and len(number.group()) <= MAX_NUMBER:
        digits = number.group()
        return (int(digits) if digits.lstrip("+-").isdecimal() else float(digits)), number.end()
    raise ValueError("no value here")


def _list(text: str, i: int, depth: int) -> tuple[list, int]:
    items = []
    while (i := _skip(text, i)) < len(text) and text[i] != "]":
        item, i = _value(text, i, depth + 1)
        items.append(item)
        i = _separator(text, i, "]")
    return items, _closed(text, i)


def _dict(text: str, i: int, depth: int) -> tuple[dict, int]:
    items = {}
    while (i := _skip(text, i)) < len(text) and text[i] != "}":
        if text[i] not in _PLAIN:
            raise ValueError("a key must be a string")
        key, i = _string(text, i)
        i = _skip(text, i)
        if text[i : i + 1] != ":":
            raise ValueError("no colon behind a key")
        items[key], i = _value(text, _skip(text, i + 1), depth + 1)
        i = _separator(text, i, "}")
    return items, _closed(text, i)


def _string(text: str, i: int) -> tuple[str, int]:
    quote, parts = text[i], []
    i += 1
    while True:
        run = _PLAIN[quote].match(text, i)
        parts.append(run.group())
        i = run.end()
        if i >= len(text):
            raise ValueError("a string without an end")
        if text[i] == "\\":
            if code := _UNICODE_ESCAPE.match(text, i + 1):
                parts.append(chr(int(code[1], 16)))
                i = code.end()
            else:
                parts.append(_ESCAPES.get(text[i + 1 : i + 2], text[i + 1 : i + 2]))
                i += 2
        elif _AFTER_STRING.match(text, i + 1):
            return "".join(parts), i + 1
        else:
            parts.append(quote)
            i += 1


def _separator(text: str, i: int, closing: str) -> int:
    i = _skip(text, i)
    if text[i : i + 1] == ",":
        return i + 1
    if text[i : i + 1] == closing:
        return i
    raise ValueError("no comma between two values")


def _closed(text: str, i: int) -> int:
    if i >= len(text):
        raise ValueError("a bracket without an end")
    return i + 1


def _skip(text: str, i: int) -> int:
    return _SPACE.match(text, i).end()
