"""Measuring samples, or a trained model, against a reference: ``python -m tread_composer evaluate``."""
