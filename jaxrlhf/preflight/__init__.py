"""What a recipe would run into, on the user's own model, data and functions, before any long run."""
