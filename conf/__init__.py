"""The configuration: Hydra reads it as `pkg://conf`, in a checkout and in the installed wheel alike."""
