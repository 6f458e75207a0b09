"""Exponential moving average of the weights as a Composer algorithm."""

from tread_composer.algorithms.ema.ema import EMA

__all__ = ['EMA']
