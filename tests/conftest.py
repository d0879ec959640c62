"""What all tests share."""

import signal

from hypothesis import settings

# The machines that run this differ in speed: no deadline for a single example.
settings.register_profile("gpurnn", deadline=None)
settings.load_profile("gpurnn")

# A job in the background starts with Ctrl-C ignored, and so would every process it starts.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
