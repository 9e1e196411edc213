"""Reads the code blocks, commands and links of Markdown pages."""

import re
import shlex
import textwrap
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[2]

_FENCE = re.compile(r" *```+(.*)")
_INLINE_CODE = re.compile(r"`([^`]+)`")
_LINK = re.compile(r"\]\(([^)\s]+)\)")
_ASSIGNMENT = re.compile(r"\w+=")
_KEYWORDS = {"do", "done", "else", "fi", "then"}


class Block(NamedTuple):
    """A fenced code block. `line` is the number of its first line in the page."""

    language: str
    line: int
    text: str


class Page:
    """A Markdown page of the project.

    Attributes:
        name: the path from the root of the project.
        prose: the lines of the page, with those of code blocks empty.
        blocks: the fenced code blocks.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.name = path.relative_to(ROOT).as_posix()
        self.prose: list[str] = []
        self.blocks: list[Block] = []
        language: str | None = None
        content: list[str] = []
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
            fence = _FENCE.fullmatch(line)
            self.prose.append("" if fence or language is not None else line)
            if not fence:
                content.append(line)
            elif language is None:
                language, content = fence[1].strip(), []
            else:
                text = textwrap.dedent("\n".join(content))
                self.blocks.append(Block(language, number - len(content), text))
                language = None
        assert language is None, f"{self.name}: a code block has no end"

    def blocks_in(self, *languages: str) -> list[Block]:
        return [block for block in self.blocks if block.language in languages]

    def inline_code(self) -> list[str]:
        """Return the code spans of the prose."""
        return _INLINE_CODE.findall("\n".join(self.prose))

    def links(self) -> list[str]:
        """Return the targets of links and images, without those of other hosts."""
        targets: list[str] = _LINK.findall("\n".join(self.prose))
        return [target for target in targets if not re.match(r"[a-z]+:", target)]

    def headings(self) -> list[str]:
        """Return the anchors of the headings."""
        titles = [line.lstrip("# ") for line in self.prose if line.startswith("#")]
        return [re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles]

    def python_script(self) -> str:
        """Return the Python blocks as one script, in which every line has its number in the page."""
        lines: list[str] = []
        for block in self.blocks_in("python"):
            lines += [""] * (block.line - 1 - len(lines)) + block.text.splitlines()
        return "\n".join(lines)

    def shell_lines(self) -> list[str]:
        """Return what the reader types: the lines after `$ ` in console blocks, and those of shell scripts."""
        lines = []
        for block in self.blocks_in("console", "bash", "sh"):
            text = block.text.replace("\\\n", " ")
            if block.language == "console":
                lines += [line.removeprefix("$ ") for line in text.splitlines() if line.startswith("$ ")]
            else:
                lines += text.splitlines()
        return lines


def find_pages(*patterns: str) -> list[Page]:
    """Return the pages of the project that match the glob patterns, in order."""
    return [Page(path) for pattern in patterns for path in sorted(ROOT.glob(pattern))]


def simple_commands(line: str) -> list[list[str]]:
    """Return the words of each command of a shell line, without variables, redirections and comments."""
    lexer = shlex.shlex(line, posix=True, punctuation_chars=True)
    lexer.whitespace_split = True
    commands: list[list[str]] = [[]]
    after_redirection = False
    for word in lexer:
        if set(word) <= set("();|&"):
            commands.append([])
        elif set(word) <= set("<>&|"):
            after_redirection = True
        elif after_redirection:
            after_redirection = False
        elif commands[-1] or not (word in _KEYWORDS or _ASSIGNMENT.match(word)):
            commands[-1].append(word)
    return [command for command in commands if command]


def cifarx_arguments(command: list[str]) -> list[str] | None:
    """Return the arguments of `cifarx` in a command, such as `cifarx train` or `torchrun -m cifarx train`, or None."""
    if command[0] == "cifarx":
        return command[1:]
    for position, word in enumerate(command[:-1]):
        if (word, command[position + 1]) == ("-m", "cifarx"):
            return command[position + 2 :]
    return None
