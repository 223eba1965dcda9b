"""How tasks and conversations are weighed against each other."""
