"""Cleaning of documents: what a step is (`step`), which there are (`catalogue`), and the steps themselves."""
