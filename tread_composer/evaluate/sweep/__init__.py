"""Sampling settings swept over: guidance scale, interval, rates, weights. ``python -m tread_composer sweep``.

``rows`` keeps what is measured and marks the best, ``drawn`` measures a trained model, ``cli`` has the words.
"""
