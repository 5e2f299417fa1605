"""The commands of `robench`, a file for each kind; `robench.benchmark.cli` puts them together."""
