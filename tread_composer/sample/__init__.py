"""Images from a trained model: ``python -m tread_composer sample``. Interruptible, on any number of ranks.

``generate.generate`` does it; ``request`` says what is asked for, ``cli`` in which words.
"""
