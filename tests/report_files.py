"""The files of a report, and its page as a browser would see it."""

from __future__ import annotations

from html.parser import HTMLParser
from pathlib import Path

VOID = {"meta", "br", "hr", "img", "input", "link", "path", "use", "rect", "circle", "line"}


def written(folder: Path) -> dict[str, bytes]:
    """Every file of a report, by its path."""
    files = [*folder.glob("report.*"), *folder.glob("*.csv"), *folder.glob("*.parquet"), *folder.glob("figures/*")]
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in sorted(files)}


class Page(HTMLParser):
    """What a browser would see: open tags matched, links and sources collected, text joined."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.sources: list[str] = []
        self.tags: list[str] = []
        self.ids: list[str] = []
        self.text = ""
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.sources += [value for name, value in attrs if name in ("src", "href", "xlink:href", "srcset", "action")]
        self.ids += [value for name, value in attrs if name == "id"]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data
