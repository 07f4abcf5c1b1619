"""Where a study is kept: `storage.py` opens it, in SQLite or PostgreSQL; crashes lose nothing."""
