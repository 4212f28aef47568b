"""`python -m almost_train.cli`: the command line, where its script is not on the path."""

from almost_train.cli.main import main

main()
