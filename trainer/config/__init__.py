"""Configuration: sections and schema, TOML files and options, diagnostics, defaults that depend on the model."""
