"""`python -m bigtrain` is the `bigtrain` command."""

from bigtrain.cli import main

main()
