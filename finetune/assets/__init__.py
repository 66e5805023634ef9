"""Files shipped inside the package: the embedded base model."""
