"""A package of somebody else: parts for runs of ``tread_composer``, of which it imports the types of a number alone."""
