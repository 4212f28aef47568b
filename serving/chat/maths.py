"""Maths in Markdown, as rules of markdown-it: `$x$`, `\\(x\\)`, `$$x$$` and `\\[x\\]`.

The source stays text in a `code` element, which the page's script (`assets/rich.js`) hands to KaTeX; without the script
it is read as it was written. `$` follows pandoc: no space inside the dollars, no digit after the second one, so that
"from $5 to $10" stays what it is.
"""

from __future__ import annotations

import re
from html import escape
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    from markdown_it import MarkdownIt
    from markdown_it.renderer import RendererHTML
    from markdown_it.rules_block import StateBlock
    from markdown_it.rules_inline import StateInline
    from markdown_it.token import Token
    from markdown_it.utils import EnvType, OptionsDict

MAX_CHARACTERS = 4_000
"""Of a formula on lines of its own; a longer one is text. One within a line has at most a quarter of it, since every
opening delimiter is searched for its end: an answer of 100,000 of them must not hold the server up."""
_FENCES = {"$$": "$$", "\\[": "\\]"}
_INLINE = (
    (re.compile(r"\$\$(?P<source>[^`]{1,1000}?)\$\$", re.DOTALL), True),
    (re.compile(r"\\\[(?P<source>[^`]{1,1000}?)\\\]", re.DOTALL), True),
    (re.compile(r"\\\((?P<source>[^`]{1,1000}?)\\\)", re.DOTALL), False),
    # No backtick, so that code comes first; a backslash takes the character after it along.
    (re.compile(r"\$(?=[^\s$])(?P<source>(?:\\.|[^\\$`]){0,999}?(?:\\.|[^\\$`\s]))\$(?!\d)", re.DOTALL), False),
)


def with_maths(parser: MarkdownIt) -> MarkdownIt:
    """The parser, which knows formulas now."""
    parser.inline.ruler.before("escape", "maths", _inline)
    parser.block.ruler.before("fence", "maths", _block, {"alt": ["paragraph", "reference", "blockquote", "list"]})
    parser.add_render_rule("maths", _render)
    return parser


def _inline(state: StateInline, silent: bool) -> bool:
    if state.src[state.pos] not in "$\\":
        return False
    for pattern, display in _INLINE:
        match = pattern.match(state.src, state.pos, min(state.posMax, state.pos + MAX_CHARACTERS // 4 + 4))
        if match and match["source"].strip():
            if not silent:
                token = state.push("maths", "code", 0)
                token.content, token.meta = match["source"].strip(), {"display": display}
            state.pos = match.end()
            return True
    return False


def _block(state: StateBlock, start: int, end: int, silent: bool) -> bool:
    """A formula whose delimiters begin and end lines: its lines are no lists, headings or paragraphs."""
    first = state.src[state.bMarks[start] + state.tShift[start] : state.eMarks[start]].rstrip()
    closing = _FENCES.get(first[:2])
    if closing is None or state.is_code_block(start):
        return False
    lines, length = [first[2:]], 0
    for number in range(start, end):
        if number > start:
            lines.append(state.getLines(number, number + 1, state.blkIndent, False).rstrip())
        length += len(lines[-1])
        if length > MAX_CHARACTERS:
            return False
        if lines[-1].endswith(closing):
            break
        if closing in lines[-1]:  # text goes on after it: a formula within a paragraph
            return False
    else:
        return False
    source = "\n".join(lines)[: -len(closing)].strip()
    if not source or closing in source:
        return False
    if not silent:
        token = state.push("maths", "code", 0)
        token.block, token.content, token.meta = True, source, {"display": True}
        token.map = [start, number + 1]
        state.line = number + 1
    return True


def _render(self: RendererHTML, tokens: Sequence[Token], index: int, options: OptionsDict, env: EnvType) -> str:
    token = tokens[index]
    kind = "maths display" if token.meta["display"] else "maths"
    html = f'<code class="{kind}">{escape(token.content)}</code>'
    return f"<p>{html}</p>\n" if token.block else html
