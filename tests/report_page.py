"""A report as a tree of its elements."""

from __future__ import annotations

import re
from html.parser import HTMLParser

import numpy as np

from revseg_jax.report import write_report

VOID = {"meta", "br", "img", "link", "input", "hr", "base"}


class Node:
    def __init__(self, tag: str, attributes: dict[str, str | None]):
        self.tag, self.attributes, self.children = tag, attributes, []

    @property
    def text(self) -> str:
        return "".join(child if isinstance(child, str) else child.text for child in self.children)

    def all(self, tag: str | None = None, name: str | None = None) -> list[Node]:
        """Descendants with this tag and this class."""
        found = []
        for child in self.children:
            if isinstance(child, Node):
                if tag in (None, child.tag) and (name is None or name in (child.attributes.get("class") or "").split()):
                    found.append(child)
                found += child.all(tag, name)
        return found


class Page(HTMLParser):
    """A tree of the page; fails on elements that are not closed."""

    def __init__(self, text: str):
        super().__init__()
        self.root = Node("", {})
        self.open = [self.root]
        self.feed(text)
        assert self.open == [self.root]

    def handle_starttag(self, tag, attrs):
        self.handle_startendtag(tag, attrs)
        if tag not in VOID:
            self.open.append(self.open[-1].children[-1])

    def handle_startendtag(self, tag, attrs):
        self.open[-1].children.append(Node(tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop().tag == tag

    def handle_data(self, data):
        self.open[-1].children.append(data)


def read(folder) -> Node:
    return Page(write_report(folder).read_text(encoding="utf-8")).root


def filled(path: str, height: int, width: int) -> np.ndarray:
    """The even-odd filling of a path of M, h, v and z: a pixel is inside when an odd number of edges is left of it."""
    crossings = np.zeros((height, width + 1), int)
    for loop in path.split("M")[1:]:
        x, y = first = tuple(map(int, re.match(r"(\d+) (\d+)", loop).groups()))
        moves = [(command, int(length)) for command, length in re.findall(r"([hv])(-?\d+)", loop)]
        assert loop.endswith("z")
        for command, length in moves:
            if command == "v":
                crossings[min(y, y + length) : max(y, y + length), x] += 1
            x, y = (x + length, y) if command == "h" else (x, y + length)
        if x == first[0]:  # z goes straight back
            crossings[min(y, first[1]) : max(y, first[1]), x] += 1
        assert x == first[0] or y == first[1]
    return np.cumsum(crossings, axis=1)[:, :width] % 2 == 1
