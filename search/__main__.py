"""`python -m search` is `fmnist-search`."""

from search.cli import main

main()
