"""The error of everything a user can fix by changing a configuration, an option or a file."""


class ConfigError(ValueError):
    """A configuration that cannot run. The message states the value, the rule and the fix."""
