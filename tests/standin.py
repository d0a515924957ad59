"""Stand-ins for commands on PATH: they record their calls and answer, or fail, as a test asks."""

from __future__ import annotations

import json
import os
import stat
import sys
from pathlib import Path

PROGRAM = """#!{python} -SE
import json, os, sys
folder, name = {folder!r}, os.path.basename(sys.argv[0])
stdin = sys.stdin.read() if sys.argv[-1] == "--filename=-" else ""
words = " ".join([name, *sys.argv[1:]])
with open(folder + "/calls.jsonl", "a") as calls:
    calls.write(json.dumps([name, sys.argv[1:], stdin]) + "\\n")
with open(folder + "/replies.json") as file:
    replies = json.load(file)
for number, (part, answers) in enumerate(replies):
    if all(piece in words for piece in part.split("...")):
        counter = folder + "/counter" + str(number)
        turn = os.path.getsize(counter) if os.path.exists(counter) else 0
        open(counter, "a").write("x")
        answer = answers[min(turn, len(answers) - 1)]
        if isinstance(answer, int):
            print(name + ": failed as asked", file=sys.stderr)
            sys.exit(answer)
        print(answer)
        break
"""


class StandIns:
    """A folder to put first on PATH."""

    def __init__(self, folder: Path, *names: str):
        self.folder = folder
        folder.mkdir()
        for name in names:
            self.script(name, PROGRAM.format(python=sys.executable, folder=str(folder)))
        self.reply()

    def script(self, name: str, text: str) -> None:
        path = self.folder / name
        path.write_text(text)
        path.chmod(path.stat().st_mode | stat.S_IXUSR)

    def reply(self, *replies: tuple[str, list[str | int]]) -> None:
        """(what a call must contain, with ... between parts; the answers in turn, the last one for good) each. A number
        is an exit code. Calls that match nothing succeed in silence; the first match counts."""
        for counter in self.folder.glob("counter*"):
            counter.unlink()
        (self.folder / "replies.json").write_text(json.dumps(replies))

    def calls(self) -> list[list[str]]:
        """Name and arguments of every call so far."""
        return [[name, *arguments] for name, arguments, _ in self._records()]

    def stdin(self, name: str) -> list[str]:
        """What was fed into each call of a command that read its standard input."""
        return [text for called, _, text in self._records() if called == name and text]

    def path(self) -> str:
        return f"{self.folder}{os.pathsep}{os.environ['PATH']}"

    def _records(self) -> list:
        path = self.folder / "calls.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
