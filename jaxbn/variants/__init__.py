"""Variations of one step of batch normalization: a module for each."""
