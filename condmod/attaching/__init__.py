"""Modulators on a model that stays as it is: plan, attach, save, fold."""
