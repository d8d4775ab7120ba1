"""Starting runs: on this machine, later on clusters. Nothing here imports torch."""
