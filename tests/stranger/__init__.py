"""A package of somebody else: parts for runs of ``tread_composer``, of which it imports nothing."""
