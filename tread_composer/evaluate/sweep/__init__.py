"""Sampling settings swept over (guidance, interval, weights): ``python -m tread_composer sweep``."""
