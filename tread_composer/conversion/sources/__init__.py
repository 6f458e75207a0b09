"""Images with their labels from every layout in which people have them, each read at random."""
