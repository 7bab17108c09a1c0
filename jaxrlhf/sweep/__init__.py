"""Seeds and arms of one recipe, and what they say together."""
