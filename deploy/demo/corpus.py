"""Assembles the training text of the demo model from documentation on this machine.

Two sources are read, both under the PSF licence: the HTML pages of the Python documentation (the
Debian package python3.11-doc, or any directory given with ``--docs``) and the docstrings of the
standard library of the running interpreter.  Optional packages add their docstrings.  Only
paragraphs of prose are kept.  Nothing is imported from the packages read, and nothing is fetched.
"""

from __future__ import annotations

import ast
import hashlib
import importlib.util
import re
import sysconfig
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from html.parser import HTMLParser
from pathlib import Path

SKIPPED_PAGES = (
    "genindex", "py-modindex", "search", "contents", "download", "license", "copyright",
    "whatsnew", "about", "bugs",
)  # fmt: skip
SKIPPED_TAGS = frozenset({"pre", "table", "script", "style", "svg", "nav", "sup", "form"})
SKIPPED_DIRECTORIES = frozenset(
    {"test", "tests", "testing", "idle_test", "site-packages", "__pycache__", "lib2to3"}
)
SKIPPED_OPENINGS = (
    "new in version", "changed in version", "deprecated since", "availability", "source code:",
    "raises an auditing event", "this is an alias", "see also", "copyright", "licensed",
)  # fmt: skip
ASCII = str.maketrans(
    {
        "\u2018": "'", "\u2019": "'", "\u201c": '"', "\u201d": '"', "\u2013": "-", "\u2014": "-",
        "\u2026": "...", "\u00a0": " ", "\u00b6": "",
    }
)  # fmt: skip


@dataclass(frozen=True)
class Entry:
    """A named thing and the paragraphs that describe it: a function, a term, a section."""

    kind: str
    name: str
    paragraphs: tuple[str, ...]


@dataclass
class Document:
    """One page or one module: its text, and the entries from which questions are made."""

    origin: str
    lines: list[str] = field(default_factory=list)
    entries: list[Entry] = field(default_factory=list)

    @property
    def text(self) -> str:
        return "\n".join(self.lines)


def clean(text: str) -> str:
    """One line of plain text: straight quotes, no contribution credits, single spaces."""
    text = re.sub(r"\s+", " ", text.translate(ASCII)).strip()
    text = re.sub(r"\s*\((?:Contributed|Suggested|Patch|Written|Implemented)\b[^()]*\)", "", text)
    text = re.sub(r"\s*\(?\bbpo-\d+\)?", "", text)
    text = re.sub(r"\s+([.,;:!?])(?=\s|$)", r"\1", text)
    # A last sentence that ends in a colon introduces code or a list, which is not there.
    return re.sub(r"(?:^|(?<=[.!?]) )(?:(?![.!?] ).)*:$", "", text)


def is_prose(text: str) -> bool:
    """Whether a paragraph reads as sentences rather than as code, a list or a heading."""
    words = re.findall(r"[A-Za-z]+", text)
    if len(words) < 5 or text[-1] not in ".:!?)" or not (text[0].isupper() or text[0] in "\"'("):
        return False
    if text.lower().startswith(SKIPPED_OPENINGS) or not text.isascii():
        return False
    plain = sum(c.isalpha() or c in " ,.'" for c in text)
    joined = len(re.findall(r"[_=<>{}\[\]\\|/@#$^~]", text))
    return plain / len(text) > 0.9 and joined / len(words) < 0.12 and ">>>" not in text


class Page(HTMLParser):
    """Reads the body of one page of the documentation into a :class:`Document`."""

    def __init__(self, origin: str) -> None:
        super().__init__()
        self.document = Document(origin)
        self._body = False
        self._skip = 0
        self._buffer: list[str] | None = None
        self._lists: list[str] = []  # the class of every open <dl>
        self._heads: list[tuple[str, list[str], list[str]]] = []  # kind, names, paragraphs
        self._section: tuple[str, list[str]] | None = None

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        attributes = dict(attrs)
        classes = attributes.get("class") or ""
        if tag == "div" and classes in ("body", "sphinxsidebar"):
            self._body = classes == "body"
        if not self._body:
            return
        if tag in SKIPPED_TAGS:
            self._skip += 1
        elif tag == "dl":
            self._lists.append(classes)
            self._heads.append((classes, [], []))
        elif tag == "dt" and self._heads and self._heads[-1][2]:
            self._close_entry()
            self._heads.append((self._lists[-1], [], []))
        if tag in ("p", "dt", "h1", "h2", "h3", "h4"):
            self._buffer = []

    def handle_endtag(self, tag: str) -> None:
        if not self._body:
            return
        if tag in SKIPPED_TAGS:
            self._skip = max(0, self._skip - 1)
        elif tag == "dl" and self._lists:
            self._close_entry()
            self._lists.pop()
        elif tag in ("p", "dt", "h1", "h2", "h3", "h4") and self._buffer is not None:
            text, self._buffer = clean("".join(self._buffer)), None
            if text:
                self._block(tag, text)

    def handle_data(self, data: str) -> None:
        if self._buffer is not None and not self._skip:
            self._buffer.append(data)

    def _block(self, tag: str, text: str) -> None:
        if tag == "dt":
            if self._heads:
                self._heads[-1][1].append(text)
        elif tag == "p":
            if is_prose(text):
                self.document.lines.append(text)
                if self._heads:
                    self._heads[-1][2].append(text)
                elif self._section is not None:
                    self._section[1].append(text)
        else:
            self.close_section()
            title = re.sub(r"^[\d.]+\s+|^PEP \d+:\s+", "", text)
            self._section = (title, [])
            self.document.lines.append(title)

    def _close_entry(self) -> None:
        kind, names, paragraphs = self._heads.pop()
        for name in names[:1]:
            if paragraphs:
                self.document.entries.append(Entry(kind, name, tuple(paragraphs)))

    def close_section(self) -> None:
        if self._section is not None and self._section[1]:
            title, paragraphs = self._section
            self.document.entries.append(Entry("section", title, tuple(paragraphs)))
        self._section = None


def read_pages(root: Path) -> Iterator[Document]:
    """The pages below ``root`` in the order of their names, without indexes and change logs."""
    for path in sorted(root.rglob("*.html")):
        name = path.relative_to(root).as_posix()
        if name.startswith(SKIPPED_PAGES):
            continue
        page = Page(name)
        page.feed(path.read_text(encoding="utf-8", errors="replace"))
        page.close_section()
        yield page.document


def paragraphs_of(docstring: str) -> Iterator[str]:
    """The paragraphs of a docstring that are prose; indented blocks and field lists are not."""
    lines = docstring.expandtabs().splitlines()
    margin = min((len(x) - len(x.lstrip()) for x in lines[1:] if x.strip()), default=0)
    dedented = [lines[0].strip(), *(x[margin:].rstrip() for x in lines[1:])] if lines else []
    for block in re.split(r"\n\s*\n", "\n".join(dedented)):
        if re.search(r"^\s|^[-*=+.:@>]|[-=~]{3}|``\w*[^`\w]+``| -- ", block, re.MULTILINE):
            continue
        text = clean(re.sub(r":\w+:(?=`)|[`*]|(?<=\w)_(?=[\s.,])", "", block))
        if text and is_prose(text):
            yield text


def read_docstrings(root: Path) -> Iterator[Document]:
    """One document per module below ``root``: its docstrings in the order of the source."""
    for path in sorted(root.rglob("*.py")):
        if SKIPPED_DIRECTORIES.intersection(path.relative_to(root).parts):
            continue
        try:
            tree = ast.parse(path.read_text(encoding="utf-8"))
        except (SyntaxError, UnicodeDecodeError, ValueError):
            continue
        document = Document(path.relative_to(root.parent).as_posix())
        for node in ast.walk(tree):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                paragraphs = list(paragraphs_of(ast.get_docstring(node, clean=False) or ""))
                document.lines.extend(paragraphs)
                name = path.stem if isinstance(node, ast.Module) else node.name
                if paragraphs and not name.startswith("_"):
                    kind = "module" if isinstance(node, ast.Module) else "docstring"
                    document.entries.append(Entry(kind, name, tuple(paragraphs)))
        yield document


def without_repeats(documents: Iterable[Document]) -> Iterator[Document]:
    """Drops every paragraph seen before, and documents with almost nothing left."""
    seen: set[str] = set()
    for document in documents:
        fresh = []
        for line in document.lines:
            key = line.lower()
            if key not in seen or len(key) < 40:
                fresh.append(line)
            seen.add(key)
        document.lines = fresh
        if len(document.text) > 200:
            yield document


def assemble(docs: Path | None, packages: Iterable[str]) -> list[Document]:
    """All documents: the pages if found, the standard library, and the packages named."""
    sources: list[Iterator[Document]] = []
    if docs is not None:
        sources.append(read_pages(docs))
    sources.append(read_docstrings(Path(sysconfig.get_path("stdlib"))))
    for package in packages:
        spec = importlib.util.find_spec(package)
        if spec is None or spec.origin is None:
            raise SystemExit(f"package {package} is not installed")
        sources.append(read_docstrings(Path(spec.origin).parent))
    return list(without_repeats(document for source in sources for document in source))


def digest(texts: Iterable[str]) -> str:
    """The sha256 of the texts, each ended by a zero byte."""
    state = hashlib.sha256()
    for text in texts:
        state.update(text.encode() + b"\0")
    return state.hexdigest()


def vocabulary(texts: Iterable[str]) -> list[str]:
    """The distinct words of the texts in lower case, sorted."""
    words: set[str] = set()
    for text in texts:
        words.update(re.findall(r"[a-z]+", text.lower()))
    return sorted(words)
