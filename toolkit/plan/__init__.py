"""SuperScaler: plan how a model is trained over many devices."""
