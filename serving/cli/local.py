"""`python -m serving.cli.local '{"policies": [...], "reward": ...}' --port N`: models of transformers behind HTTP.

No command of its own: `almost-chat --model` starts it as a child, and it ends with its parent.
"""

from __future__ import annotations

import asyncio
import json
import sys

from almost_eval.cli.command_line import import_transformers
from almost_eval.errors import AlmostError
from serving.launch.process import watch_parent
from serving.local.settings import LocalModels


def main() -> None:
    """Load the models that the first argument names, and serve them."""
    watch_parent(grace_s=3.0)
    models, port = LocalModels(**json.loads(sys.argv[1])), int(sys.argv[3])
    try:
        import_transformers()
        from serving.local.server import LocalServer, serve

        server = LocalServer.load(models)
    except AlmostError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    asyncio.run(serve(server, port))


if __name__ == "__main__":
    main()
