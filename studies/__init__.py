"""Which question is asked: one file per study. Never imports `search`."""
