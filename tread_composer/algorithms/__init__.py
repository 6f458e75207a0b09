"""Our Composer algorithms, one folder each."""
