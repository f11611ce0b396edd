"""A trained run used again: read from its folder, evaluated, or asked for predictions."""
