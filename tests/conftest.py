"""What all tests share."""

from hypothesis import settings

# The machines that run this differ in speed: no deadline for a single example.
settings.register_profile("gpurnn", deadline=None)
settings.load_profile("gpurnn")
