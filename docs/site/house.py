"""The folders of ckptool as floors of a house, drawn from the list in CONTRIBUTING.md.

``python docs/site/house.py`` rewrites ``docs/images/house.svg``, which has a background of its own and follows the
reader's system to light or dark.
"""

from __future__ import annotations

import re
import textwrap
from html import escape
from pathlib import Path
from typing import NamedTuple

REPOSITORY = Path(__file__).resolve().parents[2]
PICTURE = REPOSITORY / "docs" / "images" / "house.svg"

ROOM = re.compile(r"  (\w+)/? +(\d+)  +(.*)")
INNER = re.compile(r"    (\w+)/  +(.*)")


class Room(NamedTuple):
    """A folder or a file of the package: its floor, the words behind it, and those of the folders in it."""

    name: str
    floor: int
    text: str
    inner: dict[str, str]

    @property
    def shown(self) -> str:
        """Returns its name; that of the package for its ``__init__``."""
        return "ckptool" if self.name == "__init__" else self.name

    @property
    def caption(self) -> str:
        """Returns the beginning of its text as a sentence has it."""
        said = re.split(r"[:;,.]", self.text, maxsplit=1)[0]
        return " ".join(word.lower() if word.isupper() else word for word in said.replace("->", "→").split())


def rooms(text: str) -> list[Room]:
    """Returns the rooms that the first block below the heading "The house" lists. Raises: ValueError."""
    block = text.partition("\n## The house\n")[2].split("\n```\n")[1]
    found: list[Room] = []
    for line in block.splitlines()[1:]:
        if room := ROOM.fullmatch(line):
            found.append(Room(room[1], int(room[2]), room[3], {}))
        elif inner := INNER.fullmatch(line):
            found[-1].inner[inner[1]] = inner[2]
        elif found[-1].inner:
            found[-1].inner[[*found[-1].inner][-1]] += f" {line.strip()}"
        else:
            found[-1] = found[-1]._replace(text=f"{found[-1].text} {line.strip()}")
    return found


def listed() -> list[Room]:
    """Returns the rooms of the list in CONTRIBUTING.md."""
    return rooms((REPOSITORY / "CONTRIBUTING.md").read_text())


# --- drawing ---------------------------------------------------------------------------------------------------------

WIDTH, LEFT, RIGHT, ROOF, FLOOR = 900, 70, 830, 104, 66
"""Pixels: the picture's width, the walls, the heights of the roof and of a floor."""

STYLE = """
svg { --back: #ffffff; --line: #8a94a6; --ink: #1d2433; --soft: #566075; --roof: #e9ecf5;
      --a: #eef4ee; --b: #fdf3e4; --c: #e8f1fb; --d: #f3ecfa; }
@media (prefers-color-scheme: dark) {
  svg { --back: #1b1f2a; --line: #5d6880; --ink: #e8ebf2; --soft: #a9b2c5; --roof: #2a3042;
        --a: #22302a; --b: #362d20; --c: #203046; --d: #30283f; }
}
text { font-family: system-ui, -apple-system, "Segoe UI", Roboto, "DejaVu Sans", sans-serif; fill: var(--ink); }
.name { font: 600 15px ui-monospace, SFMono-Regular, Menlo, "DejaVu Sans Mono", monospace; }
.said, .floor, .side { font-size: 12.5px; fill: var(--soft); }
.chip { font: 11.5px ui-monospace, SFMono-Regular, Menlo, "DejaVu Sans Mono", monospace; fill: var(--soft); }
.box { stroke: var(--line); stroke-width: 1.2; }
"""

TINTS = ((2, "a"), (4, "b"), (6, "c"), (99, "d"))
"""(The highest floor, the colour): what a checkpoint is, bytes, what is read and done, what joins and shows it."""


def drawn(found: list[Room]) -> str:
    """Returns the SVG of these rooms, the topmost floor under the roof."""
    floors = sorted({room.floor for room in found}, reverse=True)
    height = 14 + ROOF + FLOOR * (len(floors) - 1) + 30
    parts = [f'<rect width="{WIDTH}" height="{height}" rx="10" fill="var(--back)"/>']
    for number, floor in enumerate(floors):
        here = [room for room in found if room.floor == floor]
        top = 14 if number == 0 else 14 + ROOF + FLOOR * (number - 1)
        if number == 0:
            parts.append(
                f'<polygon class="box" fill="var(--roof)" points="{LEFT - 26},{top + ROOF} {WIDTH / 2},{top} '
                f'{RIGHT + 26},{top + ROOF}"/>'
            )
        middle = top + ROOF - 34 if number == 0 else top + FLOOR / 2
        parts.append(f'<text class="floor" x="{LEFT - 18}" y="{middle + 4}" text-anchor="end">{floor}</text>')
        width = (RIGHT - LEFT) / len(here)
        for column, room in enumerate(here):
            left = LEFT + column * width
            tint = next(colour for highest, colour in TINTS if floor <= highest)
            if number:
                box = f'x="{left:g}" y="{top:g}" width="{width:g}" height="{FLOOR}"'
                parts.append(f'<rect class="box" {box} fill="var(--{tint})"/>')
            parts += _labels(room, left + width / 2, middle, int(width / 7.5))
    ground = height - 20
    parts.append(f'<path d="M20 {ground}H{WIDTH - 20}" stroke="var(--line)" stroke-width="2.5"/>')
    side, top = RIGHT + 40, 14 + ROOF
    parts.append(
        f'<path d="M{side - 14} {top + 14}V{ground - 8}m-5 -8l5 8l5 -8" fill="none" stroke="var(--line)" '
        f'stroke-width="1.6"/><text class="side" transform="translate({side + 4} {(top + ground) / 2}) rotate(90)" '
        'text-anchor="middle">imports lead down only, and never to a neighbour</text>'
    )
    names = {floor: ", ".join(_names(room) for room in found if room.floor == floor) for floor in floors}
    said = "; ".join(f"floor {floor}: {here}" for floor, here in names.items())
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" role="img">'
    title = f"<title>The house of ckptool</title>\n<desc>From the roof down, {said}.</desc>"
    return "\n".join([head, title, f"<style>{STYLE}</style>", *parts, "</svg>", ""])


def _names(room: Room) -> str:
    return f"{room.shown} ({', '.join(room.inner)})" if room.inner else room.shown


def _labels(room: Room, middle: float, at: float, letters: int) -> list[str]:
    """Returns the name of a room, what it is, and the folders in it, as lines around a height."""
    said = textwrap.wrap(room.caption, letters, max_lines=1 if room.inner else 2, placeholder=" …")
    lines = [("name", room.shown), *(("said", line) for line in said)]
    if room.inner:
        lines.append(("chip", "   ".join(f"{one}/" for one in room.inner)))
    start = at - 9 * (len(lines) - 1) + 4
    return [_text(kind, middle, start + 18 * number, text) for number, (kind, text) in enumerate(lines)]


def _text(kind: str, x: float, y: float, text: str) -> str:
    return f'<text class="{kind}" x="{x:g}" y="{y:g}" text-anchor="middle" xml:space="preserve">{escape(text)}</text>'


def made() -> dict[Path, str]:
    """Returns the picture, by its path."""
    return {PICTURE: drawn(listed())}


if __name__ == "__main__":
    for path, text in made().items():
        path.write_text(text)
