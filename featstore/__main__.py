"""`python -m featstore` is the command line."""

from featstore_cli import main

main()
