"""Pages as a browser has them: their tags and their text."""

from html.parser import HTMLParser

HOSTILE = "<script>alert(1)</script>&\"'{{ 7*7 }}</svg>"


class Outline(HTMLParser):
    """The tags and the text of a page; fails on tags that are closed in another order than they were opened."""

    def __init__(self, page: str):
        super().__init__()
        self.tags, self.open, self.links, self.text = set(), [], [], ""
        self.feed(page)
        assert not set(self.open) & {"div", "table", "tr", "td", "details", "svg", "span", "main"}, self.open

    def handle_starttag(self, tag, attributes):
        self.tags.add(tag)
        self.links += [value for name, value in attributes if name in ("src", "href", "xlink:href", "action")]
        if tag not in ("meta", "br", "path", "use"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.tags.add(tag)
        self.links += [value for name, value in attributes if name in ("src", "href", "xlink:href")]

    def handle_endtag(self, tag):
        if tag in ("path", "use", "html"):
            return
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data
