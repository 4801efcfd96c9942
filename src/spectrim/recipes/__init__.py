"""Recipes that come with spectrim, one YAML file each; read by recipe.py."""
