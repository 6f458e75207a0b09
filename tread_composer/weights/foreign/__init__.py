"""Weights of other projects, brought into the form and the conventions of this one; nowhere else are they converted."""
