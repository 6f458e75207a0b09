"""Sampling settings swept over (guidance, interval, rates, weights): ``python -m tread_composer sweep``."""
