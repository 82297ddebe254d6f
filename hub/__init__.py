"""The template of the model cards; packaged so that it is found after an installation."""
