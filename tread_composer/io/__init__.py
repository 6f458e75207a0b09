"""Files, locks, ranks, progress, devices, pages: what every command needs of the machine."""
