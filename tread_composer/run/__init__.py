"""A run from its configuration: training, the plan of it, what it trains on."""
