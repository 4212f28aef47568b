"""`python -m almost_eval.cli`: the command line, where its script is not on the path."""

from almost_eval.cli.main import main

main()
