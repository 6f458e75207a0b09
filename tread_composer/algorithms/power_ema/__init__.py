"""Averages of the weights from which one of another length can be made after training, as a Composer algorithm."""

from tread_composer.algorithms.power_ema.power_ema import PowerEMA

__all__ = ['PowerEMA']
