"""Reads HTML as a strict browser would: every element closed in turn, and nothing fetched from elsewhere."""

from __future__ import annotations

from html.parser import HTMLParser

__all__ = ["Page", "read"]

_WITHOUT_END = {"br", "hr", "img", "meta", "input", "link"}
_FETCHES = {"src", "srcset", "data", "poster", "action"}


class Page(HTMLParser):
    """What a page holds: its elements with their attributes, and its text by element."""

    def __init__(self):
        super().__init__(convert_charrefs=True)
        self.open, self.elements, self.texts = [], [], []

    def handle_starttag(self, tag, attributes):
        found = dict(attributes)
        assert len(found) == len(attributes), f"<{tag}> says an attribute twice"
        for key, value in found.items():
            assert not key.startswith("on"), f"<{tag} {key}> runs a script"
            if key in _FETCHES or (key == "href" and tag in ("link", "use", "image")):
                assert value.startswith(("data:", "#")), f"<{tag} {key}={value!r}> is fetched"
        assert tag not in ("script", "iframe", "object"), tag
        self.elements.append((tag, found))
        if tag not in _WITHOUT_END:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.handle_starttag(tag, attributes)
        if tag not in _WITHOUT_END:
            self.handle_endtag(tag)

    def handle_endtag(self, tag):
        assert self.open and self.open[-1] == tag, f"</{tag}> inside of {self.open}"
        self.open.pop()

    def handle_data(self, data):
        self.texts.append((self.open[-1] if self.open else "", data))
        if self.open and self.open[-1] == "style":
            assert "url(" not in data and "@import" not in data

    def text(self):
        return " ".join(data for tag, data in self.texts if tag != "style")

    def count(self, tag):
        return sum(name == tag for name, _ in self.elements)


def read(text):
    """The page, or a failed assertion that says what is wrong with it."""
    page = Page()
    page.feed(text)
    page.close()
    assert not page.open, f"never closed: {page.open}"
    return page
