"""Experiments as data: ``get_config(argument)`` returns an ml_collections ConfigDict."""
