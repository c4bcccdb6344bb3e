"""The scenarios that come with twinsim: one YAML file a question, found by `importlib.resources`."""
