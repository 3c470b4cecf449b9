"""The bundled demo model and the recipe that made it."""
