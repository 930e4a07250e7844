"""Accuracy and speed at matched read budgets."""
