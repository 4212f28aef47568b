"""`python -m serving.cli`: `almost-serve`, where its script is not on the path."""

from serving.cli.main import serve

serve()
