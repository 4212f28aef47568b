"""No serious accessibility violation by axe-core, on any tab, light and dark, on a desktop and a phone."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from browser_fixtures import DESKTOP, PHONE, Server

from serving.chat.scripted import Script, ScriptedEndpoint

AXE = Path(__file__).with_name("axe") / "axe.min.js"
RULES = """async () => {
  const told = await axe.run(document, {resultTypes: ['violations']});
  return told.violations.filter((one) => ['serious', 'critical'].includes(one.impact)).map((one) =>
    `${one.impact} ${one.id}: ${one.nodes.slice(0, 4).map((node) => [node.target.join(' '), node.html.slice(0, 200),
      (node.any[0] || node.all[0] || node.none[0] || {}).message].join(' ')).join('\\n    ')}`);
}"""
MARKDOWN = """Some `code`, $x^2$ and a [link](https://host/).

```python
def f(x: int) -> str:  # a comment
    return f"{x}" + 'y' * 3
```

$$\\sum_i^n x_i$$

| a | b |
|---|---|
| 1 | 2 |

> quoted
"""


SETTLED = """() => document.getAnimations().every((one) =>
  one.playState !== 'running' || one.effect.getComputedTiming().endTime === Infinity)"""
"""No colour is on its way to another: a contrast in between is nobody's choice. A pulse never ends."""


def violations(page: Any) -> list[str]:
    """Each serious or critical one: rule, elements, reason."""
    page.wait_for_function(SETTLED)
    page.evaluate(AXE.read_text(encoding="utf-8"))
    return list(page.evaluate(RULES))


def check(told: dict[str, list[str]]) -> None:
    lines = [f"{where}: {which}" for where, all_of_it in told.items() for which in all_of_it]
    assert not lines, "\n".join(lines)


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("viewport", [DESKTOP, PHONE], ids=["desktop", "phone"])
def test_every_tab_is_accessible(
    nano: Server,
    open_page: Callable[..., Any],
    shot: Callable[..., Path],
    viewport: dict[str, int],
    dark: bool,
    request: pytest.FixtureRequest,
) -> None:
    page = open_page(nano.url, viewport, dark=dark)
    tabs = page.get_by_role("tab").all_inner_texts()
    assert len(tabs) >= 4
    told: dict[str, list[str]] = {}
    for tab in tabs:
        page.get_by_role("tab", name=tab, exact=True).click()
        page.wait_for_timeout(400)
        told[f"{tab}, empty"] = violations(page)
        shot(page, f"axe-{tab.lower().replace(' ', '-')}-{request.node.callspec.id}")
    check(told)


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_a_conversation_is_accessible(
    chat_server: Callable[..., Any], open_page: Callable[..., Any], shot: Callable[..., Path], dark: bool
) -> None:
    with ExitStack() as stack:
        endpoint = stack.enter_context(ScriptedEndpoint(Script((MARKDOWN, "short")), rewards=len))
        server = stack.enter_context(chat_server("--base-url", f"one={endpoint.url}"))
        page = open_page(server.url, dark=dark)
        page.fill("#message textarea", "Show me")
        page.press("#message textarea", "Enter")
        page.wait_for_selector("#past .turn.model .token.keyword")
        page.wait_for_selector("#past .katex")
        told = {"answered": violations(page)}
        page.locator("#past").get_by_role("button", name="Edit").click()
        page.wait_for_selector("#cancel-edit")
        told["editing"] = violations(page)
        shot(page, f"axe-conversation-{'dark' if dark else 'light'}")
        page.click("#cancel-edit")
        page.click("#clear")
        page.wait_for_selector("#restore")
        told["cleared"] = violations(page)
    check(told)
