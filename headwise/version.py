"""The version of headwise, also where it runs from a folder that is not installed."""

__version__ = "0.1.0"
