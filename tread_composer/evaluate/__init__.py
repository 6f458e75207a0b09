"""Measuring samples, or a trained model, against a reference: ``python -m tread_composer evaluate``.

``measuring`` does it, ``samples`` knows what images say of themselves, ``publish`` writes, ``cli`` has the words.
"""
