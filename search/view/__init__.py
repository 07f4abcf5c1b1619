"""A search while it runs, and tables of it: terminal, dashboard, logs. The page is in report/."""
