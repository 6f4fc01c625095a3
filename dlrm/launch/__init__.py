"""How a training is started on other machines."""
