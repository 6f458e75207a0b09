"""What every part stands on. Nothing here imports more than the standard library."""
