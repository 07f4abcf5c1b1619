"""Which question is asked: one file per study, each with a `study = Study(...)`. Never imports `search`."""
