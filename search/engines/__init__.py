"""Where workers run: one file each. An engine has `start(device, slot) -> Worker`."""
