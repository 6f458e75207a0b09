"""Two or more runs held against each other: at equal steps, FLOPs and time, and at equal quality."""
