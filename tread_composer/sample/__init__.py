"""Images from a trained model: ``python -m tread_composer sample``. Interruptible, on any number of ranks."""
