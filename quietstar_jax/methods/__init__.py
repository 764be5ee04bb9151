"""Functions that a setting selects by name: rewards, advantages, mixings. Pure functions of arrays."""
