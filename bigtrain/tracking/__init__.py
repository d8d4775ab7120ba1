"""Numbers out: the metrics file and the terminal."""
