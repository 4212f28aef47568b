"""What gradio's own page brings for its Markdown, which ours uses too: KaTeX for maths, Prism for code. No network.

gradio gives these files no stable names, so they are looked for. Where one is missing, after an update of gradio, a
formula is shown as its source and code without colours.
"""

from __future__ import annotations

import json
import re
from importlib.util import find_spec
from pathlib import Path

_FILE = re.compile(r"(katex|prism|prism-[a-z-]+)-[\w-]{8}\.(js|css)")
_FOLDER = Path("templates", "frontend", "assets")


def parts_of(folder: Path) -> dict[str, str]:
    """Files for code and maths: `katex.js`, `katex.css`, `prism.js`, `prism-python.js`, ... -> the name in `folder`."""
    names = sorted(file.name for file in folder.glob("*")) if folder.is_dir() else []
    matches = ((name, _FILE.fullmatch(name)) for name in names)
    return {f"{match[1]}.{match[2]}": name for name, match in matches if match}


def parts_script() -> str:
    """JavaScript that tells `assets/rich.js` where they are."""
    spec = find_spec("gradio")
    assert spec is not None
    assert spec.origin is not None  # a regular package: it is installed, as `almost-chat` has checked
    return f"window.almostParts = {json.dumps(parts_of(Path(spec.origin).parent / _FOLDER))};"
