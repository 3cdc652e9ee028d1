"""Many adapters on one base: `registry` keeps them by name and version, `diff` says how two of them differ."""
