"""Workers, and what is said to them. Where they run: an engine, which has
`start(device, slot) -> Worker`, in a file each (local.py, ray.py)."""
