"""Recipes, MNTP adaptation and the training of retrievers."""
