"""Training recipes, one YAML file each; packaged so that they are found after an installation."""
