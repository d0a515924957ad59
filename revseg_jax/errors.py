"""The two ways a command ends badly. `revseg_jax.cli` prints the message as one line and sets the exit code."""


class InputError(ValueError):
    """The user's input, configuration or file is wrong (exit code 2). The message says what, where and what to do."""


class RunFailure(RuntimeError):
    """Something outside the user's input failed: a full disk, a sidecar that went away (exit code 1)."""
