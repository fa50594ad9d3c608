"""What each command does: parsed arguments in, an exit code or None out. Heavy imports come inside."""
