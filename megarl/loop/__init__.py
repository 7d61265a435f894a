"""One short file per kind of run."""
