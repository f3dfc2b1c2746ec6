"""Pipeline: everything in order, from a recipe to a report."""
